// Wires the page: chats, answers as they come, settings, keys.

import { ApiFailure, fetchHealth, fetchModels, streamAnswer, useKey } from "./api.js";
import * as chats from "./chat.js";
import { Menu, NAMES, parse, run } from "./commands.js";
import { Compare } from "./compare.js";
import { MessageView } from "./message.js";
import { Settings, choices } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store, recall, remember } from "./store.js";
import { currentLanguage, mark, setLanguage, t } from "./strings.js";
import { Banner, Follower, byId, confirmed, copyText, download, drawIcons, element } from "./view.js";

const SAVE_MS = 1000; // between saves of an answer that is being written
const LAST = "nanozhchat.last";
const WAITS_S = [1, 2, 4, 8, 15]; // between attempts to reach the server again
const SHORTCUTS = { new: "Ctrl+Shift+O", focus: "Shift+Esc", stop: "Esc", copy: "Ctrl+Shift+C", again: "Ctrl+Shift+R", help: "?" };

const input = byId("input");
const settings = new Settings();
const store = new Store();
const banner = new Banner(byId("banner"), byId("banner-text"), byId("banner-action"), byId("banner-close"));
const follower = new Follower(byId("stage"), byId("jump"));
const touch = matchMedia("(hover: none) and (pointer: coarse)");
const streams = new Map(); // chat id -> {controller, chat, node, saved}

let models = [];
let chat = chats.newChat();
let views = new Map(); // node id -> MessageView, of the chat shown
let reconnecting = 0;
let listing = 0;

const sidebar = new Sidebar({
  open: (id) => open(id),
  rename: (id, title) => change(id, (c) => { c.title = title; }),
  remove: removeChat,
});
const host = {
  regenerate, edit, continueAnswer, remove: removeMessage, explain, isSendKey,
  choose(node, by) {
    const all = chats.variants(chat, node);
    chats.choose(chat, all[(all.indexOf(node) + by + all.length) % all.length]);
    save(chat);
    draw();
  },
  variants: (node) => ({ index: chats.variants(chat, node).indexOf(node), count: chats.variants(chat, node).length }),
  model: () => byId("model").value || undefined,
};
const compare = new Compare({
  models: () => models, sampling: () => settings.sampling, isSendKey, describe: (error) => describe(error)[0], nameOf,
});
const menu = new Menu(input, (text) => {
  input.value = text;
  typed();
});

// --- the chat shown ---

/** Show the chat anew: after opening it, or when another branch is chosen. */
async function draw() {
  const path = chats.shown(chat);
  const before = views;
  views = new Map(path.map((node) => [node.id, before.get(node.id)?.node === node ? before.get(node.id) : new MessageView(node, host)]));
  byId("log").replaceChildren(...[...views.values()].map((view) => view.element));
  for (const view of views.values()) view.update();
  showState();
}

function showState() {
  const stream = streams.get(chat.id);
  byId("welcome").hidden = views.size > 0;
  byId("send").hidden = stream !== undefined;
  byId("send").disabled = input.value.trim() === "";
  byId("stop").hidden = stream === undefined;
  document.title = chat.title ? `${chat.title} · nanozhchat` : "nanozhchat";
  showContext();
}

function showContext() {
  const used = chats.tokensUsed(chat);
  const limit = current()?.context_length;
  byId("context").hidden = used === null || !limit;
  if (used === null || !limit) return;
  byId("context-meter").value = used / limit;
  byId("context-text").textContent = t("contextUse", { used, limit });
  byId("context").classList.toggle("full", used / limit > 0.8);
  byId("context").title = used / limit > 0.8 ? t("contextFull", { used, limit }) : "";
}

async function open(id) {
  chat = streams.get(id)?.chat ?? chats.settle(await store.get(id));
  remember(LAST, id);
  views = new Map();
  banner.hide();
  input.value = store.draft(chat.id);
  byId("system").value = chat.system;
  fitInput();
  await draw();
  await list();
  follower.toEnd();
  if (innerWidth < 900) sidebar.toggle(false);
  if (!touch.matches) input.focus();
}

