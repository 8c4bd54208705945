"""MMMU-Pro (Yue et al. 2024): MMMU with up to ten options, and with the whole question inside a screenshot.

Files (https://huggingface.co/datasets/MMMU/MMMU_Pro): the folders `standard (10 options)`, `standard (4 options)` and
`vision`, each with `test-*.parquet`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mm.datasets.source import field
from mm.datasets.sources.mmmu import interleave
from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.files import embedded_image, letter_answer, lettered, parquet_rows
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers import mmmu
from mm.types import Media, Sample

# mmmu-pro/prompts.yaml, "direct"
PROMPTS = {
    "standard": "Answer with the option letter from the given choices directly.",
    "vision": "Answer with the option letter from the given choices directly. The last line of your response should be "
    "of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options.",
}
Setting = Literal["standard (10 options)", "standard (4 options)", "vision"]


class MMMUProBenchmark(Benchmark):
    """One of the three settings; the published score is the mean of "standard (10 options)" and "vision".

    Args:
        path: the folder that holds the settings' folders.
        setting: which of them.
    """

    name = "mmmu_pro"
    max_new_tokens = 64

    def __init__(self, path: Path, setting: Setting = "standard (10 options)") -> None:
        self.path = path
        self.setting: Setting = setting
        self.prompt = PROMPTS[setting.split(" ")[0]]

    def samples(self) -> list[Sample]:
        vision = self.setting == "vision"
        columns = ["id", "options", "answer", "subject", *(["image"] if vision else ["question", "image_1"])]
        samples = []
        for where, row in parquet_rows(self.path / self.setting, "test*.parquet", columns):
            key = field(row, "id", str, where)
            options = _options(field(row, "options", str, where), where)
            letters, listed = lettered(options)
            content, media = self._turn(row, listed, where)
            meta = {
                "question": key if vision else row["question"],
                "category": field(row, "subject", str, where),
                "answers": [letter_answer(row, "answer", letters, where)],
                "choices": letters,
                "index2ans": dict(zip(letters, options, strict=True)),
                "options": row["options"],
            }
            samples.append(Sample(key, [{"role": "user", "content": content}], media, meta=meta))
        return samples

    def _turn(self, row: dict[str, Any], listed: str, where: str) -> tuple[list[dict[str, Any]], list[Media]]:
        if self.setting == "vision":
            media = [embedded_image(row["image"], "image", where)]
            return [{"type": "image", "media": 0}, {"type": "text", "text": self.prompt}], media
        return interleave(f"{field(row, 'question', str, where)}\n{listed}\n{self.prompt}", row, where)

    def origin(self) -> str:
        return str(self.path / self.setting)

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 or 0.0; a prediction without a letter draws from a fresh official stream (`mark_all` shares one)."""
        return self.mark_all([sample], [Response(prediction)])[0].score

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        rng = mmmu.official_rng()
        marks = []
        for sample, response in zip(samples, responses, strict=True):
            meta = sample.meta
            letter = mmmu.parse_multi_choice_pro(response.text, meta["choices"], meta["index2ans"], rng)
            marks.append(Mark(float(letter == meta["answers"][0]), details={"parsed": letter}))
        return marks

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """JSON lines as the official `evaluate.py` reads them: id, options, answer, subject, response."""
        samples = {sample.key: sample.meta for sample in self.samples()}
        lines = [
            {
                "id": record.id,
                "options": samples[record.id]["options"],
                "answer": record.answers[0],
                "subject": record.category,
                "response": record.prediction,
            }
            for record in records
        ]
        name = f"mm_{self.setting}_direct.jsonl"
        return {name: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)}


def _options(text: str, where: str) -> list[str]:
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, list) or not options:
        raise ValueError(f"{where}: column 'options': expected a list as text, got {text!r:.80}")
    return [str(option) for option in options]
