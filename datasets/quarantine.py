"""Samples that cannot be used: passed over, counted, written to `quarantine.jsonl`, and too many of them end the run.

One line a sample, however often it is met: {"shard": ..., "offset": bytes, "key": ..., "cause": ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm.datasets.shard_cache import ShardError

QUARANTINE = "quarantine.jsonl"
AT_LEAST = 1000  # samples that the share is of, at least: the first bad one of a run is not a share of 100 %


class Quarantine:
    """Keeps the count of one rank.

    Args:
        path: the file, made when the first bad sample is met; None writes nothing.
        max_bad: share of the samples read, at least of AT_LEAST, that may be bad; 0 tolerates none.
    """

    def __init__(self, path: Path | None, max_bad: float) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad={max_bad:g}: a share from 0 to 1")
        self.path, self.max_bad = path, max_bad
        self.seen = self.bad = 0
        self._written: set[str] | None = None

    def add(self, seen: int, bad: Iterable[dict[str, Any]]) -> None:
        """Notes `seen` samples and those of them that are bad. Raises ShardError past the rate, naming the last."""
        self.seen += seen
        for note in bad:
            self.bad += 1
            self._write(json.dumps(note, ensure_ascii=False) + "\n")
            if self.bad > self.max_bad * max(self.seen, AT_LEAST):
                listed = f" ({self.path} lists them)" if self.path else ""
                raise ShardError(
                    f"{self.bad} of {self.seen} samples cannot be used{listed}, more than max_bad={self.max_bad:g} "
                    f"allows; the last: {note['shard']}: offset {note['offset']}: sample {note['key']}: {note['cause']}"
                )

    def _write(self, line: str) -> None:
        if self.path is None:
            return
        if self._written is None:
            self._written = set(self.path.read_text("utf-8").splitlines(True)) if self.path.exists() else set()
        if line not in self._written:
            self._written.add(line)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:  # one write a line: ranks share the file
                file.write(line.encode())


def read_quarantine(path: Path) -> Iterator[dict[str, Any]]:
    """The notes of a file; a last line torn by a killed run is left out."""
    for line in path.read_text("utf-8").splitlines(True) if path.exists() else []:
        if line.endswith("\n"):
            yield json.loads(line)
