// What is said of one expert below the heat map; without one, which are the hottest.

import { byId, element, setText } from "./dom.js";
import { count, percent } from "./format.js";
import { WINDOW_S } from "./fleet.js";

const NUM_HOTTEST = 6;

/** Show a cell {row, expert} of a fleet, or the hottest experts, each a button that calls onChoose. */
export function showDetail(fleet, cell, onChoose) {
  const target = byId("detail");
  if (!cell) {
    showHottest(target, fleet, onChoose);
    return;
  }
  const where = fleet.replicas(cell.row, cell.expert);
  const replicas = element("span", "chips");
  for (const { shard, share } of where) {
    const part = element("span", "chip", element("b", "", shard), ` ${percent(share)}`);
    part.title = "part of this expert’s tokens by dispatch weight";
    replicas.append(part);
  }
  if (!where.length) replicas.append(element("span", "muted", "on no shard"));
  target.replaceChildren(element("b", "", name(fleet, cell)), element("span", "", words(fleet, cell)), replicas);
}

/** Say a cell to those who hear the page. */
export function speak(fleet, cell) {
  if (!cell) return;
  const where = fleet.replicas(cell.row, cell.expert).map(({ shard, share }) => `${shard} ${percent(share)}`);
  setText(byId("spoken"), `${name(fleet, cell)}: ${words(fleet, cell)}; on ${where.join(", ") || "no shard"}`);
}

const name = (fleet, { row, expert }) => `Layer ${fleet.layers[row]}, expert ${expert}`;

function words(fleet, { row, expert }) {
  const share = fleet.share(row, expert);
  if (share === null) return "no tokens in this layer now";
  const tokens = fleet.tokens[row * fleet.numExperts + expert];
  const even = (share * fleet.numExperts).toFixed(2);
  return `${percent(share)} of its layer, ${even} × the even share, ${count(tokens)} tokens in ${WINDOW_S} s`;
}

function showHottest(target, fleet, onChoose) {
  const found = fleet.hottest(NUM_HOTTEST);
  if (!found.length) {
    target.replaceChildren(element("span", "muted", "No tokens in the last seconds."));
    return;
  }
  // Kept, so that a button that has the focus keeps it.
  const buttons = [...target.querySelectorAll("button")];
  if (buttons.length !== found.length) {
    buttons.length = 0;
    found.forEach(() => buttons.push(element("button", "chip")));
    target.replaceChildren(element("span", "muted", "Hottest"), ...buttons);
  }
  found.forEach((each, index) => {
    setText(buttons[index], `L${each.layer} E${each.expert} ${percent(each.share)}`);
    buttons[index].onclick = () => onChoose({ row: each.row, expert: each.expert });
  });
}
