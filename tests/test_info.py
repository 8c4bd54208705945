"""mm info: every number against a count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mm import info

V, D, HIDDEN, E, K = 50, 8, 6, 4, 1  # vocabulary, width, expert hidden width, experts, chosen


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 2 * D, bias=False)

    def cache_numbers_per_token(self) -> int:
        return 2 * D

    def attention_flops(self, context: int) -> int:
        return 4 * D * context


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = E, K
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in ((E, HIDDEN, D), (E, D, HIDDEN)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.ffn = Mixer(), Moe()


class ToyDecoder(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.RMSNorm(D)


class ToyModel(nn.Module):
    """Two towers with one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = ToyDecoder(tied=True)
        encoder = nn.Linear(3, 5, bias=False)
        towers = {kind: nn.Sequential(encoder, nn.Linear(5, D, bias=False)) for kind in ("image", "video")}
        self.towers = nn.ModuleDict(towers)
        self.slots = nn.Embedding(3, D)


LAYER = D * 2 * D + D * E  # mixer and router
EXPERTS = E * 2 * HIDDEN * D


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_counts(tied: bool) -> None:
    found = info.describe(ToyDecoder(tied), context=10, cache_bytes=4)
    tables = V * D * (1 if tied else 2)
    assert found.parameters == tables + 2 * (LAYER + EXPERTS) + D
    assert found.active == tables + 2 * (LAYER + EXPERTS * K // E) + D
    assert found.embedding == V * D
    # tied or not, the head's product is paid
    assert found.flops_forward == 2 * (V * D + 2 * (LAYER + EXPERTS * K // E) + D) + 2 * 4 * D * 10
    assert found.flops_attention == 2 * 4 * D * 10
    assert found.flops_training == 3 * found.flops_forward
    assert found.cache_bytes_per_token == 4 * 2 * 2 * D
    assert found.cache_bytes_at_context == 10 * found.cache_bytes_per_token


def test_shared_encoder_is_one_in_memory_and_two_in_use() -> None:
    model = ToyModel()
    found = info.describe(model)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    parts = {part.name: part for part in found.parts}
    assert parts["image tower"].parameters == 3 * 5 + 5 * D
    assert parts["video tower"].parameters == 5 * D
    assert parts["image tower"].flops == parts["video tower"].flops == 2 * (3 * 5 + 5 * D)
    # towers work on media tokens: a decoder token does not pay for them
    assert found.flops_forward == info.describe(model.decoder).flops_forward


def test_window_bounds_attention_flops_not_parameters() -> None:
    near, far = (info.describe(ToyDecoder(True), context=context) for context in (1, 1000))
    assert far.flops_forward - near.flops_forward == 2 * 4 * D * 999
    assert far.parameters == near.parameters


def test_nonpositive_numbers() -> None:
    with pytest.raises(ValueError, match="context must be positive, not 0"):
        info.describe(ToyDecoder(True), context=0)
    with pytest.raises(ValueError, match="batch must be positive, not -1"):
        info.describe(ToyDecoder(True), batch=-1)
    with pytest.raises(ValueError, match="precision must be bf16-mixed, .* not 'int4'"):
        info.describe(ToyDecoder(True), precision="int4")  # type: ignore[arg-type]


def test_what_a_row_keeps_whatever_its_length() -> None:
    decoder = ToyDecoder(True)
    decoder.layers[1].get_submodule("mixer").cache_numbers_fixed = lambda: 7  # type: ignore[assignment]
    short, long = (info.describe(decoder, context=context) for context in (1, 100))
    assert short.cache_bytes_fixed == long.cache_bytes_fixed == 4 * 7  # a state is float32
    assert long.cache_bytes_at_context == 100 * long.cache_bytes_per_token + 28
    assert long.cache_numbers_per_layer == [2 * D, 2 * D] and long.layers == 2


def test_embedding_counts_and_multi_token_prediction_do_not_mix() -> None:
    decoder = ToyDecoder(False)
    plain = info.describe(decoder)
    assert plain.active_without_embedding == plain.active - V * D
    tied = info.describe(ToyDecoder(True))
    assert tied.active_without_embedding == tied.active == plain.active_without_embedding
    decoder.mtp = nn.Sequential(nn.Linear(D, D, bias=False), decoder.head)  # it shares the head
    beside = info.describe(decoder)
    assert beside.parameters_mtp == D * D
    assert (beside.parameters, beside.active, beside.flops_forward) == (
        plain.parameters,
        plain.active,
        plain.flops_forward,
    )
    assert beside.memory.gradients == 4 * (plain.parameters + D * D)  # but it is trained


def test_memory_to_train() -> None:
    decoder = ToyDecoder(True)
    found = info.describe(decoder, context=10, batch=3, precision="32-true")
    kept = 2 * (3 * D + (D + E) + K * 2 * (D + HIDDEN))  # layers; in and out of qkv, router, chosen experts
    memory = found.memory
    assert memory.tokens == 30 and memory.weights == memory.gradients == 4 * found.parameters
    assert memory.optimizer == 8 * found.parameters
    assert memory.activations == 30 * 4 * kept
    assert memory.logits == 30 * V * 8
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
    assert memory.total == sum(parts)
    mixed = info.describe(decoder, context=10, batch=3).memory
    assert mixed.weights == 6 * found.parameters and mixed.activations == memory.activations // 2
    assert mixed.logits == 30 * V * 10
    decoder.checkpoint_activations = "full"  # type: ignore[assignment]
    recomputed = info.describe(decoder, context=10, batch=3, precision="32-true").memory
    assert recomputed.recomputed and recomputed.activations == 30 * 4 * (kept // 2 + 2 * D)


def test_every_key_of_the_json_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(info.describe(ToyDecoder(True)).to_json()).keys() == info.KEYS.keys()
    with pytest.raises(SystemExit):
        info.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {key}: " in shown for key in info.KEYS)


ATTENTION = {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 4, "kv_heads": 2}}
MOE_ARGS = {"hidden": 24, "num_experts": 8, "experts_per_token": 2}
MOE = {"class_path": "mm.decoder.ffn.moe.SparseMoE", "init_args": MOE_ARGS}
LAYERS = [{"pattern": ["a/m"], "repeat": 2}]
DECODER_ARGS = {"width": 32, "mixers": {"a": ATTENTION}, "ffns": {"m": MOE}, "layers": LAYERS}
DECODER = {"class_path": "mm.decoder.decoder.Decoder", "init_args": DECODER_ARGS}
MODEL = {"class_path": "mm.model.MultimodalModel", "init_args": {"tokenizer": "absent.json", "decoder": DECODER}}

STAGE = {"model": {"class_path": "mm.training.module.InstructionModule", "init_args": {"model": MODEL}}}


def write(path: Path, config: object) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize("config", [DECODER, {"decoder": DECODER}, STAGE], ids=["part", "section", "stage"])
def test_real_decoder_from_yaml(config: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "c.yaml", config)
    assert info.main([path, "--vocab-size", "300", "--context", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    experts = 8 * 3 * 24 * 32
    layer = 32 * (32 + 2 * 2 * 8) + 32 * 32 + 8 * 32 + 2 * 32  # qkv, out, router, norms
    slots = 3 * 32 if found["model"] == "MultimodalModel" else 0
    assert found["parameters"] == 300 * 32 + 2 * (layer + experts) + 32 + slots
    assert found["parameters"] - found["active"] == 2 * experts * 6 // 8
    assert found["cache_bytes_per_token"] == 2 * 2 * (2 * 2 * 8)  # bytes, layers, (k and v) x kv_heads x head_dim
    assert found["counted"].keys() == info.HOW_COUNTED.keys()


def test_table_names_numbers_and_how_they_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info.main([write(tmp_path / "c.yaml", DECODER), "--vocab-size", "300"])
    shown = capsys.readouterr().out
    for words in ("decoder: feed-forward", "KV cache", "training", "How it is counted", "E - K"):
        assert words in shown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DECODER, "vocab_size is not set"),
        (MODEL, "absent.json is not there"),
        ({"trainer": {"max_steps": 1}}, "no class_path in it is"),
        ({**DECODER, "init_args": {**DECODER_ARGS, "vocab_size": 9, "widht": 3}}, "widht"),
    ],
)
def test_errors_name_the_cause(config: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        info.main([write(tmp_path / "c.yaml", config)])


PUBLISHED = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}


@pytest.mark.parametrize("as_file", [True, False])
def test_published_directory(as_file: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    found = info.describe(info.build_meta(tmp_path / "config.json" if as_file else tmp_path))
    assert found.parameters == 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32


def test_published_settings_that_are_not_known(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config, message in (
        (PUBLISHED | {"model_type": "eliza"}, "model_type 'eliza' is not supported"),
        (PUBLISHED | {"attention_sinks": 4}, "attention_sinks = 4"),
        ({"hidden_size": 3}, "no model_type in it"),
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            info.build_meta(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        info.build_meta(tmp_path)


def test_missing_file_and_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.yaml: no such file"):
        info.main([str(tmp_path / "nowhere.yaml")])
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="bad.yaml is not YAML"):
        info.main([str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(
    ("number", "spelled"),
    [(0, "0"), (999, "999"), (999_600, "1.00M"), (1234, "1.23K"), (45_600_000, "45.6M"), (7.89e9, "7.89B")],
)
def test_count(number: float, spelled: str) -> None:
    assert info.count(number) == spelled
