"""The demo on one GPU: the same commands as `make demo`, with Lightning's two options for a GPU added.

    python benchmarks/gpu/demo.py

Prints the demo's table, and the training throughput of both stages beside the device's name.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import torch

from mm import demo


def throughput(metrics: Path) -> float:
    """Median tokens a second over the second half of a stage."""
    with open(metrics, newline="") as file:
        rates = [float(row[key]) for row in csv.DictReader(file) if row.get(key := "throughput/tokens_per_second")]
    return statistics.median(rates[len(rates) // 2 :])


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu/demo.py needs a CUDA GPU; torch sees none")
    demo.main(["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"])
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for stage in ("align", "instruct"):
        print(f"{stage}: {throughput(demo.RUN / stage / 'metrics.csv'):,.0f} tokens/s")


if __name__ == "__main__":
    main()
