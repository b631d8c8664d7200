// The live page: messages come in, each part draws what it shows.

import { Connection, key } from "./connection.js";
import { showDetail, speak } from "./detail.js";
import { byId } from "./dom.js";
import { showFigures, showHealth, showModel } from "./figures.js";
import { Fleet } from "./fleet.js";
import { HeatMap } from "./heatmap.js";
import { showShards, showWorkers } from "./members.js";
import { Prompt } from "./prompt.js";
import { showTimeline } from "./timeline.js";

const fleet = new Fleet();
const link = { state: "connecting", why: "" };
let selected = null;

const heatMap = new HeatMap(fleet, (cell, isByKey) => {
  selected = cell;
  detail();
  if (isByKey) speak(fleet, cell);
});
const prompt = new Prompt(fleet, () => openKeyDialog());
const connection = new Connection(
  (name, message) => {
    fleet.apply(name, message);
    draw();
  },
  (state, why) => {
    Object.assign(link, { state, why });
    showHealth(fleet, state, why);
    if (state === "refused") openKeyDialog();
  },
);

function draw() {
  showHealth(fleet, link.state, link.why);
  showModel(fleet);
  showFigures(fleet);
  showShards(fleet);
  showWorkers(fleet);
  showTimeline(fleet);
  prompt.show();
  heatMap.draw();
  detail();
}

function detail() {
  showDetail(fleet, selected, (cell) => heatMap.choose(cell));
}

function openKeyDialog() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key").value = key.get();
  dialog.showModal();
}

byId("key-open").addEventListener("click", openKeyDialog);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-forget").addEventListener("click", () => useKey(""));
byId("key-form").addEventListener("submit", () => useKey(byId("key").value.trim()));

function useKey(value) {
  key.set(value);
  byId("key-dialog").close();
  connection.restart();
}

connection.run();
