// The server's API: one function per route. Failures are ApiFailure, except an abort by the caller.

import { EventParser } from "./sse.js";

export class ApiFailure extends Error {
  /** status 0 = no connection. retryAfter: seconds, 0 if the server named none. */
  constructor(status, code, message, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

const KEY = "nanozhchat.key"; // kept as long as the tab is open

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // storage is blocked
}

/** Set the API key sent with every request; empty = none. */
export function useKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // storage is blocked: the key holds until the page is left
  }
}

async function request(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { cache: "no-store", credentials: "omit", headers, signal };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure(0, "offline", error.message);
  }
  if (response.ok) return response;
  const { error = {} } = await response.json().catch(() => ({}));
  const { code = "unknown", message = response.statusText } = error;
  throw new ApiFailure(response.status, code, message, Number(response.headers.get("retry-after")) || 0);
}

async function json(path, body) {
  return (await request(path, body)).json();
}

/** Return the models: id, tag, source, step, created, loaded, context_length, sampling ranges. */
export const fetchModels = async () => (await json("/v1/models")).data;

/** Return {status, running, queued}. */
export const fetchHealth = () => json("/health");

/** Return per text its blocks of safe HTML: [{html, end}]. */
export const renderTexts = async (texts) => (await json("/ui/render", { texts })).blocks;

/** Return {tokens, pieces: bytes of each, count}. */
export const tokenize = (model, text) => json("/tokenize", { model, text });

export const fetchRuns = async () => (await json("/ui/runs")).runs;

export const fetchRun = (stage, tag) => json(`/ui/runs/${encodeURIComponent(stage)}/${encodeURIComponent(tag)}`);

/**
 * Stream an answer. onText(piece, tokens) is called as it arrives, tokens as [{bytes, logprob, top}];
 * onPlace(n) while n requests are to go first. Returns {finishReason, usage, timings}.
 */
export async function streamAnswer({ model, messages, sampling, signal, onText, onPlace = () => {} }) {
  const extra = { stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 5 };
  const response = await request("/v1/chat/completions", { model, messages, ...sampling, ...extra }, signal);
  const result = { finishReason: null, usage: null, timings: null };
  const parser = new EventParser((comment) => {
    const place = /^place (\d+)$/.exec(comment);
    if (place) onPlace(Number(place[1]));
  });
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiFailure(0, "cut_off", error.message);
    });
    for (const data of parser.push(value)) {
      if (data === "[DONE]") return result;
      takeChunk(JSON.parse(data), result, onText);
    }
    if (done) throw new ApiFailure(0, "cut_off", "the stream ended early");
  }
}

function takeChunk(chunk, result, onText) {
  if (chunk.error) throw new ApiFailure(503, chunk.error.code, chunk.error.message);
  const choice = chunk.choices[0];
  const tokens = (choice?.logprobs?.content ?? []).map(({ bytes, logprob, top_logprobs: top }) => ({
    bytes, logprob, top: top.map((t) => ({ bytes: t.bytes, logprob: t.logprob })),
  }));
  if (choice?.delta?.content || tokens.length) onText(choice.delta.content ?? "", tokens);
  result.finishReason = choice?.finish_reason ?? result.finishReason;
  result.usage = chunk.usage ?? result.usage;
  result.timings = chunk.timings ?? result.timings;
}