function newChat() {
  chat = chats.newChat();
  views = new Map();
  remember(LAST, null);
  banner.hide();
  input.value = "";
  byId("system").value = "";
  byId("status").textContent = "";
  fitInput();
  draw();
  list();
  if (innerWidth < 900) sidebar.toggle(false);
  input.focus();
}

async function list() {
  sidebar.show(await store.all(), chat.id, streams);
}

async function save(changed) {
  await store.put(changed);
  await list();
}

async function change(id, alter) {
  const one = id === chat.id ? chat : streams.get(id)?.chat ?? (await store.get(id));
  alter(one);
  await save(one);
  showState();
}

async function removeChat(id) {
  streams.get(id)?.controller.abort();
  const gone = id === chat.id ? chat : await store.get(id);
  await store.delete(id);
  if (id === chat.id) newChat();
  await list();
  banner.show(t("deleted"), t("undo"), async () => {
    await store.put(gone);
    await open(gone.id);
  });
}

function removeMessage(node) {
  if (streams.has(chat.id)) return;
  const of = chat;
  const before = chats.remove(chat, node);
  save(chat);
  draw();
  banner.show(t("deleted"), t("undo"), () => {
    Object.assign(of, before);
    save(of);
    if (of === chat) draw();
  });
}

// --- questions and answers ---

function send(text) {
  const question = text.trim();
  if (streams.has(chat.id) || !question) return false;
  const last = chats.shown(chat).at(-1) ?? null;
  const parent = last?.role === "user" ? addAnswer(last, "failed") : last;
  answer(addAnswer(chats.addNode(chat, parent, "user", question)));
  return true;
}

function addAnswer(question, status = "streaming") {
  return chats.addNode(chat, question, "assistant", "", { status, model: host.model(), tokens: [] });
}

function regenerate(node) {
  if (streams.has(chat.id)) return;
  answer(addAnswer(chat.nodes[node.parent]));
}

function edit(node, text) {
  if (streams.has(chat.id)) return false;
  answer(addAnswer(chats.addNode(chat, node.parent === null ? null : chat.nodes[node.parent], "user", text)));
  return true;
}

function continueAnswer(node) {
  if (streams.has(chat.id)) return;
  const asked = currentLanguage() === "en" ? "Continue." : "继续。";
  const question = current()?.source === "base" ? "" : asked; // a base model goes on with the text of all turns
  const next = chats.addNode(chat, node, "user", question);
  next.continues = true;
  answer(addAnswer(next));
}

/** Stream into `node`, which may go on while another chat is shown. skipped: turns left out before it was first tried. */
async function answer(node, skipped = chat.skip) {
  const of = chat;
  let failure = null;
  const controller = new AbortController();
  const stream = { controller, chat: of, node, saved: Date.now() };
  Object.assign(node, { status: "streaming", text: "", tokens: [], usage: null, timings: null });
  streams.set(of.id, stream);
  banner.hide();
  draw();
  follower.toEnd();
  remember(LAST, of.id);
  await save(of);
  byId("status").textContent = current()?.loaded === false ? t("loadingModel") : t("thinking");
  const update = () => of === chat && views.get(node.id)?.schedule(() => follower.follow());
  try {
    const result = await streamAnswer({
      model: node.model, messages: chats.messagesFor(of, node), sampling: settings.sampling, signal: controller.signal,
      onText: (piece, tokens) => {
        node.text += piece;
        node.tokens.push(...tokens);
        node.place = 0;
        if (Date.now() - stream.saved > SAVE_MS) {
          stream.saved = Date.now();
          store.put(of);
        }
        update();
      },
      onPlace: (place) => {
        node.place = place;
        update();
      },
    });
    Object.assign(node, { usage: result.usage, timings: result.timings });
    node.status = result.finishReason === "length" ? "cut" : "done";
  } catch (error) {
    node.status = error.name === "AbortError" ? "stopped" : "failed";
    if (node.status === "failed") failure = error;
  }
  node.place = 0;
  if (streams.get(of.id) === stream) streams.delete(of.id);
  of.updated = Date.now();
  if (await store.get(of.id)) await save(of);
  if (of !== chat) return;
  views.get(node.id)?.update();
  showState();
  follower.follow();
  byId("status").textContent = t(node.status === "done" ? "answered" : node.status);
  if (failure?.code === "context_length_exceeded") dropOldest(node, skipped);
  else if (failure) explain(failure, () => of === chat && !streams.has(of.id) && answer(node));
  if (current()?.loaded === false) connect();
}

