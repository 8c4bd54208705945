"""The interactive chat, driven through a `read` function and a recorded console."""

import json

import pytest
import torch
from rich.console import Console

from mm.chat.session import ChatSession, Settings
from mm.chat.terminal import HELP, Terminal, printable, use_history
from mm.generation.testing import ScriptedModel


@pytest.fixture
def chat(model, lines):
    """chat(line, ...) -> what the console shows; the session is `chat.session`."""

    def run(*script):
        console = Console(record=True, width=100, force_terminal=False, quiet=False, file=open("/dev/null", "w"))
        Terminal(run.session, console, lines(*script)).run("the model")
        return console.export_text()

    run.session = ChatSession(model)
    return run


def test_a_chat(chat, files):
    shown = chat("hello", f"/image {files['cat.png']}", "what is it?", "", "/quit", "never read")
    assert "reads text, image, audio" in shown
    assert "#1 hello\n" in shown
    assert "4 tokens, goes with the next question" in " ".join(shown.split())  # however long the file's name is
    assert "#2 image:cat.png what is it?\n" in shown
    assert "never read" not in shown


def test_thoughts_are_shown_when_asked_for(chat, tokenizer):
    chat.session = ChatSession(ScriptedModel(tokenizer, lambda sample: "<think>so\x1b[2J far</think>\nred"))
    shown = chat("/thoughts", "what?", "/thoughts", "/help")
    assert shown.index("(none)") < shown.index("red") < shown.index("so[2J far")
    assert "<think>" not in shown and "what the model thought" in shown


def test_end_of_input_leaves(chat):
    assert "#1 hello" in chat("hello")


def test_a_pasted_path_is_an_attachment(chat, files):
    shown = chat(files["two words.png"], f"'{files['cat.png']}' and this?", files["beep.wav"])
    assert "#1 image:two words.png image:cat.png and this?" in shown
    assert [item.kind for item in chat.session.attached] == ["audio"]


def test_errors_are_shown_and_the_chat_goes_on(chat, files):
    shown = chat(
        f"/image {files['text.png']}",
        files["empty.wav"],
        f"/video {files['clip.mp4']}",
        "/image",
        "/load gone.json",
        "/save /gone/there.json",
        "/dance",
        f"{files['dot.png']} what is it?",
        "still there?",
    )
    errors = shown.replace("\n", " ").split("error: ")[1:]
    for error, word in zip(
        errors,
        ["text.png", "empty.wav", "tower for video", "/image needs", "gone.json", "/gone", "/dance", "dot.png"],
        strict=True,
    ):
        assert word in error
    assert "#1 still there?" in shown  # and the question about the bad image was not asked without it


def test_ctrl_c_at_the_prompt_does_not_leave(chat):
    shown = chat("hello", KeyboardInterrupt, "again")
    assert "#1 hello" in shown and "#2 again" in shown


@pytest.mark.parametrize("steps", [0, 3])
def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat, monkeypatch, steps):
    model = chat.session.model
    step, calls = model.step, []

    def interrupted(ids, cache):
        calls.append(1)
        if len(calls) == steps + 1:
            raise KeyboardInterrupt
        return step(ids, cache)

    monkeypatch.setattr(model, "step", interrupted)
    shown = chat("tell me everything there is", "go on")
    assert "(stopped)" in shown
    assert "#2 go on" in shown
    assert chat.session.turns == 2
    partial = chat.session.messages[1]["content"]
    assert partial and "#1 tell me everything there is".startswith(partial)
    assert partial != "#1 tell me everything there is"


def test_commands(chat, tmp_path):
    saved = tmp_path / "chat.json"
    shown = chat("/help", "/stats", "/system be brief", "one", "two", "/stats", f"/save {saved}", "/reset", "one",
                 f"/load {saved}", "three")  # fmt: skip
    assert all(f"/{name}" in shown for name in HELP)
    assert "(no answer yet)" in shown
    assert "turn 2: prompt" in shown and "tokens/s" in shown
    assert "#3 three" in shown
    assert shown.count("#1 one") == 2
    assert json.loads(saved.read_text())["system"] == "be brief"
    assert chat.session.system == "be brief"
    chat("/system")
    assert chat.session.system is None


def test_a_backslash_continues_the_line(chat):
    assert "#1 first\nsecond" in chat("first\\", "second")


def test_a_cut_answer_says_so(model, chat):
    chat.session = ChatSession(model, Settings(max_new_tokens=4))
    assert "cut after 4 tokens" in chat("a long question, for a long answer")


def test_markup_and_control_characters_are_only_text(tokenizer, chat):
    text = "[red]no[/red] [/x] :smile: \x1b[2J\x1b]0;title\x07 \u009b1A tab\there"
    chat.session = ChatSession(ScriptedModel(tokenizer, lambda sample: text))
    shown = chat("[bold]hi[/bold] [/nonsense]")
    assert "[red]no[/red] [/x] :smile: [2J]0;title 1A tab        here" in shown  # rich expands the tab
    assert "\x1b" not in shown and "\x07" not in shown
    assert printable("a\x1b\r\nb\tc é") == "a\nb\tc é"


def test_nan_is_an_error_not_the_end(chat, monkeypatch):
    model = chat.session.model
    monkeypatch.setattr(model, "step", lambda ids, cache: torch.full((1, model.tokenizer.vocab_size), torch.nan))
    assert "error: sample chat-turn-1: the logits" in chat("hello").replace("\n", " ")


def test_history_is_kept_for_the_next_chat(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    readline.clear_history()
    save = use_history(Console())
    readline.add_history("an earlier question")
    save()
    file = tmp_path / "state" / "mm" / "chat_history"
    assert file.stat().st_mode & 0o077 == 0
    readline.clear_history()
    use_history(Console())
    assert readline.get_history_item(1) == "an earlier question"
    readline.clear_history()
