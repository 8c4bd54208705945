"""A model that says what it is told: for tests of the decoding loop and of what stands on it (chat, evaluation)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mm.datasets.chat_template import ChatTemplate
from mm.tokenizers.text import TextTokenizer
from mm.types import Batch, MediaSpec, Sample


class ScriptedModel(nn.Module):
    """Answers each sample with `script(sample)`, text or ids, and then closes its turn. Takes batches with one sample a
    row, not ids.

    `rows_per_step` records how many rows each step after the prompt decoded.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        script: Callable[[Sample], str | list[int]],
        specs: dict[Any, MediaSpec] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate("compact")
        self.script = script
        self.specs = specs or {}
        self.device = torch.device("cpu")
        self.rows_per_step: list[int] = []
        self.eval()

    def media_specs(self) -> dict[Any, MediaSpec]:
        return self.specs

    def new_cache(self) -> ScriptCache:
        return ScriptCache()

    def forward(self, batch: Batch, cache: ScriptCache) -> SimpleNamespace:
        end = min(self.template.stop_ids(self.tokenizer))
        said = [self.script(sample) for (sample,) in batch.samples]
        cache.left = [[*(self.tokenizer.encode(each) if isinstance(each, str) else each), end] for each in said]
        hidden = torch.zeros(*batch.input_ids.shape, self.tokenizer.vocab_size)
        mask = batch.document_ids > 0
        hidden[torch.arange(len(mask)), mask.sum(1) - 1] = self._next(cache)
        return SimpleNamespace(hidden=hidden, head=nn.Identity(), sequence=SimpleNamespace(mask=mask))

    def step(self, ids: Tensor, cache: ScriptCache) -> Tensor:
        assert len(ids) == len(cache.left)
        self.rows_per_step.append(len(ids))
        return self._next(cache)

    def advance(self, ids: Tensor, cache: ScriptCache) -> Tensor:
        return torch.stack([self.step(ids[:, column], cache) for column in range(ids.shape[1])], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def _next(self, cache: ScriptCache) -> Tensor:
        """(B, V) logits that leave no choice."""
        ids = torch.tensor([answer.pop(0) for answer in cache.left])
        return nn.functional.one_hot(ids, self.tokenizer.vocab_size) * 100.0


class ScriptCache:
    """What is left to say in each row."""

    def __init__(self) -> None:
        self.left: list[list[int]] = []

    def keep(self, rows: Tensor) -> None:
        self.left = [self.left[row] for row in rows.tolist()]
