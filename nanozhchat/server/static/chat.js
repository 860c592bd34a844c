// The conversation in memory: a list of turns, each a question and its answer. No DOM here.

/** status: "streaming", "done", "cut" (length limit), "stopped" (by the user), "failed" (error). */
export function newTurn(question) {
  return { question, answer: "", status: "streaming", usage: null, timings: null };
}

/** Messages to send for `turn`: what came before it, failed turns left out, then its question. */
export function messagesFor(turns, turn) {
  const earlier = turns.slice(0, turns.indexOf(turn)).filter((t) => t.status !== "failed");
  const messages = earlier.flatMap((t) => [
    { role: "user", content: t.question },
    { role: "assistant", content: t.answer },
  ]);
  return [...messages, { role: "user", content: turn.question }];
}
