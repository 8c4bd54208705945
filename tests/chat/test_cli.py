"""`mm chat` as a command: what it prints where, and its exit status."""

import io
import os
import select
import subprocess
import sys
import time

import pytest

import mm
from mm.chat.cli import DEFAULT_MODEL, _model_and_text
from mm.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """run(arg, ..., stdin=text) -> (exit status, stdout, stderr) of `mm chat arg ...`."""

    def command(*args, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if stdin is not None else io.StringIO())
        status = main(["chat", *args])
        return (status, *capsys.readouterr())

    return command


def test_one_shot_prints_the_answer_alone(run, model_dir, files):
    assert run(model_dir, "hello") == (0, "#1 hello\n", "")
    status, out, err = run(model_dir, "--image", files["cat.png"], "what?")
    assert (status, out, err) == (0, "#1 image:cat.png what?\n", "")


def test_options_may_stand_anywhere_and_media_keep_their_order(run, model_dir, files):
    order = ["--audio", files["beep.wav"], "--image", files["cat.png"], "--audio", files["beep.wav"]]
    expected = (0, "#1 audio:beep.wav image:cat.png audio:beep.wav what?\n", "")
    assert run(model_dir, *order, "what?") == expected
    assert run(*order, model_dir, "what?") == expected
    assert run(model_dir, "what?", *order) == expected


def test_thinking_can_be_turned_off(run, model_dir, model):
    """The prompt ends with an empty block; the model has the compact template, and its tags are text."""
    prompts = []
    model.register_forward_pre_hook(lambda module, args, kwargs: prompts.append(kwargs["batch"]), with_kwargs=True)
    for more in ((), ("--thinking", "on"), ("--thinking", "off")):
        assert run(model_dir, *more, "hi")[0] == 0
    texts = [model.tokenizer.decode(batch.input_ids[0].tolist()) for batch in prompts]
    assert texts == ["hi", "hi", "hi<think>\n\n</think>\n\n"]


def test_piped_text_is_a_question(run, model_dir, files):
    assert run(model_dir, stdin="hello\n") == (0, "#1 hello\n", "")
    assert run(model_dir, "--image", files["cat.png"], stdin="what?\nwell?") == (
        0,
        "#1 image:cat.png what?\nwell?\n",
        "",
    )


def test_a_given_text_does_not_read_standard_input(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", model_dir, "hello"]) == 0
    assert capsys.readouterr().out == "#1 hello\n"


def test_text_after_a_double_dash_may_begin_with_one(run, model_dir):
    assert run(model_dir, "--", "--image of what?") == (0, "#1 --image of what?\n", "")


def test_paths_in_a_one_shot_text_stay_text(run, model_dir, files):
    assert run(model_dir, files["cat.png"])[1] == f"#1 {files['cat.png']}\n"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("image", "text.png"), ("image", "missing.png"), ("image", "dot.png"), ("image", "beep.wav"),
        ("audio", "empty.wav"), ("audio", "cat.png"), ("video", "clip.mp4"),
    ],
)  # fmt: skip
def test_bad_media_are_one_line_that_names_the_file(run, model_dir, files, kind, name):
    status, out, err = run(model_dir, f"--{kind}", files[name], "what?")
    assert (status, out) == (2, "")
    assert err.startswith("mm chat: error: ") and name in err
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{model}", "--temperature", "-1", "hi"], "temperature=-1"),
        (["{model}", "--max-new-tokens", "0", "hi"], "max_new_tokens=0"),
        (["{model}", "--max-new-tokens", "many", "hi"], "many"),
        (["{model}", "--max-length", "30", "--max-new-tokens", "8", "a long question " * 9], "context of 30"),
        (["{model}", "--device", "toaster", "hi"], "--device toaster"),
        (["{model}", "--speed", "9", "hi"], "--speed"),
        (["{model}", "one", "two"], "put the question in quotes"),
        (["{model}"], "standard input is empty"),
        (["runs/gone/model", "hi"], "no model at runs/gone/model"),
        (["runs/gone/model"], "standard input is empty"),
    ],
)
def test_mistakes_are_one_line(run, model_dir, args, message):
    status, out, err = run(*(arg.format(model=model_dir) for arg in args))
    assert (status, out) == (2, "")
    assert err.startswith("mm chat: error: ") and message in err
    assert err.count("\n") == 1


def test_without_a_model_it_says_what_to_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("what colour is it?")
    assert status == 2
    assert DEFAULT_MODEL in err and "make demo" in err


def test_an_unreadable_model_directory_is_one_line(run, tmp_path, monkeypatch):
    def load(path):
        raise ValueError(f"{path}: not a model directory:\nit has no manifest.json")

    monkeypatch.setattr(mm, "load", load, raising=False)
    status, out, err = run(str(tmp_path), "hi")
    assert (status, out, err) == (
        2,
        "",
        f"mm chat: error: {tmp_path}: not a model directory: it has no manifest.json\n",
    )


def test_model_or_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert _model_and_text([]) == (DEFAULT_MODEL, None)
    assert _model_and_text(["model"]) == ("model", None)
    assert _model_and_text(["gone/model"]) == ("gone/model", None)
    assert _model_and_text(["hello"]) == (DEFAULT_MODEL, "hello")
    assert _model_and_text(["red and/or blue?"]) == (DEFAULT_MODEL, "red and/or blue?")
    assert _model_and_text(["model", "model"]) == ("model", "model")


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys; from mm.cli import main\n"
        "try: main(['chat', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'rich', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--image" in out and "--max-new-tokens" in out
    assert out.splitlines()[-1] == "[]"


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `mm chat ... | head -c 1`: the pipe is closed while the answer is being written."""
    code = (
        "import sys; from types import SimpleNamespace; from mm.chat.cli import _one_shot\n"
        "sys.exit(_one_shot(SimpleNamespace(ask=lambda text: ['word '] * 100_000), 'hi'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_real_terminal(tmp_path, model_dir):
    """Typed at a pseudo-terminal: readline, a question, Ctrl-C in a long answer, a second question, Ctrl-D."""
    import pty

    code = (
        "import mm, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore Ctrl-C
        "from mm.cli import main\n"
        "from mm.generation.testing import ScriptedModel\n"
        "from mm.tokenizers.text import TextTokenizer\n"
        "say = lambda sample: 'again! ' * 100000 if len(sample.messages) == 1\\\n"
        "    else 'heard ' + sample.messages[-1]['content']\n"
        "model = ScriptedModel(TextTokenizer.train(['again! heard'], vocab_size=290), say)\n"
        "mm.load = lambda path: model\n"
        f"sys.exit(main(['chat', {model_dir!r}, '--max-new-tokens', '100000']))"
    )
    process, terminal = pty.fork()
    if process == 0:
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "COLUMNS": "80"}
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    seen = ""

    def wait_for(text):
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([terminal], [], [], left)[0], seen[-2000:]
            seen += os.read(terminal, 65536).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    wait_for("you> ")
    os.write(terminal, b"talk\r")
    wait_for("again! again! again!")
    os.write(terminal, b"\x03")
    wait_for("(stopped)")
    wait_for("you> ")
    os.write(terminal, b"quiet\r")
    wait_for("heard quiet")
    wait_for("you> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "talk" in (tmp_path / "state" / "mm" / "chat_history").read_text()
