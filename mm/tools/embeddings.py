"""Texts as vectors: the alignment tower's text embedding, or the mean of a decoder's last hidden states.

Shape legend: `n` texts, `T` tokens of the longest, `D` the decoder's width or the tower's dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm.model import MultimodalModel

EmbeddingKind = Literal["tower", "mean"]


class TextEmbedder:
    """Texts -> (n, D) float32, each by itself whatever stands beside it in a batch.

    `kind` is "tower" (unit vectors in the space that the model shares with its media; needs `embedding_dim`) or "mean"
    (of the hidden states after the final norm); None takes the tower where the model has one. Texts are read up to
    `max_tokens`; a batch has at most `batch_tokens`, padding included.
    """

    def __init__(
        self,
        model: MultimodalModel,
        kind: EmbeddingKind | None = None,
        max_tokens: int = 512,
        batch_tokens: int = 4096,
    ) -> None:
        if not model.tokenizer.has_text:
            raise ValueError("this model came without a tokenizer, so it reads no text and embeds none")
        if kind == "tower" and model.embedding_head is None:
            raise ValueError("the model has no alignment tower (embedding_dim is not set); embed by mean")
        self.model, self.max_tokens, self.batch_tokens = model, max_tokens, batch_tokens
        self.kind: EmbeddingKind = kind or ("mean" if model.embedding_head is None else "tower")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Raises ValueError for a text without a token."""
        rows = [self.model.tokenizer.encode(text)[: self.max_tokens] for text in texts]
        for number, row in enumerate(rows):
            if not row:
                raise ValueError(f"text {number} is empty; there is nothing to embed")
        out: list[Tensor | None] = [None] * len(rows)
        for batch in self._batches(rows):
            for number, vector in zip(batch, self._embed([rows[number] for number in batch]), strict=True):
                out[number] = vector
        return torch.stack([vector for vector in out if vector is not None]).numpy()

    @torch.inference_mode()
    def _embed(self, rows: list[list[int]]) -> Tensor:
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.model.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        hidden = self.model(input_ids=ids, attention_mask=mask).hidden
        head = self.model.embedding_head
        if self.kind == "tower" and head is not None:
            return head.embed_text(hidden, mask).cpu()
        return ((hidden.float() * mask[..., None]).sum(1) / lengths[:, None]).cpu()

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Numbers of rows of like length, the longest first."""
        batch: list[int] = []
        for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
            if batch and (len(batch) + 1) * len(rows[batch[0]]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch
