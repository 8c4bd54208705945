"""Expert load under each balance rule: the busiest expert over the mean, step by step, and what the loss pays for it.

    python benchmarks/balance.py [--steps N] [--out DIR]

A mixture of 8 experts, top-2, learns eight linear maps, one a cluster of points; the clusters are of unequal size and
the router starts as a collapsed one does, all tokens to two experts. Writes DIR/balance.png and balance.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mm.decoder.ffn.balance import Balance
from mm.decoder.ffn.moe import RouterFactory, SparseMoE, max_over_mean_load
from mm.decoder.ffn.routers.sigmoid_bias import SigmoidBiasRouter
from mm.decoder.ffn.routers.topk import TopKRouter
from mm.decoder.init import Init

WIDTH, HIDDEN, EXPERTS, PER_TOKEN = 16, 16, 8, 2
ROWS, LENGTH = 8, 64
LAST = 20  # steps over which the final load is counted: one batch alone is noisy

RULES: dict[str, Balance] = {
    "none": Balance(switch=0, z=0),
    "switch": Balance(switch=0.1, z=0),
    "variance": Balance(switch=0, z=0, variance=0.1),
    "sequence": Balance(switch=0, z=0, sequence=0.1),
    "z": Balance(switch=0, z=0.001),
    "bias": Balance(switch=0, z=0, bias_rate=0.01),
    "bias + sequence + z": Balance(switch=0, z=0.001, sequence=0.001, bias_rate=0.01),
}
ROUTERS: dict[str, RouterFactory] = {"top-k": TopKRouter, "sigmoid": SigmoidBiasRouter}


class Clusters:
    """Points of eight clusters in `WIDTH` dimensions, of sizes 8:7:...:1, each to be mapped by a matrix of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.centres = torch.randn(EXPERTS, WIDTH, generator=generator)
        self.common = torch.randn(WIDTH, generator=generator)
        self.maps = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.sizes = torch.arange(EXPERTS, 0, -1).float()

    def batch(self) -> tuple[Tensor, Tensor]:
        """x and its image, (ROWS, LENGTH, WIDTH) each."""
        cluster = self.sizes.multinomial(ROWS * LENGTH, True, generator=self.generator)
        noise = torch.randn(len(cluster), WIDTH, generator=self.generator)
        x = self.common + self.centres[cluster] + 0.3 * noise
        y = torch.einsum("nij,nj->ni", self.maps[cluster], x)
        return x.view(ROWS, LENGTH, -1), y.view(ROWS, LENGTH, -1)


def train(
    router: RouterFactory, balance: Balance, steps: int, collapse: float = 1.0, seed: int = 0
) -> tuple[list[float], list[float], Tensor]:
    """Loss and max/mean load of every step, and the experts' loads summed over the last ones.

    `collapse` is how much higher than the rest the first two experts score at the start, in logits or so.
    """
    torch.manual_seed(seed)
    task = Clusters(torch.Generator().manual_seed(seed))
    layer = SparseMoE(WIDTH, HIDDEN, EXPERTS, PER_TOKEN, router=router)
    layer.apply(Init(None, 1))
    with torch.no_grad():
        layer.router.weight[:PER_TOKEN] += collapse * task.common / task.common.norm()
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    documents = torch.ones(ROWS, LENGTH, dtype=torch.long)
    losses, imbalances, late = [], [], torch.zeros(EXPERTS)
    for step in range(steps):
        x, y = task.batch()
        out, routing = layer(x, documents > 0)
        loss = nn.functional.mse_loss(out, y)
        terms = balance.losses([routing], documents)
        optimizer.zero_grad()
        (loss + sum(terms.values())).backward()
        optimizer.step()
        if balance.bias_rate:
            balance.update_biases([layer], [routing.demand()])
        losses.append(loss.item())
        imbalances.append(max_over_mean_load(routing.load()))
        if step >= steps - LAST:
            late += routing.load()
    return losses, imbalances, late


def measure(steps: int) -> dict[str, dict[str, object]]:
    results: dict[str, dict[str, object]] = {}
    for kind, router in ROUTERS.items():
        for rule, balance in RULES.items():
            losses, imbalances, late = train(router, balance, steps)
            name, final = f"{kind}: {rule}", max_over_mean_load(late)
            results[name] = {
                "loss": sum(losses[-LAST:]) / LAST,
                "max_over_mean": final,
                "dead": int((late == 0).sum()),
                "curve": imbalances,
            }
            print(f"{name:<32} loss {results[name]['loss']:.4f}  max/mean {final:.2f}  dead {results[name]['dead']}")
    return results


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ROUTERS), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ROUTERS, strict=True):
        for rule in RULES:
            axis.plot(running_mean(results[f"{kind}: {rule}"]["curve"], LAST), label=rule, linewidth=1.4)  # pyright: ignore
        axis.axhline(1.2, color="grey", linestyle=":", linewidth=1)
        axis.set(title=kind, xlabel="step")
    axes[0].set_ylabel("load of the busiest expert / mean")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def running_mean(values: list[float], reach: int) -> list[float]:
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - reach + 1) : i + 1])]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/balance"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    results = measure(options.steps)
    (options.out / "balance.json").write_text(json.dumps(results))
    plot(results, options.out / "balance.png")
    print(f"wrote {options.out / 'balance.png'}")


if __name__ == "__main__":
    main()
