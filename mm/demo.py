"""`make demo`: the whole way, from raw files to a chat answer and a report, as a chain of `mm` commands.

Every stage is a command that a user can type; this file runs them in order, times them, and sums up what they left in
`runs/demo`. Images are real (easy-VQA, OpenMoji); sounds and videos are generated, and said to be.
"""

from __future__ import annotations

import csv
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mm
from mm.checkpoint import write_atomically
from mm.datasets.source import Source
from mm.datasets.sources.easy_vqa import EasyVQA
from mm.datasets.sources.world_audio import AudioWorld
from mm.datasets.sources.world_video import VideoWorld
from mm.types import Media

RUN = Path("runs/demo")
MM = [sys.executable, "-m", "mm.cli"]
SHARDS = {
    "openmoji-train": ["openmoji", "--split", "train"],
    "openmoji-test": ["openmoji", "--split", "test"],
    "easy-vqa-captions": ["easy_vqa", "--split", "train", "--set", "captions=true"],
    "easy-vqa-train": ["easy_vqa", "--split", "train"],
    "world-audio-captions": [
        "world_audio",
        "--split",
        "train",
        "--seed",
        "1",
        "--set",
        "n=3000",
        "--set",
        "captions=true",
    ],
    "world-video-captions": [
        "world_video",
        "--split",
        "train",
        "--seed",
        "1",
        "--set",
        "n=1500",
        "--set",
        "captions=true",
    ],
    "world-audio-train": ["world_audio", "--split", "train", "--set", "n=3000"],
    "world-video-train": ["world_video", "--split", "train", "--set", "n=2500"],
}
# What the chat is asked: one held-out item of each kind, and a question with an exact answer.
CHAT: dict[str, tuple[Source[Any], str]] = {
    "image": (EasyVQA("test"), "what color is the shape?"),
    "audio": (AudioWorld(1, "test"), "how many beeps are there?"),
    "video": (VideoWorld(1, "test"), "which way does the shape move?"),
}


@dataclass
class Demo:
    """Runs commands, keeps their times, and stops at the first that fails."""

    console: Console
    fit_options: list[str]
    stages: list[dict[str, Any]] = field(default_factory=list)

    def run(self, title: str, *command: str) -> None:
        """One command, its output shown."""
        self.announce(title, command)
        start = time.perf_counter()
        done = subprocess.run([*MM, *command])
        self.note(title, command, done.returncode, time.perf_counter() - start)

    def run_pairs(self, titled: dict[str, list[str]]) -> list[str]:
        """Commands of one process each, two at a time, as loading torch takes longer than most; what they printed."""

        def work(title: str) -> str:
            start = time.perf_counter()
            done = subprocess.run([*MM, *titled[title]], text=True, capture_output=True)
            self.announce(title, titled[title])
            for text in filter(None, (done.stderr.strip(), done.stdout.strip())):
                self.console.print(text, highlight=False, markup=False)
            self.note(title, titled[title], done.returncode, time.perf_counter() - start)
            return done.stdout.strip()

        with ThreadPoolExecutor(2) as pool:
            return [finished.result() for finished in [pool.submit(work, title) for title in titled]]

    def announce(self, title: str, command: Sequence[str]) -> None:
        self.console.rule(f"[bold]{title}", align="left")
        self.console.print(f"$ {shlex.join(['mm', *command])}", style="dim", highlight=False, soft_wrap=True)

    def note(self, title: str, command: Sequence[str], status: int, seconds: float) -> None:
        line = shlex.join(["mm", *command])
        if status:
            raise SystemExit(f"demo: `{line}` failed with exit status {status}")
        self.stages.append({"name": title, "command": line, "seconds": round(seconds, 1)})


