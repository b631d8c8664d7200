// The prompt box: one completion, streamed as any client would get it.

import { byId, setText } from "./dom.js";
import { authorization, problemOf, serverSentEvents } from "./connection.js";
import { count, duration, rate } from "./format.js";

export class Prompt {
  constructor(fleet, onRefused) {
    this.fleet = fleet;
    this.onRefused = onRefused;
    this.abort = null;
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("prompt-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("prompt-form").requestSubmit();
    });
    byId("prompt-stop").addEventListener("click", () => this.abort?.abort());
  }

  /** Say what a prompt is for this model. */
  show() {
    const takesText = this.fleet.model?.has_tokenizer ?? true;
    byId("prompt-text").placeholder = takesText ? "Prompt (Ctrl + Enter sends)" : "Token ids, such as 12 7 1904";
    setText(byId("prompt-label"), takesText ? "Prompt" : "Prompt as token ids");
  }

  async #send() {
    const { model } = this.fleet;
    const prompt = model && this.#prompt(model);
    if (!prompt?.length || this.abort) return;
    this.abort = new AbortController();
    this.#busy(true);
    const began = performance.now();
    const seen = { first: null, tokens: 0 };
    byId("answer").textContent = "";
    setText(byId("prompt-status"), "Streaming");
    try {
      await this.#stream(model, prompt, seen);
      setText(byId("prompt-status"), this.#summary(seen, began));
    } catch (error) {
      const isStopped = error.name === "AbortError";
      setText(byId("prompt-status"), isStopped ? `Stopped · ${this.#summary(seen, began)}` : error.message);
    } finally {
      this.abort = null;
      this.#busy(false);
    }
  }

  #prompt(model) {
    const text = byId("prompt-text").value;
    if (model.has_tokenizer) return text;
    const ids = text.split(/[\s,]+/).filter(Boolean).map(Number);
    if (ids.every((id) => Number.isInteger(id) && id >= 0)) return ids;
    setText(byId("prompt-status"), "This model has no tokenizer: give whole numbers.");
    return null;
  }

  async #stream(model, prompt, seen) {
    const body = {
      model: model.name,
      prompt,
      max_tokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
      // Without a tokenizer there is no text: the tokens' names are their numbers.
      ...(model.has_tokenizer ? {} : { logprobs: 0 }),
    };
    const answer = await fetch("/v1/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...authorization() },
      body: JSON.stringify(body),
      signal: this.abort.signal,
    });
    if (!answer.ok) {
      if (answer.status === 401 || answer.status === 403) this.onRefused();
      throw new Error(await problemOf(answer));
    }
    for await (const [, data] of serverSentEvents(answer.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) seen.tokens = chunk.usage.completion_tokens;
      for (const choice of chunk.choices) this.#add(choice, seen);
    }
    throw new Error("the answer broke off");
  }

  #add({ text, logprobs }, seen) {
    seen.first ??= performance.now();
    const target = byId("answer");
    const isAtEnd = target.scrollTop + target.clientHeight >= target.scrollHeight - 4;
    const tokens = logprobs?.tokens ?? [];
    target.append(tokens.length ? `${tokens.join(" ")} ` : text);
    if (isAtEnd) target.scrollTop = target.scrollHeight;
  }

  #summary({ first, tokens }, began) {
    if (first === null) return "no token";
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 ? ` · ${rate((tokens - 1) / seconds)} tokens/s` : "";
    const number = tokens ? `${count(tokens)} tokens${speed} · ` : "";
    return `${number}first after ${duration((first - began) / 1000)}`;
  }

  #busy(isBusy) {
    byId("prompt-send").disabled = isBusy;
    byId("prompt-stop").disabled = !isBusy;
    byId("answer").setAttribute("aria-busy", String(isBusy));
  }
}
