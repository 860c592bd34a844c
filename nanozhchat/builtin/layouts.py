"""Items as text: documents in several question-and-answer layouts, and chat conversations."""

from nanozhchat.builtin import arithmetic, chatting, facts, language, reading, stories, unknown
from nanozhchat.builtin import words as word_skills
from nanozhchat.builtin.world import Draw, Item, Rng, lines, names
from nanozhchat.conversation import Conversation, Message

# How often each skill is drawn in the default mixture: what needs most examples (copying, facts) gets most.
WEIGHTED_DRAWS: dict[str, tuple[int, Draw]] = {
    "arithmetic": (26, arithmetic.draw), "reading": (18, reading.draw), "facts": (21, facts.draw),
    "antonyms": (9, word_skills.draw_antonym), "measure": (9, word_skills.draw_measure),
    "idioms": (6, word_skills.draw_idiom), "synonyms": (3, word_skills.draw_synonym),
    "pinyin": (2, word_skills.draw_pinyin), "followup": (3, word_skills.draw_followup),
    "counting": (7, word_skills.draw_count), "reversing": (14, word_skills.draw_reverse),
    "characters": (5, word_skills.draw_nth), "classify": (9, language.draw_classify),
    "rewriting": (6, language.draw_rewrite), "extraction": (8, language.draw_extract),
    "identity": (2, chatting.draw_identity), "unknown": (24, unknown.draw), "story": (7, stories.draw),
    "chat": (2, chatting.draw_chat), "repeat": (5, word_skills.draw_repeat),
}  # fmt: skip
DRAWS = {skill: draw for skill, (_, draw) in WEIGHTED_DRAWS.items()}
SKILL_WEIGHTS = {skill: weight for skill, (weight, _) in WEIGHTED_DRAWS.items()}
# Documents per part in the default mixture; stories and descriptions are several times longer than the rest.
PART_WEIGHTS: dict[str, int] = {
    "stories": 8, "descriptions": 1, "dialogues": 6, "facts": 22, "arithmetic": 22, "reading": 19, "words": 36,
    "sentences": 12, "identity": 1, "unknown": 21,
}  # fmt: skip


def weighted(weights: dict[str, int], *names: str) -> tuple[str, ...]:
    """Return every name (of all, or of `names`) as often as its weight says, to pick from uniformly."""
    return tuple(name for name in names or weights for _ in range(weights[name]))


MIXED_SKILLS = weighted(SKILL_WEIGHTS)
WORD_SKILLS = weighted(
    SKILL_WEIGHTS, "antonyms", "measure", "idioms", "synonyms", "pinyin", "followup", "counting", "reversing",
    "characters", "repeat",
)  # fmt: skip
SENTENCE_SKILLS = weighted(SKILL_WEIGHTS, "classify", "rewriting", "extraction")
PART_SKILLS = {"words": WORD_SKILLS, "sentences": SENTENCE_SKILLS}
MISSING_FRAC = 0.5  # of several questions about one passage
EXCHANGES_MAX = 4  # question-answer pairs in one document
NOT_BETWEEN_TWO = ("identity", "story", "chat", "repeat", "followup")
LABELS = (("", ""), ("问题：", "回答："), ("问：", "答："), ("问：", "答："))
SPEAKERS = (("甲：", "乙："), ("学生：", "老师："), ("孩子：", "妈妈："), ("孙女：", "爷爷："), ("小刚：", "小丽："))


def ask_text(rng: Rng, item: Item) -> str:
    """Return the question with its context and, now and then, a polite prefix."""
    if item.context:
        gap = "\n" if rng.random() < 0.6 else ""
        intro = rng.pick(lines("reading", "intro")) if rng.random() < 0.3 else ""
        return f"{item.context}{gap}{intro}{item.ask}"
    if item.skill not in ("identity", "chat", "story", "followup") and rng.random() < 0.15:
        return rng.pick(lines("chat", "prefix")) + item.ask
    return item.ask


def turns(rng: Rng, item: Item) -> list[tuple[str, str]]:
    """Return an item as (user, assistant) turns, its history first."""
    told = list(zip(item.history[::2], item.history[1::2], strict=True))
    return [*told, (ask_text(rng, item), item.answer)]


def exchanges(rng: Rng, items: list[Item]) -> str:
    """Return question-answer pairs in one of the document layouts."""
    pairs = [pair for item in items for pair in turns(rng, item)]
    layout = rng.below(5)
    ask, answer = LABELS[layout - 1] if layout else rng.pick(SPEAKERS)
    return "\n".join([f"{ask}{q}\n{answer}{a}" for q, a in pairs])


