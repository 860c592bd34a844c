// Small parts of the screen: elements, icons, scrolling, the banner.

import { mark, t } from "./strings.js";

const NEAR_END_PX = 48;
const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  sliders: "M4 7h10M18 7h2M4 17h2M10 17h10M16 4.6v4.8M8 14.6v4.8",
  close: "M6 6l12 12M18 6L6 18",
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  square: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 13l4.5 4.5L19 7",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  pencil: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  tokens: "M4 6h5v5H4zM11 6h9v5h-9zM4 13h9v5H4zM15 13h5v5h-5z",
  columns: "M4 5h7v14H4zM13 5h7v14h-7z",
  chart: "M4 19h16M5 15l4-5 4 3 6-8",
  go: "M6 5l12 7-12 7z",
  more: "M6 12h.01M12 12h.01M18 12h.01",
};

export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with a picture, named in the current language by the keys of `texts`: {label, tip, text}. */
export function button(picture, texts, onClick, className = "tool") {
  const node = element("button", className);
  node.type = "button";
  if (picture) node.append(icon(picture));
  if (texts.text) node.append(mark(element("span"), { text: texts.text }));
  mark(node, { label: texts.label, tip: texts.label });
  node.addEventListener("click", onClick);
  return node;
}

/** Draw the pictures that the page's own elements ask for with data-icon. */
export function drawIcons() {
  for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
}

/** Copy text; works without the clipboard API too, which browsers keep from plain http. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = Object.assign(element("textarea", "unseen"), { value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    const before = document.activeElement;
    area.select();
    document.execCommand("copy");
    area.remove();
    before?.focus();
  }
}

/** Show on the button for a moment that its work is done. */
export function confirmOn(node) {
  const before = node.querySelector("svg");
  const done = icon("check");
  before.replaceWith(done);
  byId("status").textContent = t("copied");
  setTimeout(() => done.replaceWith(before), 1500);
}

export function download(name, text, type) {
  const link = Object.assign(element("a"), { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Ask before something that cannot be undone; resolves to true or false. */
export function confirmed(text, action) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Keeps the end in sight until the user scrolls away; the button brings it back. */
export class Follower {
  constructor(stage, jump) {
    Object.assign(this, { stage, jump, following: true });
    stage.addEventListener("scroll", () => this.#look(), { passive: true });
    jump.addEventListener("click", () => this.toEnd());
    const watcher = new ResizeObserver(() => this.follow());
    watcher.observe(stage);
    watcher.observe(stage.querySelector(".log"));
  }

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.stage;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.jump.hidden = this.following;
  }

  /** Scroll after new text, if the user is at the end. */
  follow() {
    if (this.following) this.stage.scrollTop = this.stage.scrollHeight;
    else this.jump.hidden = false;
  }

  toEnd() {
    this.following = true;
    this.jump.hidden = true;
    this.follow();
  }
}

/** The line above the input that says what went wrong, with one action. */
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

  /** waitS: seconds until the action may be used, counted down on its button. label empty = no action. */
  show(message, label = "", run = null, waitS = 0) {
    clearTimeout(this.#timer);
    this.run = run;
    if (this.text.textContent !== message || this.box.hidden) this.text.textContent = message;
    this.box.hidden = false;
    this.action.hidden = !label;
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
