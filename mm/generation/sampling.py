"""From logits to a token: penalties and filters as pure functions, and a draw that a request's own numbers decide.

`B` rows, `V` vocabulary. A filter takes logits (B, V) float32 and returns them with the tokens it forbids at -inf; it
always leaves one, and all but `filter_typical` leave the likeliest. The order is that of transformers: penalties,
temperature, top-k, top-p, min-p, typical.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INVALID = -1  # stands for the token of a row whose logits are no numbers; no vocabulary has it


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, for a temperature above 0 (0 means greedy, which `Sampler` decides).

    Raises ValueError for a temperature that is not finite and above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature}: scaling needs a finite number above 0")
    return logits / temperature


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keeps the `top_k` largest logits of each row, and those equal to the last of them. Raises ValueError below 1."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k}: give a whole number of tokens from 1 up, or None to keep all")
    smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): keeps the fewest likeliest tokens with probability `top_p` together.

    Raises ValueError outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: give a probability above 0 and at most 1, or None to keep all")
    # Ascending, so that the sum over the unlikely tail is a sum of small numbers: no digits are lost where it matters.
    ascending, order = logits.sort(dim=-1)
    forbidden = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    forbidden[..., -1] = False
    return logits.masked_fill(torch.zeros_like(forbidden).scatter(-1, order, forbidden), -math.inf)


def filter_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keeps tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024). Raises outside [0, 1]."""
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}: give a number from 0 to 1, or None to keep all")
    probabilities = logits.softmax(dim=-1)
    forbidden = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(forbidden, -math.inf)


def filter_typical(logits: Tensor, typical_p: float) -> Tensor:
    """Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): keeps the tokens whose surprise is nearest to
    the distribution's entropy, as few as have probability `typical_p` together. Raises ValueError outside (0, 1)."""
    if not 0 < typical_p < 1:
        raise ValueError(f"typical_p={typical_p}: give a probability above 0 and below 1, or None to keep all")
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum(dim=-1, keepdim=True)  # a forbidden token is 0 * -inf
    nearest, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
    last = (p.gather(-1, order).cumsum(dim=-1) < typical_p).sum(dim=-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    forbidden = nearest > nearest.gather(-1, last)
    return logits.masked_fill(torch.zeros_like(forbidden).scatter(-1, order, forbidden), -math.inf)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens of `seen` (B, V) bool: positive logits / penalty, negative ones * penalty (Keskar et al. 2019, CTRL)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalise_counts(logits: Tensor, written: Tensor, presence: float, frequency: float) -> Tensor:
    """logits - presence * (written > 0) - frequency * written, for counts `written` (B, V): OpenAI's two penalties."""
    return logits - presence * (written > 0) - frequency * written


def contrast(expert: Tensor, amateur: Tensor, alpha: float) -> Tensor:
    """Contrastive decoding (Li et al. 2023, arXiv 2210.15097): log p_expert - log p_amateur of the tokens that the
    expert gives at least `alpha` times the probability of its likeliest, for logits (B, V); the others at -inf."""
    log_p = expert.log_softmax(dim=-1)
    implausible = log_p < log_p.amax(dim=-1, keepdim=True) + math.log(alpha)
    return (log_p - amateur.log_softmax(dim=-1)).masked_fill(implausible, -math.inf)


@dataclass
class History:
    """What penalties go by: `seen` (B, V) bool, the tokens of each row's prompt and answer; `written` (B, V) int64, how
    often each stands in the answer."""

    seen: Tensor
    written: Tensor

    @staticmethod
    def of(prompts: Sequence[Tensor], vocab_size: int, device: torch.device) -> History:
        """Of prompts as ids, one (T,) int64 a row; what is below 0 (a media slot) is no token."""
        seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, ids in enumerate(prompts):
            seen[row, ids[ids >= 0].to(device)] = True
        return History(seen, torch.zeros_like(seen, dtype=torch.long))

    def copy(self) -> History:
        """One that goes on by itself."""
        return History(self.seen.clone(), self.written.clone())

    def push(self, ids: Tensor) -> None:
        """Notes one more token (B,) of each row's answer."""
        rows = torch.arange(len(ids), device=ids.device)
        self.seen[rows, ids] = True
        self.written[rows, ids] += 1

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows`, in that order; one may be named twice."""
        self.seen, self.written = self.seen[rows], self.written[rows]


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) int64: a token of each row of logits (B, V), the distribution inverted at uniforms (B,) float64 in [0, 1).

    One number a row decides, so that a row's token does not depend on the other rows. A token at -inf is never drawn.
    """
    # In float64 the rounding of V additions stays far below the probability of any token worth drawing.
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen: `temperature` 0 takes the likeliest (the first of equals); above 0 it is drawn from what
    the filters leave. None switches a filter off. `repetition_penalty` (1 is none) goes by prompt and answer,
    `presence_penalty` and `frequency_penalty` (0 is none) by the answer alone.

    Raises ValueError at construction for a nonsense value, naming the argument.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or a finite number above it")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: give a finite number above 0; 1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: give a finite number; 0 is none")
        self._narrow(torch.zeros(1, 1))  # the filters know which values make sense

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def filter(self, logits: Tensor, history: History | None = None) -> Tensor:
        """(B, V) -> (B, V): the logits of the distribution that `draw` draws from (greedy: unscaled).

        Raises ValueError for penalties without a history to go by.
        """
        return self._narrow(self.penalise(logits, history))

    def penalise(self, logits: Tensor, history: History | None = None) -> Tensor:
        """The penalties alone, (B, V) -> (B, V)."""
        if not self.needs_history:
            return logits
        if history is None:
            raise ValueError("penalties go by what was seen and written: give the rows' History")
        if self.repetition_penalty != 1:
            logits = penalise_repetition(logits, history.seen, self.repetition_penalty)
        if self.presence_penalty or self.frequency_penalty:
            logits = penalise_counts(logits, history.written, self.presence_penalty, self.frequency_penalty)
        return logits

    def _narrow(self, logits: Tensor) -> Tensor:
        if not self.greedy:
            logits = scale_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = filter_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = filter_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = filter_min_p(logits, self.min_p)
        if self.typical_p is not None:
            logits = filter_typical(logits, self.typical_p)
        return logits

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator], history: History | None = None) -> Tensor:
        """(B,) int64: the next token of each row of logits (B, V) float32, `INVALID` where a row is no distribution.

        Drawing takes one number from each row's generator (on the CPU, so that a seed means the same on any device).
        """
        # NaN and +inf anywhere reach the maximum, and so does a row of -inf alone: one pass finds them all.
        valid = logits.amax(dim=-1).abs() < math.inf
        if self.greedy:
            ids = self.penalise(logits, history).argmax(dim=-1)
        else:
            uniforms = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
            ids = draw(self.filter(logits.masked_fill(~valid[:, None], 0.0), history), uniforms)
        return ids.masked_fill(~valid, INVALID)
