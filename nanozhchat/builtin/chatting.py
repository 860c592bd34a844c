"""Talk about the model itself (identity), small talk, and descriptions of people and places."""

from __future__ import annotations

from functools import cache

from nanozhchat.builtin.world import Item, Rng, combos, lines, names, people, places, sections, things, words

IDENTITY = ("name", "maker", "ability", "human", "learned", "limit", "size")
# What a right answer about each aspect must say; one of the words is enough.
IDENTITY_RIGHT = {
    "name": ("nanozhchat",),
    "maker": ("开源项目nanozhchat",),
    "ability": ("讲故事", "做算术"),
    "human": ("不是人", "程序"),
    "learned": ("中文短文",),
    "limit": ("出错",),
    "size": ("很小", "小的模型"),
}
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
    return Item(
        "identity", "", ask, answer, f"identity:{ask}", "any", IDENTITY_RIGHT[aspect], (), True, 1 / len(IDENTITY)
    )


@cache
def _chat() -> tuple[tuple[str, str], ...]:
    return tuple((ask, answer) for ask, answer in (line.split(" | ") for line in lines("chat", "chat")))


def introduce(rng: Rng, held: bool) -> tuple[str, str, str]:
    """Return how somebody says their name, the reply, and the name."""
    name = rng.pick(names(held))
    return rng.pick(INTRODUCTIONS).format(n=name), f"你好，{name}！很高兴认识你。", name


def draw_chat(rng: Rng, held: bool) -> Item:
    """Return one exchange of small talk; not evaluated, so it has no held-out half of its own."""
    if rng.random() < 0.2:
        ask, answer, name = introduce(rng, held)
        return Item("chat", "", ask, answer, "chat:" + name, "any", (name,))
    ask, answer = rng.pick(_chat())
    return Item("chat", "", ask, answer, "chat:" + ask, "any", (answer,))


def describe_person(rng: Rng, held: bool) -> str:
    """Return a portrait of an invented person."""
    name, he = rng.pick(people(held))
    job, age, (t, m) = rng.pick(words("names", "jobs")), 18 + rng.below(60), rng.pick(things("carry"))
    trait, other, manner = *rng.two(words("chat", "character")), rng.pick(words("chat", "manner"))
    hobby, second = rng.two(words("chat", "hobby"))
    place = rng.pick(places(held, "village_kind"))
    friend = rng.pick(people(held)).name
    colour = rng.pick(words("things", "colours"))
    openers = (
        f"{name}今年{age}岁，是{place}的一名{job}。",
        f"{place}有一名{job}，名叫{name}，今年{age}岁。",
        f"{name}住在{place}，是一名{job}，今年{age}岁。",
        f"说起{place}的{job}{name}，认识{he}的人都会点头。",
    )
    traits = (
        f"{he}为人{trait}，做事{manner}。",
        f"大家都说{he}又{trait}又{other}。",
        f"{he}性格{trait}，做起事来{manner}。",
    )
    hobbies = (
        f"空闲的时候，{he}喜欢{hobby}，有时也{second}。",
        f"{he}最大的爱好是{hobby}，朋友{friend}却爱{second}。",
        f"到了周末，{he}常和{friend}一起{hobby}。",
    )
    objects = (
        f"{he}出门时总带着一{m}{colour}的{t}，那是{friend}送的。",
        f"家里那{m}{colour}的{t}，{he}用了好多年也舍不得换。",
        f"前几天，{he}新买了一{m}{colour}的{t}，高兴得一路哼着歌回家。",
    )
    return rng.pick(openers) + rng.pick(traits) + rng.pick(hobbies) + rng.pick(objects)


def describe_place(rng: Rng, held: bool) -> str:
    """Return a description of an invented place."""
    place = rng.pick(places(held, "village_kind"))
    scenes = lines("chat", "scenery")
    a, b = rng.two(scenes)
    c = rng.pick(scenes)
    city, far = rng.pick(words("names", "cities")), 10 + rng.below(190)
    openers = (
        f"{place}离{city}有{far}公里。",
        f"{place}不大，住着{far}户人家。",
        f"从{city}坐车去{place}，要走{far}公里。",
        f"{place}是个安静的地方，全村只有{far}户人家。" if place[-1] == "村" else f"{place}是个安静的地方。",
    )
    more = f"{c}。" if c not in (a, b) else ""
    return f"{rng.pick(openers)}{a}。{b}。{more}{rng.pick(lines('chat', 'people_say'))}"


def describe(rng: Rng, held: bool) -> str:
    """Return one description."""
    return describe_person(rng, held) if rng.random() < 0.6 else describe_place(rng, held)


def everyday(rng: Rng, held: bool) -> str:
    """Return a short everyday talk between two people: at the shop, on the way, making a date."""
    a, b = rng.two(names(held))
    t, m = rng.pick(things("carry"))
    place, colour = rng.pick(places(held)), rng.pick(words("things", "colours"))
    price, count = 2 + rng.below(8), 2 + rng.below(8)
    day, activity = rng.pick(words("reading", "days")), rng.pick(words("reading", "verbs"))
    other = rng.pick(words("reading", "days"))
    steps, direction = 2 + rng.below(90), rng.pick(("左", "右"))
    talks = (
        f"{a}：请问，这{m}{colour}的{t}多少钱？\n{b}：一{m}{price}元。\n{a}：我买{count}{m}。\n"
        f"{b}：{price}乘{count}等于{price * count}，一共{price * count}元。",
        f"{a}：请问，去{place}怎么走？\n{b}：往前走{steps}步，再向{direction}拐就到了。\n{a}：谢谢你！\n{b}：不客气。",
        f"{a}：{b}，{day}我们一起去{place}{activity}，好吗？\n{b}：好啊，我{day}正好有空。\n{a}：那我们在{place}门口见。\n"
        f"{b}：好的，{day}见。",
        f"{a}：{b}，{day}你能陪我去{place}{activity}吗？\n{b}：对不起，{day}我有事，{other}可以吗？\n{a}：可以，那就{other}吧。"
        if day != other
        else f"{a}：{b}，你会{activity}吗？\n{b}：会一点，{day}我教你。\n{a}：太好了，谢谢你！",
        f"{a}：你看见我的{t}了吗？\n{b}：是不是那{m}{colour}的？\n{a}：对，就是它。\n{b}：我在{place}看见过，你快去找找吧。",
        f"{a}：{b}，这{m}{colour}的{t}送给你。\n{b}：真好看，谢谢你，{a}！\n{a}：不用谢，祝你天天开心。",
    )
    return rng.pick(talks)
