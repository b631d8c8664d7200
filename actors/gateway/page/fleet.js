// What is known of the fleet, from messages; and what follows from it. See docs/live.md for the fields.

export const WINDOW_S = 10;
const HISTORY_S = 300;
const MAX_EVENTS = 300;

export class Fleet {
  constructor() {
    this.model = null;
    this.placement = null;
    this.status = null;
    this.slots = {};
    this.operations = [];
    this.events = new Map();
    this.history = [];
    this.now = {};
    this.away = "";
    this.awaySince = null;
    this.generatedBefore = new Map();
    this.looks = []; // {time_s, tokens: one array of layers x experts}
  }

  /** Take in a `state` (all that is known) or a `tick` (what is new). */
  apply(name, message) {
    const isWhole = name === "state";
    if (isWhole) this.history = message.history;
    // What the first message knew already may come once more.
    else if (message.time_s <= (this.now.time_s ?? 0)) return;
    for (const field of ["model", "placement", "slots", "operations"]) {
      if (message[field]) this[field] = message[field];
    }
    if (message.status) {
      this.#countByWorker(message);
      this.status = message.status;
    }
    for (const event of message.events) this.events.set(event.id, event);
    if (message.time_s === undefined) return;
    if (message.away && !this.away) this.awaySince = message.time_s;
    this.away = message.away;
    this.now = message;
    if (!isWhole) this.history.push(message);
    this.history = this.history.filter((look) => look.time_s > message.time_s - HISTORY_S);
    if (message.tokens) this.looks.push({ time_s: message.time_s, tokens: Int32Array.from(message.tokens.flat()) });
    this.looks = this.looks.filter((look) => look.time_s > message.time_s - WINDOW_S);
    this.#sum();
  }

  get numExperts() {
    return this.model?.num_experts ?? 0;
  }

  get layers() {
    return this.model?.moe_layers ?? [];
  }

  /** Events, newest first. */
  get timeline() {
    const all = [...this.events.values()].sort((a, b) => b.time_s - a.time_s);
    for (const event of all.slice(MAX_EVENTS)) this.events.delete(event.id);
    return all.slice(0, MAX_EVENTS);
  }

  /** An expert's part of its layer's tokens in the window; null without traffic. */
  share(row, expert) {
    const total = this.layerTokens?.[row];
    return total ? this.tokens[row * this.numExperts + expert] / total : null;
  }

  /** Where an expert, or each of its slices, is: [{shard, share}], shares of its tokens. */
  replicas(row, expert) {
    if (!this.placement) return [];
    const slices = this.model.expert_tp;
    const found = new Map();
    for (let slice = expert * slices; slice < (expert + 1) * slices; slice += 1) {
      const weights = this.placement.weights[row][slice];
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      this.placement.replicas[row][slice].forEach((shard, index) => {
        found.set(shard, (found.get(shard) ?? 0) + weights[index] / total / slices);
      });
    }
    return [...found].map(([shard, share]) => ({ shard: this.placement.shards[shard], share }));
  }

  numReplicas(row, expert) {
    return this.placement?.replicas[row]?.[expert * this.model.expert_tp]?.length ?? 0;
  }

  /** The experts with the most tokens of their layer. */
  hottest(number) {
    const all = [];
    this.layers.forEach((layer, row) => {
      for (let expert = 0; expert < this.numExperts; expert += 1) {
        const share = this.share(row, expert);
        if (share) all.push({ layer, row, expert, share });
      }
    });
    return all.sort((a, b) => b.share - a.share).slice(0, number);
  }

  #sum() {
    const size = this.layers.length * this.numExperts;
    this.tokens = new Float64Array(size);
    for (const { tokens } of this.looks) {
      for (let index = 0; index < size; index += 1) this.tokens[index] += tokens[index];
    }
    this.layerTokens = this.layers.map((_, row) =>
      this.tokens.subarray(row * this.numExperts, (row + 1) * this.numExperts).reduce((sum, each) => sum + each, 0),
    );
    this.#sumByShard();
  }

  /** Each shard's part of all tokens, and each layer's balance: mean over largest shard load. */
  #sumByShard() {
    const names = this.placement?.shards ?? [];
    const total = new Float64Array(names.length);
    const slices = this.model?.expert_tp ?? 1;
    this.held = names.map(() => ({ experts: 0, shared: 0 }));
    this.base = Infinity; // the fewest replicas that any expert has
    this.balance = this.layers.map((_, row) => {
      const load = new Float64Array(names.length);
      const rows = this.placement?.replicas[row] ?? [];
      rows.forEach((shards, slice) => {
        const weights = this.placement.weights[row][slice];
        const sum = weights.reduce((all, weight) => all + weight, 0);
        const tokens = this.tokens[row * this.numExperts + Math.floor(slice / slices)];
        this.base = Math.min(this.base, shards.length);
        shards.forEach((shard, index) => {
          load[shard] += (tokens * weights[index]) / sum;
          this.held[shard].experts += 1;
          if (shards.length > 1) this.held[shard].shared += 1;
        });
      });
      load.forEach((tokens, shard) => (total[shard] += tokens));
      const most = Math.max(...load, 0);
      return most ? load.reduce((sum, each) => sum + each, 0) / names.length / most : null;
    });
    const all = total.reduce((sum, each) => sum + each, 0);
    this.shardShare = new Map(names.map((name, shard) => [name, all ? total[shard] / all : null]));
    this.shardHeld = new Map(names.map((name, shard) => [name, this.held[shard]]));
  }

  #countByWorker(message) {
    this.workerRate = new Map();
    const generated = new Map();
    for (const worker of message.status.workers) {
      const id = `${worker.id}/${worker.pid}`;
      generated.set(id, worker.tokens_generated ?? 0);
      const before = this.generatedBefore.get(id);
      const grown = generated.get(id) - before;
      this.workerRate.set(worker.id, before === undefined || !message.interval_s ? null : grown / message.interval_s);
    }
    this.generatedBefore = generated;
  }
}
