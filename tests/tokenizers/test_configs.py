"""Every file of configs/tokenizers builds a tokenizer that keeps the contract of mm.types.MediaTokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from mm.types import MediaTokenizer, Tokens, Waveform

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "tokenizers").glob("*.yaml"))


class Grey:
    duration, size = 2.5, (30, 70)

    def frames_at(self, seconds: Sequence[float]) -> torch.Tensor:
        return torch.full((len(seconds), 3, *self.size), 99, dtype=torch.uint8)


def media(tokenizer: MediaTokenizer) -> Any:
    kind = type(tokenizer).__name__
    return {
        "ImageTokenizer": torch.zeros(3, 30, 70, dtype=torch.uint8),
        "AudioTokenizer": Waveform(torch.zeros(2, 5000), 44_100),
        "VideoTokenizer": Grey(),
    }[kind]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=MediaTokenizer)
    tokenizer = parser.instantiate(parser.parse_object({"part": yaml.safe_load(path.read_text())})).part
    assert isinstance(tokenizer, MediaTokenizer)
    tokens: Tokens = tokenizer(media(tokenizer))
    assert tokens.values.shape == (tokenizer.count(media(tokenizer)), tokenizer.dim)
    assert tuple(tokens.grid.tolist()) == tokenizer.measure(media(tokenizer))


def test_there_are_configs() -> None:
    assert {"image", "audio", "video"} <= {path.stem for path in CONFIGS}
