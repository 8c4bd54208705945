"""DeepSeek-V2 and V3: latent attention of odd sizes, groups, selection bias, YaRN scales, FP8, prediction layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config
from transformers.modeling_layers import MtpModel

import mm
from mm.decoder.attention.latent import LatentAttention
from mm.decoder.interchange.quantised import dequantise_fp8
from mm.decoder.mtp import MultiTokenPrediction
from mm.export import export

from .parity import Case, FamilyChecks, assert_same, make_pair, randomise

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "vocab_size": 97,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}


def v2(**changes: Any) -> DeepseekV2Config:
    return DeepseekV2Config(
        **(SIZES | {"q_lora_rank": None, "n_routed_experts": 5, "n_shared_experts": 2, "kv_lora_rank": 10} | changes)
    )


def v3(**changes: Any) -> DeepseekV3Config:
    sizes: dict[str, Any] = {
        "q_lora_rank": 11,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
    }
    return DeepseekV3Config(**(SIZES | sizes | changes))


def select(reference: nn.Module) -> None:
    """Selection biases that change the choice of many tokens."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


class TestDeepseekV2(FamilyChecks):
    cases = {
        "lite": Case(v2()),
        "grouped": Case(
            v2(
                topk_method="group_limited_greedy",
                n_routed_experts=8,
                n_group=4,
                topk_group=2,
                routed_scaling_factor=3.0,
                q_lora_rank=13,
                num_experts_per_tok=3,
                attention_bias=True,
                rope_parameters=YARN,
                tie_word_embeddings=True,
            ),
            length=40,
        ),
    }


class TestDeepseekV3(FamilyChecks):
    cases = {
        "odd": Case(v3(), edit=select, gradients=True),
        "yarn": Case(v3(rope_parameters=YARN, attention_bias=True, tie_word_embeddings=True), edit=select, length=40),
        "halves": Case(
            v3(
                rope_interleave=False,
                q_lora_rank=None,
                n_group=1,
                topk_group=1,
                norm_topk_prob=False,
                rms_norm_eps=1e-5,
            )
        ),
    }


