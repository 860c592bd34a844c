"""The built-in Chinese: deterministic, split by content, fluent in form, judged by checkers that can say no."""

import re
import time
from itertools import islice

import pytest

from nanozhchat.builtin import PARTS, SKILLS, conversations, documents, is_refusal, layouts, questions, words, world
from nanozhchat.builtin.arithmetic import add_steps, sub_steps
from nanozhchat.builtin.facts import relations
from nanozhchat.builtin.stories import plots
from nanozhchat.builtin.world import Rng
from nanozhchat.conversation import make_conversation
from tasks.builtin import BuiltinTask
from tasks.registry import GROUPS, resolve

SAMPLE = 400
FLOOR_MB_PER_S = 1.0  # far below what is measured, so that a busy machine does not fail the test
SENTENCE_ENDS = ("。", "！", "？", "”")


def test_the_same_seed_gives_the_same_documents_and_conversations():
    assert list(islice(documents(7), SAMPLE)) == list(islice(documents(7), SAMPLE))
    assert list(islice(conversations(7), SAMPLE)) == list(islice(conversations(7), SAMPLE))
    assert list(islice(documents(7), SAMPLE)) != list(islice(documents(8), SAMPLE))


@pytest.mark.parametrize("skill", SKILLS)
def test_no_content_key_is_both_trained_and_held_out(skill):
    rng = Rng(0)
    trained = {layouts.DRAWS[skill](rng, False).key for _ in range(3000)}
    held = {layouts.DRAWS[skill](rng, True).key for _ in range(3000)}
    assert held
    assert not trained & held


@pytest.mark.parametrize("skill", SKILLS)
def test_no_held_out_question_is_ever_asked_in_training(skill):
    held = {tuple(m.content for m in q.messages) for q in questions(skill, 60)}
    length = {len(messages) for messages in held}.pop()
    asked = {
        tuple(m.content for m in c[i + 1 - length : i + 1])
        for c in islice(conversations(1, skills=[skill]), 5000)
        for i, m in enumerate(c)
        if m.role == "user"
    }
    assert asked
    assert not held & asked


def test_held_out_names_never_appear_in_training_documents():
    han = re.compile(r"(?<=^)[\u4e00-\u9fff]{2,4}(?=：)", re.MULTILINE)
    speakers = set(han.findall("\n".join(islice(documents(3, parts=["dialogues"]), 2000))))
    assert len(speakers) > 1000
    assert not speakers & set(world.names(True))


@pytest.mark.parametrize("pool", [world.names, world.places, world.foreign, words.strings])
def test_pools_are_large_and_their_halves_disjoint(pool):
    trained, held = set(pool(False)), set(pool(True))
    assert len(trained) > 9000
    assert len(held) > 900
    assert not trained & held


def test_every_fact_is_trained_in_most_of_its_phrasings():
    rng = Rng(0)
    seen = {}
    for _ in range(150_000):
        fact, phrasing = layouts.DRAWS["facts"](rng, False).key.split("|")
        seen.setdefault(fact, set()).add(phrasing)
    assert len(seen) == sum(len(r.rows) for r in relations())
    assert min(len(phrasings) for phrasings in seen.values()) >= 6


@pytest.mark.parametrize("skill", SKILLS)
def test_questions_are_stable_and_distinct_and_pass_expected_answers_only(skill):
    asked, again = questions(skill, 60, seed=5), questions(skill, 60, seed=5)
    assert [(q.messages, q.expected) for q in asked] == [(q.messages, q.expected) for q in again]
    assert len({q.messages for q in asked}) == 60
    assert all(q.check(q.expected) for q in asked)
    assert not any(q.check("") or q.check("这句话什么也没说。") for q in asked)
    assert not any(q.check("我不知道。") for q in asked if q.answerable)
    assert all(is_refusal(q.expected) is not q.answerable for q in asked)
    assert all(0 <= q.chance < 1 for q in asked)


@pytest.mark.parametrize("skill", [s for s in SKILLS if s not in ("story", "identity", "unknown")])
def test_the_answer_to_another_question_rarely_passes(skill):
    asked = questions(skill, 60, seed=6)
    crossed = [a.check(b.expected) for a, b in zip(asked, asked[1:], strict=False)]
    assert sum(crossed) <= 0.4 * len(crossed)


def test_a_second_capital_and_a_story_that_loops_or_forgets_its_hero_fail():
    capital = next(q for q in questions("facts", 200) if "首都" in q.messages[-1].content and "首都是" in q.expected)
    assert not capital.check(capital.expected + "巴黎、伦敦、东京都是首都。")
    question = questions("story", 1)[0]
    sentence = question.expected.split("。")[1] + "。"
    assert not question.check(question.expected + sentence)
    assert not question.check(question.expected[:-1])
    assert not question.check(questions("story", 2, seed=9)[1].expected)


