// Settings: kept in local storage when there is one, shown in the settings dialog.

import { recall, remember } from "./store.js";
import { mark, t } from "./strings.js";
import { byId, element } from "./view.js";

const STORE = "nanozhchat.settings";
const FIELDS = [
  { name: "temperature", step: 0.05 },
  { name: "top_p", step: 0.01, min: 0.01 }, // 0 would keep no token
  { name: "top_k", step: 1 },
  { name: "min_p", step: 0.01 },
  { name: "repetition_penalty", step: 0.05 },
  { name: "max_tokens", step: 1 },
];
const PRESETS = {
  precise: { temperature: 0, top_p: 1 },
  balanced: { temperature: 0.5, top_p: 0.95 },
  creative: { temperature: 1.1, top_p: 0.98 },
};

export class Settings {
  #ranges = {};
  #rows = [];
  #saved = Object(recall(STORE, {}));

  /** A saved choice such as language, theme, sendKey, model. */
  get(name, fallback) {
    return this.#saved[name] ?? fallback;
  }

  set(name, value) {
    this.#saved[name] = value;
    remember(STORE, this.#saved);
  }

  /** Values for a request: only what the user changed, so that the server's defaults hold otherwise. */
  get sampling() {
    const names = FIELDS.map(({ name }) => name).filter((name) => this.#saved[name] != null && this.#ranges[name]);
    const values = Object.fromEntries(names.map((name) => [name, this.#clamp(name, this.#saved[name])]));
    const seed = this.#saved.seed;
    return Number.isInteger(seed) ? { ...values, seed } : values;
  }

  /** Take a value within the model's range; returns what it became. */
  setSampling(name, value) {
    const kept = name === "seed" ? Math.trunc(value) : this.#ranges[name] ? this.#clamp(name, value) : value;
    this.set(name, kept);
    this.show();
    return kept;
  }

  /** Build the rows of the dialog from the ranges of a model. */
  build(ranges) {
    this.#ranges = ranges;
    this.#rows = FIELDS.filter(({ name }) => ranges[name]).map((field) => this.#row(field));
    byId("fields").replaceChildren(...this.#rows.map((row) => row.field));
    this.#presets();
    this.show();
  }

  /** Write the values into the rows. */
  show() {
    for (const { name, slider, output } of this.#rows) {
      slider.value = output.value = this.#clamp(name, this.#saved[name] ?? this.#ranges[name].default);
    }
    byId("seed").value = this.#saved.seed ?? "";
    for (const choice of document.querySelectorAll("[data-preset]")) {
      const values = Object.entries(PRESETS[choice.dataset.preset]);
      const same = values.every(([name, value]) => (this.#saved[name] ?? this.#ranges[name]?.default) === value);
      choice.setAttribute("aria-pressed", String(same));
    }
  }

  reset() {
    for (const { name } of FIELDS) this.set(name, undefined);
    this.set("seed", undefined);
    this.show();
  }

  #presets() {
    byId("presets").replaceChildren(...Object.entries(PRESETS).map(([name, values]) => {
      const choice = mark(Object.assign(element("button", "choice"), { type: "button" }), { text: `preset_${name}` });
      choice.dataset.preset = name;
      choice.addEventListener("click", () => {
        for (const [field, value] of Object.entries(values)) this.setSampling(field, value);
      });
      return choice;
    }));
  }

  #row({ name, step, min }) {
    const range = this.#ranges[name];
    const field = element("div", "field");
    const title = mark(element("label", "field-name"), { text: name });
    const help = mark(element("span", "field-help"), { text: `${name}Help` });
    const limits = { min: min ?? range.min, max: range.max, step, id: `set-${name}` };
    const slider = Object.assign(element("input", "slider"), { type: "range", ...limits });
    const output = Object.assign(element("input", "value"), { type: "number", ...limits, id: `set-${name}-value` });
    title.htmlFor = slider.id;
    output.setAttribute("aria-labelledby", (title.id = `set-${name}-title`));
    help.id = `set-${name}-help`;
    slider.setAttribute("aria-describedby", help.id);
    slider.addEventListener("input", () => this.setSampling(name, slider.valueAsNumber));
    output.addEventListener("change", () => this.setSampling(name, output.valueAsNumber));
    field.append(title, output, slider, help);
    return { name, field, slider, output };
  }

  #clamp(name, value) {
    const { min, max, default: fallback } = this.#ranges[name];
    const field = FIELDS.find((f) => f.name === name);
    const number = Number.isFinite(value) ? value : fallback;
    return Math.min(max, Math.max(field?.min ?? min, field?.step === 1 ? Math.round(number) : number));
  }
}

/** Make a group of buttons of which one is pressed; choose(value) when another is. */
export function choices(box, prefix, values, current, choose) {
  box.replaceChildren(...values.map((value) => {
    const one = mark(Object.assign(element("button", "choice"), { type: "button" }), { text: `${prefix}_${value}` });
    one.setAttribute("aria-pressed", String(value === current));
    one.addEventListener("click", () => {
      for (const other of box.children) other.setAttribute("aria-pressed", String(other === one));
      choose(value);
    });
    return one;
  }));
  box.setAttribute("aria-label", t(prefix));
  box.dataset.label = prefix;
}
