"""Video-MME (Fu et al. 2024): three four-option questions about each of 900 videos, short, medium and long.

Files (https://huggingface.co/datasets/lmms-lab/Video-MME): `videomme/test-00000-of-00001.parquet`, the videos
`VIDEOID.mp4` in one folder and, to be given with the frames, the subtitles `VIDEOID.srt` in another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field
from mm.evaluation.benchmarks.base import Benchmark, by_category, mean_of, question
from mm.evaluation.files import letter_answer, parquet_rows
from mm.evaluation.records import Record
from mm.evaluation.scorers.letters import extract_letter
from mm.evaluation.statistics import Mean
from mm.types import Media, Sample

LETTERS = ["A", "B", "C", "D"]
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video{}. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
COLUMNS = (
    "video_id",
    "duration",
    "domain",
    "sub_category",
    "videoID",
    "question_id",
    "task_type",
    "question",
    "options",
    "answer",
)


class VideoMMEBenchmark(Benchmark):
    """The official prompt, without or with subtitles; questions about one video share it.

    How many frames are seen is the model's: its video tokenizer's, which the result records.

    Args:
        path: the parquet file, or a folder with it.
        videos: the folder of `VIDEOID.mp4` (or .MP4, .mkv).
        subtitles: the folder of `VIDEOID.srt`; None gives no subtitles.
        durations: which of the three lengths.
    """

    name = "video_mme"
    max_new_tokens = 16

    def __init__(
        self,
        path: Path,
        videos: Path,
        subtitles: Path | None = None,
        durations: Sequence[str] = ("short", "medium", "long"),
    ) -> None:
        self.path = path
        self.videos = videos
        self.subtitles = subtitles
        self.durations = list(durations)
        self.prompt = INSTRUCTION.format(" and the subtitles" if subtitles else "")

    def samples(self) -> list[Sample]:
        shown: dict[str, Media] = {}
        samples = []
        for where, row in parquet_rows(self.path, "test*.parquet", COLUMNS):
            if row["duration"] not in self.durations:
                continue
            name = field(row, "videoID", str, where)
            if name not in shown:
                shown[name] = self._video(name, where)
            options = [str(option) for option in row["options"] or []]
            if len(options) != len(LETTERS):
                raise ValueError(f"{where}: column 'options': expected 4 options, got {len(options)}")
            asked = [self.prompt, field(row, "question", str, where), *options, "The best answer is:"]
            meta = {
                "question": row["question"],
                "category": row["duration"],
                "answers": [letter_answer(row, "answer", LETTERS, where)],
                "choices": LETTERS,
                "row": {column: row[column] for column in COLUMNS},
            }
            text = "\n".join([*self._subtitles(name), *asked])
            samples.append(question(field(row, "question_id", str, where), text, meta, [shown[name]]))
        return samples

    def _video(self, name: str, where: str) -> Media:
        for suffix in (".mp4", ".MP4", ".mkv"):
            path = self.videos / f"{name}{suffix}"
            if path.is_file():
                return Media("video", path, path.name)
        raise ValueError(f"{where}: no video {self.videos / name}.mp4")

    def _subtitles(self, name: str) -> list[str]:
        """The official lines before the question: the subtitles' text, without numbers, times and markup."""
        if self.subtitles is None:
            return []
        file = self.subtitles / f"{name}.srt"
        if not file.is_file():
            return ["This video's subtitles are listed below:", "No subtitles available"]
        blocks = re.split(r"\n\s*\n", file.read_text(encoding="utf-8", errors="replace").strip())
        lines = [line for block in blocks for line in block.splitlines()[2:]]
        return ["This video's subtitles are listed below:", *(re.sub(r"<[^>]+>", "", line).strip() for line in lines)]

    def origin(self) -> str:
        return str(self.path)

    def score(self, sample: Sample, prediction: str) -> float:
        return float(extract_letter(prediction, LETTERS) == sample.meta["answers"][0])

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        return {"accuracy": mean_of(records), **by_category(records)}

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """The leaderboard's file: a video each, with its questions and responses."""
        rows = {sample.key: sample.meta["row"] for sample in self.samples()}
        videos: dict[str, dict[str, Any]] = {}
        for record in records:
            row = rows[record.id]
            told = {key: row[key] for key in ("video_id", "duration", "domain", "sub_category")}
            entry = {key: row[key] for key in ("question_id", "task_type", "question", "options", "answer")}
            video = videos.setdefault(row["video_id"], {**told, "questions": []})
            video["questions"].append({**entry, "response": record.prediction})
        return {"results.json": list(videos.values())}
