// Operations that run, and what happened, newest first.

import { byId, element, setText } from "./dom.js";
import { clock, duration } from "./format.js";

const SIGNS = { fault: "▲", recovery: "✓", link: "▲", operation: "◆", placement: "⇄", weights: "⇄", member: "•" };
// Many of these follow each other: only the last is shown, with how many there were.
const GROUPED = new Set(["placement", "link"]);
// These are routine: of all only the last is shown.
const ROUTINE = new Set(["weights"]);

export function showTimeline(fleet) {
  showRunning(fleet);
  showAutoscaler(fleet.status?.autoscaler);
  const groups = grouped(fleet.timeline);
  const list = byId("events");
  const shown = groups.map(({ event, number }) => `${event.id}x${number}`).join();
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(...groups.map(row));
  if (!groups.length) list.append(element("li", "muted", "Nothing has happened yet."));
}

function showRunning({ operations, now }) {
  const running = operations.filter((operation) => !operation.ended_s);
  byId("running").replaceChildren(
    ...running.map((operation) => {
      const text = `${operation.request}: ${operation.phase}${operation.progress ? `, ${operation.progress}` : ""}`;
      const since = duration(Math.max(0, now.time_s - operation.started_s));
      return entry("operation", since, text);
    }),
  );
}

/** Its last words. */
function showAutoscaler(decision) {
  const words = decision ? [...decision.reasons, decision.problem && `cannot be had: ${decision.problem}`] : [];
  setText(byId("autoscaler"), words.length ? `Autoscaler: ${words.filter(Boolean).join("; ")}` : "");
}

function grouped(events) {
  const groups = [];
  for (const event of events) {
    const of = ({ event: { kind } }) => kind === event.kind;
    const last = ROUTINE.has(event.kind) ? groups.find(of) : groups.slice(-1).find(of);
    if (last && (ROUTINE.has(event.kind) || GROUPED.has(event.kind))) last.number += 1;
    else groups.push({ event, number: 1 });
  }
  return groups;
}

function row({ event, number }) {
  const made = entry(event.kind, clock(event.time_s), event.text);
  if (number > 1) made.append(element("span", "times", `${number} ×`));
  return made;
}

function entry(kind, time, text) {
  const sign = element("span", "sign", SIGNS[kind] ?? "•");
  sign.setAttribute("aria-hidden", "true");
  const made = element("li", "event", element("time", "", time), sign, element("span", "text", text));
  made.dataset.kind = kind;
  return made;
}
