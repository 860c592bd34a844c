// Chats kept in the browser: IndexedDB, or memory when it is blocked. Small things: local storage.

const NAME = "nanozhchat";
const LEAVING = "nanozhchat.leaving";
const DRAFTS = "nanozhchat.drafts";

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Read JSON from local storage; `fallback` when there is none. */
export function recall(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // storage is blocked or full: it holds until the page is closed
  }
}

export class Store {
  #db = null;
  #memory = new Map();
  #others = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel(NAME);

  /** persistent: whether chats outlive the page. onChange(id): another tab changed a chat (null = many). */
  async open(onChange) {
    if (this.#others) this.#others.onmessage = ({ data }) => onChange(data);
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
      this.#db = await promised(request);
      this.#db.onversionchange = () => this.#db.close();
    } catch {
      this.#db = null;
    }
    this.persistent = this.#db !== null;
    const left = recall(LEAVING, null); // what was being written when the page was closed
    if (left && this.persistent) for (const chat of left) await this.put(chat);
    try {
      localStorage.removeItem(LEAVING);
    } catch {
      // blocked
    }
  }

  #chats(mode) {
    return this.#db.transaction("chats", mode).objectStore("chats");
  }

  /** All chats, the latest first. */
  async all() {
    const chats = this.#db ? await promised(this.#chats("readonly").getAll()) : [...this.#memory.values()];
    return chats.sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#db ? promised(this.#chats("readonly").get(id)) : this.#memory.get(id);
  }

  async put(chat) {
    if (this.#db) await promised(this.#chats("readwrite").put(chat));
    else this.#memory.set(chat.id, chat);
    this.#others?.postMessage(chat.id);
  }

  async delete(id) {
    if (this.#db) await promised(this.#chats("readwrite").delete(id));
    this.#memory.delete(id);
    this.#others?.postMessage(id);
  }

  async clear() {
    if (this.#db) await promised(this.#chats("readwrite").clear());
    this.#memory.clear();
    this.#others?.postMessage(null);
  }

  /** Keep chats without waiting: the page is going away. */
  leave(chats) {
    if (chats.length) remember(LEAVING, chats);
  }

  draft(id) {
    return recall(DRAFTS, {})[id] ?? "";
  }

  setDraft(id, text) {
    const { [id]: _, ...others } = recall(DRAFTS, {});
    remember(DRAFTS, text ? { ...others, [id]: text } : others);
  }
}
