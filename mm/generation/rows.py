"""What a decoding loop carries along for its rows, so that rows can leave, double and go on in one step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from mm.generation.caches.choose import make
from mm.generation.constraints import Constraint
from mm.generation.options import Decoding
from mm.generation.requests import GenerativeModel, Prompts, read, same_tokenizer
from mm.generation.sampling import History, contrast
from mm.generation.thinking import ThinkingBudget


class Shaper:
    """Of each row what penalties go by, where it stands in its form, and its last tokens, for stop strings.

    `begin` is called with the first logits (B, V).
    """

    def __init__(self, model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int]) -> None:
        self.model, self.prompts, self.decoding, self.stops = model, prompts, decoding, stops
        self.history: History | None = None
        self.tails: list[list[int]] = [[] for _ in prompts.ids]
        # Tokens that may spell a stop string: one a byte, and some before it that begin in the middle of a character.
        self.reach = max((len(string.encode()) for string in decoding.stop_strings), default=0) + 4
        budget, tags = decoding.thinking_budget, decoding.thinking_tags or model.template.thinking_tags
        self.thinking = None if budget is None else ThinkingBudget(model.tokenizer, prompts.openings, budget, tags)
        form = decoding.form
        self.constraint = None if form is None else Constraint(form, model.tokenizer, stops, len(prompts.ids))

    def begin(self, logits: Tensor) -> None:
        if self.decoding.needs_history:
            self.history = History.of(self.prompts.ids, logits.shape[-1], logits.device)

    def mask(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B, V): what the form, or the end of a thinking budget, forbids at -inf."""
        if self.thinking is not None:
            logits = self.thinking.mask(logits)
        return logits if self.constraint is None else self.constraint.mask(logits)

    def going(self, ids: Sequence[int]) -> list[int]:
        """The places of the rows that go on after these ids, one a row."""
        return [place for place, token in enumerate(ids) if not self.ends([*self.tails[place], token])]

    def ends(self, answer: list[int]) -> bool:
        """Whether an answer is over with its last id: a stop, or the last letter of a stop string."""
        if answer[-1] in self.stops:
            return True
        if not self.decoding.stop_strings:
            return False
        text = self.model.tokenizer.decode(answer[-self.reach :])
        return any(string in text for string in self.decoding.stop_strings)

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows` (int64), in that order; one may be named twice."""
        self.tails = [list(self.tails[row]) for row in rows.tolist()]
        if self.history is not None:
            self.history.keep(rows)
        if self.constraint is not None:
            self.constraint.keep(rows.tolist())
        if self.thinking is not None:
            self.thinking.keep(rows.tolist())

    def push(self, ids: Tensor) -> None:
        """One more token (B,) of each row's answer."""
        if self.decoding.stop_strings:
            self.tails = [[*tail, token][-self.reach :] for tail, token in zip(self.tails, ids.tolist(), strict=True)]
        if self.history is not None:
            self.history.push(ids)
        if self.constraint is not None:
            self.constraint.push(ids.tolist())
        if self.thinking is not None:
            self.thinking.push(ids.tolist())


class Rows(Shaper):
    """The same with the rows' cache and, where asked for, the model to be contrasted with.

    `own` are the model's own logits (B, V) of the last `read` or `step`, whatever is made of them.
    """

    own: Tensor

    def __init__(self, model: GenerativeModel, prompts: Prompts, decoding: Decoding, stops: Collection[int]) -> None:
        super().__init__(model, prompts, decoding, stops)
        self.cache = make(model, decoding.cache)
        self.amateur = decoding.amateur
        if self.amateur is not None:
            same_tokenizer("amateur", self.amateur, model)
            self.amateur_cache = make(self.amateur, decoding.cache)

    def read(self) -> Tensor:
        """The logits (B, V) float32 after the prompts."""
        self.own = logits = read(self.model, self.prompts, self.cache)
        self.begin(logits)
        if self.amateur is None:
            return logits
        return self._contrast(logits, read(self.amateur, self.prompts, self.amateur_cache))

    def step(self, ids: Tensor) -> Tensor:
        """Reads one more token (B,) in each row -> logits (B, V) float32."""
        self.push(ids)
        self.own = logits = self.model.step(ids, self.cache).float()
        if self.amateur is None:
            return logits
        return self._contrast(logits, self.amateur.step(ids, self.amateur_cache).float())

    def _contrast(self, logits: Tensor, amateur: Tensor) -> Tensor:
        width = min(logits.shape[1], amateur.shape[1])  # rows that only pad a vocabulary are no tokens
        return contrast(logits[:, :width], amateur[:, :width], self.decoding.amateur_alpha)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.cache.keep(rows)
        if self.amateur is not None:
            self.amateur_cache.keep(rows)
