"""Mamba-2: groups, odd state sizes, with and without biases, several chunks of the reference's and of ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config

from mm.decoder.families.mamba2 import FAMILY

from .parity import Case, FamilyChecks, make_pair


def config(**changes: Any) -> Mamba2Config:
    sizes: dict[str, Any] = {
        "hidden_size": 36,
        "num_heads": 6,
        "head_dim": 12,
        "state_size": 7,
        "n_groups": 3,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "chunk_size": 8,
        "pad_token_id": 0,
    }
    return Mamba2Config(**(sizes | changes))


def plain(config: Any) -> dict[str, Any]:
    """As config.json holds it."""
    return json.loads(config.to_json_string())


class TestMamba2(FamilyChecks):
    cases = {
        "odd": Case(config(), length=80, gradients=True),
        "tied": Case(config(tie_word_embeddings=True, n_groups=1, use_conv_bias=False, conv_kernel=3), length=19),
    }


@torch.no_grad()
def test_projection_biases(tmp_path: Path) -> None:
    """Unpadded: the reference lets the bias of padding through its convolution, so that its padded rows are others."""
    pair = make_pair(Case(config(use_bias=True)), tmp_path)
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    theirs = pair.reference(ids, use_cache=False).logits
    ours = pair.model(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    ours_padded = pair.model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    assert (ours_padded - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    theirs_padded = pair.reference(padded, attention_mask=mask, use_cache=False).logits[:, 5:]
    assert (theirs_padded - theirs).abs().max() > 1e-3 * theirs.abs().max()  # if this fails, use a Case instead


@torch.no_grad()
def test_limited_time_steps(tmp_path: Path) -> None:
    """In one pass: the reference's own decoding step leaves the limit out."""
    pair = make_pair(Case(config(time_step_limit=(0.3, 0.6))), tmp_path)
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    theirs = pair.reference(ids, use_cache=False).logits
    assert (pair.model(input_ids=ids).logits - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("spelled", "limit"),
    [
        ([0.0, {"__float__": "Infinity"}], None),
        ([0.0, float("inf")], None),
        ([0.0, "inf"], None),
        (None, None),
        ([0.01, 0.2], [0.01, 0.2]),
    ],
)
def test_time_step_limits_as_files_spell_them(spelled: Any, limit: Any) -> None:
    tree, _ = FAMILY.read(plain(config()) | {"time_step_limit": spelled}, "config.json")
    assert tree["init_args"]["mixers"]["ssm"]["init_args"].get("dt_limit") == limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"expand": 3}, "expand = 3: times hidden_size 36 must be num_heads 6 x head_dim 12"),
        ({"time_step_limit": [0.1, "soon"]}, "time_step_limit .* two numbers"),
        ({"time_step_limit": [0.1]}, "time_step_limit .* two numbers"),
        ({"rms_norm": False}, "rms_norm"),
        ({"selective": True}, "selective = true: this setting is not supported"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY.read(plain(config()) | change, "config.json")
