// The list of chats: search, open, rename, delete.

import { mark, t } from "./strings.js";
import { button, byId, element } from "./view.js";

const DAY_MS = 86_400_000;

/** Whether a chat holds the text somewhere. */
function holds(chat, text) {
  if (!text) return true;
  const all = [chat.title, ...Object.values(chat.nodes).map((node) => node.text)].join("\n").toLowerCase();
  return all.includes(text);
}

function group(chat) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (chat.updated >= midnight) return "today";
  return chat.updated >= midnight - 6 * DAY_MS ? "thisWeek" : "earlier";
}

export class Sidebar {
  /** host: open(id), rename(id, title), remove(id), isSendKey. */
  constructor(host) {
    this.host = host;
    this.chats = [];
    byId("search").addEventListener("input", () => this.draw());
    byId("sidebar").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && document.body.classList.contains("sidebar-open")) this.toggle(false);
    });
    byId("open-sidebar").addEventListener("click", () => this.toggle());
    byId("shade").addEventListener("click", () => this.toggle(false));
  }

  /** Show the sidebar where there is no room for it beside the chat, or hide it where there is. */
  toggle(open = !document.body.classList.contains("sidebar-open")) {
    document.body.classList.toggle("sidebar-open", open);
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
    if (open) byId("new-chat").focus();
    else if (byId("sidebar").contains(document.activeElement)) byId("open-sidebar").focus();
  }

  show(chats, current, busy) {
    Object.assign(this, { chats, current, busy });
    this.draw();
  }

  draw() {
    const wanted = byId("search").value.trim().toLowerCase();
    const found = this.chats.filter((chat) => holds(chat, wanted)).slice(0, 300);
    const list = byId("chats");
    const focused = document.activeElement?.closest?.("[data-chat]")?.dataset.chat;
    list.replaceChildren();
    let heading = null;
    let rows = null;
    for (const chat of found) {
      if (group(chat) !== heading) {
        heading = group(chat);
        rows = element("ul");
        list.append(mark(element("h2", "", ""), { text: heading }), rows);
      }
      rows.append(this.#row(chat));
    }
    if (!found.length) list.append(mark(element("p", "empty"), { text: wanted ? "nothingFound" : "noChats" }));
    if (focused) list.querySelector(`[data-chat="${CSS.escape(focused)}"] .open`)?.focus();
  }

  #row(chat) {
    const row = element("li", "chat");
    row.dataset.chat = chat.id;
    const open = element("button", "open");
    open.type = "button";
    open.append(element("span", "", chat.title || t("untitled")));
    if (this.busy.has(chat.id)) open.append(mark(element("span", "busy"), { label: "thinking" }));
    if (chat.id === this.current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.host.open(chat.id));
    const rename = button("pencil", { label: "rename" }, () => this.#rename(row, chat), "tool small");
    const drop = button("trash", { label: "deleteChat" }, () => this.host.remove(chat.id), "tool small");
    row.append(open, rename, drop);
    return row;
  }

  #rename(row, chat) {
    const input = mark(Object.assign(element("input"), { value: chat.title, maxLength: 80 }), { label: "rename" });
    let ended = false;
    const end = (keep) => {
      if (ended) return;
      ended = true;
      if (keep && input.value.trim()) this.host.rename(chat.id, input.value.trim());
      else this.draw();
      byId("chats").querySelector(`[data-chat="${CSS.escape(chat.id)}"] .open`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") end(false);
      if (["Enter", "Escape"].includes(event.key)) event.stopPropagation();
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.select();
  }
}