function stop() {
  streams.get(chat.id)?.controller.abort();
}

// --- what went wrong ---

/** Say an error in a sentence: [text, label of what can be done, the deed, seconds to wait]. */
function describe(error, retry) {
  if (!(error instanceof ApiFailure)) return [t("errorServer", { status: error.name, message: error.message }), t("retry"), retry];
  if (error.status === 401) return [t("errorKey"), t("openSettings"), askKey];
  if (error.status === 429) return [t("errorBusy"), t("retry"), retry, error.retryAfter];
  if (error.code === "context_length_exceeded") return [t("errorLong")];
  if (error.status === 0) return [t(error.code === "offline" ? "errorOffline" : "errorCut"), t("retry"), retry];
  return [t("errorServer", { status: error.status, message: error.message }), t("retry"), retry, error.retryAfter];
}

function explain(error, retry) {
  const [text, label, action, wait] = describe(error, retry);
  banner.show(text, action ? label : "", action, wait);
  if (error.code === "offline") reconnect();
}

/** Try again without the oldest turn. If none is left, the message itself is too long, and all of them come back. */
function dropOldest(node, skipped) {
  const continues = Boolean(chat.nodes[node.parent].continues); // without the answer to be continued it means nothing
  if (chat.skip + continues < chats.turnsBefore(chat, node).length) {
    chat.skip += 1;
    answer(node, skipped);
    banner.show(t("dropped", { n: chat.skip }));
  } else {
    chat.skip = skipped;
    save(chat);
    banner.show(t(continues ? "errorLong" : "errorTooLong"));
  }
}

/** Look for the server until it answers; what is shown stays. */
async function reconnect() {
  if (reconnecting) return;
  for (reconnecting = 1; ; reconnecting += 1) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * WAITS_S[Math.min(reconnecting, WAITS_S.length) - 1]));
    if (await fetchHealth().then(() => true, () => false)) break;
  }
  reconnecting = 0;
  if (!byId("banner").hidden && byId("banner-text").textContent === t("errorOffline")) {
    const { run: retry, action } = banner;
    banner.show(t("online"), retry ? action.textContent : "", retry);
  }
  connect();
}

function askKey() {
  byId("key-field").hidden = false;
  byId("settings").showModal();
  byId("api-key").focus();
}

// --- models and settings ---

const current = () => models.find((model) => model.id === byId("model").value);

function nameOf({ tag, source, step }) {
  return t("modelName", { tag, source: t(`source_${source}`), step });
}

async function connect() {
  try {
    models = await fetchModels();
  } catch (error) {
    explain(error, connect);
    return;
  }
  if (byId("banner-text").textContent === t("errorKey")) banner.hide();
  const wanted = byId("model").value || settings.get("model", "");
  showModels();
  if (models.some((model) => model.id === wanted)) byId("model").value = wanted;
  settings.build(current().sampling);
  showStarters();
  showState();
  for (const view of views.values()) view.update();
}

