"""The built-in Chinese: deterministic, split by content, fluent in form, judged by checkers that can say no."""

import re
import time
from itertools import islice, pairwise

import pytest

from nanozhchat.builtin import PARTS, SKILLS, conversations, documents, is_refusal, layouts, questions, words, world
from nanozhchat.builtin.arithmetic import add_steps, sub_steps
from nanozhchat.builtin.facts import relations
from nanozhchat.builtin.stories import plots
from nanozhchat.builtin.world import Rng
from nanozhchat.conversation import make_conversation
from tasks.builtin import BuiltinTask
from tasks.registry import GROUPS, resolve
from tests.conftest import refused

SAMPLE = 400
FLOOR_MB_PER_S = 1.0  # far below what is measured, so that a busy machine does not fail the test
SENTENCE_ENDS = ("。", "！", "？", "”")


def test_the_same_seed_gives_the_same_text_at_once_and_it_names_thousands_of_people():
    for make in (documents, conversations):
        one, same, other = (list(islice(make(seed), SAMPLE)) for seed in (7, 7, 8))
        assert one == same != other
    start, text = time.perf_counter(), "\n".join(islice(documents(), 20_000))
    assert len(text.encode()) / (time.perf_counter() - start) / 1e6 > FLOOR_MB_PER_S
    candidates = {c for n in (2, 3) for c in re.findall(rf"(?=([\u4e00-\u9fff]{{{n}}}))", text)}
    assert len(candidates & set(world.names(False))) > 5000


@pytest.mark.parametrize("skill", SKILLS)
def test_no_content_or_question_is_both_trained_and_held_out(skill):
    rng = Rng(0)
    trained, held = ({layouts.DRAWS[skill](rng, is_held).key for _ in range(3000)} for is_held in (False, True))
    assert held
    assert not trained & held
    held = {tuple(m.content for m in q.messages) for q in questions(skill, 60)}
    length = {len(messages) for messages in held}.pop()
    chats = islice(conversations(1, skills=[skill]), 5000)
    ends = ((chat, i) for chat in chats for i, m in enumerate(chat, start=1) if m.role == "user")
    asked = {tuple(m.content for m in chat[i - length : i]) for chat, i in ends}
    assert asked
    assert not held & asked


@pytest.mark.parametrize("pool", [world.names, world.places, world.foreign, words.strings])
def test_pools_are_large_and_no_held_out_name_is_in_the_training_halves_or_documents(pool):
    trained, held = set(pool(False)), set(pool(True))
    assert (len(trained) > 9000, len(held) > 900, trained & held) == (True, True, set())
    text = "\n".join(islice(documents(3, parts=["dialogues"]), 500))
    speakers = set(re.findall(r"^([\u4e00-\u9fff]{2,4})：", text, re.MULTILINE))
    assert (len(speakers) > 300, speakers & set(world.names(True))) == (True, set())


def test_tables_hold_no_duplicates_and_measure_words_agree_with_their_nouns():
    for relation in relations():
        assert len(relation.rows) == len({(s, u) for s, _, u in relation.rows}), relation.name
        assert len(relation.asks) == len(set(relation.asks)) >= 8, relation.name
        assert all("{s}" in template for template in relation.asks + relation.answers)
    assert len({idiom for idiom, _ in words.idioms()}) == len({meaning for _, meaning in words.idioms()}) >= 90
    assert len(plots()) == len({(p.aim, p.block) for p in plots()}) >= 50
    table = {**world.measures()}
    assert len(table) > 300
    text = "\n".join(islice(documents(6, parts=["reading", "descriptions"]), 2000))
    for measure, noun in re.findall(r"[一那](.)(?:.{1,3}色的)?([\u4e00-\u9fff]{1,4})(?=[，。])", text):
        if noun in table and measure != "个":
            assert measure in table[noun] + world.other_measures().get(noun, ""), (measure, noun)


