"""How answers are decoded: one object with every option, which refuses values and combinations that make no sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mm.generation.caches.choose import check
from mm.generation.sampling import Sampler


class Options(TypedDict, total=False):
    """The keyword arguments of `Decoding`, for functions that pass them on."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: bool | Literal["never"]
    penalty_alpha: float | None
    cache: str
    draft: Any
    draft_length: int


@dataclass(frozen=True)
class Decoding(Sampler):
    """The options of a Sampler, and the methods that look further than the next token.

    num_beams          above 1: beam search (Sutskever et al. 2014). The answer is the hypothesis with the best
                       log probability / length ** `length_penalty`
    early_stopping     False: ends when no beam is likely to end better than the ended ones; True: with `num_beams`
                       ended ones; "never": only when no beam can end better
    num_beam_groups    above 1: diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424): a group's beam loses
                       `diversity_penalty` for a token for each beam of the groups before that just took it too
    penalty_alpha      contrastive search (Su et al. 2022, arXiv 2202.06417): of the `top_k` likeliest tokens that with
                       the best (1 - alpha) * probability - alpha * likeness to what is already there

    draft              speculative decoding: a smaller model with the same tokenizer, "lookup" (what followed the same
                       words before) or "mtp" (the model's own prediction modules) proposes `draft_length` tokens, which
                       the model checks in one pass
    cache              what is kept of the past, by one of the names of mm.generation.caches.CACHES

    Raises ValueError at construction, naming the option or the combination.
    """

    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    penalty_alpha: float | None = None
    draft: Any = None
    draft_length: int = 4
    cache: str = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.cache)
        for name in ("num_beams", "num_beam_groups", "draft_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}: give a whole number from 1 up")
        if self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beam_groups={self.num_beam_groups} must divide num_beams={self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: give True, False or 'never'")
        if not 0 <= self.diversity_penalty < float("inf"):
            raise ValueError(f"diversity_penalty={self.diversity_penalty}: give a finite number from 0 up")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ValueError(f"diversity_penalty={self.diversity_penalty} needs num_beam_groups above 1")
        if self.num_beam_groups > 1 and not self.diversity_penalty:
            raise ValueError("num_beam_groups above 1 needs a diversity_penalty: without it all groups are the same")
        if self.penalty_alpha is not None:
            if not 0 <= self.penalty_alpha <= 1:
                raise ValueError(f"penalty_alpha={self.penalty_alpha}: give a number from 0 to 1")
            if self.top_k is None or self.top_k < 2:
                raise ValueError(
                    "penalty_alpha chooses among the top_k likeliest tokens: give top_k from 2 up (4 is usual)"
                )
        for name, on in (("num_beams", self.num_beams > 1), ("penalty_alpha", self.penalty_alpha is not None)):
            if on and not self.greedy:
                raise ValueError(f"{name} searches and does not draw: leave temperature at 0")
        if self.num_beams > 1 and self.penalty_alpha is not None:
            raise ValueError("num_beams and penalty_alpha are two methods; choose one")
        if isinstance(self.draft, str) and self.draft not in ("lookup", "mtp"):
            raise ValueError(f"draft={self.draft!r}: give 'lookup', 'mtp' or a model")
        if self.draft is not None:
            for name, on in (("num_beams", self.num_beams > 1), ("penalty_alpha", self.penalty_alpha is not None)):
                if on:
                    raise ValueError(f"draft speeds up plain decoding; {name} decodes otherwise: leave one out")
            if self.cache not in ("dynamic", "int8", "int4"):
                raise ValueError(
                    f"draft takes tokens back, which cache={self.cache!r} cannot: use dynamic, int8 or int4"
                )
        filters = ("top_p", "min_p", "typical_p", *(("top_k",) if self.penalty_alpha is None else ()))
        if (self.num_beams > 1 or self.penalty_alpha is not None) and any(getattr(self, name) for name in filters):
            raise ValueError(f"{', '.join(filters)} narrow what is drawn; num_beams and penalty_alpha do not draw")
