"""Constrained decoding: answers that match a regular expression, a JSON schema or a grammar, token by token.

The package llguidance says which tokens may come next; here its word is put over the logits. `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.tokenizers.text import TextTokenizer

# JSON allows white space without end, and a model that likes it (a small one, or random weights) would write nothing
# else. This much is enough for indented JSON; a schema's own "x-guidance" may say otherwise.
_JSON_SPACE = {"whitespace_flexible": True, "whitespace_pattern": r"(\n {0,16}| )?"}


@dataclass(frozen=True)
class Form:
    """What an answer must look like, all of it: one of

    regex        in the syntax of Rust's regex crate
    json_schema  a JSON schema (as JSON text, or as what json.loads makes of it); between its parts stands nothing, a
                 space, or a line break with an indentation of up to 16
    grammar      Lark's syntax, as llguidance reads it
    """

    regex: str | None = None
    json_schema: str | dict[str, Any] | bool | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("regex", "json_schema", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a form is one of regex, json_schema, grammar; given: {', '.join(given) or 'none'}")

    def compile(self) -> str:
        """The grammar for llguidance. Raises ValueError naming the argument and what is wrong with it."""
        matcher = _package().LLMatcher
        if self.regex is not None:
            name, grammar = "regex", matcher.grammar_from_regex(self.regex)
        elif self.json_schema is not None:
            name, schema = "json_schema", self.json_schema
            try:
                text = schema if isinstance(schema, str) else json.dumps(schema)
                json.loads(text)
            except (ValueError, TypeError) as error:
                raise ValueError(f"json_schema is not JSON: {error}") from error
            grammar = matcher.grammar_from_json_schema(text, defaults=_JSON_SPACE)
        else:
            name, grammar = "grammar", matcher.grammar_from_lark(self.grammar)
        if error := matcher.validate_grammar(grammar, None):
            if not error.startswith("WARNING"):
                raise ValueError(f"{name}: {' '.join(error.split())}")
        return grammar


class FormNotFollowed(ValueError):
    """An answer cannot go on: a token does not fit its form, or the form takes more states than it may."""


class Constraint:
    """Where each row stands in its form: `mask` forbids what cannot come next, `push` goes on.

    Raises ValueError for a form that makes no sense, and without a stop id: an answer that is complete has to end.
    """

    def __init__(self, form: Form, tokenizer: TextTokenizer, stops: Collection[int], rows: int) -> None:
        if not stops:
            raise ValueError("regex, json_schema and grammar need an id to end answers with: give stop at least one")
        grammar = form.compile()
        self._stops = frozenset(stops)
        vocabulary = _vocabulary(tokenizer, tuple(sorted(stops)))
        self._matchers = [_package().LLMatcher(vocabulary, grammar, log_level=0) for _ in range(rows)]
        for matcher in self._matchers:
            _check(matcher)
        self._words = (vocabulary.vocab_size + 31) // 32

    def mask(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B, V): what may not come next at -inf; once an answer is complete, all but the stops."""
        words = max(self._words, (logits.shape[1] + 31) // 32)  # rows that only pad a vocabulary are forbidden: bits 0
        bits = np.zeros((len(self._matchers), words), dtype=np.int32)
        for row, matcher in enumerate(self._matchers):
            matcher.unsafe_compute_mask_ptr(bits[row].ctypes.data, 4 * self._words)
            _check(matcher)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
        return torch.where(torch.from_numpy(allowed.view(np.bool_)).to(logits.device), logits, float("-inf"))

    def push(self, ids: Sequence[int]) -> None:
        """One more token of each row. Raises FormNotFollowed for one that `mask` forbids."""
        for matcher, token in zip(self._matchers, ids, strict=True):
            if not matcher.consume_token(token):
                raise FormNotFollowed(f"token {token} does not fit the form: {matcher.get_error()}")

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every row but `rows`, in that order; one may be named twice."""
        seen: set[int] = set()
        kept = []
        for row in rows:
            kept.append(self._matchers[row].deep_copy() if row in seen else self._matchers[row])
            seen.add(row)
        self._matchers = kept


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise FormNotFollowed(f"the form cannot be followed: {' '.join(matcher.get_error().split())}")


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: TextTokenizer, stops: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer: every token's bytes."""
    package, special = _package(), set(tokenizer.specials.values())

    class Tokens:
        eos_token_id = stops[0]
        bos_token_id = None
        tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        special_token_ids = sorted(special | set(stops))

        def __call__(self, text: bytes | str) -> list[int]:
            return tokenizer.encode(text.decode() if isinstance(text, bytes) else text)

    return package.LLTokenizer(package.TokenizerWrapper(Tokens()), eos_token=list(stops))


def _package() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "regex, json_schema and grammar need the package llguidance: pip install 'mm[constrained]'"
        ) from error
    return llguidance
