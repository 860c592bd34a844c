"""Conversations: what counts as one, and what is refused."""

import pytest

from nanozhchat.conversation import Message, call_text, make_conversation
from tests.conftest import refused

SYSTEM = {"role": "system", "content": "你是助手"}
USER = {"role": "user", "content": "<|end|>你好\n "}
ANSWER = {"role": "assistant", "content": "您好"}


@pytest.mark.parametrize("turns", [[USER], [USER, ANSWER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER, ANSWER]])
def test_well_formed_conversations_keep_their_turns_to_the_letter(turns):
    made = make_conversation(turns)
    assert [(m.role, m.content) for m in made] == [(t["role"], t["content"]) for t in turns]
    assert make_conversation([Message(**turns[0]), *turns[1:]]) == make_conversation(made) == made


CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"function": {"name": "calculator", "arguments": '{"expression": "3+5"}'}},
    {"function": {"name": "weather", "arguments": {"city": "北京"}}},
]}  # fmt: skip
RESULT = {"role": "tool", "content": "8"}


def test_a_call_of_a_tool_is_followed_by_its_results_in_one_turn_and_more_words():
    asked, called, result, answer = make_conversation([USER, CALL, RESULT, RESULT, ANSWER])
    assert called == Message("assistant", "", '3+5\n{"name": "weather", "arguments": {"city": "北京"}}')
    assert (asked.tool_call, result, answer.content) == ("", Message("tool", "8\n8"), "您好")
    refused("tool call 0 is not a function", call_text, [{"function": {"name": "calculator", "arguments": "3+5"}}])


@pytest.mark.parametrize(("turns", "message"), [
    ([], "at least one message"), ([SYSTEM], "needs a user message"),
    ([ANSWER], "turn 1 is 'assistant', expected 'user'"), ([USER, USER], "turn 2 is 'user', expected 'assistant'"),
    ([USER, ANSWER, ANSWER], "turn 3 is 'assistant'"), ([USER, SYSTEM], "turn 2 is 'system'"),
    ([SYSTEM, SYSTEM, USER], "turn 1 is 'system'"), ([{"content": "x"}], "role None"),
    ([{"role": "human", "content": "x"}], "role 'human'; roles are system, user, assistant"),
    ([{"role": "user"}], "content of type NoneType"), ([{"role": "user", "content": ["x"]}], "content of type list"),
    (["你好"], "message 0 is str"), ([USER, RESULT], "turn 2 is 'tool'"), ([USER, ANSWER, RESULT], "turn 3 is 'tool'"),
    ([USER, CALL, ANSWER], "turn 3 is 'assistant', expected 'tool'"), ([CALL | {"role": "user"}], "calls a tool"),
])  # fmt: skip
def test_malformed_conversations_are_refused_with_the_reason(turns, message):
    refused(message, make_conversation, turns)
