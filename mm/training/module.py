"""The one LightningModule: it asks an objective for a loss, logs it, and steps the optimizer. Named stages are thin."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mm.checkpoint import load, load_weights
from mm.datasets.mixture import subseed
from mm.decoder.ffn.balance import Balance
from mm.decoder.ffn.moe import moe_layers
from mm.model import MultimodalModel
from mm.objectives.align import Align, embed_pairs
from mm.objectives.base import Loss, Objective
from mm.objectives.instruct import NextToken
from mm.objectives.retrieval import RetrievalPool
from mm.training.optim import OptimConfig, freeze_all_but
from mm.training.resume import ResumeCheck
from mm.types import Batch, Routing


@dataclass
class StepInfo:
    """The batch just trained on, for callbacks: this rank's counts, how its tokens were routed, and its loss.

    loss, count  the objective's sum over the rank's batch, and of how many things; no gradient
    """

    tokens: int
    positions: int
    samples: int
    routings: list[Routing | None]
    modality_ids: Tensor
    loss: Tensor
    count: Tensor

    @staticmethod
    def of(batch: Batch, loss: Loss) -> StepInfo:
        assert loss.output is not None
        sequence = loss.output.sequence
        samples = sum(len(row) for row in batch.samples)
        tokens = int(sequence.mask.sum())
        return StepInfo(
            tokens,
            sequence.mask.numel(),
            samples,
            loss.output.routings,
            sequence.modality_ids,
            loss.total.detach(),
            loss.count.detach(),
        )


class ObjectiveModule(pl.LightningModule):
    """Trains `model` (its parts, or the directory of a trained one) on an objective.

    `train` names the parameters that learn, by dotted prefix ("towers.image.bridge"); "all" is everything. `init_from`
    is a model directory whose weights the model starts from (same shapes). The loss is the mean over the whole global
    batch: gradients of sums are divided once by the count of all ranks and all accumulated batches.
    """

    def __init__(
        self,
        model: MultimodalModel | str,
        objective: Objective,
        optim: OptimConfig | None = None,
        train: Seq[str] = ("all",),
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.model = load(model) if isinstance(model, str) else model
        if init_from is not None:
            load_weights(self.model, init_from)
        self.objective, self.optim = objective, optim or OptimConfig()
        self.trained = freeze_all_but(self.model, train)
        if not objective.trains_embedding_head:
            self._freeze("embedding_head")
        trains_mtp = getattr(objective, "trains_mtp", False)
        if not trains_mtp:
            self._freeze("decoder.mtp")
        self.model.train()
        # In the order of the routings: the layers', then those of multi-token prediction, where it is trained.
        self.moe = moe_layers(self.model.decoder.layers)
        if trains_mtp and self.model.decoder.mtp is not None:
            self.moe += moe_layers(self.model.decoder.mtp)
        self.last_step: StepInfo | None = None
        self._count: Tensor | None = None
        self._loads: list[Tensor] | None = None

    def _freeze(self, part: str) -> None:
        """A part that this objective never reaches: DDP would wait for its gradients."""
        for name, parameter in self.model.named_parameters():
            if name.startswith(part + "."):
                parameter.requires_grad_(False)
        self.trained = [name for name in self.trained if not name.startswith(part + ".")]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What is drawn in a step (dropout, ...) depends on the run's seed, the step and the rank, and on nothing that
        happened before: a resumed run draws what the unbroken one would have, and no state needs to be kept."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        done = progress.total.processed
        drawn = subseed(os.environ.get("PL_GLOBAL_SEED", "0"), "step", done, self.global_rank)
        random.seed(drawn)
        np.random.seed(drawn & 0xFFFFFFFF)
        torch.manual_seed(drawn)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self.objective(self.model, batch)
        self._count = loss.count if self._count is None else self._count + loss.count
        self._note_loads(loss)
        self.last_step = StepInfo.of(batch, loss)
        samples = max(1, self.last_step.samples)
        main = loss.total.detach() / loss.count.clamp(min=1)
        self.log("train/loss", main, prog_bar=True, batch_size=samples)
        self.log_dict({f"train/{name}": value for name, value in loss.parts.items()}, batch_size=samples)
        # Lightning divides by the number of accumulated batches; the count below already does.
        return loss.total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._count is not None
        count, ranks = self._count, 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(count)
        scale = ranks / count.clamp(min=1)  # DDP averages over ranks
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.device))
        self._count = None
        self._update_biases()

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        loss = self.objective(self.model, batch)
        size = max(1, int(loss.count))
        self.log("val/loss", loss.total / loss.count.clamp(min=1), batch_size=size, sync_dist=True, prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in loss.parts.items()}, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optim.optimizer(self.model)
        scheduler = self.optim.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.model.train()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the weights: of another config, they would not fit, which says less than the key that differs."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResumeCheck):
                callback.check(self.trainer, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Between the batches of one optimizer step the gradients so far are in no checkpoint: it then says that the
        step has not begun, which is what its weights say, and the step's batches are read again."""
        every = self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        pending = 0 if self._count is None else progress["current"]["processed"] % every
        for counters in (progress["current"], progress["total"]):
            for name in ("ready", "started", "processed", "completed"):
                counters[name] -= pending
        if pending and progress["current"]["completed"] < progress["current"]["processed"]:
            # Lightning counts the step of the batch that it believes to have just ended; that step is counted already.
            checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

    def _note_loads(self, loss: Loss) -> None:
        balance: Balance | None = getattr(self.objective, "balance", None)
        if balance is None or not balance.bias_rate or not self.moe or loss.output is None:
            return
        loads = [routing.demand() for routing in loss.output.routings if routing is not None]
        self._loads = loads if self._loads is None else [a + b for a, b in zip(self._loads, loads, strict=True)]

    def _update_biases(self) -> None:
        if self._loads is None:
            return
        if dist.is_available() and dist.is_initialized():
            for load in self._loads:
                dist.all_reduce(load)
        self.objective.balance.update_biases(self.moe, self._loads)  # type: ignore[attr-defined]
        self._loads = None


class AlignmentModule(ObjectiveModule):
    """Alignment pretraining. Validation is retrieval over the whole held-out set: recall@k in both directions."""

    def __init__(
        self,
        model: MultimodalModel | str,
        objective: Align | None = None,
        optim: OptimConfig | None = None,
        train: Seq[str] = ("all",),
        init_from: str | None = None,
        recall_at: Seq[int] = (1, 5, 10),
    ) -> None:
        super().__init__(model, objective or Align(), optim, train, init_from)
        self.recall_at = tuple(recall_at)
        self.pool = RetrievalPool()

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, index, dataloader_idx)
        if self.model.embedding_head is not None:
            self.pool.add(*embed_pairs(self.model, batch, self.model.encode_media(batch)))

    def on_validation_epoch_end(self) -> None:
        if self.model.embedding_head is not None:
            self.log_dict({f"val/{name}": value for name, value in self.pool.recalls(self.recall_at).items()})
        self.pool = RetrievalPool()


class InstructionModule(ObjectiveModule):
    """Instruction tuning: the next token of what the assistant says."""

    def __init__(
        self,
        model: MultimodalModel | str,
        objective: NextToken | None = None,
        optim: OptimConfig | None = None,
        train: Seq[str] = ("all",),
        init_from: str | None = None,
    ) -> None:
        super().__init__(model, objective or NextToken(), optim, train, init_from)