function showModels() {
  const before = byId("model").value;
  byId("model").replaceChildren(...models.map((model) => {
    const choice = Object.assign(element("option", "", nameOf(model)), { value: model.id });
    choice.title = new Date(model.created * 1000).toLocaleString(currentLanguage());
    return choice;
  }));
  if (before) byId("model").value = before;
}

function chooseModel(id) {
  byId("model").value = id;
  settings.set("model", id);
  settings.build(current().sampling);
  showStarters();
  showContext();
}

function showStarters() {
  const base = current()?.source === "base";
  mark(byId("welcome-text"), { text: base ? "welcomeBase" : "welcomeText" });
  byId("starters").replaceChildren(...[1, 2, 3, 4].map((i) => {
    const text = t(`${base ? "begin" : "starter"}${i}`);
    const choice = Object.assign(element("button", "starter", text), { type: "button", lang: "zh-CN" });
    choice.addEventListener("click", () => send(text));
    return choice;
  }));
}

function showLanguage(language) {
  settings.set("language", language);
  setLanguage(language);
  showModels();
  showStarters();
  showHints();
  sidebar.draw();
  for (const view of views.values()) view.update();
  showState();
  byId("keys").replaceChildren(
    ...Object.entries(SHORTCUTS).flatMap(([name, keys]) => [element("dt", "", keys), element("dd", "", t(`shortcut_${name}`))]),
    ...NAMES.flatMap((name) => [element("dt", "", `/${name}`), element("dd", "", t(`command_${name}`))]),
  );
}

function showHints() {
  const hint = settings.get("sendKey", "enter") === "ctrl" ? "inputHintCtrl" : "inputHint";
  mark(input, { hint: touch.matches || innerWidth < 480 ? "inputHintTouch" : hint });
}

function showTheme(theme) {
  settings.set("theme", theme);
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// --- typing ---

/** Tell whether a key press means "send": never while an input method composes (Safari reports only keyCode 229). */
function isSendKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.altKey || event.repeat) return false;
  if (event.isComposing || event.keyCode === 229) return false;
  const modified = event.ctrlKey || event.metaKey;
  return settings.get("sendKey", "enter") === "ctrl" ? modified : modified || !touch.matches;
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

const draftKey = () => (chat.child === null ? "new" : chat.id);

function typed() {
  fitInput();
  menu.update();
  store.setDraft(draftKey(), input.value);
  showState();
}

function submit() {
  const command = parse(input.value);
  const key = draftKey();
  if (command) {
    const said = run(command, commands);
    if (said) banner.show(said);
    if (said.includes(`/${command.name}`)) return; // it was not understood: leave it to be mended
  } else if (!send(input.value)) return;
  input.value = "";
  store.setDraft(key, "");
  fitInput();
  menu.close();
  showState();
}

const commands = {
  new: () => newChat(),
  clear: () => newChat(),
  set: (name, value) => settings.setSampling(name, value),
  system(text) {
    chat.system = byId("system").value = text;
    if (views.size) save(chat);
    return t("commandSystem");
  },
  model(name) {
    const found = models.find((model) => model.id === name);
    if (!found) return t("commandModel", { names: models.map((model) => model.id).join(", ") });
    chooseModel(found.id);
    return t("modelChosen", { name: nameOf(found) });
  },
  tokens: () => lastAnswer()?.toggleTokens() && "",
  compare: () => compare.open(),
  export: () => exportOne(),
  help: () => byId("help").showModal(),
};

const lastAnswer = () => [...views.values()].findLast((view) => view.node.role === "assistant");

// --- files ---

function exportOne() {
  const names = { user: t("user"), assistant: t("assistant"), system: t("system"), untitled: t("untitled") };
  download(`${chat.title || "chat"}.md`, chats.toMarkdown(chat, names), "text/markdown");
}

async function exportAll() {
  download("nanozhchat.json", chats.toJson(await store.all()), "application/json");
}

