// The figures at the top, and whether it serves.

import { byId, element, setText } from "./dom.js";
import { clock, count, duration, plural, rate, ratio } from "./format.js";
import { drawSpark } from "./sparkline.js";

const SPAN_S = 300;
const LEAST_SPAN_S = 60;

export function showFigures(fleet) {
  const { now, status, history } = fleet;
  const since = (now.time_s ?? 0) - (history[0]?.time_s ?? 0);
  const span = Math.min(SPAN_S, Math.max(LEAST_SPAN_S, since));
  setText(byId("tokens-value"), rate(now.generated_per_s));
  const peak = Math.max(0, ...history.map((look) => look.generated_per_s ?? 0));
  setText(byId("tokens-note"), `prompts ${rate(now.prompt_per_s)}/s · highest ${rate(peak)}`);
  drawSpark(byId("tokens-spark"), history, ["generated_per_s"], span);
  setText(byId("gap-value"), `${duration(now.gap_p50_s)}`);
  setText(byId("gap-note"), `median · 99 % within ${duration(now.gap_p99_s)}`);
  drawSpark(byId("gap-spark"), history, ["gap_p99_s", "gap_p50_s"], span);
  setText(byId("first-value"), duration(now.first_token_p50_s));
  setText(byId("requests-value"), count(now.live_requests));
  if (!status) return;
  const sum = (field) => status.workers.reduce((all, worker) => all + (worker[field] ?? 0), 0);
  setText(byId("requests-note"), `${count(sum("running"))} running · ${count(sum("waiting"))} waiting`);
  setText(byId("balance-value"), ratio(status.recent_balancedness));
  setText(byId("balance-note"), `${ratio(status.balancedness)} over 5 min`);
  setText(byId("epoch-value"), `epoch ${status.epoch}`);
  setText(byId("epoch-note"), replicaWords(fleet));
}

function replicaWords({ placement, base }) {
  if (!placement || base === undefined) return "";
  const more = placement.replicas.flat().reduce((all, shards) => all + shards.length - base, 0);
  return `${plural(base, "replica")} · ${count(more)} extra`;
}

export function showModel({ model }) {
  if (!model) return;
  const experts = `${model.moe_layers.length} layers of ${model.num_experts} experts, top ${model.top_k}`;
  const slices = model.expert_tp > 1 ? ` in ${model.expert_tp} slices` : "";
  setText(byId("model"), `${model.name} · ${experts}${slices} · ${model.dtype}`);
}

/** Say whether it serves. link is "open", "lost", "refused" or "connecting". */
export function showHealth(fleet, link, why) {
  const [level, text] = health(fleet, link);
  const target = byId("health");
  target.dataset.level = level;
  setText(byId("health-text"), text);
  document.title = `${text} · ExpertMesh`;
  document.body.dataset.stale = String(link !== "open" || Boolean(fleet.away));
  const notices = [];
  if (link === "refused") notices.push(`${why} Give an API key with the admin role (button above).`);
  if (link === "lost") notices.push(`The gateway does not answer (${why}); trying again. What is shown is old.`);
  if (link === "open" && fleet.away) {
    const since = clock(fleet.awaySince);
    notices.push(`The controller has been away since ${since} (${fleet.away}). Tokens go on; figures of the fleet are old.`);
  }
  showLines(byId("notices"), notices);
  showLines(byId("warnings"), fleet.status?.warnings ?? []);
}

function showLines(list, lines) {
  if (list.dataset.shown === lines.join("\n")) return;
  list.dataset.shown = lines.join("\n");
  list.replaceChildren(...lines.map((line) => element("p", "", line)));
}

function health({ now, status, away }, link) {
  if (link === "refused") return ["warn", "API key needed"];
  if (link === "lost") return ["bad", "No connection"];
  if (link === "connecting" || now.time_s === undefined) return ["unknown", "Connecting"];
  if (!now.is_serving) return ["bad", `Not serving${status?.not_ready_reason ? `: ${status.not_ready_reason}` : ""}`];
  if (away) return ["warn", "Serving, controller away"];
  const members = [...(status?.shards ?? []), ...(status?.workers ?? [])];
  const missing = members.filter((member) => member.state !== "ready").length;
  if (missing) return ["warn", `Serving, ${plural(missing, "member")} not ready`];
  return ["good", "Serving"];
}
