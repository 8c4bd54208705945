"""Where an answer should go: small classifiers of hidden states, which steer a model that knows nothing of them.

    steer = Steering([BagOfWords.of(model.tokenizer, ["sea", "ship"])])
    steer = Steering([Towards(train_discriminator(model, texts, labels), "kind")])
    model.generate(ids, temperature=1.0, steer=steer)

Plug-and-play language models (Dathathri et al. 2020, arXiv 1912.02164); mm.generation.steered does it. `B` rows, `T`
positions, `D` width, `V` vocabulary, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.tokenizers.text import TextTokenizer


class Attribute(Protocol):
    """What a text is like. `reads_states` says whether it looks at hidden states: only then is there a horizon."""

    @property
    def reads_states(self) -> bool: ...

    def log_p(self, mean: Tensor, next_log_p: Tensor) -> Tensor:
        """(B,) float32: its log probability. `mean` (B, D) float32 is that of the text's hidden states (after the
        decoder's last norm), `next_log_p` (B, V) what the model gives the next token."""
        ...


@dataclass(frozen=True)
class BagOfWords:
    """The next token is one of `ids` (section 4.2 of the paper)."""

    ids: tuple[int, ...]
    reads_states = False

    @staticmethod
    def of(tokenizer: TextTokenizer, words: Iterable[str]) -> BagOfWords:
        """Of words, each by itself and after a space: what of the two is one token.

        Raises ValueError for no words, and naming those that are more than one token either way: half a word would
        steer towards other words.
        """
        words = list(words)
        found = {word: [ids[0] for ids in map(tokenizer.encode, (word, " " + word)) if len(ids) == 1] for word in words}
        if missing := [word for word, ids in found.items() if not ids]:
            raise ValueError(f"words={missing}: the tokenizer has no single token for them; leave them out")
        if not words:
            raise ValueError("words: give at least one")
        return BagOfWords(tuple(sorted({token for ids in found.values() for token in ids})))

    def log_p(self, mean: Tensor, next_log_p: Tensor) -> Tensor:
        return next_log_p[:, list(self.ids)].logsumexp(-1)


class Discriminator(nn.Module):
    """Which of `labels` a text is, linear in the mean of its hidden states (section 4.3)."""

    def __init__(self, width: int, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.linear = nn.Linear(width, len(labels))

    def forward(self, mean: Tensor) -> Tensor:
        """(B, D) float32 -> (B, C): log probabilities."""
        return self.linear(mean).log_softmax(-1)


@dataclass(frozen=True)
class Towards:
    """The text is one that the discriminator calls `label`. Raises ValueError for a label that it does not know."""

    discriminator: Discriminator
    label: str
    reads_states = True

    def __post_init__(self) -> None:
        if self.label not in self.discriminator.labels:
            known = ", ".join(self.discriminator.labels)
            raise ValueError(f"label={self.label!r} is none of the discriminator's: {known}")

    def log_p(self, mean: Tensor, next_log_p: Tensor) -> Tensor:
        return self.discriminator(mean)[:, self.discriminator.labels.index(self.label)]


@dataclass(frozen=True)
class Steering:
    """How far, and towards what. At each token what the cache keeps of the past is moved along the gradient of the
    attributes' log probabilities, and stays moved; then the token is drawn from what model and moved model say.

    attributes  their log probabilities are added up
    step_size   how far a gradient step moves what one layer keeps of a row (the length of the move); 0 steers nothing
    steps       gradient steps a token
    kl_scale    what the steps lose by KL(moved || model): it holds the moved distribution to the model's
    gm_scale    g of the distribution drawn from, p_moved^g * p^(1-g), normalised; 0 steers nothing
    horizon     tokens to come that attributes of hidden states see beside what stands, as the embeddings expected of
                them
    window      only so many of the newest positions are moved; None: all
    gamma       the gradient is divided by its length to this power; 1 makes `step_size` a length, and below a gradient
                of length 1 more moves further (the paper has 1 for discriminators, 1.5 for bags of words)

    Raises ValueError naming the option.
    """

    attributes: Sequence[Attribute]
    step_size: float = 0.04
    steps: int = 3
    kl_scale: float = 0.01
    gm_scale: float = 0.95
    horizon: int = 1
    window: int | None = None
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not self.attributes:
            raise ValueError("Steering.attributes: give at least one")
        for name in ("step_size", "kl_scale", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Steering.{name}={value}: give a finite number from 0 up")
        if not 0 <= self.gm_scale <= 1:
            raise ValueError(f"Steering.gm_scale={self.gm_scale}: give a share from 0 to 1")
        for name, value, least in (("steps", self.steps, 1), ("horizon", self.horizon, 0), ("window", self.window, 1)):
            if value is not None and (isinstance(value, bool) or value < least):
                raise ValueError(f"Steering.{name}={value}: give a whole number from {least} up")

    @property
    def moves(self) -> bool:
        """Whether anything comes out other than without it."""
        return self.step_size > 0 and self.gm_scale > 0


def train_discriminator(
    model: Any, texts: Sequence[str], labels: Sequence[str], decay: float = 1e-3, batch_size: int = 16
) -> Discriminator:
    """A discriminator of these texts, one label each: logistic regression on their mean hidden states, by L-BFGS.

    `decay` times the squared weights is added to the mean loss. The model stays as it is; the same texts give the same
    discriminator. Raises ValueError for lengths that differ, fewer than two labels, and naming a text without a token.
    """
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts, but {len(labels)} labels")
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"labels={names}: give at least two different ones")
    means = torch.cat(
        [mean_states(model, texts[start : start + batch_size], start) for start in range(0, len(texts), batch_size)]
    )
    wanted = torch.tensor([names.index(label) for label in labels], device=means.device)
    with torch.inference_mode(False), torch.enable_grad():
        found = Discriminator(means.shape[-1], names).to(means.device)
        nn.init.zeros_(found.linear.weight)
        nn.init.zeros_(found.linear.bias)
        optimizer = torch.optim.LBFGS(found.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.nll_loss(found(means), wanted) + decay * found.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # pyright: ignore[reportArgumentType] - typed to give a float, documented to take this
    return found.eval().requires_grad_(False)


def mean_states(model: Any, texts: Sequence[str], first: int = 0) -> Tensor:
    """(B, D) float32: the mean of each text's hidden states. Raises ValueError naming a text (from `first`) that has no
    token."""
    ids = [torch.tensor(model.tokenizer.encode(text), dtype=torch.long) for text in texts]
    for number, row in enumerate(ids, first):
        if not len(row):
            raise ValueError(f"text {number} (from 0) is empty; leave it out")
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
    with torch.inference_mode(False), torch.no_grad():
        hidden = model(input_ids=padded, attention_mask=mask.to(model.device)).hidden.float()
    weight = mask.to(model.device)[..., None].float()
    return (hidden * weight).sum(1) / weight.sum(1)