def about_one_passage(rng: Rng, held: bool, n: int) -> list[Item]:
    """Return up to n different questions about one passage, which only the first carries; some it does not answer."""
    passage = reading.draw_passage(rng, held)
    drawn = (reading.ask_missing(rng, held, passage) if rng.random() < MISSING_FRAC else reading.ask_about(rng, passage)
             for _ in range(n))  # fmt: skip
    first, *rest = {item.ask: item for item in drawn}.values()
    return [first, *(item._replace(context="") for item in rest)]


def skill_document(rng: Rng, held: bool, skills: tuple[str, ...]) -> str:
    """Return a document of a few exchanges of one skill; facts also come as plain statements."""
    skill = rng.pick(skills)
    if not held and skills is WORD_SKILLS and rng.random() < 0.15:  # plain statements have no held-out part
        return word_skills.statements(rng)
    if not held and skill == "facts" and rng.random() < 0.2:
        if rng.random() < 0.5:
            return facts.article(rng)
        return "".join([facts.statement(rng) for _ in range(2 + rng.below(5))])
    if skill == "reading" and rng.random() < 0.7:
        passage, *items = about_one_passage(rng, held, 2 + rng.below(EXCHANGES_MAX))
        return f"{passage.context}\n{exchanges(rng, [passage._replace(context=''), *items])}"
    return exchanges(rng, [DRAWS[skill](rng, held) for _ in range(1 + rng.below(EXCHANGES_MAX))])


def dialogue(rng: Rng, held: bool) -> str:
    """Return a talk between two named people that mixes skills."""
    a, b = rng.two(names(held))
    said = [f"{a}：{b}，你好！我想问你几个问题。\n{b}：好的，请问吧。"] if rng.random() < 0.4 else []
    for _ in range(2 + rng.below(3)):
        while (item := DRAWS[rng.pick(MIXED_SKILLS)](rng, held)).skill in NOT_BETWEEN_TWO:
            pass
        said.append(f"{a}：{item.context}{item.ask}\n{b}：{item.answer}")
    if rng.random() < 0.3:
        said.append(f"{a}：谢谢你，{b}。\n{b}：不客气。")
    return "\n".join(said)


def document(rng: Rng, held: bool, part: str) -> str:
    """Return one document of a part."""
    if part == "stories":
        item = stories.draw(rng, held)
        if (kind := rng.below(4)) == 0:
            return exchanges(rng, [item])
        return item.answer if kind > 1 else f"{item.ask}\n{item.answer}"
    if part == "descriptions":
        return (chatting.describe_person if rng.random() < 0.6 else chatting.describe_place)(rng, held)
    if part == "dialogues":
        return chatting.everyday(rng, held) if rng.random() < 0.3 else dialogue(rng, held)
    return skill_document(rng, held, PART_SKILLS.get(part, (part,)))


def passage_turns(rng: Rng, held: bool, n: int) -> list[tuple[str, str]]:
    """Return up to n (user, assistant) turns about one passage."""
    return [(ask_text(rng, item), item.answer) for item in about_one_passage(rng, held, n)]


def several_turns(rng: Rng, held: bool, skills: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (user, assistant) turns: skills mixed, or questions about one passage, or a name to be remembered."""
    kind, n = rng.random(), 2 + rng.below(3)
    if "reading" in skills and kind < 0.35:
        return passage_turns(rng, held, n + 1)
    pairs = []
    for _ in range(n):
        pairs += turns(rng, DRAWS[rng.pick(skills)](rng, held))
    if "chat" not in skills or kind > 0.65:
        return pairs
    if kind > 0.5:
        hello = chatting.draw_chat(rng, held)
        return [(hello.ask, hello.answer), *pairs]
    ask, answer, name = chatting.introduce(rng, held)
    return [(ask, answer), *pairs[1:], (rng.pick(chatting.NAME_ASKS), f"你叫{name}。")]


def conversation(rng: Rng, held: bool, skills: tuple[str, ...]) -> Conversation:
    """Return one chat: mostly one exchange, a quarter of the time several, some with a system message."""
    messages = [Message("system", rng.pick(lines("chat", "system")))] if rng.random() < 0.12 else []
    skill, several = rng.pick(skills), rng.random() < 0.2
    if not several and skill == "reading" and rng.random() < 0.5:  # a passage is long: more is learnt from it at once
        pairs = passage_turns(rng, held, 2 + rng.below(3))
    else:
        pairs = several_turns(rng, held, skills) if several else turns(rng, DRAWS[skill](rng, held))
    for ask, answer in pairs:
        messages += [Message("user", ask), Message("assistant", answer)]
    return tuple(messages)
