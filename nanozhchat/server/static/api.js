// The server's API: one function per route. Failures are ApiFailure, except an abort by the caller.

import { EventParser } from "./sse.js";

export class ApiFailure extends Error {
  /** status 0 = no connection. retryAfter: seconds, 0 if the server named none. */
  constructor(status, code, message, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure(0, "offline", error.message);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const { code = "unknown", message = response.statusText } = body.error ?? {};
  throw new ApiFailure(response.status, code, message, Number(response.headers.get("retry-after")) || 0);
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** Return the served model: id, source, step, context_length, sampling ranges. */
export async function fetchModel(key) {
  const response = await request("/v1/models", { headers: headers(key) });
  return (await response.json()).data[0];
}

/** Stream an answer. onText(piece) is called as text arrives; returns {finishReason, usage, timings}. */
export async function streamAnswer({ messages, sampling, key, signal, onText }) {
  const body = JSON.stringify({ messages, ...sampling, stream: true, stream_options: { include_usage: true } });
  const type = { "content-type": "application/json" };
  const response = await request("/v1/chat/completions", {
    method: "POST", headers: { ...type, ...headers(key) }, body, signal,
  });
  const result = { finishReason: null, usage: null, timings: null };
  const parser = new EventParser();
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
  if (choice?.delta?.content) onText(choice.delta.content);
  result.finishReason = choice?.finish_reason ?? result.finishReason;
  result.usage = chunk.usage ?? result.usage;
  result.timings = chunk.timings ?? result.timings;
}
