// Wires the page: input -> api -> chat -> view.

import { ApiFailure, fetchModel, streamAnswer } from "./api.js";
import { messagesFor, newTurn } from "./chat.js";
import { Settings } from "./settings.js";
import { currentLanguage, setLanguage, t } from "./strings.js";
import { Banner, Follower, TurnView, element } from "./view.js";

const byId = (id) => document.getElementById(id);
const input = byId("input");
const settings = new Settings();
const banner = new Banner(byId("banner"), byId("banner-text"), byId("banner-action"), byId("banner-close"));
const follower = new Follower(byId("stage"), byId("jump"));
const touch = matchMedia("(hover: none) and (pointer: coarse)");

let views = []; // one per turn, in order
let model = null;
let stream = null; // {turn, controller} while an answer is coming
let apiKey = "";

function showState() {
  byId("welcome").hidden = views.length > 0;
  byId("send").hidden = stream !== null;
  byId("send").disabled = input.value.trim() === "";
  byId("stop").hidden = stream === null;
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function send(text) {
  const question = text.trim();
  if (stream || !question) return false;
  const view = new TurnView(newTurn(question));
  views.push(view);
  byId("log").append(view.node);
  answer(view);
  return true;
}

async function answer(view) {
  const { turn } = view;
  const controller = new AbortController();
  Object.assign(turn, { answer: "", status: "streaming", usage: null, timings: null });
  stream = { turn, controller };
  banner.hide();
  view.update();
  showState();
  follower.toEnd();
  byId("status").textContent = t("thinking");
  try {
    const result = await streamAnswer({
      messages: messagesFor(views.map((v) => v.turn), turn),
      sampling: settings.sampling,
      key: apiKey,
      signal: controller.signal,
      onText: (piece) => {
        turn.answer += piece;
        view.schedule(() => follower.follow());
      },
    });
    Object.assign(turn, { usage: result.usage, timings: result.timings });
    turn.status = result.finishReason === "length" ? "cut" : "done";
  } catch (error) {
    turn.status = error.name === "AbortError" ? "stopped" : "failed";
    if (turn.status === "failed" && views.includes(view)) explain(error, () => answer(view));
  }
  if (stream?.turn === turn) stream = null;
  view.update();
  showState();
  follower.follow();
  if (views.includes(view)) byId("status").textContent = t(turn.status === "done" ? "answered" : turn.status);
}

function stop() {
  stream?.controller.abort();
}

function explain(error, retry) {
  if (!(error instanceof ApiFailure)) {
    banner.show(t("errorServer", { status: error.name, message: error.message }), t("retry"), retry);
  } else if (error.status === 401) {
    banner.show(t("errorKey"), t("openSettings"), askKey);
  } else if (error.status === 429) {
    banner.show(t("errorBusy"), t("retry"), retry, error.retryAfter);
  } else if (error.code === "context_length_exceeded") {
    banner.show(t("errorLong"), t("newChat"), newChat);
  } else if (error.status === 0) {
    banner.show(t(error.code === "offline" ? "errorOffline" : "errorCut"), t("retry"), retry);
  } else {
    const values = { status: error.status, message: error.message };
    banner.show(t("errorServer", values), t("retry"), retry, error.retryAfter);
  }
}

function newChat() {
  stop();
  stream = null;
  views = [];
  byId("log").replaceChildren();
  banner.hide();
  byId("status").textContent = "";
  showState();
  follower.toEnd();
  input.focus();
}

function askKey() {
  byId("key-field").hidden = false;
  byId("settings").showModal();
  byId("api-key").focus();
}

async function connect() {
  try {
    model = await fetchModel(apiKey);
    settings.build(byId("fields"), model.sampling);
    showModel();
  } catch (error) {
    explain(error, connect);
  }
}

function showModel() {
  if (!model) return;
  const source = t(`source_${model.source}`);
  byId("model").textContent = `${model.id} · ${source}`;
  byId("model").title = t("modelTip", { name: model.id, source, step: model.step, context: model.context_length });
}

function showLanguage(language) {
  input.dataset.hint = touch.matches || innerWidth < 480 ? "inputHintTouch" : "inputHint";
  setLanguage(language);
  showModel();
  settings.show();
  for (const view of views) view.update();
  const starters = ["starter1", "starter2", "starter3", "starter4"].map((key) => {
    const button = Object.assign(element("button", "starter", t(key)), { type: "button" });
    button.addEventListener("click", () => send(t(key)));
    return button;
  });
  byId("starters").replaceChildren(...starters);
}

/** Tell whether a key press means "send": never while an input method composes (Safari reports only keyCode 229). */
function isSendKey(event) {
  const plain = event.key === "Enter" && !event.shiftKey && !event.altKey && !event.repeat;
  return plain && !event.isComposing && event.keyCode !== 229 && !touch.matches;
}

function submit() {
  if (!send(input.value)) return;
  input.value = "";
  fitInput();
  showState();
}

input.addEventListener("keydown", (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  submit();
});
input.addEventListener("input", () => {
  fitInput();
  showState();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
  input.focus();
});
byId("stop").addEventListener("click", () => {
  stop();
  input.focus();
});
byId("new-chat").addEventListener("click", newChat);
byId("open-settings").addEventListener("click", () => byId("settings").showModal());
byId("settings").addEventListener("close", () => {
  const key = byId("api-key").value.trim();
  if (key === apiKey) return;
  apiKey = key;
  banner.hide();
  connect();
});
byId("reset").addEventListener("click", () => settings.reset());
byId("language").addEventListener("click", () => {
  settings.language = currentLanguage() === "en" ? "zh-CN" : "en";
  showLanguage(settings.language);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !byId("settings").open) stop();
});
window.addEventListener("pagehide", stop);

showLanguage(settings.language);
showState();
connect();
if (!touch.matches) input.focus();
