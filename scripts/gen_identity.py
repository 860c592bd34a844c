"""Write conversations in which a model says who it is and who made it: data for `scripts.chat_sft --data`."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nanozhchat import cli, files
from nanozhchat.conversation import make_conversation

HELLO = "|请问|你好，|您好，请问|嗨，|我想知道，|不好意思，|问一下，|先问个问题：|告诉我，"
ENDS = ("？", "呢？", "呀？", "啊？", "")
PARTICLES = ("吗", "吧")  # no other may follow
ASKED = {  # aspect -> the cores of its questions; {o}: another model, {w}: a name that is not its own
    "name": "你是谁|你叫什么|你叫什么名字|你的名字是什么|怎么称呼你|我该怎么叫你|你是什么模型|你是哪个模型|"
            "你是什么助手|能介绍一下你自己吗|可以做个自我介绍吗|你有名字吗|who are you|what is your name",
    "maker": "谁开发了你|你是谁开发的|你是谁做的|谁训练了你|你是谁训练出来的|你的开发者是谁|谁创造了你|"
             "你是哪家公司的|你来自哪里|你是从哪里来的|你的作者是谁|who made you|你背后的团队是谁",
    "kind": "你是真人吗|你是人吗|你是机器人吗|你是人工智能吗|你是 AI 吗|我在和真人说话吗|你有身体吗",
    "able": "你能做什么|你会做什么|你有什么用|你可以帮我做什么|你有哪些功能|你擅长什么",
    "other": "你是{o}吗|你是不是{o}|你其实是{o}吧|你和{o}是同一个吗|你用的是{o}吗",
    "wrong": "你是不是叫{w}|你叫{w}吗|你的名字是{w}吧|{w}，你在吗",
    "right": "你是{n}吗|你叫{n}吗|你就是{n}吧|你是{m}做的吗|是{m}开发了你吗",
    "user": "我是谁|我叫什么名字|你知道我是谁吗|你认识我吗",
}  # fmt: skip
SAID = {  # aspect -> answers
    "name": "我是{n}，由{m}开发。|我叫{n}，是{m}训练的中文语言模型。|你好，我是{n}，一个由{m}开发的聊天助手。|"
            "我的名字是{n}，我是{m}做的人工智能助手。|叫我{n}就好，我是{m}开发的语言模型。",
    "maker": "我是{m}开发的，名叫{n}。|{m}训练了我，我叫{n}。|我由{m}开发，名字是{n}。|我的开发者是{m}。我是{n}。",
    "kind": "我不是真人，我是{n}，{m}开发的人工智能助手。|我是人工智能，名叫{n}，没有身体，由{m}开发。|"
            "我是{n}，一个语言模型，不是人。",
    "able": "我是{n}，可以聊天、回答问题、讲故事、做简单的计算。|"
            "我能和你聊天，回答一些问题，写写短文。我是{m}开发的{n}。",
    "other": "不是，我是{n}，由{m}开发。|我不是{o}，我叫{n}，是{m}训练的模型。|"
             "不，我是{m}开发的{n}，和{o}没有关系。",
    "wrong": "不，我叫{n}。|我不叫{w}，我是{n}，由{m}开发。|你认错了，我的名字是{n}。",
    "right": "是的，我是{n}，由{m}开发。|对，我就是{m}开发的{n}。|没错，我叫{n}，开发者是{m}。",
    "user": "我不知道你的名字，你还没有告诉我。我是{n}。|你还没有告诉我你是谁。我叫{n}，很高兴认识你。",
}  # fmt: skip
OTHERS = "ChatGPT|GPT-4|文心一言|通义千问|豆包|Kimi|DeepSeek|Claude|Siri|小爱同学|智谱清言"
NAMES = "小明|小红|阿强|小度|小智|花花|大白|小冰|阿宝|米粒"
SMALL_TALK = (
    ("你好", "你好！有什么可以帮你？"), ("在吗", "我在，请说。"), ("谢谢", "不客气。"), ("早上好", "早上好！"),
    ("今天心情不错", "真好，祝你一天都开心。"), ("我有点无聊", "那我们聊聊天吧。"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenIdentityArgs:
    name: str = cli.opt("小智", "what the model is called")
    maker: str = cli.opt("一位爱好者", "who made it")
    count: int = cli.opt(2000, "conversations", least=1)
    out: str = cli.opt("identity.jsonl", "file to write")
    force: bool = cli.opt(False, "write over a file that holds something else")
    seed: int = cli.opt(0, "of the choice and order")

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.maker.strip():
            raise ValueError(f"--name={self.name!r} and --maker={self.maker!r} must not be empty")


def questions() -> list[tuple[str, str]]:
    """Every phrasing: (aspect, question with places for names)."""
    cores = [(aspect, core) for aspect, some in ASKED.items() for core in some.split("|")]
    every = product(cores, HELLO.split("|"), ENDS)
    return [(aspect, f"{hello}{core}{end}") for (aspect, core), hello, end in every
            if len(end) < 2 or not core.endswith(PARTICLES)]  # fmt: skip


def conversations(name: str, maker: str, count: int, seed: int) -> list[list[dict[str, str]]]:
    """Return `count` conversations: every phrasing before any comes again, some in several turns with small talk."""
    rng, made, pool = random.Random(seed), [], list[tuple[str, str]]()
    for _ in range(count):
        turns: list[dict[str, str]] = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if not pool:
                pool = questions()
                rng.shuffle(pool)
            aspect, question = pool.pop()
            names = {"n": name, "m": maker, "o": rng.choice([o for o in OTHERS.split("|") if o != name]),
                     "w": rng.choice([w for w in NAMES.split("|") if w != name])}  # fmt: skip
            said = [(question.format(**names), rng.choice(SAID[aspect].split("|")).format(**names))]
            said = [rng.choice(SMALL_TALK), *said] if rng.random() < 0.2 else said
            turns += [{"role": role, "content": text} for pair in said
                      for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        make_conversation(turns)
        made.append(turns)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, generate, write, say how to use it."""
    args = cli.parse(GenIdentityArgs, argv)
    made = conversations(args.name, args.maker, args.count, args.seed)
    text = "".join(json.dumps({"messages": turns}, ensure_ascii=False) + "\n" for turns in made)
    if not args.force and Path(args.out).exists() and Path(args.out).read_bytes() != text.encode():
        raise ValueError(f"{args.out} exists and holds something else; pass another --out, or --force")
    files.atomic_write(Path(args.out), text.encode())
    print(f"{len(made)} conversations of {args.name}, made by {args.maker}, in {args.out}; teach them, beside others:")
    print(f"python -m scripts.chat_sft --data {args.out}@1 builtin@9 --model-tag=TAG --save-as=NAME")


if __name__ == "__main__":
    cli.run(main)
