// Server-sent events from bytes, however the network cuts them: inside a character, a line, or a blank line.

export class EventParser {
  #decoder = new TextDecoder("utf-8");
  #buffer = "";

  /** onComment(text): called for comments, which carry the place in line. */
  constructor(onComment = () => {}) {
    this.onComment = onComment;
  }

  /** Take a piece of the body (nothing = the end); return the data of each event completed by it. */
  push(bytes) {
    this.#buffer += bytes ? this.#decoder.decode(bytes, { stream: true }) : this.#decoder.decode();
    const events = [];
    for (;;) {
      const blank = /\r\n\r\n|\n\n|\r\r(?!$)/.exec(this.#buffer);
      if (!blank) return events;
      const data = this.#dataOf(this.#buffer.slice(0, blank.index));
      this.#buffer = this.#buffer.slice(blank.index + blank[0].length);
      if (data !== null) events.push(data);
    }
  }

  /** Join the data lines of one event; null for comments and other fields alone. */
  #dataOf(block) {
    const lines = block.split(/\r\n|\n|\r/);
    for (const line of lines) if (line.startsWith(":")) this.onComment(line.slice(1).trim());
    const data = lines.filter((line) => line === "data" || line.startsWith("data:"));
    return data.length ? data.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
  }
}
