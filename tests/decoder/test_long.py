"""Long rows within bounded memory: no mask of a whole row, no logits of a whole row, no activations but a layer's."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What trains, or reads, in a process of its own, which then says the most memory that it had.
SCRIPT = """
import resource, sys, torch
from functools import partial
from mm.decoder.attention.grouped import GroupedAttention, Scores
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.positions import Alibi, Rotary
from mm.model import MultimodalModel
from mm.objectives.instruct import NextToken
from mm.testing import tiny_tokenizer
from mm.types import Batch

kind, length = sys.argv[1], int(sys.argv[2])
kinds = {"window": {"window": 512}, "alibi": {"positions": Alibi()}, "sinks": {"scores": Scores(sinks=True)}}
options = {"positions": Rotary()} | kinds.get(kind, {})
mixer = partial(GroupedAttention, heads=4, kv_heads=2, **options)
groups = [LayerGroup(["m/f"], 4)]
ffns = {"f": partial(GatedFFN, hidden=512)}
decoder = Decoder(256, {"m": mixer}, ffns, groups, 300, checkpoint_activations="full")
model = MultimodalModel(tiny_tokenizer(), decoder)
torch.manual_seed(0)
ids = torch.randint(300, (1, length))
if sys.argv[3] == "train":
    documents = torch.arange(length)[None] // (length // 8) + 1
    loss = NextToken()(model, Batch(ids, ids.clone(), documents, torch.zeros_like(ids)))
    loss.total.backward()
else:
    with torch.inference_mode():
        model.eval()(input_ids=ids, cache=model.new_cache())
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(*arguments: str) -> float:
    """GB."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "window", "alibi", "sinks"])
def test_32k_packed_positions_train_within_8_gb(kind: str) -> None:
    found = peak(kind, "32768", "train")
    print(f"{kind}: {found:.2f} GB")
    assert found < 8


@pytest.mark.slow
def test_128k_positions_are_read_within_12_gb() -> None:
    found = peak("window", "131072", "read")
    print(f"{found:.2f} GB")
    assert found < 12
