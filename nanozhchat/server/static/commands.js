// Commands typed into the message box: "/temperature 0.5". A full-width slash and full-width digits work too.

import { mark, t } from "./strings.js";
import { byId, element } from "./view.js";

const NUMBERS = { temperature: "temperature", topk: "top_k", topp: "top_p", seed: "seed", max: "max_tokens" };
export const NAMES = ["new", "clear", "system", "model", ...Object.keys(NUMBERS), "tokens", "compare", "export", "help"];

const folded = (text) => text.normalize("NFKC").replace(/^／/, "/");

/** Return {name, argument} if the text is a command, known or not; null for a message. */
export function parse(text) {
  const found = /^\/([A-Za-z]*)(?:\s+([\s\S]*))?$/.exec(folded(text.trim()));
  return found && { name: found[1].toLowerCase(), argument: text.trim().replace(/^\S+\s*/, "") };
}

/** Do a command; returns what to tell the user, "" for nothing. host: one function per name, set(field, value). */
export function run({ name, argument }, host) {
  if (name in NUMBERS) {
    const value = Number.parseFloat(folded(argument));
    if (!Number.isFinite(value)) return t("commandNumber", { name });
    return t("commandSet", { name, value: host.set(NUMBERS[name], value) });
  }
  if (!NAMES.includes(name)) return t("commandUnknown", { name: `/${name}` });
  return host[name](argument) ?? "";
}

/** The list above the message box while a command is being typed. */
export class Menu {
  #chosen = 0;
  #names = [];

  /** take(text): put it into the box. */
  constructor(input, take) {
    Object.assign(this, { input, take, box: byId("commands") });
  }

  get open() {
    return !this.box.hidden;
  }

  /** Follow what is typed. */
  update() {
    const typed = /^\/([A-Za-z]*)$/.exec(folded(this.input.value));
    this.#names = typed ? NAMES.filter((name) => name.startsWith(typed[1].toLowerCase())) : [];
    this.#chosen = 0;
    this.#draw();
  }

  close() {
    this.#names = [];
    this.#draw();
  }

  #draw() {
    this.box.hidden = this.#names.length === 0;
    this.input.setAttribute("aria-expanded", String(this.open));
    this.box.replaceChildren(...this.#names.map((name, i) => {
      const row = element("div", "command");
      row.id = `command-${name}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(i === this.#chosen));
      row.append(element("code", "", `/${name}`), mark(element("span"), { text: `command_${name}` }));
      row.addEventListener("mousedown", (event) => {
        event.preventDefault(); // the box keeps the focus
        this.#choose(i);
      });
      return row;
    }));
    const row = this.box.children[this.#chosen];
    if (row) this.input.setAttribute("aria-activedescendant", row.id);
    else this.input.removeAttribute("aria-activedescendant");
    row?.scrollIntoView({ block: "nearest" });
  }

  #choose(i) {
    this.take(`/${this.#names[i]} `);
    this.close();
  }

  /** Take a key press in the box; true = it was for the menu. */
  key(event) {
    if (!this.open || event.isComposing || event.keyCode === 229) return false;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      this.#chosen = (this.#chosen + step + this.#names.length) % this.#names.length;
      this.#draw();
    } else if (event.key === "Tab" || (event.key === "Enter" && folded(this.input.value) !== `/${this.#names[this.#chosen]}`)) {
      this.#choose(this.#chosen);
    } else if (event.key === "Escape") {
      this.close();
    } else return false;
    event.preventDefault();
    event.stopPropagation();
    return true;
  }
}
