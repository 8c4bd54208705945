"""Typing: keys go through a pipe into the real line editor."""

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mm.chat.reader import CommandCompleter, line_reader


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """typed(keys) -> the line that they make, in a chat of its own; earlier chats are remembered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(keys: str) -> str:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            return line_reader(Console(), {"image": "an image", "help": "this"})("you> ")

    run.file = tmp_path / "state" / "mm" / "chat_history"
    return run


def test_enter_sends(typed):
    assert typed("what is it?\r") == "what is it?"


def test_alt_enter_begins_a_line_and_enter_sends_all_of_them(typed):
    assert typed("one\x1b\rtwo\r") == "one\ntwo"


def test_a_paste_of_several_lines_is_one_question(typed):
    assert typed("\x1b[200~first\nsecond\nthird\x1b[201~\r") == "first\nsecond\nthird"


def test_ctrl_d_and_ctrl_c(typed):
    with pytest.raises(EOFError):
        typed("\x04")
    with pytest.raises(KeyboardInterrupt):
        typed("half a line\x03")


def test_history_is_kept_for_the_next_chat_and_for_nobody_else(typed):
    typed("an earlier question\r")
    assert typed.file.stat().st_mode & 0o077 == 0
    assert typed("\x1b[A\r") == "an earlier question"


def test_a_history_that_cannot_be_kept_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("hi\r")
        assert line_reader(Console(), {})("you> ") == "hi"
    assert "the history is not kept" in capsys.readouterr().out


def test_completion(tmp_path):
    completer = CommandCompleter({"image": "an image", "help": "this"})

    def complete(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text, len(text)), CompleteEvent())]

    assert complete("/") == ["image", "help"] and complete("/im") == ["image"]
    (tmp_path / "cat.png").write_text("")
    assert complete(f"/image {tmp_path}/c") == ["at.png"]
    assert complete("hello /im") == [] and complete("/system ca") == []
