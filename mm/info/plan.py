"""What a run would cost on so many GPUs, on paper: time, memory, bytes moved, and how many tokens are worth it.

Nothing is measured here. Rules and their sources:

FLOPs      3 x forward a token, attention over half the context: the mean of a causal row
memory     weights, gradients and moments cut into one share a GPU (ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054);
           one row's activations and logits, and one whole layer's weights as it is computed, less its routed experts
moved      two gathers of the weights and one scatter of the gradients, in bfloat16. Routed experts stay where they lie:
           each token goes to its experts and back, forward and backward. Between machines a gather brings every number
           into a machine once, over all its GPUs' cards together; a token goes over its own GPU's card
bubble     of a pipeline of S stages and M rows: (S - 1) / (M + S - 1) (Huang et al. 2019, arXiv 1811.06965)
tokens     20 for each weight that a token uses (Hoffmann et al. 2022, arXiv 2203.15556), unless given
loss       E + A / N^a + B / D^b as refitted by Besiroglu et al. 2024, arXiv 2404.10102: dense models, English web text
batch      beyond B* / L^(1/0.21) tokens a step more rows help little (Kaplan et al. 2020, arXiv 2001.08361)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mm.decoder.ffn.moe import moe_layers
from mm.info.counting import Info

NODE = 8  # GPUs whose links are those within a machine
CHINCHILLA = 20  # tokens for each active weight
LOSS_E, LOSS_A, LOSS_B, LOSS_ALPHA, LOSS_BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
CRITICAL_TOKENS, CRITICAL_EXPONENT = 2.1e8, 0.21
STAGES, ROWS = 8, 32  # the pipeline whose bubble is told


@dataclass(frozen=True)
class Gpu:
    """FLOP/s of dense bfloat16, bytes, and bytes a second in one direction: within a machine, and between machines."""

    flops: float
    memory: float
    link: float
    network: float


GPUS: dict[str, Gpu] = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 180e9, 900e9, 50e9),
}


@dataclass(frozen=True)
class Plan:
    """Seconds, bytes and FLOPs; `step` is one row of `context` tokens on each GPU.

    hidden  tokens a GPU must have in a step for the gathers and the scatter to take no longer than its products
    fewest  GPUs on which the memory fits; None if a row alone is too large
    """

    gpus: int
    gpu: str
    mfu: float
    tokens: float
    flops: float
    seconds: float
    memory_states: float
    memory_row: float
    fits: bool
    fewest: int | None
    moved_weights: float
    moved_tokens: float
    step_compute: float
    step_moving: float
    hidden: float
    bubble: float
    loss: float
    optimal_weights: float
    optimal_tokens: float
    critical_batch: float

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600


def plan(model: Any, info: Info, gpus: int, gpu: str = "h200", mfu: float = 0.4, tokens: float | None = None) -> Plan:
    """`mfu` is the share of the GPU's FLOP/s that the run is expected to reach; `info` was counted with batch 1.

    Raises ValueError for what is not positive, and an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu {gpu!r}: give one of {', '.join(GPUS)}")
    for name, value in (("gpus", gpus), ("mfu", mfu), ("tokens", tokens)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}: must be positive")
    if mfu > 1:
        raise ValueError(f"mfu={mfu}: it is a share of the GPU's FLOP/s, at most 1")
    device, memory = GPUS[gpu], info.memory
    gathered = info.parameters - _routed_weights(model)
    tokens = CHINCHILLA * info.active if tokens is None else tokens
    per_token = info.flops_training - 1.5 * info.flops_attention
    rate = device.flops * mfu
    states = memory.weights + memory.gradients + memory.optimizer
    row = memory.activations + memory.logits + 2 * gathered / max(info.layers, 1)
    room = device.memory - row
    share = (gpus - 1) / gpus
    weights, routed = 3 * 2 * gathered * share, 4 * 2 * _sent(model) * info.context * share
    within = gpus <= NODE
    gather, send = (device.link,) * 2 if within else (min(device.link, NODE * device.network), device.network)
    return Plan(
        gpus=gpus,
        gpu=gpu,
        mfu=mfu,
        tokens=tokens,
        flops=per_token * tokens,
        seconds=per_token * tokens / (gpus * rate),
        memory_states=states / gpus,
        memory_row=row,
        fits=states / gpus + row <= device.memory,
        fewest=-(-int(states) // int(room)) if room > 0 else None,
        moved_weights=weights,
        moved_tokens=routed,
        step_compute=per_token * info.context / rate,
        step_moving=weights / gather + routed / send,
        hidden=weights / gather / (per_token / rate),
        bubble=(STAGES - 1) / (ROWS + STAGES - 1),
        loss=(loss := expected_loss(info.active, tokens)),
        optimal_weights=(best := optimal(per_token * tokens))[0],
        optimal_tokens=best[1],
        critical_batch=CRITICAL_TOKENS / loss ** (1 / CRITICAL_EXPONENT),
    )


def expected_loss(weights: float, tokens: float) -> float:
    """Nats a token that a dense model of so many weights is expected to reach on so many tokens of English web text."""
    return LOSS_E + LOSS_A / weights**LOSS_ALPHA + LOSS_B / tokens**LOSS_BETA


def optimal(flops: float) -> tuple[float, float]:
    """(weights, tokens) of the lowest expected loss that 6 x weights x tokens = `flops` can buy."""
    total = LOSS_ALPHA + LOSS_BETA
    ratio = (LOSS_ALPHA * LOSS_A / (LOSS_BETA * LOSS_B)) ** (1 / total)
    weights = ratio * (flops / 6) ** (LOSS_BETA / total)
    return weights, flops / 6 / weights


def _routed_weights(model: Any) -> int:
    """Weights of all routed experts, over all layers."""
    decoder = getattr(model, "decoder", model)
    return sum(weight.numel() for layer in moe_layers(decoder) for weight in layer.experts.parameters())


def _sent(model: Any) -> int:
    """Numbers of one token that go to experts elsewhere, over all layers."""
    decoder = getattr(model, "decoder", model)
    return sum(layer.experts_per_token * decoder.width for layer in moe_layers(decoder))
