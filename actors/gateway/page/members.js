// Shards and workers as cards.

import { bar, byId, element, keyed, setText } from "./dom.js";
import { bytes, count, percent, rate } from "./format.js";

export function showShards(fleet) {
  const shards = fleet.status?.shards ?? [];
  keyed(byId("shard-cards"), shards.map((shard) => ({ ...shard, fleet })), makeShard);
  setText(byId("shards-note"), note(shards, fleet.status?.autoscaler, "shards"));
}

export function showWorkers(fleet) {
  const workers = fleet.status?.workers ?? [];
  keyed(byId("worker-cards"), workers.map((worker) => ({ ...worker, fleet })), makeWorker);
  setText(byId("workers-note"), note(workers, fleet.status?.autoscaler, "workers"));
}

function note(members, autoscaler, kind) {
  const ready = members.filter((member) => member.state === "ready").length;
  const wanted = autoscaler ? ` · ${autoscaler[kind]} wanted` : "";
  return `${ready} of ${members.length} ready${wanted}`;
}

function makeShard() {
  const head = makeHead();
  const load = makeBar("part of all experts’ tokens", "load");
  const slots = makeBar("slots used", "slots");
  const facts = element("p", "facts");
  facts.title = "experts that are on other shards too; bytes of all weights here";
  const root = element("article", "member", head.root, load.root, slots.root, facts);
  return {
    root,
    update({ fleet, ...shard }) {
      head.set(shard);
      const share = fleet.shardShare?.get(shard.id) ?? null;
      load.set(share ?? 0, percent(share));
      const room = fleet.slots[shard.id];
      slots.set(room ? shard.num_slots / room : 0, room ? `${count(shard.num_slots)} / ${count(room)}` : count(shard.num_slots));
      const shared = fleet.shardHeld?.get(shard.id)?.shared ?? 0;
      setText(facts, `${count(shared)} replicated · ${bytes(shard.weight_bytes ?? 0)}`);
    },
  };
}

function makeWorker() {
  const head = makeHead();
  const pages = makeBar("KV pages used", "KV pages");
  const batch = element("p", "batch");
  const facts = element("p", "facts");
  const root = element("article", "member", head.root, batch, pages.root, facts);
  return {
    root,
    update({ fleet, ...worker }) {
      head.set(worker);
      setText(batch, `${count(worker.running ?? 0)} running · ${count(worker.waiting ?? 0)} waiting`);
      const used = (worker.num_pages ?? 0) - (worker.free_pages ?? 0);
      const has = worker.num_pages > 0;
      pages.set(has ? used / worker.num_pages : 0, has ? `${count(used)} / ${count(worker.num_pages)}` : "model’s own");
      const speed = fleet.workerRate?.get(worker.id) ?? null;
      setText(facts, `${rate(speed)} tokens/s · ${bytes(worker.dense_bytes ?? 0)}`);
    },
  };
}

function makeHead() {
  const name = element("b", "");
  const state = element("span", "state");
  const node = element("span", "node");
  return {
    root: element("p", "member-head", element("span", "dot"), name, state, node),
    set(member) {
      setText(name, member.id);
      setText(state, member.state);
      state.parentElement.dataset.state = member.state;
      setText(node, member.node ? `node ${member.node.slice(-6)}` : "");
      node.title = member.pid ? `process ${member.pid} on ${member.address ?? ""}` : "";
    },
  };
}

function makeBar(label, short) {
  const meter = bar(label);
  const value = element("span", "bar-value");
  return {
    root: element("p", "bar-row", element("span", "bar-name", short), meter.root, value),
    set(part, text) {
      meter.set(part);
      setText(value, text);
    },
  };
}
