"""MMLU (Hendrycks et al. 2021): four-option questions in 57 subjects, scored by the likelihood of the options.

Files (https://github.com/hendrycks/test, `data.tar`): `data/test/SUBJECT_test.csv` and, for few-shot prompts,
`data/dev/SUBJECT_dev.csv`: question, four options and the letter, without a header.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mm.evaluation.benchmarks.base import Benchmark, by_category, mean_of
from mm.evaluation.files import lettered, table
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers import choice
from mm.evaluation.statistics import Mean
from mm.types import Sample

COLUMNS = ("question", "A", "B", "C", "D", "answer")
LETTERS = COLUMNS[1:5]


class MMLUBenchmark(Benchmark):
    """The prompt of the authors and of lm-eval: a line on the subject, examples, the question, its options, "Answer:".

    Args:
        path: the folder with `test` and `dev`.
        split: "test" or "val".
        shots: how many of a subject's five examples stand before each question.
        continuation: what is scored after "Answer:": the option's "letter" (the official way), or its "text", where the
            options are not listed and their length matters (acc_norm).
        plain: no chat template, as base models are measured; false opens a chat.
    """

    name = "mmlu"
    ask = "choices"

    def __init__(
        self,
        path: Path,
        split: str = "test",
        shots: int = 0,
        continuation: Literal["letter", "text"] = "letter",
        plain: bool = True,
    ) -> None:
        if not 0 <= shots <= 5:
            raise ValueError(f"mmlu: shots must be 0 to 5, got {shots}")
        self.path = path
        self.split = split
        self.shots = shots
        self.continuation: Literal["letter", "text"] = continuation
        self.plain = plain
        self.prompt = f"{shots} examples; {continuation} after 'Answer:'"

    def samples(self) -> list[Sample]:
        files = sorted((self.path / self.split).glob(f"*_{self.split}.csv"))
        if not files:
            raise ValueError(f"{self.path / self.split}: no *_{self.split}.csv: not the folder of MMLU")
        return [sample for file in files for sample in self._subject(file)]

    def _subject(self, file: Path) -> list[Sample]:
        subject = file.name.removesuffix(f"_{self.split}.csv")
        examples = [
            self._ask(row) + " " + self._options(row)[LETTERS.index(row["answer"])] for row in self._dev(subject)
        ]
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        samples = []
        for number, (where, row) in enumerate(table(file, COLUMNS, header=False)):
            if row["answer"] not in LETTERS:
                raise ValueError(f"{where}: the answer {row['answer']!r} is none of {', '.join(LETTERS)}")
            options = self._options(row)
            gold = LETTERS.index(row["answer"])
            space = " " if self.plain else ""
            meta = {
                "question": row["question"].strip(),
                "category": subject,
                "answers": [options[gold]],
                "gold": gold,
                "choices": [space + option for option in options],
            }
            text = "\n\n".join([head, *examples, self._ask(row)])
            samples.append(Sample(f"{subject}/{number}", [{"role": "user", "content": text}], meta=meta))
        return samples

    def _dev(self, subject: str) -> list[dict[str, str]]:
        if not self.shots:
            return []
        rows = [row for _, row in table(self.path / "dev" / f"{subject}_dev.csv", COLUMNS, header=False)]
        return rows[: self.shots]

    def _ask(self, row: dict[str, str]) -> str:
        listed = [lettered([row[letter] for letter in LETTERS])[1]] if self.continuation == "letter" else []
        return "\n".join([row["question"].strip(), *listed, "Answer:"])

    def _options(self, row: dict[str, str]) -> list[str]:
        return list(LETTERS) if self.continuation == "letter" else [row[letter].strip() for letter in LETTERS]

    def origin(self) -> str:
        return str(self.path / self.split)

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        return [
            choice_mark(sample.meta["choices"], response, sample.meta["gold"])
            for sample, response in zip(samples, responses, strict=True)
        ]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """acc, acc_norm and acc_bytes over all questions, then each subject's acc."""
        overall = {name: mean_of(records, name) for name in ("acc", "acc_norm", "acc_bytes")}
        return overall | by_category(records, "acc")


def choice_mark(choices: Sequence[str], response: Response, gold: int) -> Mark:
    """The three accuracies of a question, its score being "acc"; log-likelihoods are kept."""
    scores = choice.accuracy([text.strip() for text in choices], response.loglikelihoods, gold)
    kept = {"loglikelihoods": list(response.loglikelihoods), "tokens": list(response.tokens)}
    return Mark(scores["acc"], details=scores | kept)