@pytest.mark.parametrize("skill", SKILLS)
def test_questions_are_stable_and_distinct_and_pass_expected_answers_only(skill):
    asked, again = questions(skill, 60, seed=5), questions(skill, 60, seed=5)
    assert [(q.messages, q.expected) for q in asked] == [(q.messages, q.expected) for q in again]
    assert len({q.messages for q in asked}) == 60
    assert all(q.check(q.expected) for q in asked)
    assert not any(q.check("") or q.check("这句话什么也没说。") for q in asked)
    assert not any(q.check("我不知道。") for q in asked if q.answerable)
    if skill in ("arithmetic", "pinyin", "antonyms", "synonyms"):
        right = (re.findall(r"\d+|“[^”]+”|[a-z\u00e0-\u01dc]+", q.expected)[-1] for q in asked)
        assert not any(q.check(f"是“九”、a、9或{r}。") for q, r in zip(asked, right, strict=True))  # one of several
    assert all(is_refusal(q.expected) is not q.answerable for q in asked)
    assert all(0 <= q.chance < 1 for q in asked)
    if skill not in ("story", "identity", "unknown"):
        assert sum(a.check(b.expected) for a, b in pairwise(asked)) <= 0.4 * len(asked)  # answers to other questions


def test_a_second_capital_and_a_story_that_loops_or_forgets_its_hero_fail():
    capital = next(q for q in questions("facts", 200) if "首都" in q.messages[-1].content and "首都是" in q.expected)
    assert not capital.check(capital.expected + "巴黎、伦敦、东京都是首都。")
    story, other = questions("story", 1)[0], questions("story", 2, seed=9)[1]
    looping = story.expected + story.expected.split("。")[1] + "。"
    assert not any(map(story.check, (looping, story.expected[:-1], other.expected)))


def test_a_right_quotation_with_a_wrong_conclusion_fails():
    colour = next(q for q in questions("reading", 200) if q.expected.endswith("色的。"))
    quoted, _, concluded = colour.expected.rpartition("所以")
    value = re.search(r"[是](.{1,3}色)的。$", concluded)[1]
    assert (value in quoted, colour.check(colour.expected), colour.check(concluded)) == (True, True, True)
    assert not colour.check(quoted + "所以" + concluded.replace(value, "无色"))


def test_values_that_are_copied_are_never_part_of_one_another():
    for section, name in (("things", "colours"), ("names", "jobs"), ("reading", "days")):
        values = world.words(section, name)
        assert len(values) >= 48, name
        assert [(a, b) for a in values for b in values if a != b and a in b] == []


def test_tasks_cover_every_skill_know_their_own_answers_and_what_there_is_not_is_said():
    tasks = resolve("builtin", n=3)
    assert [task.name for task in tasks] == list(GROUPS["builtin"])
    assert all(task.check(i, task.expected(i)) for task in tasks for i in range(3))
    assert {task.prompt(i)[-1].role for task in tasks for i in range(3)} == {"user"}
    task = BuiltinTask("unknown", 200)  # whose refusals have answerable twins
    assert 0.25 < sum(map(task.answerable, range(len(task)))) / len(task) < 0.75
    unknown = "unknown.*poem.*arithmetic"
    refused(unknown, documents, parts=["poem"])
    refused(unknown, conversations, skills=["poem"])
    refused(unknown, questions, "poem", 1)
    refused(unknown, resolve, "builtin:poem")
    refused("train, val", documents, split="test")
    refused("ran out", questions, "antonyms", 20_000)


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


def test_worked_sums_and_differences_are_right():
    for a in range(1, 100):
        for b in range(1, 101 - a):
            assert re.findall(r"\d+", add_steps(a, b))[-1] == str(a + b)
        for b in range(1, a):
            assert re.findall(r"\d+", sub_steps(a, b))[-1] == str(a - b)
    for steps in (add_steps(47, 38), sub_steps(82, 37), add_steps(95, 5), sub_steps(90, 89)):
        for a, b, c in re.findall(r"(?<!加)(?<!\d)(\d+)加(\d+)[得等于]+(\d+)", steps):
            assert int(a) + int(b) == int(c)
