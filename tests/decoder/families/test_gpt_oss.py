"""gpt-oss: sinks, windows, YaRN past its length, biased clamped experts that reach their limits, and MXFP4 files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mm
from mm.decoder.interchange.quantised import dequantise_mxfp4
from mm.export import export

from .parity import Case, FamilyChecks, assert_same, make_pair

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}


def config(**changes: Any) -> GptOssConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 7,
        "max_position_embeddings": 128,
        "rope_parameters": YARN,
        "vocab_size": 97,
    }
    return GptOssConfig(**(sizes | changes))


def widen(reference: Any) -> None:
    """Gates and ups that reach beyond the clamp, on both sides."""
    for layer in reference.model.layers:
        layer.mlp.experts.gate_up_proj.mul_(2.5)


class TestGptOss(FamilyChecks):
    cases = {
        "odd": Case(config(swiglu_limit=3.0), length=40, edit=widen, gradients=True),
        "plain": Case(
            config(
                attention_bias=False,
                tie_word_embeddings=True,
                layer_types=["full_attention", "sliding_attention", "sliding_attention"],
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                swiglu_alpha=1.0,
            ),
            length=20,
        ),
    }


def test_mxfp4_numbers() -> None:
    """Two of every four-bit number and three scales, against the format's definition."""
    blocks = torch.arange(16, dtype=torch.uint8).mul(16).add(torch.arange(15, -1, -1, dtype=torch.uint8)).expand(3, 16)
    scales = torch.tensor([127, 120, 131], dtype=torch.uint8)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    every = torch.tensor([*values, *(-x for x in values)])
    low, high = every.flip(0), every  # the low half of byte i holds 15 - i, the high half i
    expected = torch.stack([low, high], 1).flatten() * torch.tensor([1.0, 2.0**-7, 16.0])[:, None]
    assert torch.equal(dequantise_mxfp4(blocks, scales), expected.flatten())
    ends = dequantise_mxfp4(blocks, torch.tensor([255, 0, 254], dtype=torch.uint8)).view(3, 32)
    assert ends[0].isnan().all() and ends[1].abs().max() == 6 * 2.0**-127 and ends[2].abs().max() == torch.inf
    with pytest.raises(ValueError, match="do not fit scales"):
        dequantise_mxfp4(blocks, scales[:2])
    with pytest.raises(ValueError, match="uint8"):
        dequantise_mxfp4(blocks.int(), scales)


def test_mxfp4_files_are_their_float32_numbers(tmp_path: Path) -> None:
    """Against transformers' own dequantisation, put into its float32 model."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    pair = make_pair(Case(config(**sizes)), tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            base = f"model.layers.{i}.mlp.experts.{name}"
            del stored[base]
            shape = (3, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
            stored |= {f"{base}_blocks": blocks, f"{base}_scales": scales}
            theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            pair.reference.get_parameter(base).data.copy_(theirs)
    (tmp_path / "packed").mkdir()
    save_file(stored, tmp_path / "packed" / "model.safetensors")
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())
    published = {"quantization_config": how, "experts_per_token": 2, "initial_context_length": 16}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(settings | published))
    model = mm.load(tmp_path / "packed")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert_same(model(input_ids=ids).logits, pair.reference(ids).logits, torch.ones_like(ids), 2e-5)
    export(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.experts.down_proj"].shape == (
        3,
        32,
        64,
    )
    stored["model.layers.1.mlp.experts.down_proj_scales"] = torch.zeros(3, 64, 2, dtype=torch.uint8)
    save_file(stored, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"down_proj_scales has shape \(3, 64, 2\), the config's model needs \(3, 64, 1\)"
    ):
        mm.load(tmp_path / "packed")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked", "full_attention"]}, "layer_types"),
        ({"experts_per_token": 4}, "experts_per_token = 4"),
        ({"initial_context_length": 4096}, "initial_context_length = 4096"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'"),
        ({"new_setting": 1}, "new_setting = 1"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config().to_json_string()) | changes))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        mm.load(tmp_path)
