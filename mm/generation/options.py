"""How answers are decoded: one object with every option, which refuses values and combinations that make no sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mm.generation.caches.choose import check
from mm.generation.constraints import Form
from mm.generation.sampling import Sampler
from mm.generation.steering import Steering


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
    reward: Callable[[str], float] | None
    reward_weight: float
    reward_every: int
    penalty_alpha: float | None
    amateur: Any
    amateur_alpha: float
    steer: Steering | None
    thinking: bool | None
    thinking_budget: int | None
    thinking_tags: tuple[str, str] | None
    stop_strings: Sequence[str]
    logprobs: int | None
    regex: str | None
    json_schema: str | dict[str, Any] | bool | None
    grammar: str | None
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
    reward             every `reward_every` steps beams are kept by log probability + `reward_weight` * the reward of
                       their text so far, and so is the best of those that have ended
    penalty_alpha      contrastive search (Su et al. 2022, arXiv 2202.06417): of the `top_k` likeliest tokens that with
                       the best (1 - alpha) * probability - alpha * likeness to what is already there

    amateur            contrastive decoding (Li et al. 2023, arXiv 2210.15097): a smaller model with the same tokenizer;
                       what counts is how much likelier a token is than to it, among those with at least `amateur_alpha`
                       times the probability of the likeliest
    steer              towards attributes, by moving what is kept of the past: mm.generation.steering.Steering
    thinking           chats of models with both modes: True reasons before the answer, False answers at once, None is
                       as the model's template has it. Reasoning is apart from the answer's text
    thinking_budget    so many tokens between the `thinking_tags` (default: the template's), then the closing one, and
                       the answer
    stop_strings       the answer ends before the first of them
    logprobs           also say how likely the model itself held each token, and so many of the likeliest at its place
    regex              the whole answer matches it;  json_schema, grammar: as in mm.generation.constraints.Form
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
    reward: Callable[[str], float] | None = None
    reward_weight: float = 1.0
    reward_every: int = 1
    penalty_alpha: float | None = None
    amateur: Any = None
    amateur_alpha: float = 0.1
    steer: Steering | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    thinking_tags: tuple[str, str] | None = None
    stop_strings: Sequence[str] = ()
    logprobs: int | None = None
    regex: str | None = None
    json_schema: str | dict[str, Any] | bool | None = None
    grammar: str | None = None
    draft: Any = None
    draft_length: int = 4
    cache: str = "dynamic"

    @property
    def form(self) -> Form | None:
        """What the answer must look like, or None."""
        if self.regex is None and self.json_schema is None and self.grammar is None:
            return None
        return Form(self.regex, self.json_schema, self.grammar)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.form  # refuses more than one
        check(self.cache)
        self._check_values()
        given = {name for name, is_on in SWITCHES.items() if is_on(self)}
        for pair, why in REFUSED.items():
            if given.issuperset(pair):
                raise ValueError(f"{' and '.join(pair)} do not go together: {why}")

    def _check_values(self) -> None:
        for name in ("num_beams", "num_beam_groups", "reward_every", "draft_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}: give a whole number from 1 up")
        if self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beam_groups={self.num_beam_groups} must divide num_beams={self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: give True, False or 'never'")
        if not 0 <= self.diversity_penalty < float("inf"):
            raise ValueError(f"diversity_penalty={self.diversity_penalty}: give a finite number from 0 up")
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
            raise ValueError("num_beam_groups above 1 and a diversity_penalty above 0 need one another")
        if self.reward is not None and self.num_beams == 1:
            raise ValueError("reward chooses among beams: give num_beams above 1")
        if self.penalty_alpha is not None:
            if not 0 <= self.penalty_alpha <= 1:
                raise ValueError(f"penalty_alpha={self.penalty_alpha}: give a number from 0 to 1")
            if self.top_k is None or self.top_k < 2:
                raise ValueError("penalty_alpha chooses among the top_k likeliest tokens: give top_k from 2 up (say 4)")
        if not 0 < self.amateur_alpha <= 1:
            raise ValueError(f"amateur_alpha={self.amateur_alpha}: give a share above 0 and at most 1")
        if self.steer is not None and not isinstance(self.steer, Steering):
            raise ValueError(f"steer={self.steer!r}: give a mm.generation.steering.Steering")
        if isinstance(self.draft, str) and self.draft not in ("lookup", "mtp"):
            raise ValueError(f"draft={self.draft!r}: give 'lookup', 'mtp' or a model")
        if self.thinking_budget is not None and (isinstance(self.thinking_budget, bool) or self.thinking_budget < 0):
            raise ValueError(f"thinking_budget={self.thinking_budget}: give a number of tokens from 0 up")
        if self.thinking not in (True, False, None):
            raise ValueError(f"thinking={self.thinking!r}: give True, False or None (as the template has it)")
        if self.thinking_tags is not None and (len(self.thinking_tags) != 2 or not all(self.thinking_tags)):
            raise ValueError(f"thinking_tags={self.thinking_tags!r}: give the opening and the closing one")
        if isinstance(self.stop_strings, str) or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise ValueError(f"stop_strings={self.stop_strings!r}: give a list of strings, none of them empty")
        if self.logprobs is not None and (isinstance(self.logprobs, bool) or self.logprobs < 0):
            raise ValueError(f"logprobs={self.logprobs}: give how many of the likeliest tokens to name, from 0 up")


SWITCHES: dict[str, Callable[[Decoding], bool]] = {
    "num_beams": lambda d: d.num_beams > 1,
    "penalty_alpha": lambda d: d.penalty_alpha is not None,
    "draft": lambda d: d.draft is not None,
    "amateur": lambda d: d.amateur is not None,
    "steer": lambda d: d.steer is not None,
    "logprobs": lambda d: d.logprobs is not None,
    "thinking=False": lambda d: d.thinking is False,
    "thinking_budget": lambda d: d.thinking_budget is not None,
    "regex, json_schema or grammar": lambda d: d.form is not None,
    "temperature": lambda d: not d.greedy,
    "top_p, min_p or typical_p": lambda d: any(each is not None for each in (d.top_p, d.min_p, d.typical_p)),
    "top_k": lambda d: d.top_k is not None,
    "a cache that loses tokens": lambda d: d.cache not in ("dynamic", "static", "int8", "int4"),
    "the static cache": lambda d: d.cache == "static",
    "a cache other than dynamic": lambda d: d.cache != "dynamic",
}
SEARCHES = "it searches for the best and draws nothing"
ONE_TOKEN = "its step reads one token of each row"
OTHERWISE = "it decodes in a way of its own, not token by token"
REFUSED: dict[tuple[str, str], str] = {
    ("num_beams", "penalty_alpha"): "they are two methods",
    ("num_beams", "temperature"): SEARCHES,
    ("num_beams", "top_p, min_p or typical_p"): SEARCHES,
    ("num_beams", "top_k"): SEARCHES,
    ("penalty_alpha", "temperature"): SEARCHES,
    ("penalty_alpha", "top_p, min_p or typical_p"): SEARCHES,
    ("draft", "num_beams"): OTHERWISE,
    ("draft", "penalty_alpha"): OTHERWISE,
    ("draft", "amateur"): "a draft is checked against the model itself",
    ("draft", "a cache that loses tokens"): "a draft's tokens are taken back; use cache dynamic, int8 or int4",
    ("draft", "the static cache"): ONE_TOKEN,
    ("penalty_alpha", "the static cache"): ONE_TOKEN,
    ("amateur", "penalty_alpha"): "they are two methods",
    ("steer", "num_beams"): OTHERWISE,
    ("steer", "penalty_alpha"): OTHERWISE,
    ("steer", "draft"): "a draft is checked against the model itself",
    ("steer", "amateur"): "they are two methods",
    ("steer", "a cache other than dynamic"): "steering moves what is kept of the past, so it must be there as it was",
    ("thinking=False", "thinking_budget"): "without reasoning there is nothing to budget",
    ("thinking_budget", "regex, json_schema or grammar"): "the form is that of the whole answer, reasoning included",
}


_NOT_HERE = {
    "num_beams": lambda d: d.num_beams > 1,
    "penalty_alpha": lambda d: d.penalty_alpha is not None,
    "draft": lambda d: d.draft is not None,
    "amateur": lambda d: d.amateur is not None,
    "steer": lambda d: d.steer is not None,
    "cache": lambda d: d.cache != "dynamic",
}


def unsupported(decoding: Decoding) -> str | None:
    """The first option that an engine does not have."""
    return next((name for name, is_on in _NOT_HERE.items() if is_on(decoding)), None)