def test_unknown_names_and_more_questions_than_there_are_are_errors_that_say_so():
    for call in (
        lambda: documents(parts=["poem"]),
        lambda: conversations(skills=["poem"]),
        lambda: questions("poem", 1),
    ):
        with pytest.raises(ValueError, match="unknown.*poem.*arithmetic"):
            call()
    with pytest.raises(ValueError, match="unknown task 'builtin:poem'.*builtin:arithmetic"):
        resolve("builtin:poem")
    with pytest.raises(ValueError, match="train, val"):
        documents(split="test")
    with pytest.raises(ValueError, match="ran out"):
        questions("antonyms", 20_000)


def test_documents_come_fast_enough():
    stream = documents(0)
    next(stream)
    start = time.perf_counter()
    size = sum(len(text.encode()) for text in islice(stream, 10_000))
    assert size / (time.perf_counter() - start) / 1e6 > FLOOR_MB_PER_S


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("part", PARTS)
def test_documents_hold_no_control_characters_and_end_properly(part, split):
    for text in islice(documents(4, split=split, parts=[part]), SAMPLE):
        assert text.endswith(SENTENCE_ENDS), text
        assert all(char == "\n" or char.isprintable() for char in text), text
        assert not re.search(r"[{}]|。。|，，|，。|：。|\n\n", text), text


def test_conversations_alternate_and_a_quarter_have_several_turns():
    chats = list(islice(conversations(2), 4000))
    assert all(make_conversation(chat) == chat and chat[-1].role == "assistant" for chat in chats)
    several = sum(sum(m.role == "user" for m in chat) > 1 for chat in chats) / len(chats)
    assert 0.2 < several < 0.3
    assert any(chat[0].role == "system" for chat in chats)


def test_twenty_thousand_documents_name_thousands_of_people():
    text = "\n".join(islice(documents(), 20_000))
    candidates = set(re.findall(r"(?=([\u4e00-\u9fff]{2}))", text)) | set(re.findall(r"(?=([\u4e00-\u9fff]{3}))", text))
    assert len(candidates & set(world.names(False))) > 5000


def test_measure_words_agree_with_their_nouns_in_training_text():
    table = {**world.measures()}
    for text in islice(documents(6, parts=["reading", "descriptions"]), 2000):
        for measure, noun in re.findall(r"[一那](.)(?:.色的)?([\u4e00-\u9fff]{1,4})(?=[，。])", text):
            if noun in table and measure != "个":
                assert measure in table[noun] + world.other_measures().get(noun, ""), text


def test_worked_sums_and_differences_are_right():
    for a in range(1, 100):
        for b in range(1, 101 - a):
            assert re.findall(r"\d+", add_steps(a, b))[-1] == str(a + b)
        for b in range(1, a):
            assert re.findall(r"\d+", sub_steps(a, b))[-1] == str(a - b)
    for steps in (add_steps(47, 38), sub_steps(82, 37), add_steps(95, 5), sub_steps(90, 89)):
        for a, b, c in re.findall(r"(?<!加)(?<!\d)(\d+)加(\d+)[得等于]+(\d+)", steps):
            assert int(a) + int(b) == int(c)


def test_tables_hold_no_duplicates():
    for relation in relations():
        keys = [(s, u) for s, _, u in relation.rows]
        assert len(keys) == len(set(keys)), relation.name
        assert len(relation.asks) == len(set(relation.asks)) >= 8, relation.name
        assert all("{s}" in template for template in relation.asks + relation.answers)
    assert len({idiom for idiom, _ in words.idioms()}) == len({meaning for _, meaning in words.idioms()}) >= 90
    assert len(plots()) == len({(p.aim, p.block) for p in plots()}) >= 50
    counted = " ".join(line for line in world.sections("things")["measure"]).split()
    assert len(world.measures()) > 300
    assert len(counted) > 300


def test_tasks_cover_every_skill_and_know_their_own_answers():
    tasks = resolve("builtin", n=3)
    assert [task.name for task in tasks] == list(GROUPS["builtin"])
    assert all(
        task.check(i, task.expected(i)) and task.prompt(i)[-1].role == "user" for task in tasks for i in range(3)
    )
    task = BuiltinTask("unknown", 200)  # whose refusals have answerable twins
    assert 0.25 < sum(map(task.answerable, range(len(task)))) / len(task) < 0.75
