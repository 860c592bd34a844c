"""scripts.chat_cli with a fake model: one answer, talking, commands, Ctrl-C."""

import os
import signal
import threading

import pytest

from scripts import chat_cli
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
        typed = iter([*lines, EOFError])

        def read(prompt=""):
            print(prompt, end="")
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        chat_cli.main(flags)
        return capsys.readouterr().out

    return run


def test_p_prints_only_the_answer(chat, capsys):
    chat_cli.main(["-p", "讲个故事"])
    assert capsys.readouterr().out == STORY + "\n"


def test_p_with_a_base_model_continues_the_text(chat, capsys):
    chat.source = "base"
    chat_cli.main(["-p", "从前"])
    assert chat.prompts == ["从前"]
    assert capsys.readouterr().out == STORY + "\n"


def test_flags_reach_the_model(monkeypatch, chat):
    seen = {}
    monkeypatch.setattr("nanozhchat.chat.load", lambda tag, **where: seen.update(tag=tag, **where) or chat)
    monkeypatch.setattr(chat, "stream", lambda _prompt, *, cancel, **sampling: seen.update(sampling) or iter(()))
    flags = "-p x --model-tag t --source rl --temperature 0.1 --top-k 3 --top-p 0.5 --repetition-penalty 1.2"
    chat_cli.main([*flags.split(), "--max-tokens", "7", "--seed", "9"])
    expected = {"tag": "t", "source": "rl", "step": None, "temperature": 0.1, "top_k": 3, "top_p": 0.5}
    expected |= {"repetition_penalty": 1.2, "max_tokens": 7, "seed": 9}
    assert expected.items() <= seen.items()


@pytest.mark.parametrize(
    "flags", [["-p", " "], ["-p", "x", "--temperature", "9"], ["--system", "x", "--source", "base"]]
)
def test_bad_values_are_errors_before_the_model_is_loaded(monkeypatch, flags):
    monkeypatch.setattr("nanozhchat.chat.load", lambda *_args, **_kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError):
        chat_cli.main(flags)


def test_conversation_keeps_its_turns_until_new(chat, talk):
    talk(["一", "二", "/new", "三"], "--system", "你是老师")
    contents = [[m["content"] for m in prompt] for prompt in chat.prompts]
    assert contents == [["你是老师", "一"], ["你是老师", "一", STORY, "二"], ["你是老师", "三"]]


def test_prompts_come_in_both_languages(chat, talk):
    assert "你：" in talk(["你好"])
    assert "You: " in talk(["你好"], "--lang=en")


@pytest.mark.parametrize("line", ["/help", "／help", "/HELP", "/nothing", "", "   "])
def test_commands_and_blank_lines_are_not_sent(chat, talk, line):
    talk([line])
    assert chat.prompts == []


def test_quit_ends_at_once(chat, talk):
    talk(["/quit", "不该问到"])
    assert chat.prompts == []


def test_ctrl_c_at_the_prompt_does_not_leave(chat, talk):
    talk([KeyboardInterrupt, "还在"])
    assert len(chat.prompts) == 1


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(chat, talk, monkeypatch):
    chat.engine = FakeEngine(delay_s=0.01, repeat=20)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    out = talk(["讲", "/help"], "--max-tokens=900")
    assert "（已停止）" in out
    assert "从前" in out
    assert "/quit" in out


def test_handler_of_ctrl_c_is_put_back(chat, capsys):
    before = signal.getsignal(signal.SIGINT)
    chat_cli.main(["-p", "x"])
    assert signal.getsignal(signal.SIGINT) is before


def test_too_long_question_is_reported_and_left_out_of_the_history(chat, talk):
    out = talk(["字" * 2000, "短"])
    assert "没有回答" in out
    assert [m["content"] for m in chat.prompts[-1]] == ["短"]


def test_answer_is_written_piece_by_piece(chat, monkeypatch, capsys):
    shown = []

    def stream(_prompt, *, cancel, **_sampling):
        for piece in ("一", "二"):
            yield piece
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr(chat, "stream", stream)
    chat_cli.main(["-p", "x"])
    assert shown == ["一", "二"]


def test_bytes_that_are_not_utf_8_become_replacement_characters():
    assert chat_cli.clean("好\udcff") == "好\ufffd"
