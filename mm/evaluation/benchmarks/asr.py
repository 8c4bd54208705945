"""Speech recognition: word error rate on LibriSpeech (Panayotov et al. 2015) and Common Voice (Ardila et al. 2020).

Files: LibriSpeech (https://www.openslr.org/12), `test-clean/SPEAKER/CHAPTER/*.flac` with `*.trans.txt`; Common Voice
(https://commonvoice.mozilla.org), `LANGUAGE/test.tsv` with `LANGUAGE/clips/*.mp3`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm.datasets.source import media_file
from mm.evaluation.benchmarks.base import Benchmark, question
from mm.evaluation.files import table
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers import text
from mm.evaluation.statistics import Mean
from mm.types import Media, Sample


class SpeechBenchmark(Benchmark):
    """Transcripts of recordings. WER pools the errors of all recordings over all words of the references.

    `normalise` applies Whisper's English normaliser to both sides first (case, punctuation, numbers, contractions); the
    plain rate is reported beside it. A record's score is 1 - its own WER, and not below 0; controls make no sense.
    """

    max_new_tokens = 256
    guessable = False

    def __init__(self, path: Path, normalise: bool = True, prompt: str = "Transcribe the speech.") -> None:
        self.path = path
        self.normalise = normalise
        self.prompt = prompt

    @abstractmethod
    def recordings(self) -> Iterator[tuple[str, str, Media, str]]:
        """(id, reference, recording, category) of each recording, in the order of ids."""

    def samples(self) -> list[Sample]:
        return [
            question(key, self.prompt, {"category": category, "answers": [reference]}, [recording])
            for key, reference, recording, category in self.recordings()
        ]

    def origin(self) -> str:
        return str(self.path)

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        marks = []
        for sample, response in zip(samples, responses, strict=True):
            reference = sample.meta["answers"][0]
            rates = text.wer(reference, response.text, normalise=self.normalise)
            raw = text.wer(reference, response.text)
            words = rates["hits"] + rates["substitutions"] + rates["deletions"]
            details = {
                "errors": rates["substitutions"] + rates["deletions"] + rates["insertions"],
                "words": words,
                "raw_wer": raw["wer"],
                "raw_words": raw["hits"] + raw["substitutions"] + raw["deletions"],
                "cer": rates["cer"],
                "characters": len(reference),
            }
            marks.append(Mark(max(0.0, 1.0 - rates["wer"]), details=details))
        return marks

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """wer, wer without the normaliser, and cer: errors over words or characters (lower is better)."""
        details = [record.details for record in records]
        words = [float(d["words"]) for d in details]
        return {
            "wer": Mean([d["errors"] / d["words"] for d in details], words),
            "raw_wer": Mean([d["raw_wer"] for d in details], [float(d["raw_words"]) for d in details]),
            "cer": Mean([d["cer"] for d in details], [float(d["characters"]) for d in details]),
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """The pooled rates, by jiwer over the whole corpus."""
        references, said = [record.answers[0] for record in records], [record.prediction for record in records]
        pooled, raw = text.wer(references, said, normalise=self.normalise), text.wer(references, said)
        return {"wer": pooled["wer"], "raw_wer": raw["wer"], "cer": pooled["cer"]}

    def controlled(self, sample: Sample) -> bool:
        return False


class LibriSpeechBenchmark(SpeechBenchmark):
    """All recordings below a folder, whose speakers' chapters each have one `SPEAKER-CHAPTER.trans.txt`."""

    name = "librispeech"

    def recordings(self) -> Iterator[tuple[str, str, Media, str]]:
        lists = sorted(self.path.rglob("*.trans.txt"))
        if not lists:
            raise ValueError(f"{self.path}: no *.trans.txt below it: not a folder of LibriSpeech")
        for file in lists:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                key, _, reference = line.partition(" ")
                where = f"{file}: line {number}"
                if not reference.strip():
                    raise ValueError(f"{where}: expected an id and a transcript, got {line!r:.80}")
                yield key, reference, media_file(file.parent, f"{key}.flac", where, "audio"), "all"


class CommonVoiceBenchmark(SpeechBenchmark):
    """The recordings of one `SPLIT.tsv` of one language's folder. The normaliser is for English."""

    name = "common_voice"

    def __init__(
        self, path: Path, split: str = "test", normalise: bool = True, prompt: str = "Transcribe the speech."
    ) -> None:
        super().__init__(path, normalise, prompt)
        self.split = split

    def recordings(self) -> Iterator[tuple[str, str, Media, str]]:
        for where, row in table(self.path / f"{self.split}.tsv", ("path", "sentence"), delimiter="\t"):
            name = row["path"] if Path(row["path"]).suffix else f"{row['path']}.mp3"  # the first releases left it out
            yield Path(name).stem, row["sentence"], media_file(self.path / "clips", name, where, "audio"), "all"
