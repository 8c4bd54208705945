"""`make demo`: the whole way, from raw files to a chat answer and a report, as a chain of `mm` commands.

Every stage is a command that a user can type; this file runs them in order, times them, and sums up what they left in
`runs/demo`. Images are real (easy-VQA, OpenMoji); sounds and videos are generated, and said to be.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mm.checkpoint import write_atomically
from mm.datasets.catalog import open_source
from mm.datasets.sources.world_audio import AudioWorld
from mm.datasets.sources.world_video import VideoWorld
from mm.datasets.source import Source
from mm.tokenizers.text import TextTokenizer
from mm.types import Sample

RUN = Path("runs/demo")
VOCABULARY = 1500
SHARDS = {
    "easy-vqa-train": ["easy_vqa", "--split", "train"],
    "easy-vqa-captions": ["easy_vqa", "--split", "train", "--set", "captions=true"],
    "openmoji-train": ["openmoji", "--split", "train"],
    "openmoji-test": ["openmoji", "--split", "test"],
    "world-audio-train": ["world_audio", "--split", "train", "--set", "n=3000"],
    "world-video-train": ["world_video", "--split", "train", "--set", "n=2500"],
}
BENCHMARKS = ("easy_vqa", "world_audio", "world_video")


@dataclass
class Demo:
    """Runs commands, keeps their times, and stops at the first that fails."""

    console: Console
    options: list[str]
    stages: list[dict[str, Any]] = field(default_factory=list)

    def run(self, title: str, *command: str, capture: bool = False) -> str:
        words = ["mm", *command]
        self.console.rule(f"[bold]{title}", align="left")
        self.console.print(f"[dim]$ {shlex.join(words)}")
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mm.cli", *command], text=True, stdout=subprocess.PIPE if capture else None)
        if done.returncode:
            raise SystemExit(f"demo: `{shlex.join(words)}` failed with exit status {done.returncode}")
        self.stages.append({"name": title, "command": shlex.join(words), "seconds": round(time.perf_counter() - start, 1)})
        return (done.stdout or "").strip()

    def step(self, title: str, work: Any) -> None:
        """A stage that is a function, not a command."""
        self.console.rule(f"[bold]{title}", align="left")
        start = time.perf_counter()
        work()
        self.stages.append({"name": title, "command": "", "seconds": round(time.perf_counter() - start, 1)})


def train_tokenizer() -> None:
    """Byte-level BPE from the text of the training shards."""
    def texts() -> Any:
        for arguments in SHARDS.values():
            if "test" in arguments:
                continue
            yield from (text for sample in _light(arguments) for text in _texts(sample))

    TextTokenizer.train(texts(), VOCABULARY).save(RUN / "tokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="Shards, two training stages, scores with controls, a chat, a report.")
    parser.add_argument("options", nargs="*", help="passed to both `mm fit` stages, for example --trainer.accelerator gpu")
    arguments, more = parser.parse_known_args(argv)
    demo = Demo(Console(), [*arguments.options, *more])
    start = time.perf_counter()
    for name, source in SHARDS.items():
        demo.run(f"Shards: {name}", "shard", *source, "--out", str(RUN / "shards" / name), "--overwrite")
    demo.step("Text tokenizer", train_tokenizer)
    demo.run("Alignment", "fit", "--config", "configs/demo/align.yaml", *demo.options)
    demo.run("Instruction tuning", "fit", "--config", "configs/demo/instruct.yaml", *demo.options)
    demo.run("Evaluation with controls", "validate", "--config", "configs/demo/evaluate.yaml")
    answers = chat(demo)
    summary = summarise(demo, answers, time.perf_counter() - start)
    write_atomically(RUN / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    demo.run("Report", "report", str(RUN))
    show(demo.console, summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
