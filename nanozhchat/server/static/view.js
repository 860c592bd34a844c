// What is on the screen: turns, scrolling, the banner. Text goes in as text nodes only.

import { t } from "./strings.js";

const NEAR_END_PX = 48;

export function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

/** Shows one turn and follows it; several updates in a frame cost one. */
export class TurnView {
  #frame = 0;

  constructor(turn) {
    this.turn = turn;
    this.node = element("article", "turn");
    this.you = element("h3", "unseen");
    this.who = element("h3", "unseen");
    this.answer = element("div", "answer");
    this.text = document.createTextNode("");
    this.meta = element("p", "meta");
    const body = element("div", "body");
    this.answer.append(this.text);
    body.append(this.who, this.answer, this.meta);
    const question = element("div", "question");
    question.append(this.you, element("div", "bubble", turn.question));
    this.node.append(question, body);
    this.update();
  }

  /** Draw at the next frame, then call `after`. */
  schedule(after) {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.update();
      after();
    });
  }

  /** Draw now. */
  update() {
    const { turn } = this;
    this.you.textContent = t("you");
    this.who.textContent = t("model");
    this.node.dataset.status = turn.status;
    this.answer.setAttribute("aria-busy", String(turn.status === "streaming"));
    if (turn.answer.length >= this.text.length) this.text.appendData(turn.answer.slice(this.text.length));
    else this.text.data = turn.answer;
    this.meta.textContent = metaOf(turn);
  }
}

/** Describe how an answer ended and how fast it was, by the server's own numbers. */
function metaOf({ status, usage, timings }) {
  const parts = [];
  if (["stopped", "cut", "failed"].includes(status)) parts.push(t(status));
  if (timings?.tokens_per_s != null) parts.push(t("speed", { n: timings.tokens_per_s.toFixed(1) }));
  if (timings?.ttft_ms != null) parts.push(t("firstToken", { n: Math.round(timings.ttft_ms) }));
  if (usage) parts.push(t("tokens", { n: usage.completion_tokens }));
  return parts.join(" · ");
}

/** Keeps the end in sight until the user scrolls away; the button brings it back. */
export class Follower {
  constructor(stage, button) {
    this.stage = stage;
    this.button = button;
    this.following = true;
    stage.addEventListener("scroll", () => this.#look(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe(stage);
  }

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.stage;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.button.hidden = this.following;
  }

  /** Scroll after new text, if the user is at the end. */
  follow() {
    if (this.following) this.stage.scrollTop = this.stage.scrollHeight;
    else this.button.hidden = false;
  }

  toEnd() {
    this.following = true;
    this.button.hidden = true;
    this.follow();
  }
}

/** The error line above the input, with one action. */
export class Banner {
  #timer = 0;

  constructor(box, text, action, close) {
    Object.assign(this, { box, text, action, run: null });
    action.addEventListener("click", () => {
      const { run } = this;
      this.hide();
      run?.();
    });
    close.addEventListener("click", () => this.hide());
  }

  /** waitS: seconds until the action may be used, counted down on its button. */
  show(message, label, run, waitS = 0) {
    clearTimeout(this.#timer);
    this.run = run;
    this.text.textContent = message;
    this.box.hidden = false;
    this.action.disabled = waitS > 0;
    this.action.textContent = waitS > 0 ? t("retryIn", { n: waitS }) : label;
    if (waitS > 0) this.#timer = setTimeout(() => this.show(message, label, run, waitS - 1), 1000);
  }

  hide() {
    clearTimeout(this.#timer);
    this.box.hidden = true;
    this.run = null;
  }
}
