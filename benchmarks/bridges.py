"""Four ways for an image to reach the decoder, each trained briefly on easy-VQA and scored on its test split.

    python benchmarks/bridges.py [--steps N] [--variants mlp,resampler,cross_attention,native]

The model is the demo's with one line changed, the image tower's bridge; `native` has no encoder: patches go straight to
the bridge. Needs the shards and the tokenizer of `make demo`. Goal: colour/shape accuracy of at least 0.90 for the
three bridges (the author's CNN: 0.995; a question-only reader: 0.23).
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import mm
from mm.evaluation.benchmarks.easy_vqa import EasyVQABenchmark
from mm.evaluation.runner import evaluate

ROOT = Path(__file__).resolve().parents[1]
SHARDS = Path("runs/demo/shards")
MLP = "mm.fusion.projector.MLPProjector"
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"bridge": {"class_path": MLP, "init_args": {"norm": True}}},
    "resampler": {
        "bridge": {
            "class_path": "mm.fusion.resampler.PerceiverResampler",
            "init_args": {"queries": 16, "layers": 1, "heads": 8, "norm": True},
        }
    },
    "cross_attention": {"bridge": {"class_path": "mm.fusion.cross_attention.GatedCrossAttentionBridge"}},
    "native": {
        "encoder": {"class_path": "mm.encoders.none.NoEncoder", "init_args": {"mean": 0.95, "std": 0.25}},
        "bridge": {"class_path": MLP, "init_args": {"norm": True}},
    },
}


def stage_config(stage: str, model: Any, out: Path, shards: str, samples: int, steps: int) -> dict[str, Any]:
    """A demo stage on easy-VQA alone, without loggers, saving to `out`."""
    config = yaml.safe_load((ROOT / f"configs/demo/{stage}.yaml").read_text())
    config["model"]["init_args"]["model"] = model
    data = config["data"]["init_args"]
    data |= {"train": {"easy_vqa": {"path": str(SHARDS / shards)}}, "val": {}, "samples_per_batch": samples}
    data["epoch_samples"] = samples * steps
    trainer = config["trainer"]
    trainer.pop("max_steps", None)
    trainer |= {"max_epochs": 1, "logger": False}
    trainer["callbacks"] = [
        {"class_path": "mm.training.callbacks.Throughput"},
        {"class_path": "mm.training.callbacks.ProgressBar"},
        {"class_path": "mm.training.callbacks.SaveModelDirectory", "init_args": {"path": str(out)}},
    ]
    return config


def run(name: str, folder: Path, align_steps: int, steps: int) -> dict[str, Any]:
    network = yaml.safe_load((ROOT / "configs/demo/model.yaml").read_text())
    network["init_args"]["towers"] = {"image": copy.deepcopy(network["init_args"]["towers"]["image"]) | VARIANTS[name]}
    stages = {
        "align": stage_config("align", network, folder / "align", "easy-vqa-captions", 48, align_steps),
        "instruct": stage_config("instruct", str(folder / "align"), folder / "model", "easy-vqa-train", 32, steps),
    }
    start = time.perf_counter()
    for stage, config in stages.items():
        file = folder / f"{stage}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        subprocess.run([sys.executable, "-m", "mm.cli", "fit", "--config", str(file)], check=True)
    seconds = time.perf_counter() - start
    model = mm.load(folder / "model")
    result = evaluate(model, EasyVQABenchmark(), output=folder / "results", batch_size=512, show_progress=False)
    return {
        "bridge": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training seconds": round(seconds),
        "accuracy": result["scores"]["accuracy"],
        "colour/shape": result["scores"]["color_shape_accuracy"],
        "shuffled media": result["controls"]["shuffled_media"]["color_shape_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--align-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/bridges"))
    options = parser.parse_args()
    if not (SHARDS / "easy-vqa-train/manifest.json").is_file():
        raise SystemExit("benchmarks/bridges.py needs the shards and the tokenizer of `make demo`: run that first")
    rows = []
    for name in options.variants.split(","):
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows.append(run(name, folder, options.align_steps, options.steps))
        (folder / "row.json").write_text(json.dumps(rows[-1]))
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, {options.align_steps} + {options.steps} steps"
    )
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join(
                f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values()
            )
            + " |"
        )


if __name__ == "__main__":
    main()
