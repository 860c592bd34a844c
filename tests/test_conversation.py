"""Conversations: what counts as one, and what is refused."""

import pytest

from nanozhchat.conversation import ROLE_TOKEN, SPECIAL_TOKENS, Message, make_conversation

SYSTEM = {"role": "system", "content": "你是助手"}
USER = {"role": "user", "content": "你好"}
ANSWER = {"role": "assistant", "content": "您好"}


@pytest.mark.parametrize("turns", [[USER], [USER, ANSWER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER, ANSWER]])
def test_well_formed_conversations_keep_their_turns(turns):
    made = make_conversation(turns)
    assert [(m.role, m.content) for m in made] == [(t["role"], t["content"]) for t in turns]


def test_messages_and_mappings_may_be_mixed_and_the_result_is_stable():
    made = make_conversation([Message("user", "你好"), ANSWER])
    assert make_conversation(made) == made


def test_content_is_kept_as_it_is_even_if_it_looks_like_a_control_token():
    assert make_conversation([{"role": "user", "content": "<|end|>\n "}])[0].content == "<|end|>\n "


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one message"),
        ([SYSTEM], "needs a user message"),
        ([ANSWER], "turn 1 is 'assistant', expected 'user'"),
        ([USER, USER], "turn 2 is 'user', expected 'assistant'"),
        ([USER, ANSWER, ANSWER], "turn 3 is 'assistant'"),
        ([USER, SYSTEM], "turn 2 is 'system'"),
        ([SYSTEM, SYSTEM, USER], "turn 1 is 'system'"),
        ([{"role": "human", "content": "x"}], "role 'human'; roles are system, user, assistant"),
        ([{"content": "x"}], "role None"),
        ([{"role": "user"}], "content of type NoneType"),
        ([{"role": "user", "content": ["x"]}], "content of type list"),
        (["你好"], "message 0 is str"),
    ],
)
def test_malformed_conversations_are_refused_with_the_reason(turns, message):
    with pytest.raises(ValueError, match=message):
        make_conversation(turns)


def test_control_tokens_are_distinct_and_every_role_has_one():
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS)
    assert set(ROLE_TOKEN) == {"system", "user", "assistant"}
    assert set(ROLE_TOKEN.values()) <= set(SPECIAL_TOKENS)
