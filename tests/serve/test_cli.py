"""`mm serve` as a command: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from mm import checkpoint
from mm.cli import main
from mm.model import MultimodalModel
from mm.parts import build
from mm.testing import spread, tiny_tokenizer

KEY = "a key"
CONFIG = """
class_path: mm.model.MultimodalModel
init_args:
  tokenizer: {tokenizer}
  towers:
    image:
      tokenizer: {{class_path: mm.tokenizers.image.ImageTokenizer, init_args: {{patch: 2, max_tokens: 16}}}}
      encoder:
        class_path: mm.encoders.transformer.TransformerEncoder
        init_args: {{width: 8, layers: 1, heads: 2, mlp_ratio: 2}}
      bridge: {{class_path: mm.fusion.projector.LinearProjector}}
  decoder:
    class_path: mm.decoder.decoder.Decoder
    init_args:
      width: 16
      mixers: {{full: {{class_path: mm.decoder.attention.grouped.GroupedAttention, init_args: {{heads: 2}}}}}}
      ffns: {{dense: {{class_path: mm.decoder.ffn.dense.GatedFFN, init_args: {{hidden: 24}}}}}}
      layers: [{{pattern: [full/dense]}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    config = yaml.safe_load(CONFIG.format(tokenizer=tiny_tokenizer().save(folder)))
    made = spread(build(config, MultimodalModel))
    made.config = config
    checkpoint.save(made, folder / "tiny")
    return folder / "tiny"


@contextmanager
def served(model: Path, *options: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The process, which may not listen yet."""
    command = [sys.executable, "-m", "mm.cli", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def listening(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Its first line, and where that says that the API is."""
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert "API at " in line, process.stderr.read()
    return line.strip(), line.split("API at ")[1].strip()


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_end(model: Path) -> None:
    """One with a key is ended by SIGTERM amid a stream, one without by Ctrl-C; both have nothing left."""
    with (
        served(model, "--name", "mine", "--max-length", "3000", MM_API_KEY=KEY) as process,
        served(model, "--api-key", "", "--host", "localhost", "--log-level", "warning") as other,
    ):
        (line, url), (other_line, other_url) = listening(process), listening(other)
        assert line == f"mine (text, image) at {url.removesuffix('v1')}  API at {url}"
        assert other_line.startswith("tiny (text, image) at http://127.0.0.1:") and other_url != url
        ai = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        assert [model.id for model in ai.models.list().data] == ["mine"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="no", max_retries=0).models.list()
        assert openai.OpenAI(base_url=other_url, api_key="no", max_retries=0).models.retrieve("tiny").id == "tiny"
        schema = {"type": "array", "items": {"const": "beep"}, "minItems": 10_000}
        form: Any = {"type": "json_schema", "json_schema": {"name": "beeps", "schema": schema}}
        stream = ai.chat.completions.create(
            model="mine",
            messages=[{"role": "user", "content": "?"}],
            max_tokens=2800,
            stream=True,
            response_format=form,
        )
        next(stream)
        children = [*_children(process.pid), *_children(other.pid)]
        assert len(children) >= 2  # which decode media
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        other.send_signal(signal.SIGINT)
        _, log = other.communicate(timeout=60)
        assert (other.returncode, log) == (0, "")
        with pytest.raises(openai.APIError, match="going down"):
            for _ in stream:
                pass
        out, log = process.communicate(timeout=60)
        assert time.monotonic() - start < 30  # 3 of them for the answer at work; the rest is for a busy machine
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in log and "shutting_down" in log
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_taken_port_is_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(model), "--port", str(port)]) == 2
    out, error = capsys.readouterr()
    assert (out, error) == ("", f"mm serve: error: --host 127.0.0.1 --port {port}: Address already in use\n")


MISTAKES = [
    (["--host", "0.0.0.0"], "others can reach this address, so a key is needed: --api-key, or MM_API_KEY"),
    (["--host", "192.0.2.1"], "--host 192.0.2.1: others can reach this address"),
    (["--host", "nowhere.invalid", "--api-key", "k"], "--host nowhere.invalid: "),
    (["--port", "70000"], "--port 70000: give a number from 0 to 65535"),
    (["--slots", "0"], "slots=0: a limit is a positive number"),
    (["--media-host", "http://a.org"], "'http://a.org' is not a host name"),
    (["--device", "cuda:9"], "--device cuda:9: "),
    (["--port", "many"], "argument --port: invalid int value: 'many'; see mm serve --help"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[" ".join(args) for args, _ in MISTAKES])
def test_mistakes_are_one_line(
    model: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MM_API_KEY", raising=False)
    assert main(["serve", str(model), "--port", "0", *args]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("mm serve: error: ") and message in error and error.count("\n") == 1


def test_no_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert f"no model at {tmp_path}/none: give the directory" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    options = "host port api-key name slots per-client max-length cache-tokens deadline media-host device log-level"
    for option in options.split():
        assert f"--{option} " in text
    assert "mm serve MODEL" in text and "MM_API_KEY" in text and "(default: 8000)" in text
