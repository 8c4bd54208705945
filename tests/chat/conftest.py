"""A model that repeats what it is asked, media files of every sort, and a terminal that is a list of lines."""

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mm
from mm.generation.testing import ScriptedModel
from mm.tokenizers.audio import AudioTokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.text import TextTokenizer
from mm.types import MediaSpec, Sample


def echo(sample: Sample) -> str:
    """Turn number, media of the last question, and its text: what the model saw, spelled out."""
    questions = [message["content"] for message in sample.messages if message["role"] == "user"]
    last = questions[-1]
    parts: list[dict[str, Any]] = [{"type": "text", "text": last}] if isinstance(last, str) else last
    shown = [
        f"{part['type']}:{Path(sample.media[part['media']].name).name}" for part in parts if part["type"] != "text"
    ]
    return " ".join([f"#{len(questions)}", *shown, *(part["text"] for part in parts if part["type"] == "text")])


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["what colour is the shape? red, green or blue. " * 4], vocab_size=300)


@pytest.fixture
def model(tokenizer) -> ScriptedModel:
    specs = {"image": MediaSpec(ImageTokenizer(patch=4, max_tokens=16)), "audio": MediaSpec(AudioTokenizer())}
    return ScriptedModel(tokenizer, echo, specs)


@pytest.fixture
def model_dir(tmp_path, model, monkeypatch) -> str:
    """A directory that `mm.load` takes for the model's."""
    directory = tmp_path / "model"
    directory.mkdir()
    monkeypatch.setattr(mm, "load", lambda path: model, raising=False)
    return str(directory)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Good and bad media files by name."""
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "cat.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "two words.png").write_bytes((tmp_path / "cat.png").read_bytes())
    for name, samples in (("beep.wav", 1600), ("empty.wav", 0)):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(b"\1\2" * samples)
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 64)
    names = ["cat.png", "dot.png", "text.png", "two words.png", "beep.wav", "empty.wav", "clip.mp4", "missing.png"]
    return {name: str(tmp_path / name) for name in names}


@pytest.fixture
def lines() -> Callable[..., Callable[[str], str]]:
    """lines("a", KeyboardInterrupt, ...) -> a `read` that gives or raises one after the other, then ends the input."""

    def make(*script: str | type[BaseException]) -> Callable[[str], str]:
        left = [*script, EOFError]

        def read(prompt: str) -> str:
            line = left.pop(0)
            if isinstance(line, str):
                return line
            raise line

        return read

    return make
