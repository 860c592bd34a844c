"""Conversation files: every layout gives the same conversation; what is none is counted; the split is by content."""

import json

import pytest

from nanozhchat.conversation import Message
from nanozhchat.conversation_files import conversations, load_conversations, preferences
from nanozhchat.records import ReadStats
from tests.conftest import pack, refused, write_jsonl

SYSTEM, ASK, ANSWER = "你是助手。", "三加五等于几？", "八。"
EXCHANGE = (Message("user", ASK), Message("assistant", ANSWER))


def turns(*contents, keys=("role", "content"), roles=("user", "assistant")):
    return [{keys[0]: roles[i % 2], keys[1]: content} for i, content in enumerate(contents)]


def both(path, **options):
    return [c for split in ("train", "val") for c in conversations([str(path)], split, **options)]


def numbered(n):
    return [{"messages": turns(f"问题{i}", f"回答{i}")} for i in range(n)]


@pytest.mark.parametrize("row", [
    {"messages": turns(ASK, ANSWER)}, {"conversations": turns(ASK, ANSWER)},
    {"conversations": turns(ASK, ANSWER, keys=("from", "value"), roles=("human", "gpt"))},
    {"prompt": ASK, "completion": ANSWER}, {"instruction": ASK, "input": "", "output": ANSWER, "x": 1},
    {"instruction": ASK, "output": ANSWER}, {"kind": "计算", "input": ASK, "target": ANSWER},
    {"instruction_zh": ASK, "input_zh": None, "output_zh": ANSWER}, {"question": ASK, "answer": ANSWER},
    {"conversation": [{"human": ASK, "assistant": ANSWER}]},
    {"prompt": turns(ASK), "completion": turns("", ANSWER)[1:]},
])  # fmt: skip
def test_every_layout_gives_the_same_conversation(tmp_path, row):
    assert both(write_jsonl(tmp_path / "a.jsonl", [row])) == [EXCHANGE]


def test_an_input_follows_its_instruction_on_a_new_line_and_earlier_turns_are_kept(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "翻译成英文", "input": "猫", "output": "cat"}])
    assert both(path)[0][0].content == "翻译成英文\n猫"
    row = {"system": SYSTEM, "history": [["你好", "你好！"]], "instruction": ASK, "input": "", "output": ANSWER}
    [found] = both(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert [m.role for m in found] == ["system", "user", "assistant", "user", "assistant"]
    assert found[-2:] == EXCHANGE


def test_files_of_a_folder_and_rows_of_a_file_may_mix_layouts_and_what_has_none_is_counted(tmp_path):
    shared = {"conversations": turns("在吗", "在。", keys=("from", "value"), roles=("human", "gpt"))}
    rows = [{"messages": turns(ASK, ANSWER)}, {"prompt": "再见", "completion": "再见。"}, shared, {"title": "无"}]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"instruction": "走", "output": "好"}])
    stats = ReadStats()
    assert len(both(tmp_path / "a.jsonl", stats=stats)) == 4
    assert stats.skipped == {"of no known layout": 2}  # once for each split
    write_jsonl(tmp_path / "b.jsonl.gz", [{"prompt": "再见啦", "completion": "再见。"}])
    pack(tmp_path / "c.json", json.dumps([{"instruction": "来", "output": "好"}]))
    assert len(both(tmp_path)) == 6


CALLS = [{"function": {"name": "calculator", "arguments": '{"expression": "3+5"}'}}]


