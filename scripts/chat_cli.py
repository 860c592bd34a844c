"""Talk to a model on the terminal, or answer once with -p."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanozhchat import cli

if TYPE_CHECKING:
    from nanozhchat.chat import Chat

TEXTS = {
    "zh": {"hello": "{0.name}（{0.source}，第 {0.step} 步）。输入 /help 看命令，Ctrl-C 停止回答，Ctrl-D 退出。",
           "latest": "最近的模型：{0.name}（{0.source}，第 {0.step} 步）；换一个用 --model-tag",
           "help": "/new 新对话　/help 命令　/quit 退出", "unknown": "没有这个命令；/help 看有哪些", "new": "新对话。",
           "you": "你：", "model": "答：", "stopped": "（已停止）", "bye": "再见。",
           "forgot": "（对话长了，最早的 {n} 轮模型看不到了）", "base": "\n它还没有微调：只会接着写，不会回答。",
           "long": "没有回答：这句话有 {used} 个词元，模型最多能看 {context} 个；请缩短再问"},
    "en": {"hello": "{0.name} ({0.source}, step {0.step}). /help lists commands, Ctrl-C stops an answer, Ctrl-D quits.",
           "latest": "the latest model: {0.name} ({0.source}, step {0.step}); --model-tag takes another",
           "help": "/new new chat   /help commands   /quit quit", "unknown": "no such command; /help lists them",
           "new": "New chat.", "you": "You: ", "model": "Model: ", "stopped": " (stopped)", "bye": "Bye.",
           "forgot": "(the model no longer sees the first {n} turn(s))", "base": "\nNot fine-tuned: it continues text.",
           "long": "no answer: this question has {used} tokens, the model sees {context} at most; shorten it"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChatCliArgs(cli.ModelFlags):
    prompt: str | None = cli.opt(None, "answer this once, and no more; - = what comes through a pipe", group="talk",
                                 flag="-p")  # fmt: skip
    system: str | None = cli.opt(None, "system message", group="talk")
    lang: str = cli.opt("zh", "language of the prompts", group="talk", choices=("zh", "en"))
    temperature: float = cli.opt(0.5, "0 = always the likeliest token", group="sampling")
    top_k: int = cli.opt(0, "choose among this many tokens; 0 = all", group="sampling")
    top_p: float = cli.opt(0.95, "choose among tokens of this much probability", group="sampling")
    repetition_penalty: float = cli.opt(1.0, "above 1 = repeat less", group="sampling")
    no_repeat_ngram: int = cli.opt(0, "never say so many tokens in a row twice; 0 = may", group="sampling")
    max_tokens: int = cli.opt(512, "most tokens in an answer", group="sampling")
    seed: int | None = cli.opt(None, "same seed, same answer; none = a new one each time", group="sampling")

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("-p is empty; pass the question, or leave -p out to talk")
        if self.system is not None and self.source == "base":
            raise ValueError("--system does not go with --source=base, which continues plain text")


def clean(text: str) -> str:
    """Replace bytes that were not UTF-8 on the command line or terminal."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def prompt_for(chat: Chat, system: str | None, history: list[dict[str, str]], text: str) -> Any:
    """Return what `Chat.stream` takes: plain text for a base model, else the conversation."""
    if chat.source == "base":
        return text
    first = [{"role": "system", "content": clean(system)}] if system else []
    return [*first, *history, {"role": "user", "content": text}]


def forget(chat: Chat, system: str | None, history: list[dict[str, str]], text: str) -> int:
    """Drop the oldest turns until a quarter of the context is free for the answer; returns how many were dropped."""
    turns = len(history)
    while history and 4 * len(chat.prompt_ids(prompt_for(chat, system, history, text))) > 3 * chat.engine.context:
        del history[:2]
    return (turns - len(history)) // 2


def say_answer(chat: Chat, prompt: Any, texts: dict[str, str], sampling: dict[str, Any]) -> tuple[str, bool]:
    """Print an answer as it comes; return it and whether Ctrl-C stopped it. Raises ValueError if it has no room."""
    if (used := len(chat.prompt_ids(prompt))) >= (context := chat.engine.context):
        raise ValueError(texts["long"].format(used=used, context=context))
    cancel, pieces = threading.Event(), []
    before = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        for piece in chat.stream(prompt, cancel=cancel, **sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    return "".join(pieces), cancel.is_set()


def talk(chat: Chat, args: ChatCliArgs, sampling: dict[str, Any]) -> None:
    """Read questions and answer them until the input ends."""
    texts, history = TEXTS[args.lang], list[dict[str, str]]()
    print(texts["hello"].format(chat) + texts["base"] * (chat.source == "base"))
    while True:
        try:
            text = clean(input(f"\n{texts['you']}")).strip()
        except KeyboardInterrupt:  # nothing is being answered: a fresh line, as in a shell
            continue
        except EOFError:
            break
        sys.stdout.write("" if sys.stdin.isatty() else f"{text}\n")  # a pipe does not show what comes through it
        if text.startswith(("/", "／")):
            if (command := text[1:].lower()) in ("quit", "exit"):
                break
            if command == "new":
                history.clear()
            print(texts[command if command in ("new", "help") else "unknown"])
            continue
        if not text:
            continue
        if n := forget(chat, args.system, history, text) if chat.source != "base" else 0:
            print(texts["forgot"].format(n=n))
        sys.stdout.write(texts["model"])
        try:
            answer, stopped = say_answer(chat, prompt_for(chat, args.system, history, text), texts, sampling)
        except ValueError as error:
            print(error)
            continue
        print(texts["stopped"] if stopped else "")
        history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    print(f"\n{texts['bye']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, then answer -p or talk."""
    args = cli.parse(ChatCliArgs, argv)
    from nanozhchat import chat as models
    from nanozhchat.sampling import SamplingParams

    cli.prepare_terminal()
    sampling = {n: getattr(args, n) for n in SamplingParams.__dataclass_fields__ if hasattr(args, n)}
    SamplingParams(**sampling)  # a bad value shows before the model is loaded
    chat = models.load(**args.where())
    if args.prompt is None:
        talk(chat, args, sampling)
        return
    texts, question = TEXTS[args.lang], clean(sys.stdin.read() if args.prompt == "-" else args.prompt).strip()
    if not question:
        raise ValueError("nothing came through the pipe; write the question into it, or after -p")
    if not args.model_tag:
        sys.stderr.write(texts["latest"].format(chat) + texts["base"] * (chat.source == "base") + "\n")
    _, stopped = say_answer(chat, prompt_for(chat, args.system, [], question), texts, sampling)
    print()
    if stopped:
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
