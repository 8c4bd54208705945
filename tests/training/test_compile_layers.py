"""Compiled layers: the same weights after a step, and only while a stage trains. Traced here, not made into kernels."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from mm.testing import sample_batch, tiny_model
from mm.training.compile_layers import CompileLayers
from mm.training.module import InstructionModule
from tests.training.test_module import SAMPLES, PlainGradient, fit


class Compiled(pl.Callback):
    """How many layers were compiled when the step began."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.layers = [layer._compiled_call_impl is not None for layer in pl_module.model.decoder.layers]


@pytest.mark.slow  # tracing takes 25 s
def test_a_step_of_compiled_layers() -> None:
    torch.manual_seed(0)
    plain = tiny_model()
    model, seen = copy.deepcopy(plain), Compiled()
    fit(InstructionModule(plain, optim=PlainGradient()), [sample_batch(plain, [SAMPLES])])
    module = InstructionModule(model, optim=PlainGradient())
    calls = [CompileLayers(backend="eager"), seen]
    fit(module, [sample_batch(model, [SAMPLES[:5], SAMPLES[5:]])], callbacks=calls)
    assert all(seen.layers) and len(seen.layers) == len(model.decoder.layers)
    assert all(layer._compiled_call_impl is None for layer in model.decoder.layers)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=name)  # sums in another order
    assert isinstance(copy.deepcopy(model), nn.Module)  # and nothing of the compiler is left in it