@pytest.mark.parametrize("called", [
    {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS)},
    {"from": "function_call", "value": '{"name": "calculator", "arguments": {"expression": "3+5"}}'},
])  # fmt: skip
def test_calls_of_tools_are_read(tmp_path, called):
    row = {"conversations": [*turns(ASK), called, {"from": "observation", "value": "8"}, turns("", ANSWER)[1]]}
    [found] = both(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert found == (EXCHANGE[0], Message("assistant", "", "3+5"), Message("tool", "8"), EXCHANGE[1])


@pytest.mark.parametrize("row", [
    {"prompt": ASK, "chosen": ANSWER, "rejected": "九。"},
    {"chosen": turns(ASK, ANSWER), "rejected": turns(ASK, "九。")},
    {"messages": turns(ASK), "chosen": turns("", ANSWER)[1:], "rejected": turns("", "九。")[1:]},
    {"conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": ANSWER},
     "rejected": {"from": "gpt", "value": "九。"}},
    {"instruction": ASK, "input": "", "chosen": ANSWER, "rejected": "九。"},
])  # fmt: skip
def test_every_layout_of_preferences_gives_the_same_pair_and_what_is_none_is_counted(tmp_path, row):
    stats = ReadStats()
    path = write_jsonl(tmp_path / "a.jsonl", [row, {**row, "rejected": row["chosen"]}])
    pair = (EXCHANGE, (EXCHANGE[0], Message("assistant", "九。")))
    assert list(preferences([str(path)], "train", stats=stats)) == [pair]
    assert stats.skipped == {"no proper conversation": 1}
    write_jsonl(path, [{"prompt": ASK, "completion": ANSWER}])
    refused("expected chosen . rejected", lambda: list(preferences([str(path)], "train")))


def test_what_has_no_known_layout_or_no_conversation_is_an_error_that_says_what_was_found(tmp_path):
    odd = write_jsonl(tmp_path / "a.jsonl", [{"q": ASK, "answer": ANSWER}])
    refused(r"a\.jsonl:1 has keys answer, q; expected messages", both, odd)
    refused(r"a\.txt:1 is plain text", lambda: both(pack(tmp_path / "a.txt", "从前有座山。")))
    refused("unknown skill 'nonsense' of the built-in data; there are: ", both, "builtin:nonsense")
    one = [str(write_jsonl(tmp_path / "a.jsonl", numbered(1)))]
    refused("no conversation for the val split", load_conversations, one, "val", max_conversations=10)


@pytest.mark.parametrize("messages", [
    [], turns(ASK), turns(ASK, " "), turns(ASK, ANSWER, roles=("assistant", "user")), ["你好", "你好！"], None,
    turns(ASK, ANSWER, roles=("user", "tool")), turns(ASK, ASK, roles=("user", "user")), turns(ASK, None),
    [{"role": "user"}, {"role": "assistant", "content": ANSWER}], turns(ASK, "\ud800"),
])  # fmt: skip
def test_what_is_no_proper_conversation_is_skipped_and_counted(tmp_path, messages):
    stats = ReadStats()
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns(ASK, ANSWER)}, {"messages": messages}])
    assert list(conversations([str(path)], "train", stats=stats)) == [EXCHANGE]
    assert sum(stats.skipped.values()) == 1
    assert set(stats.skipped) <= {"no proper conversation", "not UTF-8"}  # a lone surrogate is no text at all


def test_the_splits_share_nothing_lose_nothing_and_do_not_depend_on_order_or_layout(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", numbered(1000))
    rows = [{"prompt": f"问题{i}", "completion": f"回答{i}"} for i in reversed(range(1000))]
    b = write_jsonl(tmp_path / "b.jsonl", rows)
    train, val = (set(conversations([str(a)], split)) for split in ("train", "val"))
    assert val == set(conversations([str(b)], "val"))
    assert (train & val, len(train | val)) == (set(), 1000)
    assert 5 <= len(val) <= 40  # 2 % of 1,000, give or take four deviations
    for i in range(0, 20, 2):  # of two, each split has one
        path = write_jsonl(tmp_path / "c.jsonl", rows[i : i + 2])
        assert [len(list(conversations([str(path)], split))) for split in ("train", "val")] == [1, 1]


def test_the_limit_is_kept_builtin_splits_share_nothing_and_a_few_others_come_again_to_keep_their_weight(tmp_path):
    train, val = (load_conversations(["builtin"], s, max_conversations=200) for s in ("train", "val"))
    assert (len(train), len(val), set(train) & set(val)) == (200, 200, set())
    path = write_jsonl(tmp_path / "a.jsonl", numbered(10))
    found = load_conversations([f"{path}@1", "builtin@4"], "train", max_conversations=1000)
    ours = [c for c in found if c[0].content.startswith("问题")]
    assert (len(found), len(set(ours))) == (1000, 9)
    size = [sum(len(f"{m.content}{m.tool_call}".encode()) for c in some for m in c) for some in (ours, found)]
    assert size[0] / size[1] == pytest.approx(1 / 5, rel=0.02)