async function importFile() {
  const [file] = byId("import-file").files;
  byId("import-file").value = "";
  if (!file) return;
  try {
    const read = chats.fromJson(await file.text());
    await Promise.all(read.map((one) => store.put(one)));
    banner.show(t("imported", { n: read.length }));
    await list();
  } catch (error) {
    banner.show(t(error.message === "version" ? "importVersion" : "importFormat"));
  }
}

async function deleteAll() {
  const all = await store.all();
  if (!all.length || !(await confirmed(t("deleteAllSure", { n: all.length }), t("deleteAll")))) return;
  for (const { controller } of streams.values()) controller.abort();
  await store.clear();
  newChat();
}

// --- events ---

input.addEventListener("keydown", (event) => {
  if (menu.key(event) || !isSendKey(event)) return;
  event.preventDefault();
  submit();
});
input.addEventListener("input", typed);
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
  input.focus();
});
const clicks = {
  stop: () => { stop(); input.focus(); },
  "new-chat": newChat,
  "open-settings": () => byId("settings").showModal(),
  "open-compare": () => compare.open(),
  language: () => showLanguage(currentLanguage() === "en" ? "zh-CN" : "en"),
  reset: () => settings.reset(),
  "export-one": exportOne,
  "export-all": exportAll,
  import: () => byId("import-file").click(),
  "delete-all": deleteAll,
};
for (const [id, deed] of Object.entries(clicks)) byId(id).addEventListener("click", deed);
byId("import-file").addEventListener("change", importFile);
byId("model").addEventListener("change", () => chooseModel(byId("model").value));
byId("seed").addEventListener("change", () => {
  if (byId("seed").value === "") settings.set("seed", undefined);
  else settings.setSampling("seed", byId("seed").valueAsNumber || 0);
});
byId("system").addEventListener("change", () => {
  chat.system = byId("system").value;
  if (views.size) save(chat);
});
byId("settings").addEventListener("close", () => {
  const key = byId("api-key").value.trim();
  if (!key) return;
  useKey(key);
  connect();
});
document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const combined = (event.ctrlKey || event.metaKey) && event.shiftKey ? event.key.toLowerCase() : "";
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName);
  if (event.key === "Escape" && event.shiftKey) input.focus();
  else if (event.key === "Escape") stop();
  else if (combined === "o") newChat();
  else if (combined === "c" && lastAnswer()) copyText(lastAnswer().node.text);
  else if (combined === "r" && lastAnswer()) regenerate(lastAnswer().node);
  else if (event.key === "?" && !typing) byId("help").showModal();
  else return;
  if (event.key !== "Escape") event.preventDefault();
});
window.addEventListener("pagehide", () => {
  store.leave([...streams.values()].map((stream) => chats.settle(structuredClone(stream.chat))));
  for (const { controller } of streams.values()) controller.abort();
});

async function changedElsewhere(id) {
  clearTimeout(listing); // another tab may be importing a thousand
  listing = setTimeout(list, 200);
  if (id !== chat.id || streams.has(chat.id)) return;
  const newer = await store.get(id);
  if (newer && JSON.stringify(newer) !== JSON.stringify(chat)) banner.show(t("changedElsewhere"), t("reload"), () => open(id));
}

async function start() {
  drawIcons();
  showLanguage(settings.get("language", "zh-CN"));
  showTheme(settings.get("theme", "system"));
  choices(byId("themes"), "theme", ["system", "light", "dark"], settings.get("theme", "system"), showTheme);
  choices(byId("send-keys"), "sendKey", ["enter", "ctrl"], settings.get("sendKey", "enter"), (value) => {
    settings.set("sendKey", value);
    showHints();
  });
  const connected = connect();
  await store.open(changedElsewhere);
  if (!store.persistent) banner.show(t("storageBlocked"));
  const last = recall(LAST, null);
  if (last && (await store.get(last))) await open(last);
  else {
    input.value = store.draft("new");
    fitInput();
    await list();
  }
  showState();
  await connected;
  if (!touch.matches) input.focus();
}

start();
