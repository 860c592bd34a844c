// Two checkpoints answer the same question side by side: what did more training change?

import { streamAnswer } from "./api.js";
import { t } from "./strings.js";
import { byId, element } from "./view.js";

export class Compare {
  #running = null;

  /** host: models(), sampling(model), isSendKey(event), explain(error, retry), nameOf(model). */
  constructor(host) {
    this.host = host;
    this.sides = ["left", "right"].map((side) => ({
      choice: byId(`compare-${side}`), answer: byId(`compare-${side}-answer`), meta: byId(`compare-${side}-meta`),
    }));
    const form = byId("compare-form");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    byId("compare-input").addEventListener("keydown", (event) => {
      if (!host.isSendKey(event)) return;
      event.preventDefault();
      this.ask();
    });
    byId("compare").addEventListener("close", () => this.#running?.abort());
  }

  open() {
    const models = this.host.models();
    this.sides.forEach(({ choice }, i) => {
      const before = choice.value;
      choice.replaceChildren(...models.map((m) => Object.assign(element("option", "", this.host.nameOf(m)), { value: m.id })));
      choice.value = before || models[Math.min(i, models.length - 1)].id;
    });
    byId("compare").showModal();
    byId("compare-input").focus();
  }

  async ask() {
    const question = byId("compare-input").value.trim();
    if (!question) return;
    this.#running?.abort();
    this.#running = new AbortController();
    await Promise.all(this.sides.map((side) => this.#answer(side, question, this.#running.signal)));
  }

  async #answer({ choice, answer, meta }, question, signal) {
    answer.textContent = "";
    meta.textContent = t("thinking");
    try {
      const { usage, timings } = await streamAnswer({
        model: choice.value,
        messages: [{ role: "user", content: question }],
        sampling: this.host.sampling(),
        signal,
        onText: (text) => answer.append(text),
      });
      const speed = timings?.tokens_per_s != null ? `${t("speed", { n: timings.tokens_per_s.toFixed(1) })} · ` : "";
      meta.textContent = speed + t("tokens", { n: usage.completion_tokens, prompt: usage.prompt_tokens });
    } catch (error) {
      meta.textContent = error.name === "AbortError" ? t("stopped") : this.host.describe(error);
    }
  }
}
