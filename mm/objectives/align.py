"""Alignment: media and their texts are drawn together in one space, and media are captioned.

Shape legend: `P` pairs (one media item and one text each), `E` embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm.decoder.ffn.balance import Balance
from mm.fusion.splice import Features
from mm.model import EmbeddingHead, MultimodalModel
from mm.objectives.base import Loss, next_token_loss
from mm.types import IGNORE, Batch


class Align:
    """Contrastive and captioning loss over samples that are one media item and one assistant text.

    `contrastive`: infonce (CLIP, arXiv 2103.00020) or sigmoid (SigLIP, arXiv 2303.15343), over all ranks' pairs; pairs
    with the same text count as matches of one another. `captioning` weighs the next-token loss of the text
    given the media. Freeze the decoder in the stage's config for LLaVA-style bridge training.
    """

    def __init__(
        self,
        contrastive: Literal["infonce", "sigmoid", "none"] = "infonce",
        captioning: float = 1.0,
        balance: Balance | None = None,
    ) -> None:
        self.contrastive, self.captioning, self.balance = contrastive, captioning, balance or Balance()

    @property
    def trains_embedding_head(self) -> bool:
        return self.contrastive != "none"

    def __call__(self, model: MultimodalModel, batch: Batch) -> Loss:
        features = model.encode_media(batch)
        output = model(batch, features=features)
        caption, tokens, right = next_token_loss(output)
        tokens = tokens.clamp(min=1)
        routings = [routing for routing in output.routings if routing is not None]
        terms = self.balance.losses(routings, output.sequence.document_ids)
        parts = {"caption": caption.detach() / tokens, "accuracy": right / tokens}
        mean = self.captioning * caption / tokens + sum(terms.values())
        if self.contrastive != "none":
            media, text, ids = embed_pairs(model, batch, features)
            loss = contrastive_loss(head_of(model), media, text, ids, sigmoid=self.contrastive == "sigmoid")
            mean, parts["contrastive"] = mean + loss, loss.detach()
        pairs = torch.full((), float(sum(len(media.rows) for media in batch.media.values())), device=caption.device)
        return Loss(mean * pairs, pairs, parts | {name: term.detach() for name, term in terms.items()}, output)


def head_of(model: MultimodalModel) -> EmbeddingHead:
    if model.embedding_head is None:
        raise ValueError("contrastive alignment needs the model's embedding_dim to be set")
    return model.embedding_head


def embed_pairs(
    model: MultimodalModel, batch: Batch, features: Mapping[str, Features]
) -> tuple[Tensor, Tensor, Tensor]:
    """Media (P, E) and text (P, E) unit vectors, and the padded text ids (P, T) that say which texts are the same.

    A pair is a media item and the supervised tokens of its document. A batch without any document gives no pairs, but
    through the same parts: the gradients of other ranks' pairs pass through this one.
    """
    head = head_of(model)
    if not batch.media and bool(batch.document_ids.any()):
        raise ValueError(
            "a batch for contrastive alignment needs samples with one media item and an assistant text each"
        )
    media, texts = [], []
    for kind, feature in features.items():
        media.append(head.embed_media(feature))
        if kind not in batch.media:
            continue
        items = batch.media[kind]
        documents = batch.document_ids[items.rows, items.columns]
        for row, document in zip(items.rows.tolist(), documents.tolist(), strict=True):
            labels = batch.labels[row]
            texts.append(labels[(batch.document_ids[row] == document) & (labels != IGNORE)])
    ids = pad_sequence(texts or [batch.input_ids.new_zeros(1)], batch_first=True, padding_value=IGNORE)
    mask = ids != IGNORE
    hidden = model(input_ids=ids.masked_fill(~mask, 0), attention_mask=mask).hidden
    pairs = len(texts)
    return torch.cat(media), head.embed_text(hidden, mask)[:pairs], ids[:pairs]


def contrastive_loss(head: EmbeddingHead, media: Tensor, text: Tensor, ids: Tensor, sigmoid: bool = False) -> Tensor:
    """Mean loss over pairs, InfoNCE or sigmoid, against the texts and media of every rank."""
    media, text, ids = gather(media), gather(text), gather_ids(ids)
    if not len(media):
        return media.sum()
    match = (ids[:, None] == ids[None]).all(-1)
    logits = head.log_scale.clamp(max=4.6052).exp() * media @ text.T  # at most 100, as CLIP
    if sigmoid:
        sign = match.float() * 2 - 1
        return -F.logsigmoid(sign * (logits + head.shift)).sum() / len(media)
    target = match.float() / match.sum(-1, keepdim=True)  # symmetric, so it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gather(x: Tensor) -> Tensor:
    """(P, E) of this rank -> (all ranks' P, E), with gradients. P may differ: a rank drops samples that do not fit."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    sizes = _sizes(x)[:, 0].tolist()
    parts = dist_nn.all_gather(F.pad(x, (0, 0, 0, max(sizes) - len(x))))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_ids(ids: Tensor) -> Tensor:
    """(P, T) of this rank, both differing -> (all ranks' P, longest T)."""
    if not (dist.is_available() and dist.is_initialized()):
        return ids
    sizes = _sizes(ids)
    pairs, longest = sizes.amax(0).tolist()
    ids = F.pad(ids, (0, longest - ids.shape[1], 0, pairs - len(ids)), value=IGNORE)
    parts = [torch.empty_like(ids) for _ in sizes]
    dist.all_gather(parts, ids)
    return torch.cat([part[:size] for part, (size, _) in zip(parts, sizes.tolist(), strict=True)])


def _sizes(x: Tensor) -> Tensor:
    """(ranks, 2) int64: the shape of every rank's x."""
    parts = [torch.empty(2, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor(x.shape, device=x.device))
    return torch.stack(parts)
