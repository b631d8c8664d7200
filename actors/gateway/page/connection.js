// The stream of events, over fetch, because EventSource sends no headers. It comes back by itself.

const KEY = "expertmesh-api-key";
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5000;
// The server says something each second; a controller that hangs makes it some seconds.
const SILENCE_MS = 12000;
const HIDDEN_MS = 60000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export function authorization() {
  return key.get() ? { authorization: `Bearer ${key.get()}` } : {};
}

/** What an answer that is no success says, in one line. */
export async function problemOf(answer) {
  const body = await answer.json().catch(() => null);
  return body?.error?.message ?? `${answer.status} ${answer.statusText}`;
}

/** Yield [event, data] of server-sent events. */
export async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = block.split("\n").map((line) => line.split(/: (.*)/s));
        const field = (name) => fields.find(([found]) => found === name)?.[1] ?? "";
        yield [field("event"), field("data")];
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);  // it is broken, or nobody reads on
  }
}

export class Connection {
  /** onMessage(name, fields) for each event; onState("open" | "lost" | "refused", why). */
  constructor(onMessage, onState) {
    this.onMessage = onMessage;
    this.onState = onState;
    this.wake = () => undefined;
    this.retryMs = FIRST_RETRY_MS;
    this.isAsleep = false;
    this.abort = new AbortController();
    document.addEventListener("visibilitychange", () => this.#visibilityChanged());
  }

  /** Connect anew, now. */
  restart() {
    this.abort.abort();
    this.wake();
  }

  async run() {
    for (;;) {
      this.abort = new AbortController();
      try {
        await this.#read();
      } catch (error) {
        if (error.name !== "AbortError") this.onState("lost", String(error.message ?? error));
      }
      await this.#pause(this.retryMs);
      this.retryMs = Math.min(LAST_RETRY_MS, this.retryMs * 2);
    }
  }

  /** Read until the stream ends. */
  async #read() {
    const { signal } = this.abort;
    let watch = setTimeout(() => this.abort.abort(new Error("the server is silent")), SILENCE_MS);
    try {
      const answer = await fetch("/live/events", { headers: authorization(), cache: "no-store", signal });
      if (!answer.ok) {
        const refused = answer.status === 401 || answer.status === 403;
        this.onState(refused ? "refused" : "lost", await problemOf(answer));
        if (refused) await this.#pause(Infinity);
        return;
      }
      this.onState("open", "");
      this.retryMs = FIRST_RETRY_MS;
      for await (const [name, data] of serverSentEvents(answer.body)) {
        clearTimeout(watch);
        watch = setTimeout(() => this.abort.abort(new Error("the server is silent")), SILENCE_MS);
        this.onMessage(name, JSON.parse(data));
      }
      this.onState("lost", "the server closed the connection");
    } finally {
      clearTimeout(watch);
    }
  }

  async #pause(ms) {
    await new Promise((resolve) => {
      this.wake = resolve;
      if (ms < Infinity) setTimeout(resolve, ms);
    });
    // Nobody looks: nothing is asked for.
    if (document.hidden && this.isAsleep) await new Promise((resolve) => (this.wake = resolve));
  }

  #visibilityChanged() {
    clearTimeout(this.sleepTimer);
    if (document.hidden) {
      this.sleepTimer = setTimeout(() => {
        this.isAsleep = true;
        this.abort.abort();
      }, HIDDEN_MS);
    } else if (this.isAsleep) {
      this.isAsleep = false;
      this.wake();
    }
  }
}
