"""Upcycling: the same outputs where the mathematics allows it, and what cannot be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import mm
from mm import checkpoint, cli
from mm.decoder.ffn.experts import ClampedSwigluExperts, GegluExperts, PlainExperts, SwigluExperts
from mm.decoder.ffn.moe import SparseMoE, moe_layers
from mm.decoder.upcycle import Upcycling
from mm.export import export
from mm.model import MultimodalModel
from mm.parts import build
from mm.testing import spread, tiny_tokenizer
from mm.upcycle import difference, upcycle

TOKENIZER = tiny_tokenizer()
ROUTERS = "mm.decoder.ffn.routers."
FFNS: dict[str, tuple[dict[str, Any], type]] = {
    "swiglu": ({"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 20}}, SwigluExperts),
    "swiglu_bias": (
        {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 20, "bias": True}},
        SwigluExperts,
    ),
    "geglu": (
        {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 20, "activation": "gelu"}},
        GegluExperts,
    ),
    "clamped": (
        {"class_path": "mm.decoder.ffn.dense.ClampedFFN", "init_args": {"hidden": 20, "limit": 0.5}},
        ClampedSwigluExperts,
    ),
    "gelu": ({"class_path": "mm.decoder.ffn.dense.PlainFFN", "init_args": {"hidden": 20}}, PlainExperts),
    "relu2": (
        {
            "class_path": "mm.decoder.ffn.dense.PlainFFN",
            "init_args": {"hidden": 20, "activation": "relu2", "bias": False},
        },
        PlainExperts,
    ),
}


def model_of(ffn: dict[str, Any], layers: int = 3) -> MultimodalModel:
    decoder = {
        "width": 16,
        "mixers": {"full": {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 2}}},
        "ffns": {"dense": ffn},
        "layers": [{"pattern": ["full/dense"], "repeat": layers}],
        "vocab_size": 300,
    }
    tree = {"class_path": "mm.decoder.decoder.Decoder", "init_args": decoder}
    torch.manual_seed(0)
    model = MultimodalModel(TOKENIZER, build(tree, mm.decoder.decoder.Decoder), embedding_dim=4)
    model.config = {"class_path": "mm.model.MultimodalModel", "init_args": {"decoder": tree, "embedding_dim": 4}}
    spread(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(TOKENIZER.save(tmp_path_factory.mktemp("tokenizer")))


def with_tokenizer(model: MultimodalModel, tokenizer: str) -> MultimodalModel:
    assert model.config is not None
    model.config["init_args"]["tokenizer"] = tokenizer
    return model


@pytest.mark.parametrize("kind", FFNS)
def test_copies_compute_what_the_dense_model_did(kind: str, tokenizer: str) -> None:
    """However random the router is: its weights add up to one. Float32 rounding only."""
    tree, expected = FFNS[kind]
    dense = with_tokenizer(model_of(tree), tokenizer)
    sparse, same = upcycle(dense, Upcycling(num_experts=5, experts_per_token=2, keep_dense=1))
    assert same and difference(dense, sparse, 0) < 1e-5
    experts = [layer.experts for layer in moe_layers(sparse)]
    assert [type(each) for each in experts] == [expected, expected]
    assert torch.equal(
        sparse.state_dict()["embedding_head.text.weight"], dense.state_dict()["embedding_head.text.weight"]
    )
    assert not isinstance(sparse.decoder.layers[0].get_submodule("ffn"), SparseMoE)


@pytest.mark.parametrize(
    ("router", "arguments", "exact"),
    [
        ("topk.TopKRouter", {"scale": 2.0}, True),
        ("topk.TopKRouter", {"gate": "all"}, False),
        ("sigmoid_bias.SigmoidBiasRouter", {"scale": 2.5, "groups": 2, "groups_chosen": 1}, True),
        ("sigmoid_bias.SigmoidBiasRouter", {"normalise": False}, False),
        ("hierarchical.HierarchicalRouter", {"groups": 2, "groups_chosen": 2}, True),
        ("expert_choice.ExpertChoiceRouter", {"look_ahead": True}, False),
    ],
)
def test_the_router_decides_whether_it_can_be_exact(
    router: str, arguments: dict[str, Any], exact: bool, tokenizer: str
) -> None:
    tree = {"class_path": ROUTERS + router, "init_args": arguments}
    dense = with_tokenizer(model_of(FFNS["gelu"][0]), tokenizer)
    sparse, same = upcycle(dense, Upcycling(num_experts=4, experts_per_token=2, router=tree))
    assert same == exact and (difference(dense, sparse, 0) < 1e-5) == exact


def test_noise_sets_experts_apart_and_is_reproducible(tokenizer: str) -> None:
    dense = with_tokenizer(model_of(FFNS["swiglu"][0]), tokenizer)
    upcycling = Upcycling(num_experts=4, noise=0.1)
    made = [upcycle(dense, upcycling, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    first, again, other = (moe_layers(model)[0].experts.get_parameter("gate_up").detach() for model in made)
    assert torch.equal(first, again) and not torch.equal(first, other)
    apart = (first[0] - first[1]).std() / dense.decoder.get_parameter("layers.0.ffn.gate_up.weight").detach().std()
    assert float(apart) == pytest.approx(0.1 * 2**0.5, rel=0.2)
    assert 1e-4 < difference(dense, made[0], 0) < 0.5


def test_a_router_from_zero_sends_all_to_the_first(tokenizer: str) -> None:
    dense = with_tokenizer(model_of(FFNS["swiglu"][0]), tokenizer)
    sparse, same = upcycle(dense, Upcycling(num_experts=4, start="zero"))
    assert same and difference(dense, sparse, 0) < 1e-5
    routing = sparse(input_ids=torch.arange(12)[None]).routings[0]
    assert (routing.load() > 0).sum() == 2


def test_layers_are_chosen_and_the_tree_stays_readable() -> None:
    model = model_of(FFNS["swiglu"][0], layers=7)
    assert model.config is not None
    tree = Upcycling(keep_dense=1, every=2).tree(model.config["init_args"]["decoder"])
    kinds = [kind for group in tree["init_args"]["layers"] for kind in group["pattern"] * group["repeat"]]
    dense, sparse = "full/dense", "full/dense_experts"
    assert kinds == [dense, dense, sparse, dense, sparse, dense, sparse]
    assert tree["init_args"]["ffns"].keys() == {"dense", "dense_experts"}
    every = Upcycling().tree(model.config["init_args"]["decoder"])
    assert every["init_args"]["ffns"].keys() == {"dense_experts"}
    assert every["init_args"]["layers"] == [{"pattern": [sparse], "repeat": 7}]


def test_a_published_model_is_upcycled_and_no_longer_exported(tmp_path: Path) -> None:
    """Tied embeddings, a tokenizer that is not there, and the origin that the result no longer has."""
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    config = LlamaConfig(vocab_size=60, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert cli.main(["upcycle", str(tmp_path / "llama"), str(tmp_path / "moe"), "--experts", "3"]) == 0
    dense, sparse = mm.load(tmp_path / "llama"), mm.load(tmp_path / "moe")
    assert difference(dense, sparse, 0) < 1e-5 and sparse.decoder.head.weight is sparse.decoder.embed.weight
    with pytest.raises(ValueError, match="did not come from a published checkpoint"):
        export(sparse, tmp_path / "hf")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str) -> None:
    checkpoint.save(with_tokenizer(model_of(FFNS["swiglu"][0]), tokenizer), tmp_path / "dense")
    router = tmp_path / "router.yaml"
    router.write_text(yaml.safe_dump({"class_path": ROUTERS + "sigmoid_bias.SigmoidBiasRouter"}))
    args = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--router", str(router)]
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "parameters became" in said and "the same but for rounding" in said
    model = mm.load(tmp_path / "moe")
    assert len(moe_layers(model)) == 3 and difference(mm.load(tmp_path / "dense"), model, 1) < 1e-5
    assert cli.main(args) == 2 and "there is a model already" in capsys.readouterr().err
    assert cli.main([*args[:2], str(tmp_path / "other"), "--keep-dense", "3"]) == 2
    assert "keep_dense 3 and every 1 leave none of the 3 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ffn", "match"),
    [
        (
            {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 8, "activation": "relu"}},
            "layer 0: dense: there are no experts gated by relu",
        ),
        ({"class_path": "mm.decoder.ffn.moe.SparseMoE", "init_args": {"hidden": 8}}, "layer 0: dense is .*SparseMoE"),
    ],
)
def test_what_cannot_be_changed_is_named(ffn: dict[str, Any], match: str) -> None:
    model = model_of(ffn)
    assert model.config is not None
    with pytest.raises(ValueError, match=match):
        Upcycling().tree(model.config["init_args"]["decoder"])
