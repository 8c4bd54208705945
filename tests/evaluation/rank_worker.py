"""Run by test_ranks.py: `python -m tests.evaluation.rank_worker RANK WORLD FILE OUT DIES_AFTER`.

One of WORLD gloo ranks that evaluate together. DIES_AFTER requests of its own the rank is killed; 0 lets it live.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from mm.evaluation.runner import evaluate

from .toys import ColorBenchmark, Seer


class Mortal(Seer):
    def __init__(self, dies_after: int) -> None:
        super().__init__()
        self.dies_after = dies_after

    def __call__(self, model, benchmark, samples, batch_size):
        if self.dies_after and len(self.asked) >= self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, benchmark, samples, batch_size)


def main() -> None:
    rank, world, dies_after = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[5])
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    seer = Mortal(dies_after)
    benchmark = ColorBenchmark(n=40, distinct=True)
    model = Path(sys.argv[4], "model")
    options = {"model_path": model, "batch_size": 1, "respond": seer, "show_progress": False}
    result = evaluate(None, benchmark, output=sys.argv[4], **options)
    asked = [sample.key for sample in seer.asked]
    text = json.dumps({"scores": result["scores"], "controls": result["controls"], "asked": asked})
    Path(sys.argv[4], f"rank{rank}.json").write_text(text)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
