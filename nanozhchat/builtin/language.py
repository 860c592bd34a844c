"""Sentences: sorting words, feelings, extracting, and rewriting (politer, 把 and 被, shorter, longer)."""

from functools import cache

from nanozhchat.builtin import reading
from nanozhchat.builtin.world import Item, Rng, combos, is_held_out, lines, names, places, things, words

SLOT_LABELS = {"p": "地点", "t": "东西", "c": "颜色", "k": "价钱", "a": "年龄", "j": "职业", "d": "时间", "v": "事情"}
SLOT_UNITS = {"k": "元", "a": "岁"}
FEELINGS = {"glad": ("高兴", "难过"), "sad": ("难过", "高兴")}


def _lines(section: str) -> tuple[str, ...]:
    return lines("language", section)


@cache
def kinds() -> dict[str, tuple[str, ...]]:
    """Return kind -> its members."""
    return {kind: tuple(members) for kind, *members in map(str.split, _lines("kinds"))}


def draw_kind(rng: Rng, held: bool) -> Item:
    """Ask which kind a thing is of."""
    members, asks = [(member, kind) for kind, some in kinds().items() for member in some], _lines("ask_kind")
    i, j = rng.pick(combos(tuple(f"kind:{member}" for member, _ in members), asks, held))
    word, kind = members[i]
    other = rng.pick(tuple(k for k in kinds() if k != kind))
    ask = asks[j].format(w=word, k=kind, o=other)
    return Item("classify", "", ask, f"{word}属于{kind}。", f"kind:{word}|{j}", "contains", (kind,), (f"属于{other}",))


def draw_odd(rng: Rng, held: bool) -> Item:
    """Ask which of three things is of another kind."""
    while True:
        kind, other = rng.two(tuple(kinds()))
        x, y = rng.two(kinds()[kind])
        z = rng.pick(kinds()[other])
        key = f"odd:{min(x, y)},{max(x, y)},{z}"
        if is_held_out(key) is held:
            break
    rng.shuffle(shown := [x, y, z])
    ask = rng.pick(_lines("ask_odd")).format(**dict(zip("xyz", shown)), k=kind)
    return Item("classify", "", ask, f"{z}不是{kind}。", key, "contains", (z + "不是",))


def draw_feeling(rng: Rng, held: bool) -> Item:
    """Ask how somebody feels in a situation."""
    mood = rng.pick(tuple(FEELINGS))
    situations, asks = _lines(mood), _lines("ask_feeling")
    i, j = rng.pick(combos(situations, asks, held))
    n, (t, m) = rng.pick(names(held)), rng.pick(things("carry"))
    told = situations[i].format(n=n, h=n, t=t, m=m, p=rng.pick(places(held)))
    right, wrong = FEELINGS[mood]
    ask, answer = asks[j].format(n=n), f"{n}很{right}。"
    return Item("classify", told + "。", ask, answer, f"{told}|{j}", "contains", (right,), (wrong,))


def draw_classify(rng: Rng, held: bool) -> Item:
    """Ask to sort a thing, to find the odd one out, or to name a mood."""
    return rng.pick((draw_kind, draw_odd, draw_feeling))(rng, held)._replace(chance=0.4)


def draw_extract(rng: Rng, held: bool) -> Item:
    """Ask to list who, where, what out of a sentence."""
    passage = reading.draw_passage(rng, held)
    event = passage.events[0]
    told = rng.pick(reading.schema(passage.kind).says).format(**event)
    rng.shuffle(slots := [slot for slot in event if slot in SLOT_LABELS])
    wanted = {SLOT_LABELS[s]: f"{event[s]}{SLOT_UNITS.get(s, '')}" for s in slots[: 1 + rng.below(2)]}
    found = [f"人名：{event['n']}", *(f"{label}：{value}" for label, value in wanted.items())]
    ask = rng.pick(_lines("ask_extract")).format(slots="和".join(wanted))
    return Item("extraction", told, ask, "；".join(found) + "。", "extract:" + told, "contains", tuple(found))


def draw_rewrite(rng: Rng, held: bool) -> Item:
    """Ask to say a sentence politer, with 把 or 被, shorter, or longer."""
    n, p, c = rng.pick(names(held)), rng.pick(places(held)), rng.pick(words("things", "colours"))
    t, m = rng.pick(things("carry"))
    kind = rng.pick(("polite", "ba", "bei", "short", "long"))
    wrong: tuple[str, ...] = ()
    rule, asks, key = "contains", _lines("ask_" + kind), "rewrite:" + n
    j = rng.below(len(asks))
    if kind == "polite":
        i, j = rng.pick(combos(_lines("requests"), asks, held))
        said, key = _lines("requests")[i].format(n=n, p=p, t=t, m=m), f"polite:{i}|{j}"
        answer = f"请您{said}，好吗？"
        right: tuple[str, ...] = ("请", said)
    elif kind in ("ba", "bei"):
        deed = rng.pick(words("language", "deeds"))
        both = f"{n}把{t}{deed}", f"{t}被{n}{deed}"
        said, answer = both if kind == "bei" else both[::-1]
        right, answer = (answer,), answer + "。"
    else:
        act, day = rng.pick(words("language", "acts")), rng.pick(words("reading", "days"))
        brief, full = f"{n}{act}{t}。", f"{day}，{n}在{p}{act}一{m}{c}的{t}。"
        said, answer = (full, brief) if kind == "short" else (brief, full)
        right, wrong = ((brief[:-1],), (p,)) if kind == "short" else ((n, act, t, brief), ())
        rule = "contains" if kind == "short" else "longer"
    return Item("rewriting", "", asks[j].format(w=said.rstrip("。")), answer, key, rule, right, wrong)
