"""Responses on disk while an evaluation runs, so that a killed one goes on where it was.

    NAME.journal/0.jsonl, 1.jsonl, ...   one file a rank: a line that says what is being asked, then a line a response

Lines of another question (other model, data, settings) are never used. The folder goes when the result is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.evaluation.records import Response
from mm.types import Sample


def request_key(sample: Sample, salt: str = "") -> str:
    """Equal for samples that look the same to the model: hash of the chat, the media and what is scored of them."""
    digest = hashlib.sha256(salt.encode())
    asked = {name: sample.meta[name] for name in ("choices", "text", "captions") if name in sample.meta}
    digest.update(json.dumps([sample.messages, asked], sort_keys=True, ensure_ascii=False).encode())
    for item in sample.media:
        data = item.data if isinstance(item.data, bytes) else str(item.data).encode()
        digest.update(f"{item.kind}:{len(data)}:".encode() + data)
    return digest.hexdigest()


class Journal:
    """Responses by request key, in `folder`. `identity` is what they depend on: the model, the data, the settings."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = folder
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.path = folder / f"{rank}.jsonl"
        self._file: Any = None

    def read(self) -> dict[str, Response]:
        """What any rank of an earlier, unfinished run of the same question wrote; a torn last line is left out."""
        known: dict[str, Response] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            current = False
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off by the kill, or the end of the file
                    continue
                if "identity" in entry:
                    current = entry["identity"] == self.identity
                elif current:
                    known[entry["key"]] = Response.from_json(entry["response"])
        return known

    def add(self, responses: Mapping[str, Response]) -> None:
        """Appends, and waits until it is on disk."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")
            # A line break first: the line before may have been cut off.
            self._file.write(b"\n" + json.dumps({"identity": self.identity}).encode() + b"\n")
        for key, response in responses.items():
            line = json.dumps({"key": key, "response": response.to_json()}, ensure_ascii=False)
            self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """The result is written: nothing is left to go on with."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