def test_yarn_scales_scores_and_angles(tmp_path: Path) -> None:
    """mscale_all_dim goes into the scores, squared; its ratio to mscale into cos and sin."""
    mixer = make_pair(Case(v3(rope_parameters=YARN)), tmp_path).model.decoder.get_submodule("layers.0.mixer")
    assert isinstance(mixer, LatentAttention)
    assert mixer.scale == pytest.approx(10**-0.5 * (0.1 * torch.tensor(4.0).log().item() + 1) ** 2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
        ({"index_topk": 2048}, "index_topk = 2048"),
    ],
)
def test_v3_refuses_by_name(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    config = json.loads(v3().to_json_string()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        mm.load(tmp_path)


def test_v2_refuses_normalised_weights_on_which_implementations_differ(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(v2(norm_topk_prob=True).to_json_string())
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="norm_topk_prob = true"):
        mm.load(tmp_path)


# --- FP8 ----------------------------------------------------------------------------------------------------------


def test_fp8_files_are_their_float32_numbers(tmp_path: Path) -> None:
    """Blocks that do not divide the matrices: the last one of each row and column is cut."""
    pair = make_pair(Case(v3()), tmp_path / "plain")
    block = (16, 8)
    stored, plain = {}, load_file(tmp_path / "plain" / "model.safetensors")
    for name, x in plain.items():
        stored[name] = x
        if "_proj" in name and name.endswith("weight"):
            shape = [-(-size // b) for size, b in zip(x.shape, block, strict=True)]
            scale = 0.01 + 0.05 * torch.rand(shape)
            stored[name] = (x / dequantise_fp8(torch.ones_like(x), scale, block)).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "weight_scale_inv"] = scale
            plain[name] = dequantise_fp8(stored[name], scale, block)
    (tmp_path / "fp8").mkdir()
    save_file(stored, tmp_path / "fp8" / "model.safetensors")
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    config = json.loads((tmp_path / "plain" / "config.json").read_text()) | {"quantization_config": how}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    model = mm.load(tmp_path / "fp8")
    pair.reference.load_state_dict(reassembled(plain, pair.reference))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, pair.reference(ids).logits
    assert_same(ours, theirs, torch.ones_like(ids), 2e-5)
    export(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(stored, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing tensor model.layers.0.mlp.up_proj.weight_scale_inv"):
        mm.load(tmp_path / "fp8")


def reassembled(stored: dict[str, torch.Tensor], reference: nn.Module) -> dict[str, torch.Tensor]:
    """A file's tensors as transformers has them in memory: the experts of a layer in one."""
    state = {name: stored[name] for name in reference.state_dict() if name in stored}
    for name in reference.state_dict().keys() - state.keys():
        base, kind = name.rsplit(".", 1)
        parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
        count = len(reference.state_dict()[name])
        state[name] = torch.stack(
            [torch.cat([stored[f"{base}.{e}.{part}.weight"] for part in parts]) for e in range(count)]
        )
    return state


# --- the multi-token-prediction layers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A directory with two prediction layers, and transformers' model and its own module of those layers."""
    path = tmp_path_factory.mktemp("mtp")
    pair = make_pair(Case(v3(num_mtp_layers=2), edit=select), path)
    mtp = MtpModel(pair.reference, 2).float().eval()
    embedding = {name: p.clone() for name, p in pair.reference.named_parameters()}
    randomise(mtp, seed=5)
    pair.reference.load_state_dict(embedding, strict=False)  # its embedding and head are the reference's
    with torch.no_grad():
        select(mtp)
    stored = load_file(path / "model.safetensors")
    for name, x in mtp.layers.state_dict().items():
        depth, rest = name.split(".", 1)
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        base = f"model.layers.{3 + int(depth)}."
        if rest.endswith(("gate_up_proj", "down_proj")):
            for e, of_one in enumerate(x):
                names = ("gate_proj", "up_proj") if rest.endswith("gate_up_proj") else ("down_proj",)
                for part, matrix in zip(names, of_one.chunk(len(names)), strict=True):
                    stored[f"{base}mlp.experts.{e}.{part}.weight"] = matrix.clone()
        else:
            stored[base + rest] = x.clone()
    stored["model.layers.3.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.3.shared_head.head.weight"] = stored["lm_head.weight"].clone()
    save_file(stored, path / "model.safetensors")
    return path, pair.reference, mtp


@torch.no_grad()
def test_prediction_layers_equal_the_reference(with_mtp: tuple[Path, Any, Any]) -> None:
    path, reference, theirs = with_mtp
    model = mm.load(path)
    mtp = model.decoder.mtp
    assert isinstance(mtp, MultiTokenPrediction)
    ids = torch.randint(0, 97, (1, 17), generator=torch.Generator().manual_seed(1))
    output = model(input_ids=ids)
    states = mtp(output.hidden, output.sequence)
    hidden = reference.model(ids).last_hidden_state
    for depth, (state, _, there) in enumerate(states, 1):
        # Their inputs of depth k: tokens k, k + 1, ... and the states, one depth less deep, of the tokens before them.
        places = torch.arange(depth, 17)[None]
        hidden = theirs.forward_layer(depth - 1, hidden[:, : 17 - depth], places, None, input_ids=ids[:, depth:])
        assert there[0].tolist() == [False] * depth + [True] * (17 - depth)
        logits = model.decoder.logits(state[:, depth:])
        assert_same(logits, reference.lm_head(hidden), torch.ones_like(places), 2e-5)


@torch.no_grad()
def test_prediction_layers_are_exported_and_stay_in_our_checkpoint(
    with_mtp: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    path = with_mtp[0]
    model = mm.load(path)
    export(model, tmp_path / "hf")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert before.keys() - after.keys() == copies
    assert all(torch.equal(before[name], x) for name, x in after.items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.arange(9)[None]
    assert_same(model(input_ids=ids).logits, again(ids).logits, torch.ones_like(ids), 2e-5)


def test_a_file_without_the_prediction_layers_that_its_config_counts(tmp_path: Path) -> None:
    model = make_pair(Case(v3(num_mtp_layers=1)), tmp_path).model
    assert model.decoder.mtp is None
    assert model.origin is not None and model.origin["config"]["num_nextn_predict_layers"] == 0
