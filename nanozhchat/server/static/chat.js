// A chat as data: a tree of messages, one branch of it shown. No DOM, no network.

const FORMAT = "nanozhchat-chats";
const VERSION = 1;
const STATUSES = ["done", "cut", "stopped", "failed", "interrupted"];
const TITLE_CHARS = 24;

export function newChat() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, title: "", created: now, updated: now,
    system: "", nodes: {}, next: 1, child: null, skip: 0 };
}

/** Add a message under `parent` (null = first) and show its branch. status: see STATUSES, or "streaming". */
export function addNode(chat, parent, role, text, more = {}) {
  const node = { id: String(chat.next++), parent: parent?.id ?? null, role, text, status: "done", child: null, ...more };
  chat.nodes[node.id] = node;
  choose(chat, node);
  if (!chat.title && role === "user") chat.title = [...text.replace(/\s+/g, " ").trim()].slice(0, TITLE_CHARS).join("");
  chat.updated = Date.now();
  return node;
}

/** Show the branch that `node` is on. */
export function choose(chat, node) {
  const holder = node.parent === null ? chat : chat.nodes[node.parent];
  holder.child = node.id;
}

/** The messages shown, first to last. */
export function shown(chat) {
  const path = [];
  for (let id = chat.child; id !== null; id = chat.nodes[id].child) path.push(chat.nodes[id]);
  return path;
}

/** The versions of a message, itself among them. */
export function variants(chat, node) {
  return Object.values(chat.nodes).filter((n) => n.parent === node.parent && n.role === node.role);
}

/** Remove a message and all that follows it; returns what to give `restore`. */
export function remove(chat, node) {
  const before = structuredClone({ nodes: chat.nodes, child: chat.child });
  const doomed = [node.id];
  for (const id of doomed) {
    doomed.push(...Object.values(chat.nodes).filter((n) => n.parent === id).map((n) => n.id));
    delete chat.nodes[id];
  }
  const left = Object.values(chat.nodes).filter((n) => n.parent === node.parent);
  (node.parent === null ? chat : chat.nodes[node.parent]).child = left.at(-1)?.id ?? null;
  return before;
}

/** Answered turns before the one that `node` answers, oldest first, each [question, answer]. */
export function turnsBefore(chat, node) {
  const path = [];
  for (let id = node.parent; id !== null; id = chat.nodes[id].parent) path.unshift(chat.nodes[id]);
  const turns = [];
  for (let i = 0; i + 1 < path.length; i += 2) if (path[i + 1].text) turns.push([path[i], path[i + 1]]);
  return turns;
}

/** Messages to send so that the model writes `node`: earlier ones without failed turns and those left out, in order. */
export function messagesFor(chat, node) {
  const sent = [...turnsBefore(chat, node).slice(chat.skip).flat(), chat.nodes[node.parent]];
  const messages = sent.map(({ role, text }) => ({ role, content: text }));
  return chat.system.trim() ? [{ role: "system", content: chat.system }, ...messages] : messages;
}

/** Tokens of the conversation shown, by the server's last count; null before the first answer. */
export function tokensUsed(chat) {
  return shown(chat).findLast((node) => node.usage)?.usage.total_tokens ?? null;
}

/** Mark answers that were being written when the page was left. */
export function settle(chat) {
  for (const node of Object.values(chat.nodes)) if (node.status === "streaming") node.status = "interrupted";
  return chat;
}

export function toMarkdown(chat, names) {
  const parts = [`# ${chat.title || names.untitled}`];
  if (chat.system.trim()) parts.push(`## ${names.system}`, chat.system);
  for (const node of shown(chat)) parts.push(`## ${names[node.role]}`, node.text);
  return `${parts.join("\n\n")}\n`;
}

export function toJson(chats) {
  return JSON.stringify({ format: FORMAT, version: VERSION, chats }, null, 1);
}

/** Read an export; throws Error with message "format" or "version" if it is not one of ours. Text stays text. */
export function fromJson(text) {
  let data = null;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("format");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.chats)) throw new Error("format");
  if (data.version !== VERSION) throw new Error("version");
  return data.chats.map(readChat);
}

function readChat(given) {
  const chat = newChat();
  const string = (value) => (typeof value === "string" ? value : "");
  Object.assign(chat, { title: string(given.title), system: string(given.system) });
  if (Number.isFinite(given.created)) chat.created = given.created;
  if (Number.isFinite(given.updated)) chat.updated = given.updated;
  if (Number.isInteger(given.skip) && given.skip > 0) chat.skip = given.skip;
  const ids = new Map([[null, null]]);
  const nodes = Object.values(Object(given.nodes)).sort((a, b) => Number(a.id) - Number(b.id));
  for (const node of nodes) {
    const parent = ids.get(node.parent ?? null);
    const expected = parent === null ? "user" : parent?.role === "user" ? "assistant" : "user";
    if (parent === undefined || node.role !== expected || typeof node.text !== "string") throw new Error("format");
    const status = STATUSES.includes(node.status) ? node.status : "interrupted";
    ids.set(node.id, addNode(chat, parent, node.role, node.text, { status, model: string(node.model), ...measured(node) }));
  }
  for (const node of nodes) if (ids.get(node.child)) choose(chat, ids.get(node.child));
  if (ids.get(given.child)) choose(chat, ids.get(given.child));
  if (Number.isFinite(given.updated)) chat.updated = given.updated;
  if (given.title === "") chat.title = "";
  return chat;
}

/** Counts and speeds of an imported message, numbers only. */
function measured(node) {
  const numbers = (value) => Object.fromEntries(Object.entries(Object(value)).filter(([, n]) => Number.isFinite(n)));
  return { usage: node.usage ? numbers(node.usage) : null, timings: node.timings ? numbers(node.timings) : null };
}
