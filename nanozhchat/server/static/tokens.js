// How the model sees a text: its tokens, coloured by how sure the model was, with what else it could have said.

import { tokenize } from "./api.js";
import { mark, t } from "./strings.js";
import { element } from "./view.js";

const LEVELS = [0.9, 0.5, 0.2, 0.05]; // probabilities between colours 0 (sure) to 4 (a guess)

/** Bytes of a token as text; what is only a part of a character as <E4>. */
export function readable(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes)).replaceAll("\n", "⏎\n");
  } catch {
    return bytes.map((b) => `<${b.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
  }
}

const hex = (bytes) => bytes.map((b) => b.toString(16).toUpperCase().padStart(2, "0")).join(" ");

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100%" : p < 0.1 ? "<0.1%" : `${p.toFixed(1)}%`;
};

const level = (logprob) => {
  const place = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return place < 0 ? LEVELS.length : place;
};

/** Return an element that shows `node`'s tokens. Those of an answer come with probabilities. */
export async function tokenView(node, model) {
  const box = element("div", "tokens");
  const known = node.tokens?.length > 0;
  const tokens = known ? node.tokens : (await tokenize(model, node.text)).pieces.map((bytes) => ({ bytes }));
  const row = element("div", "token-row");
  const detail = element("div", "token-detail");
  detail.setAttribute("aria-live", "polite");
  mark(row, { label: "tokenRow" });
  row.setAttribute("role", "group");
  tokens.forEach((token, i) => {
    const chip = element("button", "token", readable(token.bytes));
    if (!/[^\s\p{C}]/u.test(chip.textContent)) chip.setAttribute("aria-label", hex(token.bytes));
    chip.type = "button";
    chip.dataset.level = token.logprob === undefined ? `plain${i % 2}` : level(token.logprob);
    const show = () => showDetail(detail, token);
    chip.addEventListener("focus", show);
    chip.addEventListener("mouseenter", show);
    chip.addEventListener("click", show);
    chip.tabIndex = i === 0 ? 0 : -1; // one stop; arrows move inside
    row.append(chip);
  });
  row.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && [...row.children][[...row.children].indexOf(document.activeElement) + step];
    if (next) next.focus();
  });
  box.append(caption(tokens.length, [...node.text].length, known), row, detail);
  return box;
}

function caption(count, characters, known) {
  const line = element("p", "token-caption", t("tokenCount", { n: count, chars: characters }));
  if (known) {
    const scale = element("span", "scale");
    scale.append(element("span", "", t("sure")));
    for (let i = 0; i <= LEVELS.length; i += 1) {
      const step = element("i");
      step.dataset.level = i;
      scale.append(step);
    }
    scale.append(element("span", "", t("unsure")));
    line.append(scale);
  }
  return line;
}

function showDetail(detail, token) {
  detail.replaceChildren();
  detail.append(element("p", "", t("tokenBytes", { text: readable(token.bytes), bytes: hex(token.bytes) })));
  const rows = token.top?.length ? token.top : token.logprob === undefined ? [] : [token];
  const chosen = readable(token.bytes);
  const all = rows.some((row) => readable(row.bytes) === chosen) || !rows.length ? rows : [...rows, token];
  for (const other of all) {
    const line = element("p", "guess");
    line.classList.toggle("chosen", readable(other.bytes) === chosen);
    const bar = element("meter");
    Object.assign(bar, { min: 0, max: 1, value: Math.exp(other.logprob) });
    bar.setAttribute("aria-hidden", "true");
    line.append(element("span", "guess-text", readable(other.bytes)), bar, element("span", "", percent(other.logprob)));
    detail.append(line);
  }
}
