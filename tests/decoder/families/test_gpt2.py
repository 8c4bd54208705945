"""GPT-2: learned positions on left-padded rows, its odd scalings, and the length that it has learned."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config

import mm
from mm.decoder.families.gpt2 import FAMILY

from .parity import Case, FamilyChecks, make_pair


def config(**changes: Any) -> GPT2Config:
    sizes: dict[str, Any] = {"n_embd": 36, "n_head": 3, "n_layer": 3, "n_positions": 40, "vocab_size": 97}
    return GPT2Config(**(sizes | changes))


class TestGPT2(FamilyChecks):
    cases = {
        "tied": Case(config(), gradients=True),
        "untied_relu": Case(config(tie_word_embeddings=False, n_inner=50, activation_function="relu")),
        "scaled_by_layer": Case(config(scale_attn_by_inverse_layer_idx=True, activation_function="gelu")),
        "unscaled": Case(config(scale_attn_weights=False, n_embd=12)),
    }


def test_a_document_longer_than_the_learned_positions_is_refused(tmp_path):
    model = make_pair(Case(config()), tmp_path).model
    with pytest.raises(ValueError, match="41 positions is longer than the 40"):
        model(input_ids=torch.zeros(1, 41, dtype=torch.long))


def test_a_file_without_the_prefix_loads(tmp_path):
    """As the first published files are: saved from the model without its head, with stored causal masks."""
    from safetensors.torch import load_file, save_file

    pair = make_pair(Case(config()), tmp_path)
    ids = torch.arange(9)[None]
    expected = pair.model(input_ids=ids).logits
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in stored.items() if name != "lm_head.weight"}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40) for i in range(3)}
    save_file(bare, tmp_path / "model.safetensors")
    assert torch.equal(mm.load(tmp_path)(input_ids=ids).logits, expected)


@pytest.mark.parametrize("key,value", [("add_cross_attention", True), ("activation_function", "silu"), ("n_head", 5)])
def test_what_is_refused(key, value):
    settings = config().to_diff_dict() | {key: value}
    with pytest.raises(ValueError, match=f"config.json: {key} = "):
        FAMILY.read(settings, "config.json")
