"""What every position scheme owes a mixer, for every file of configs/positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mm.decoder.decoder import Decoder
from mm.fusion.splice import splice
from mm.parts import build
from mm.testing import element_batch

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "positions"
MIXER = "mm.decoder.attention.grouped.GroupedAttention"


@pytest.fixture(params=sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """One layer of attention alone: a second one could tell places by what the first one saw."""
    torch.manual_seed(0)
    mixer = {"heads": 4, "kv_heads": 2, "head_dim": 16, "positions": yaml.safe_load(request.param.read_text())}
    arguments: dict[str, Any] = {
        "width": 32,
        "mixers": {"m": {"class_path": MIXER, "init_args": mixer}},
        "ffns": {},
        "layers": [{"pattern": ["m/none"]}],
        "vocab_size": 97,
    }
    built = build({"class_path": "mm.decoder.decoder.Decoder", "init_args": arguments}, Decoder)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


def run(decoder: Decoder, *row: list[int], start: int = 0, cache: Any = None) -> torch.Tensor:
    """One row of documents of token ids -> (T, D)."""
    batch = element_batch([[(1 + d, 0, str(token)) for d, document in enumerate(row) for token in document]])
    sequence = splice(batch, decoder.embed, {}, nn.Embedding(3, decoder.width))
    sequence.index += start
    sequence.positions += start
    return decoder(sequence, cache)[0][0]


@torch.no_grad()
def test_places_tell_and_each_document_has_its_own(decoder: Decoder) -> None:
    ids = list(range(5, 15))
    alone = run(decoder, ids)
    swapped = run(decoder, [ids[1], ids[0], *ids[2:]])
    assert (swapped[-1] - alone[-1]).abs().max() > 1e-3
    # float32 sums in another order: 1e-5 is ten times that noise
    packed = run(decoder, [30, 31, 32], ids, [33])
    torch.testing.assert_close(packed[3:13], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_cached_step_is_the_last_of_a_full_pass(decoder: Decoder) -> None:
    ids, cache = list(range(5, 15)), decoder.new_cache()
    run(decoder, ids[:4], cache=cache)
    for count in range(5, 11):  # across a switch of frequencies, where there is one
        step = run(decoder, [ids[count - 1]], start=count - 1, cache=cache)[-1]
        torch.testing.assert_close(step, run(decoder, ids[:count])[-1], atol=1e-5, rtol=1e-4)
