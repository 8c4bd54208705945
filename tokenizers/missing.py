"""What stands in a model's place for a tokenizer that its checkpoint did not bring: ids work, text is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from mm.tokenizers.text import TextTokenizer


class MissingTokenizer(TextTokenizer):
    """A vocabulary size and no text. `origin` is where the tokenizer was looked for; every use of text names it."""

    has_text = False

    def __init__(self, vocab_size: int, origin: str = "its checkpoint") -> None:
        self.vocab_size, self.origin = vocab_size, origin
        self.specials: dict[str, int] = {}

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"the model has no tokenizer: {self.origin} has no tokenizer.json and no tokenizer.model; "
            "put one there, or give the model input_ids"
        )

    def save(self, directory: str | Path) -> Path:
        self._refuse()

    def with_specials(self, names: Iterable[str]) -> TextTokenizer:
        self._refuse()

    def special(self, name: str) -> int:
        self._refuse()

    def encode(self, text: str) -> list[int]:
        self._refuse()

    def decode(self, ids: Sequence[int], skip_specials: bool = True) -> str:
        self._refuse()

    def token_bytes(self, token: int) -> bytes:
        self._refuse()

    def __reduce__(self) -> tuple[type[MissingTokenizer], tuple[int, str]]:  # type: ignore[override]
        return MissingTokenizer, (self.vocab_size, self.origin)
