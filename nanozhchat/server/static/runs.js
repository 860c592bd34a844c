// The training page: curves and samples of a run, read again every few seconds while it goes on.

import { fetchRun, fetchRuns } from "./api.js";
import { currentLanguage, setLanguage, t } from "./strings.js";
import { byId, element } from "./view.js";

const EVERY_MS = 3000;
const CHARTS = [
  ["loss", [["train", "train/loss"], ["val", "val/loss"]]],
  ["bpb", [["train", "train/bpb"], ["val", "val/bpb"]]],
  ["tok_per_sec", [["train", "tok_per_sec"]]],
  ["lr", [["train", "lr"]]],
];
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [480, 210, 48, 10, 12, 24];

let runs = [];
let shown = null;
let atEnd = true; // the slider follows the training

const number = (value) => {
  if (value == null) return "–";
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 0.01 || value === 0 ? 3 : undefined;
  return digits === undefined ? value.toExponential(1) : value.toLocaleString(currentLanguage(), { maximumFractionDigits: digits });
};

function clock(seconds) {
  const whole = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  return (hours ? `${hours}:` : "") + `${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

function draw(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

/** Range of the values without the first steps' spike, a little wider than they are. */
function rangeOf(series) {
  const values = series.flatMap(([, points]) => points.slice(Math.min(3, Math.floor(points.length / 10))).map(([, value]) => value));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

function chart(name, series) {
  const figure = element("figure", "chart");
  const caption = element("figcaption", "", t(`curve_${name}`));
  const legend = element("span", "legend");
  const last = Math.max(...series.map(([, points]) => points.at(-1)[0]));
  const first = Math.min(...series.map(([, points]) => points[0][0]));
  const [low, high] = rangeOf(series);
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (Math.min(value, high) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  for (let i = 0; i <= 4; i += 1) {
    const value = low + ((high - low) * i) / 4;
    svg.append(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  for (const [i, anchor] of [[0, "start"], [1, "middle"], [2, "end"]]) {
    const step = Math.round(first + ((last - first) * i) / 2);
    svg.append(draw("text", { x: x(step), y: HEIGHT - 6, "text-anchor": anchor }, step.toLocaleString()));
  }
  const said = [];
  for (const [kind, points] of series) {
    svg.append(draw("polyline", { class: kind, points: points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }));
    const words = series.length > 1 ? `${t(kind)} ${number(points.at(-1)[1])}` : number(points.at(-1)[1]);
    legend.append(element("span", kind, words), " ");
    said.push(words);
  }
  svg.setAttribute("aria-label", `${t(`curve_${name}`)}: ${said.join(", ")}`);
  caption.append(legend);
  figure.append(caption, svg);
  return figure;
}

function showRun(run, data) {
  byId("title").textContent = `${run.tag} · ${t(`source_${run.stage}`)}`;
  byId("state").className = run.active ? "live" : "lead";
  const when = new Date(run.updated * 1000).toLocaleString(currentLanguage());
  const left = run.active && data.last.eta_s ? ` · ${t("left", { time: clock(data.last.eta_s) })}` : "";
  byId("state").textContent = run.active ? t("active") + left : when;
  const { last } = data;
  const best = (key) => (data.curves[key] ? Math.min(...data.curves[key].map(([, value]) => value)) : null);
  const figures = [[t("steps"), number(last.step)], [`${t("curve_loss")} · ${t("train")}`, number(last["train/loss"])],
    [`${t("curve_bpb")} · ${t("best_val")}`, number(best("val/bpb"))], [t("curve_tok_per_sec"), number(last.tok_per_sec)]];
  byId("figures").replaceChildren(...figures.map(([name, value]) => {
    const box = element("div");
    box.append(element("dt", "", name), element("dd", "", value));
    return box;
  }));
  byId("charts").replaceChildren(...CHARTS.flatMap(([name, wanted]) => {
    const series = wanted.filter(([, key]) => data.curves[key]).map(([kind, key]) => [kind, data.curves[key]]);
    return series.length ? [chart(name, series)] : [];
  }));
  showSamples(data.samples);
}

function showSamples(samples) {
  const steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => a - b);
  const slider = byId("when");
  slider.hidden = steps.length < 2;
  slider.max = Math.max(0, steps.length - 1);
  if (atEnd) slider.value = slider.max;
  const step = steps[slider.valueAsNumber];
  byId("samples-help").textContent = steps.length ? `${t("samplesHelp")} · ${t("step", { n: step })}` : t("noSamples");
  slider.setAttribute("aria-valuetext", t("step", { n: step ?? 0 }));
  byId("samples").replaceChildren(...samples.filter((sample) => sample.step === step).map(({ prompt, text }) => {
    const quote = element("blockquote");
    quote.lang = "zh-CN";
    quote.append(element("b", "", prompt ?? ""), text ?? "");
    return quote;
  }));
}

async function refresh() {
  try {
    runs = await fetchRuns();
  } catch (error) {
    byId("lead").textContent = error.status ? error.message : t("errorOffline");
    return;
  }
  const choice = byId("run");
  const wanted = choice.value || location.hash.slice(1);
  const ids = runs.map((run) => `${run.stage}/${run.tag}`);
  if ([...choice.options].map((option) => option.value).join() !== ids.join()) {
    choice.replaceChildren(...runs.map((run, i) => Object.assign(element("option", "", `${run.tag} · ${t(`source_${run.stage}`)}`), { value: ids[i] })));
    if (ids.includes(wanted)) choice.value = wanted;
  }
  choice.hidden = byId("shown").hidden = runs.length === 0;
  byId("lead").textContent = t(runs.length ? "runsText" : "noRuns");
  const run = runs[ids.indexOf(choice.value)];
  if (!run) return;
  shown = await fetchRun(run.stage, run.tag).catch(() => shown);
  if (shown) showRun(run, shown);
}

byId("run").addEventListener("change", () => {
  location.hash = byId("run").value;
  atEnd = true;
  refresh();
});
byId("when").addEventListener("input", () => {
  atEnd = byId("when").value === byId("when").max;
  showSamples(shown.samples);
});

setLanguage(document.documentElement.lang);
refresh();
setInterval(() => document.hidden || refresh(), EVERY_MS);
