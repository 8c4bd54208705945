"""What decays, what learns, and how the rate goes up and down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm.testing import tiny_model
from mm.training.optim import OptimConfig, freeze_all_but


class Parts(nn.Module):
    """Names that are prefixes of one another, and a layer 1 beside a layer 10."""

    def __init__(self) -> None:
        super().__init__()
        self.bridge = nn.Linear(2, 2)
        self.bridge_norm = nn.LayerNorm(2)
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(11))
        self.gate = nn.Parameter(torch.zeros(()))


def trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["bridge"], ["bridge.weight", "bridge.bias"]),
        (["layers.1"], ["layers.1.weight"]),
        (["bridge_norm.bias", "gate"], ["gate", "bridge_norm.bias"]),
    ],
)
def test_exactly_the_named_parts_learn(patterns: list[str], names: list[str]) -> None:
    parts = Parts()
    assert freeze_all_but(parts, patterns) == trained(parts)
    assert set(trained(parts)) == set(names)
    assert freeze_all_but(parts, ["all"]) == [name for name, _ in parts.named_parameters()]  # and all of it thaws again


@pytest.mark.parametrize("pattern", ["bridges", "layers.11", "bridge.", "weight", ""])
def test_a_pattern_that_matches_nothing_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"train: '{pattern}' matches no .* bridge, bridge_norm, gate, layers"):
        freeze_all_but(Parts(), ["gate", pattern])


def test_matrices_alone_decay() -> None:
    model = tiny_model(embedding_dim=8)
    optimizer = OptimConfig(lr=3e-4, weight_decay=0.2, betas=(0.8, 0.9)).optimizer(model)
    decay, plain = optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    for group in (decay, plain):
        assert group["lr"] == 3e-4 and group["betas"] == (0.8, 0.9) and group["fused"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, kept = ({names[p] for p in group["params"]} for group in (decay, plain))
    assert decaying | kept == set(names.values()) and not decaying & kept
    assert all(name.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight", "log_scale", "shift"))
               for name in kept)  # fmt: skip
    for name in ("decoder.embed.weight", "decoder.layers.1.ffn.experts.down", "decoder.layers.1.ffn.router.weight"):
        assert name in decaying


def test_decay_is_decoupled_from_the_gradient() -> None:
    """With no gradient at all a matrix shrinks by lr * weight_decay a step, and a bias stays."""
    linear = nn.Linear(3, 3)
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    optimizer = OptimConfig(lr=0.1, weight_decay=0.5).optimizer(linear)
    for parameter in linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(linear.bias.detach(), before["bias"])


def test_frozen_parameters_are_not_the_optimizers() -> None:
    parts = Parts()
    freeze_all_but(parts, ["bridge.bias"])
    [group] = OptimConfig().optimizer(parts).param_groups
    assert [id(p) for p in group["params"]] == [id(parts.bridge.bias)] and group["weight_decay"] == 0
    for parameter in parts.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        OptimConfig().optimizer(parts)


def rates(config: OptimConfig, steps: int, run: int | None = None) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = config.scheduler(optimizer, steps)
    seen = []
    for _ in range(run or steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    seen = rates(OptimConfig(lr=2.0, warmup=10, final=0.1), 110)
    assert seen[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])  # no step is lost at rate 0
    assert max(seen) == pytest.approx(2.0)
    assert seen[60] == pytest.approx(2.0 * 0.55)  # half way down the cosine: the mean of 1 and 0.1
    assert all(a > b for a, b in zip(seen[10:], seen[11:], strict=False))
    assert 0.2 < seen[-1] < 0.201


def test_warmup_below_one_is_a_share_of_the_steps() -> None:
    assert rates(OptimConfig(lr=1.0, warmup=0.05), 200) == rates(OptimConfig(lr=1.0, warmup=10), 200)
    assert rates(OptimConfig(lr=1.0, warmup=0), 10)[0] == 1.0


def test_steps_beyond_the_plan_keep_the_final_rate() -> None:
    assert rates(OptimConfig(lr=1.0, warmup=2, final=0.25), 10, run=14)[10:] == pytest.approx([0.25] * 4)
    assert rates(OptimConfig(lr=1.0, warmup=20), 10)[-1] == pytest.approx(0.5)  # a warm-up longer than the run


def test_the_rate_stays_before_it_falls() -> None:
    seen = rates(OptimConfig(lr=1.0, warmup=10, final=0.1, decay=0.25), 110)
    assert seen[9:85] == [1.0] * 76  # the last 25 of the 100 steps after the warm-up are a cosine of their own
    assert seen[85:] == pytest.approx(rates(OptimConfig(lr=1.0, warmup=10, final=0.1), 35)[10:])
    sudden = rates(OptimConfig(lr=1.0, warmup=10, final=0.1, decay=0.0), 110, run=112)
    assert sudden[9:110] == [1.0] * 101 and sudden[110:] == pytest.approx([0.1] * 2)


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_fall_over_a_share_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"optim.decay: {decay} .* 0 to 1"):
        OptimConfig(decay=decay)
