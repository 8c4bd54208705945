"""LibriSpeech folders: read speech with transcripts (SPLIT/SPEAKER/CHAPTER/*.flac and *.trans.txt)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mm.datasets.source import Source, media_file, media_parts, sha256_file
from mm.types import Sample


class Record(NamedTuple):
    where: str
    folder: Path
    utterance: str
    text: str


class LibriSpeech(Source[Record]):
    """Read speech in the layout of LibriSpeech (Panayotov et al., 2015): each `S-C.trans.txt` has lines "ID TEXT", and
    `ID.flac` (or .wav, .opus, .mp3) lies beside it.

    Args:
        path: the folder; any above the chapters will do.
        split: only this folder below it, such as test-clean; None takes all.
        prompt: what the user says after the sound; "" says nothing.
        lower: transcripts in lower case (they are in capitals).
    """

    def __init__(self, path: Path, split: str | None = None, prompt: str = "", lower: bool = True) -> None:
        root = path if split is None else path / split
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder")
        self.path, self.prompt, self.lower = root, prompt, lower
        self.files = sorted(root.rglob("*.trans.txt"))
        if not self.files:
            raise ValueError(f"{root}: no *.trans.txt in it")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_dir() and any(any(path.glob(f"{'*/' * depth}*.trans.txt")) for depth in range(4))

    def fingerprint(self) -> dict[str, str]:
        return {str(file.relative_to(self.path)): sha256_file(file) for file in self.files}

    def records(self) -> Iterable[Record]:
        for file in self.files:
            try:
                rows = file.read_text("utf-8").splitlines()
            except UnicodeDecodeError:
                raise ValueError(f"{file}: not UTF-8 text") from None
            for number, row in enumerate(rows, start=1):
                utterance, _, text = row.strip().partition(" ")
                if utterance and not text:
                    raise ValueError(f"{file}: line {number}: expected ID TEXT, got {row!r:.80}")
                if utterance:
                    yield Record(f"{file}: line {number}", file.parent, utterance, text)

    def sample(self, record: Record) -> Sample:
        suffixes = (".flac", ".wav", ".opus", ".mp3")
        names = [record.utterance + suffix for suffix in suffixes]
        name = next((name for name in names if (record.folder / name).is_file()), names[0])
        media = [media_file(record.folder, name, record.where, "audio")]
        content: list[dict[str, Any]] = media_parts(media)
        if self.prompt:
            content.append({"type": "text", "text": self.prompt})
        text = record.text.lower() if self.lower else record.text
        speaker, _, chapter = record.utterance.rpartition("-")[0].partition("-")
        meta = {"id": record.utterance, "speaker": speaker, "chapter": chapter, "answers": [text], "language": "en"}
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        return Sample(f"librispeech_{record.utterance}", messages, media, meta=meta)
