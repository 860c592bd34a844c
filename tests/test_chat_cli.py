"""scripts.chat_cli with a fake model: one answer, talking, commands, Ctrl-C."""

import io
import os
import signal
import threading
from unittest.mock import Mock

import pytest

from scripts import chat_cli
from tests.conftest import refused
from tests.fakes import STORY, FakeChat, FakeEngine


@pytest.fixture
def chat(monkeypatch):
    fake = FakeChat()
    monkeypatch.setattr("nanozhchat.chat.load", lambda *_args, **_kwargs: fake)
    return fake


@pytest.fixture
def talk(monkeypatch, capsys):
    """Return a function that types lines (an exception is raised instead of typed) and gives back what was printed."""

    def run(lines, *flags):
        typed = Mock(side_effect=[*lines, EOFError])
        monkeypatch.setattr("builtins.input", lambda prompt: print(prompt, end="") or typed())
        chat_cli.main(flags)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("source", "asked"), [("sft", [{"role": "user", "content": "从前"}]), ("base", "从前")])
def test_p_prints_only_the_answer_or_how_a_base_model_continues_and_puts_the_handler_back(chat, capsys, source, asked):
    chat.source, before = source, signal.getsignal(signal.SIGINT)
    chat_cli.main(["-p", "从前"])
    assert (capsys.readouterr().out, chat.prompts[-1]) == (STORY + "\n", asked)
    assert signal.getsignal(signal.SIGINT) is before


def test_p_takes_what_comes_through_a_pipe(monkeypatch, chat, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    chat_cli.main(["-p", "-"])
    assert (capsys.readouterr().out, chat.prompts[-1]) == (STORY + "\n", [{"role": "user", "content": "你好"}])
    refused("nothing came through the pipe", chat_cli.main, ["-p", "-"])


def test_flags_reach_the_model_and_the_answer_is_written_piece_by_piece(monkeypatch, chat, capsys):
    seen, shown = {}, []

    def stream(_prompt, *, cancel, **sampling):
        seen.update(sampling)
        for piece in ("一", "二"):
            yield piece
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr("nanozhchat.chat.load", lambda tag, **where: seen.update(tag=tag, **where) or chat)
    monkeypatch.setattr(chat, "stream", stream)
    flags = "-p x --model-tag t --source rl --temperature 0.1 --top-k 3 --top-p 0.5 --repetition-penalty 1.2"
    chat_cli.main([*flags.split(), "--max-tokens", "7", "--seed", "9"])
    expected = {"tag": "t", "source": "rl", "step": None, "temperature": 0.1, "top_k": 3, "top_p": 0.5}
    assert (expected | {"repetition_penalty": 1.2, "max_tokens": 7, "seed": 9}).items() <= seen.items()
    assert shown == ["一", "二"]


def test_bad_values_are_errors_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("nanozhchat.chat.load", lambda *_args, **_kwargs: pytest.fail("loaded"))
    for flags in (["-p", " "], ["-p", "x", "--temperature", "9"], ["--system", "x", "--source", "base"]):
        refused(None, chat_cli.main, flags)


def test_conversation_keeps_its_turns_until_new(chat, talk):
    talk(["一", "二", "/new", "三"], "--system", "你是老师")
    contents = [[m["content"] for m in p] for i, p in enumerate(chat.prompts) if p not in chat.prompts[:i]]
    assert contents == [["你是老师", "一"], ["你是老师", "一", STORY, "二"], ["你是老师", "三"]]


def test_prompts_come_in_both_languages_and_piped_questions_are_shown_before_their_answers(chat, talk):
    assert f"你：你好\n答：{STORY}" in talk(["你好"])
    assert f"You: Hi\nModel: {STORY}" in talk(["Hi"], "--lang=en")


def test_commands_and_blank_lines_are_not_sent_and_quit_ends_at_once(chat, talk):
    talk(["/help", "／help", "/HELP", "/nothing", "", "   ", "/quit", "不该问到"])
    assert chat.prompts == []


def test_ctrl_c_stops_the_answer_and_neither_then_nor_at_the_prompt_ends_the_talk(chat, talk):
    assert STORY in talk([KeyboardInterrupt, "还在"])
    chat.engine = FakeEngine(delay_s=0.01, repeat=20)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    out = talk(["讲", "/help"], "--max-tokens=900")
    assert [said for said in ("（已停止）", "从前", "/quit") if said not in out] == []


def test_a_model_that_was_not_fine_tuned_is_introduced_as_one_that_continues_text(chat, talk):
    assert "只会接着写" not in talk([])
    chat.source = "base"
    assert "只会接着写" in talk([])


def test_too_long_question_is_reported_and_left_out_of_the_history(chat, talk):
    assert "没有回答：这句话有 2001 个词元" in talk(["字" * 2000, "短"])
    assert [m["content"] for m in chat.prompts[-1]] == ["短"]
    refused("没有回答：这句话有 2001 个词元", chat_cli.main, ["-p", "字" * 2000])


def test_a_chat_longer_than_the_context_loses_its_oldest_turns_and_says_so(chat, talk):
    chat.engine = FakeEngine(context=4 * len(STORY))
    out = talk(["一", "二", "三", "四"])
    assert (out.count(STORY), "没有回答" in out, "最早的 1 轮" in out) == (4, False, True)
    assert [m["content"] for m in chat.prompts[-1]][-3:] == ["三", STORY, "四"]


def test_bytes_that_are_not_utf_8_become_replacement_characters():
    assert chat_cli.clean("好\udcff") == "好\ufffd"
