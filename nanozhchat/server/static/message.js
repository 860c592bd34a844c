// One message on the screen. Text goes in as text nodes; HTML only as the server rendered and cleaned it.

import { renderTexts } from "./api.js";
import { currentLanguage, mark, t } from "./strings.js";
import { tokenView } from "./tokens.js";
import { button, confirmOn, copyText, element } from "./view.js";

const NEXT_TRY_MS = 120; // between looks for finished blocks

/** Shows a message and follows it while it is written; several updates in a frame cost one. */
export class MessageView {
  #frame = 0;
  #rendered = 0; // UTF-16 units of the text that are shown as blocks
  #rendering = false;
  #timer = 0;

  /** host: what the buttons do: regenerate, edit, continueAnswer, remove, choose, variants, model. */
  constructor(node, host) {
    Object.assign(this, { node, host });
    this.element = element("article", `message ${node.role}`);
    this.title = mark(element("h3", "unseen"), { text: node.role });
    this.blocks = element("div", "blocks");
    this.text = document.createTextNode("");
    this.tail = element("div", "tail");
    this.tail.append(this.text);
    this.body = element("div", node.role === "user" ? "bubble" : "answer");
    this.body.append(this.blocks, this.tail);
    this.meta = element("p", "meta");
    this.actions = element("div", "actions");
    this.foot = element("div", "foot");
    this.foot.append(this.meta, this.actions);
    this.element.append(this.title, this.body, this.foot);
    this.#buildActions();
    this.update();
  }

