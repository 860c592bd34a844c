"""Talk about the model itself (identity), small talk, and descriptions of people and places."""

from functools import cache

from nanozhchat.builtin.world import Item, Rng, cells, combos, lines, names, people, places, sections, things, words

# What a right answer about each aspect of the model must say; one of the words is enough.
IDENTITY = {
    "name": ("nanozhchat",), "maker": ("开源项目nanozhchat",), "ability": ("讲故事", "做算术"),
    "human": ("不是人", "程序"), "learned": ("中文短文",), "limit": ("出错",), "size": ("很小", "小的模型"),
}  # fmt: skip
GREETINGS = ("", "你好，", "你好！", "您好，", "早上好，", "晚上好，", "嗨，", "打扰一下，")
INTRODUCTIONS = ("我叫{n}。", "我是{n}。", "你好，我叫{n}。", "你好，我是{n}。", "我的名字是{n}。")
NAME_ASKS = ("我叫什么名字？", "我叫什么？", "你记得我的名字吗？", "我的名字是什么？", "还记得我是谁吗？")
CLOSINGS = ("", "谢谢。", "谢谢！", "请简单说说。", "我很好奇。", "说来听听。")


@cache
def _identity(held: bool) -> tuple[tuple[str, str], ...]:
    """Return (aspect, question) of one split: greeting x question x closing."""
    found = []
    for aspect in IDENTITY:
        asks = tuple(line[2:] for line in sections("chat")[aspect] if line[0] == "?")
        for greeting in (*GREETINGS, *lines("chat", "prefix")):
            closings = tuple(ask + closing for ask in asks for closing in CLOSINGS)
            found += [(aspect, greeting + closings[j]) for _, j in combos((f"{aspect}:{greeting}",), closings, held)]
    return tuple(found)


def draw_identity(rng: Rng, held: bool) -> Item:
    """Ask the model about itself."""
    aspect, ask = rng.pick(_identity(held))
    answer = next(line[2:] for line in sections("chat")[aspect] if line[0] == "!")
    chance = 1 / len(IDENTITY)
    return Item("identity", "", ask, answer, f"identity:{ask}", "any", IDENTITY[aspect], chance=chance)


def introduce(rng: Rng, held: bool) -> tuple[str, str, str]:
    """Return how somebody says their name, the reply, and the name."""
    name = rng.pick(names(held))
    return rng.pick(INTRODUCTIONS).format(n=name), f"你好，{name}！很高兴认识你。", name


def draw_chat(rng: Rng, held: bool) -> Item:
    """Return one exchange of small talk; not evaluated, so it has no held-out half of its own."""
    if rng.random() < 0.2:
        ask, answer, name = introduce(rng, held)
        return Item("chat", "", ask, answer, "chat:" + name, "any", (name,))
    ask, answer = cells(rng.pick(lines("chat", "chat")))
    return Item("chat", "", ask, answer, "chat:" + ask, "any", (answer,))


def describe_person(rng: Rng, held: bool) -> str:
    """Return a portrait of an invented person."""
    slots: dict[str, object] = {}
    slots["n"], slots["h"] = rng.pick(people(held))
    slots["j"], slots["y"] = rng.pick(words("names", "jobs")), 18 + rng.below(60)
    slots["t"], slots["m"] = rng.pick(things("carry"))
    slots["a"], slots["b"] = rng.two(words("chat", "character"))
    slots["v"] = rng.pick(words("chat", "manner"))
    slots["l"], slots["o"] = rng.two(words("chat", "hobby"))
    slots["p"], slots["k"] = rng.pick(places(held, "village_kind")), rng.pick(people(held)).name
    slots["c"] = rng.pick(words("things", "colours"))
    parts = [rng.pick(lines("chat", "person_" + part)) for part in ("open", "trait", "hobby", "thing")]
    return "".join(parts).format(**slots)


def describe_place(rng: Rng, held: bool) -> str:
    """Return a description of an invented place."""
    place, scenes = rng.pick(places(held, "village_kind")), lines("chat", "scenery")
    (a, b), c = rng.two(scenes), rng.pick(scenes)
    city, far = rng.pick(words("names", "cities")), 10 + rng.below(190)
    opener = rng.pick(lines("chat", "place_open"))
    if place[-1] != "村":
        opener = opener.replace("，全村只有{f}户人家", "")
    more = f"{c}。" if c not in (a, b) else ""
    return f"{opener.format(p=place, c=city, f=far)}{a}。{b}。{more}{rng.pick(lines('chat', 'people_say'))}"


def everyday(rng: Rng, held: bool) -> str:
    """Return a short everyday talk between two people: at the shop, on the way, making a date."""
    (a, b), (thing, measure) = rng.two(names(held)), rng.pick(things("carry"))
    place, colour = rng.pick(places(held)), rng.pick(words("things", "colours"))
    price, count = 2 + rng.below(8), 2 + rng.below(8)
    day, verb, other = (rng.pick(words("reading", section)) for section in ("days", "verbs", "days"))
    slots = {"a": a, "b": b, "t": thing, "m": measure, "p": place, "c": colour, "x": price, "y": count,
             "z": price * count, "d": day, "v": verb, "o": other, "s": 2 + rng.below(90),
             "r": rng.pick(("左", "右"))}  # fmt: skip
    talk = rng.pick(lines("chat", "talks"))
    if "{o}" in talk and day == other:
        talk = lines("chat", "talk_same_day")[0]
    return talk.replace("|", "\n").format(**slots)