def main(argv: Sequence[str] | None = None) -> int:
    """`argv` goes to both `mm fit` stages: `python -m mm.demo --trainer.accelerator gpu --trainer.precision ...`."""
    demo = Demo(Console(), list(sys.argv[1:] if argv is None else argv))
    start = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    commands = {}
    for name, source in SHARDS.items():
        out = ["--out", str(RUN / "shards" / name), "--workers", "1", "--quiet"]
        commands[f"Shards: {name}"] = ["shard", *source, *out]
    demo.run_pairs(commands)
    trained_on = [str(RUN / "shards" / name) for name in SHARDS if not name.endswith("test")]
    demo.run("Text tokenizer", "tokenizer", *trained_on, "--out", str(RUN / "tokenizer"), "--vocab-size", "1500")
    for title, config in (("Alignment", "align"), ("Instruction tuning", "instruct")):
        fit = ("fit", "--config", f"configs/demo/{config}.yaml", *demo.fit_options)
        demo.run(title, *fit)
    demo.run("Evaluation with controls", "validate", "--config", "configs/demo/evaluate.yaml")
    answers = chat(demo)
    summary = summarise(demo, answers)
    summary["seconds.total"] = round(time.perf_counter() - start + summary["seconds.install"], 1)
    write_atomically(RUN / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    demo.run("Report", "report", str(RUN))
    show(demo.console, summary)
    return 0


def chat(demo: Demo) -> list[dict[str, str]]:
    """One one-shot chat about each kind of media; the files are kept under `runs/demo/media` for the user to try."""
    asked: list[tuple[str, str]] = []
    commands = {}
    (RUN / "media").mkdir(parents=True, exist_ok=True)
    for kind, (source, question) in CHAT.items():
        sample = next(iter(source))
        media: Media = sample.media[0]
        file = RUN / "media" / f"{kind}{Path(media.name).suffix}"
        assert isinstance(media.data, bytes)
        file.write_bytes(media.data)
        asked.append((str(file), question))
        commands[f"Chat: {kind}"] = ["chat", str(RUN / "model"), f"--{kind}", str(file), question]
    answers = demo.run_pairs(commands)
    return [
        {"file": file, "question": question, "answer": answer}
        for (file, question), answer in zip(asked, answers, strict=True)
    ]


def summarise(demo: Demo, answers: list[dict[str, str]]) -> dict[str, Any]:
    """summary.json: fractions by dotted key, then what ran and what was said."""
    vqa, audio, video = (_result(name) for name in ("easy_vqa", "world_audio", "world_video"))
    recall = _last_row(RUN / "align/metrics.csv", "val/recall_at_10")
    controls = vqa["controls"]
    return {
        "easy_vqa.accuracy": vqa["scores"]["accuracy"],
        "easy_vqa.color_shape_accuracy": vqa["scores"]["color_shape_accuracy"],
        "easy_vqa.question_only": controls["question_only"]["color_shape_accuracy"],
        "easy_vqa.shuffled_media": controls["shuffled_media"]["color_shape_accuracy"],
        "audio.accuracy": audio["scores"]["accuracy"],
        "audio.shuffled_media": audio["controls"]["shuffled_media"]["accuracy"],
        "video.accuracy": video["scores"]["accuracy"],
        "video.shuffled_media": video["controls"]["shuffled_media"]["accuracy"],
        "alignment.recall_at_10": float(recall["val/recall_at_10"]),
        "alignment.chance_at_10": float(recall["val/chance_at_10"]),
        "routing.max_over_mean_load": max_over_mean_load(RUN / "instruct/routing.jsonl"),
        "seconds.install": _install_seconds(),
        "stages": demo.stages,
        "chat": answers,
        "versions": {"mm": mm.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }


def max_over_mean_load(routing: Path) -> float:
    """The worst layer's load imbalance over the last line of a routing.jsonl: all modalities together."""
    layers = json.loads(routing.read_text().splitlines()[-1])["layers"]
    loads = [[sum(counts) for counts in zip(*layer["counts"].values(), strict=True)] for layer in layers]
    return max(max(load) * len(load) / sum(load) for load in loads)


def show(console: Console, summary: dict[str, Any]) -> None:
    table = Table("what", "value", title="make demo")
    for key, value in summary.items():
        if isinstance(value, float):
            table.add_row(key, f"{value:.1f} s" if key.startswith("seconds") else f"{value:.3f}")
    for said in summary["chat"]:
        table.add_row(f"{said['question']}  ({said['file']})", said["answer"])
    console.print(table)
    console.print(
        f"report: {RUN / 'report.html'}    chat: mm chat {RUN / 'model'} --image {RUN / 'media/image.png'} ..."
    )


def _result(name: str) -> dict[str, Any]:
    return json.loads((RUN / f"results/{name}.json").read_text())


def _last_row(metrics: Path, key: str) -> dict[str, str]:
    with open(metrics, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(key)]
    if not rows:
        raise SystemExit(f"demo: {metrics} has no {key}: the stage was ended before it was validated")
    return rows[-1]


def _install_seconds() -> float:
    """What the Makefile noted: 0.0 where everything was installed already, or without make."""
    note = Path(sys.prefix, ".install-seconds")
    return float(note.read_text()) if note.is_file() else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