  #buildActions() {
    const { node, host } = this;
    const small = "tool small";
    const copy = button("copy", { label: "copy" }, async () => {
      await copyText(node.text);
      confirmOn(copy);
    }, small);
    copy.dataset.action = "copy";
    const edit = button("pencil", { label: "edit" }, () => this.edit(), small);
    const again = button("again", { label: "regenerate" }, () => host.regenerate(node), small);
    this.tokens = button("tokens", { label: "tokenView" }, () => this.toggleTokens(), small);
    this.tokens.setAttribute("aria-pressed", "false");
    const drop = button("trash", { label: "deleteMessage" }, () => host.remove(node), small);
    this.more = button("go", { label: "continue", text: "continue" }, () => host.continueAnswer(node), "tool small wordy");
    this.steps = element("span", "variants");
    this.count = element("span", "variant");
    const step = (by) => () => host.choose(node, by);
    this.steps.append(
      button("left", { label: "earlierVersion" }, step(-1), small), this.count,
      button("right", { label: "laterVersion" }, step(1), small),
    );
    const own = node.role === "user" ? [edit] : [this.more, again];
    this.actions.append(this.steps, copy, ...own, this.tokens, drop);
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
    const { node } = this;
    const streaming = node.status === "streaming";
    this.element.dataset.status = node.status;
    this.body.setAttribute("aria-busy", String(streaming));
    this.actions.hidden = streaming;
    this.more.hidden = node.status !== "cut";
    const { index, count } = this.host.variants(node);
    this.steps.hidden = count < 2;
    this.count.textContent = `${index + 1}/${count}`;
    this.meta.textContent = metaOf(node);
    this.meta.lang = currentLanguage();
    const rest = node.text.slice(this.#rendered);
    if (rest.startsWith(this.text.data)) this.text.appendData(rest.slice(this.text.length));
    else this.text.data = rest;
    this.tail.classList.toggle("open-code", /^\s*(```|~~~)/.test(rest));
    if (node.role === "assistant") this.#renderSoon();
  }

  /** Ask for the blocks that are finished, or at the end for all; a failure leaves the text as it is. */
  #renderSoon() {
    const rest = this.node.text.slice(this.#rendered);
    const done = this.node.status !== "streaming";
    if (this.#rendering || this.#timer || !rest || !(done || /\n\s*\n|\n```/.test(rest))) return;
    this.#rendering = true;
    renderTexts([rest]).then(([blocks]) => {
      this.#rendering = false;
      this.show(done && this.node.status !== "streaming" ? blocks : blocks.slice(0, -1));
      if (this.node.status === "streaming" || this.#rendered < this.node.text.length) this.#later();
    }, () => {
      this.#rendering = false;
    });
  }

  #later() {
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.update();
    }, NEXT_TRY_MS);
  }

  /** Put in blocks that begin where the shown ones end. */
  show(blocks) {
    for (const { html } of blocks) {
      const part = document.createElement("template");
      part.innerHTML = html;
      for (const figure of part.content.querySelectorAll("figure.code")) addCopy(figure);
      for (const table of part.content.querySelectorAll("table")) wrapTable(table);
      this.blocks.append(part.content);
    }
    if (!blocks.length) return;
    this.#rendered += blocks.at(-1).end;
    this.text.data = this.node.text.slice(this.#rendered);
    if (!this.text.data.trim()) this.text.data = "";
  }

  /** Forget what is shown: the text has changed. */
  reset() {
    this.#rendered = 0;
    this.blocks.replaceChildren();
    this.update();
  }

  async toggleTokens() {
    const open = this.tokens.getAttribute("aria-pressed") === "true";
    this.tokens.setAttribute("aria-pressed", String(!open));
    this.body.hidden = !open;
    this.element.querySelector(".tokens")?.remove();
    if (open) return;
    try {
      const view = await tokenView(this.node, this.host.model());
      if (this.body.hidden && !this.element.querySelector(".tokens")) this.body.after(view);
    } catch (error) {
      this.tokens.setAttribute("aria-pressed", "false");
      this.body.hidden = false;
      this.host.explain(error);
    }
  }

  /** Turn the question into a text box; sending makes a new branch. */
  edit() {
    if (this.element.querySelector(".editor")) return;
    const form = element("form", "editor");
    const area = mark(element("textarea"), { label: "edit" });
    area.value = this.node.text;
    area.rows = Math.min(10, this.node.text.split("\n").length + 1);
    const close = () => {
      form.remove();
      this.body.hidden = this.foot.hidden = false;
      this.actions.querySelector("button:not([hidden])")?.focus();
    };
    const send = () => {
      if (area.value.trim() && this.host.edit(this.node, area.value.trim()) !== false) close();
    };
    const yes = mark(element("button", "strong"), { text: "sendEdited" });
    yes.type = "submit";
    form.append(area, button(null, { text: "cancel" }, close, "quiet"), yes);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) {
        event.stopPropagation();
        close();
      } else if (this.host.isSendKey(event)) {
        event.preventDefault();
        send();
      }
    });
    this.body.hidden = this.foot.hidden = true;
    this.title.after(form);
    area.focus();
  }
}

function addCopy(figure) {
  const copy = button("copy", { label: "copyCode" }, async () => {
    await copyText(figure.querySelector("code").textContent);
    confirmOn(copy);
  }, "tool small");
  figure.querySelector("figcaption").append(copy);
  figure.querySelector("pre").tabIndex = 0;
}

function wrapTable(table) {
  const box = element("div", "table-box");
  box.tabIndex = 0;
  table.replaceWith(box);
  box.append(table);
}

/** Describe how an answer ended and how fast it was, by the server's own numbers. */
function metaOf({ role, status, usage, timings, place, model }) {
  if (role === "user") return "";
  const parts = [];
  if (place) parts.push(t("place", { n: place }));
  if (["stopped", "cut", "failed", "interrupted"].includes(status)) parts.push(t(status));
  if (timings?.tokens_per_s != null) parts.push(t("speed", { n: timings.tokens_per_s.toFixed(1) }));
  if (timings?.ttft_ms != null) parts.push(t("firstToken", { n: Math.round(timings.ttft_ms) }));
  if (usage) parts.push(t("tokens", { n: usage.completion_tokens, prompt: usage.prompt_tokens }));
  if (usage && model) parts.push(model);
  return parts.join(" · ");
}
