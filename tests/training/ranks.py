"""Run by test_module.py: `python ranks.py WORLD OUT` trains two steps of each scenario on WORLD CPU ranks.

OUT gets {scenario: {parameter: its change}}. Lightning starts the second rank itself, with the same command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from mm.datasets.packing import collate
from mm.decoder.ffn.balance import Balance
from mm.fusion.cross_attention import GatedCrossAttentionBridge
from mm.fusion.projector import LinearProjector
from mm.objectives.align import Align
from mm.objectives.base import Objective
from mm.objectives.instruct import NextToken
from mm.testing import picture, sample_batch, tiny_model
from mm.training.module import ObjectiveModule
from mm.training.optim import OptimConfig
from mm.types import Batch, BridgeFactory, Sample

LM_ALONE = Balance(switch=0, z=0)


class PlainGradient(OptimConfig):
    def optimizer(self, module: torch.nn.Module) -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)


class Twice:
    """A loader of the same batch, two times."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch, self.batch])


class RankRows(pl.LightningDataModule):
    """The global batch: all of it in one process, or each rank its own samples."""

    def __init__(self, model: Any, shares: list[list[Sample]]) -> None:
        super().__init__()
        self.model, self.shares = model, shares

    def train_dataloader(self) -> Twice:
        assert self.trainer is not None
        one = self.trainer.world_size == 1
        share = sum(self.shares, []) if one else self.shares[self.trainer.global_rank]
        batch = sample_batch(self.model, [[sample] for sample in share]) if share else collate([])
        return Twice(batch)


def chat(answer: str, image: int | None = None) -> Sample:
    user: list[dict[str, Any]] = [{"type": "text", "text": "what color?"}]
    if image is not None:
        user.insert(0, {"type": "image", "media": 0})
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return Sample(answer, messages, [] if image is None else [picture(image)])


IMAGES = [chat("red", 1), chat("a green shape or two", 2), chat("blue", 3)]
TEXTS = [chat("two"), chat("how many beeps are there")]
FROZEN = "a rank without images, frozen encoders"
SCENARIOS: dict[str, tuple[Callable[[], Objective], BridgeFactory, list[list[Sample]]]] = {
    "a rank without images": (lambda: NextToken(LM_ALONE), LinearProjector, [IMAGES, TEXTS]),
    "a rank without images, cross-attention": (
        lambda: NextToken(LM_ALONE), GatedCrossAttentionBridge, [TEXTS, IMAGES]),
    "a rank without samples": (lambda: NextToken(LM_ALONE), LinearProjector, [IMAGES, []]),
    "uneven pairs, infonce": (lambda: Align("infonce", 0, LM_ALONE), LinearProjector, [IMAGES[:2], IMAGES[2:]]),
    "uneven pairs, sigmoid": (lambda: Align("sigmoid", 0, LM_ALONE), LinearProjector, [IMAGES[:1], IMAGES[1:]]),
    "a rank without pairs": (lambda: Align("infonce", 0, LM_ALONE), LinearProjector, [IMAGES, []]),
    FROZEN: (lambda: NextToken(LM_ALONE), LinearProjector, [TEXTS, IMAGES]),
}  # fmt: skip


def main(world: int, out: str) -> None:
    changes = {}
    for name, (objective, bridge, shares) in SCENARIOS.items():
        torch.manual_seed(0)
        model = tiny_model(bridge, embedding_dim=8)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        trainer = pl.Trainer(
            accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        train = [f"towers.{kind}.bridge" for kind in model.towers] if name == FROZEN else ["all"]
        module = ObjectiveModule(model, objective(), PlainGradient(warmup=0), train)
        trainer.fit(module, datamodule=RankRows(model, shares))
        print(name, "done on rank", trainer.global_rank, flush=True)
        changes[name] = {key: p.detach() - before[key] for key, p in model.named_parameters()}
        if trainer.is_global_zero:
            torch.save(changes, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
