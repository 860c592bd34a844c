// Sampling settings and the language: kept in local storage when there is one, shown in the settings dialog.

import { t } from "./strings.js";

const STORE = "nanozhchat.settings";
const FIELDS = [
  { name: "temperature", step: 0.05 },
  { name: "top_p", step: 0.01, min: 0.01 }, // 0 would keep no token
  { name: "max_tokens", step: 1 },
];

export class Settings {
  #ranges = {};
  #rows = [];
  #saved = read();

  get language() {
    return this.#saved.language ?? "zh-CN";
  }

  set language(value) {
    this.#save({ language: value });
  }

  /** Values for a request: only what the user changed, so that the server's defaults hold otherwise. */
  get sampling() {
    const pairs = FIELDS.filter(({ name }) => this.#saved[name] !== undefined && this.#ranges[name]);
    return Object.fromEntries(pairs.map(({ name }) => [name, this.#clamp(name, this.#saved[name])]));
  }

  /** Build the rows of the dialog in `container` from the ranges of /v1/models. */
  build(container, ranges) {
    this.#ranges = ranges;
    this.#rows = FIELDS.filter(({ name }) => ranges[name]).map((field) => this.#row(field));
    container.replaceChildren(...this.#rows.map((row) => row.element));
    this.show();
  }

  /** Write texts and values into the rows (after a language switch or a reset). */
  show() {
    for (const { name, title, help, slider, output } of this.#rows) {
      const value = this.#clamp(name, this.#saved[name] ?? this.#ranges[name].default);
      title.textContent = t(name);
      help.textContent = t(`${name}Help`);
      slider.value = value;
      output.value = value;
    }
  }

  reset() {
    this.#save(Object.fromEntries(FIELDS.map(({ name }) => [name, undefined])));
    this.show();
  }

  #row({ name, step, min }) {
    const range = this.#ranges[name];
    const make = (tag, className) => Object.assign(document.createElement(tag), { className });
    const element = make("div", "field");
    const title = make("label", "field-name");
    const help = make("span", "field-help");
    const limits = { min: min ?? range.min, max: range.max, step, id: `set-${name}` };
    const slider = Object.assign(make("input", "slider"), { type: "range", ...limits });
    const output = Object.assign(make("input", "value"), { type: "number", ...limits, id: `set-${name}-value` });
    title.htmlFor = slider.id;
    output.setAttribute("aria-labelledby", (title.id = `set-${name}-title`));
    help.id = `set-${name}-help`;
    slider.setAttribute("aria-describedby", help.id);
    const take = (value) => {
      this.#save({ [name]: this.#clamp(name, value) });
      this.show();
    };
    slider.addEventListener("input", () => take(slider.valueAsNumber));
    output.addEventListener("change", () => take(output.valueAsNumber));
    element.append(title, output, slider, help);
    return { name, element, title, help, slider, output };
  }

  #clamp(name, value) {
    const { min, max, default: fallback } = this.#ranges[name];
    const field = FIELDS.find((f) => f.name === name);
    const number = Number.isFinite(value) ? value : fallback;
    const whole = field.step === 1 ? Math.round(number) : number;
    return Math.min(max, Math.max(field.min ?? min, whole));
  }

  #save(changes) {
    Object.assign(this.#saved, changes);
    try {
      localStorage.setItem(STORE, JSON.stringify(this.#saved));
    } catch {
      // storage is blocked: the settings hold until the page is closed
    }
  }
}

function read() {
  try {
    return Object(JSON.parse(localStorage.getItem(STORE) ?? "{}"));
  } catch {
    return {};
  }
}
