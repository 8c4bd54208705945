"""What every router owes its layer, for every file of configs/routers; and each with every balance rule on a toy."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mm.decoder.decoder import Decoder
from mm.decoder.ffn.balance import Balance
from mm.decoder.ffn.routers.base import Router
from mm.decoder.ffn.routers.expert_choice import ExpertChoiceRouter
from mm.parts import build

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "routers").glob("*.yaml"))
WIDTH, EXPERTS, PER_TOKEN = 16, 8, 2


def balance_benchmark() -> Any:
    """The toy task is the benchmark's: what the plot shows is what is tested."""
    spec = importlib.util.spec_from_file_location("balance_benchmark", ROOT / "benchmarks" / "balance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = balance_benchmark()


def build_router(file: Path) -> Router:
    """Built as a decoder builds it, inside a mixture of experts."""
    moe = {"num_experts": EXPERTS, "experts_per_token": PER_TOKEN, "hidden": 4}
    arguments = {
        "width": WIDTH,
        "mixers": {"m": {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 2}}},
        "ffns": {
            "f": {
                "class_path": "mm.decoder.ffn.moe.SparseMoE",
                "init_args": moe | {"router": yaml.safe_load(file.read_text())},
            }
        },
        "layers": [{"pattern": ["m/f"]}],
        "vocab_size": 9,
    }
    decoder = build({"class_path": "mm.decoder.decoder.Decoder", "init_args": arguments}, Decoder)
    part = decoder.layers[0].get_submodule("ffn.router")
    assert isinstance(part, Router)
    return part


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def router(request: pytest.FixtureRequest) -> Router:
    torch.manual_seed(0)
    router = build_router(request.param)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.4)
    return router


def everything(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def test_a_routing_is_whole(router: Router) -> None:
    x = torch.randn(96, WIDTH)
    routing = router(x, everything(x))
    taken = routing.taken()
    assert routing.logits.shape == routing.scores.shape == (96, EXPERTS)
    assert routing.indices.dtype == torch.int64 and routing.indices.min() >= 0 and routing.indices.max() < EXPERTS
    assert taken.sum() == routing.load().sum() == 96 * PER_TOKEN  # on average, where experts choose
    for row, kept in zip(routing.indices, taken, strict=True):
        assert len(set(row[kept].tolist())) == int(kept.sum())  # no expert twice
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(96))
    assert (routing.weights[taken] > 0).all()
    total = router.weight_sum()
    if total is not None:
        torch.testing.assert_close(routing.weights.sum(-1), torch.full((96,), total))


def test_padding_is_in_no_statistic_and_changes_nothing(router: Router) -> None:
    x = torch.randn(40, WIDTH)
    bare = router(x, everything(x))
    mask = torch.arange(60) < 40
    padded = router(torch.cat([x, 50 * torch.randn(20, WIDTH)]), mask)
    assert torch.equal(padded.load(), bare.load()) and not padded.taken()[40:].any()
    assert torch.equal(padded.indices[:40], bare.indices)
    torch.testing.assert_close(padded.weights[:40], bare.weights)
    documents = mask.long()[None]
    balance = Balance(switch=1, z=1, variance=1, sequence=1)
    one, other = balance.losses([padded], documents), balance.losses([bare], documents[:, :40])
    assert one.keys() == {"balance/switch", "balance/z", "balance/variance", "balance/sequence"}
    for name, term in one.items():
        torch.testing.assert_close(term, other[name])
    none = router(x, torch.zeros(40, dtype=torch.bool))
    silent = balance.losses([none], torch.zeros(1, 40, dtype=torch.long))
    assert not none.load().any() and all(term == 0 for term in silent.values())


def test_maths_is_float32_for_bfloat16_activations(router: Router) -> None:
    x = torch.randn(8, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, everything(x))
    assert routing.logits.dtype == routing.scores.dtype == torch.float32 and routing.weights.dtype == torch.bfloat16
    torch.testing.assert_close(routing.scores, router(x.float(), everything(x)).scores)


def test_the_selection_bias_moves_the_choice_and_not_the_weight(router: Router) -> None:
    x = torch.randn(60, WIDTH)
    before = router(x, everything(x))
    router.bias[3] = 10.0
    after = router(x, everything(x))
    torch.testing.assert_close(after.scores, before.scores)
    if not router.steerable:
        assert torch.equal(after.indices, before.indices)
        return
    assert (after.indices == 3).any(-1).all() and not (before.indices == 3).any(-1).all()
    # Chosen by the bias or not, the weights stand to one another as the scores do.
    chosen = after.scores.gather(-1, after.indices)
    torch.testing.assert_close(after.weights / after.weights[:, :1], chosen / chosen[:, :1])


def test_gradients_reach_every_parameter(router: Router) -> None:
    x = torch.randn(50, WIDTH, requires_grad=True)
    weights = router(x, everything(x)).weights
    (weights**2 @ torch.arange(1.0, 1 + weights.shape[1])).sum().backward()
    for name, parameter in (*router.named_parameters(), ("x", x)):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


# --- with the balance rules ---------------------------------------------------------------------------------------

RULES = {
    "switch": Balance(switch=0.2, z=0),
    "variance": Balance(switch=0, z=0, variance=0.2),
    "sequence": Balance(switch=0, z=0, sequence=0.2),
    "bias": Balance(switch=0, z=0, bias_rate=0.003, bias_tolerance=0.1),
    "all": Balance(switch=0.1, z=0.001, variance=0.1, sequence=0.1, bias_rate=0.003),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_trains_without_a_dead_expert(file: Path, rule: str) -> None:
    balance, made = RULES[rule], build_router(file)
    if balance.bias_rate and not made.steerable:
        with pytest.raises(ValueError, match="ExpertChoiceRouter has no selection bias"):
            BENCHMARK.train(lambda *sizes: made, balance, 1)
        return
    losses, _, late = BENCHMARK.train(lambda *sizes: made, balance, 30, collapse=0.0)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert (late > 0).all(), late


@pytest.mark.parametrize("kind", BENCHMARK.ROUTERS)
def test_the_bias_update_evens_what_else_stays_collapsed(kind: str) -> None:
    router = BENCHMARK.ROUTERS[kind]
    loads = {rule: BENCHMARK.train(router, BENCHMARK.RULES[rule], 180)[2] for rule in ("none", "bias")}
    imbalance = {rule: float(load.max() / load.mean()) for rule, load in loads.items()}
    assert imbalance["none"] > 2 and imbalance["bias"] < 1.2, imbalance


def test_expert_choice_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"looks ahead.*look_ahead: true"):
        ExpertChoiceRouter(WIDTH, EXPERTS, PER_TOKEN)
