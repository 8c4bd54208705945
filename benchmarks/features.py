"""Training a bridge and a decoder behind a frozen ViT: from the media, and from features that `mm shard` stored.

    OMP_NUM_THREADS=1 python benchmarks/features.py --clock cpu --threads 1

Samples are a generated picture of 224 x 224 and a question, 8 a batch; the tower is timm's vit_tiny_patch16_224 with
random weights, frozen. A step reads its batch in this process (decoding and all, so that the loader is counted), then
goes forward, back and through AdamW. Before anything is timed, the losses of the first batches are compared: float32
features to 1e-5, float16 ones to 2e-3 (a feature is rounded by 2^-11 of itself). A row of the loader alone gives its
share of the step.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Bench, spread

from mm.checkpoint import load, save
from mm.cli import main as mm
from mm.datasets.datamodule import DataSet, StreamingDataModule
from mm.datasets.shards import write_shards
from mm.model import MultimodalModel
from mm.objectives.instruct import NextToken
from mm.parts import build
from mm.testing import picture, tiny_tokenizer
from mm.training.optim import OptimConfig, freeze_all_but
from mm.types import Sample

SAMPLES, BATCH = 48, 8
TOLERANCES = {"float32": 1e-5, "float16": 2e-3}
MEDIA, STORED = "the media", tuple(f"{dtype} features" for dtype in TOLERANCES)


def config(folder: Path) -> dict[str, Any]:
    tower = {
        "tokenizer": {"class_path": "mm.tokenizers.image.ImageTokenizer", "init_args": {"patch": 16}},
        "encoder": {"class_path": "mm.encoders.timm_vision.TimmEncoder"},  # its default: vit_tiny_patch16_224
        "bridge": {"class_path": "mm.fusion.projector.MLPProjector"},
    }
    mixer = {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 4, "kv_heads": 2}}
    ffn = {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 688}}
    layers = [{"pattern": ["m/f"], "repeat": 4}]
    decoder = {"width": 256, "mixers": {"m": mixer}, "ffns": {"f": ffn}, "layers": layers}
    return {
        "class_path": "mm.model.MultimodalModel",
        "init_args": {
            "tokenizer": str(folder / "tokenizer"),
            "towers": {"image": tower},
            "decoder": {"class_path": "mm.decoder.decoder.Decoder", "init_args": decoder},
        },
    }


def prepare(folder: Path) -> dict[str, Path]:
    """Writes the model and the shards: run -> its shards."""
    tiny_tokenizer().save(folder / "tokenizer")
    torch.manual_seed(0)
    tree = config(folder)
    model = build(tree, MultimodalModel)
    model.config = tree
    save(model, folder / "model")
    parts = [{"type": "image", "media": 0}, {"type": "text", "text": "what color is the shape?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red green blue"}]
    write_shards([Sample(str(i), chat, [picture(i, (224, 224))]) for i in range(SAMPLES)], folder / "media")
    for dtype in TOLERANCES:
        out = ["--out", str(folder / dtype), "--workers", "1", "--quiet"]
        made = ["--features", str(folder / "model"), "--feature-dtype", dtype, "--device", "cpu"]
        if mm(["shard", str(folder / "media"), *out, *made]) != 0:
            raise RuntimeError("mm shard --features failed; its message is above")
    return {MEDIA: folder / "media"} | {f"{dtype} features": folder / dtype for dtype in TOLERANCES}


class Training:
    """Steps from one set of shards; `seconds` are of (its loader, the whole) a step."""

    def __init__(self, shards: Path, model: MultimodalModel, clock: Any) -> None:
        self.model, self.clock = model, clock
        data = StreamingDataModule(
            {"pictures": DataSet(str(shards))}, samples_per_batch=BATCH, row_length=512, workers=0
        )
        data.attach(model)
        self.data, self.optimizer = data, OptimConfig(lr=1e-4).optimizer(model)
        self.batches, self.objective = iter(data.train_dataloader()), NextToken()
        self.seconds: list[tuple[float, float]] = []

    def step(self) -> tuple[list[Any], float]:
        """The keys read, and the loss."""
        start = self.clock()
        try:
            batch = next(self.batches)
        except StopIteration:
            self.batches = iter(self.data.train_dataloader())
            batch = next(self.batches)
        read = self.clock()
        loss = self.objective(self.model, batch)
        mean = loss.total / loss.count
        mean.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(((read - start) / len(batch.keys), (self.clock() - start) / len(batch.keys)))
        return list(batch.keys), float(mean.detach())


def compare(runs: dict[str, Training]) -> None:
    """The losses of two steps, which warm up too. Raises AssertionError where they differ by more than the dtype."""
    for _ in range(2):
        found = {name: run.step() for name, run in runs.items()}
        keys, loss = found[MEDIA]
        for name, tolerance in zip(STORED, TOLERANCES.values(), strict=True):
            assert found[name][0] == keys, found
            assert abs(found[name][1] - loss) <= tolerance * abs(loss), found


def main() -> int:
    bench = Bench(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        shards = prepare(Path(folder))
        model = load(Path(folder) / "model")
        freeze_all_but(model, ("towers.image.bridge", "decoder"))
        runs = {name: Training(path, copy.deepcopy(model).train(), bench.clock) for name, path in shards.items()}
        compare(runs)
        for run in runs.values():
            run.seconds.clear()
        for _ in range(bench.args.repeats):
            for run in runs.values():
                run.step()
        whole = {name: [taken for _, taken in run.seconds] for name, run in runs.items()}
        base = statistics.median(whole[MEDIA])
        for name, run in runs.items():
            taken, loader = statistics.median(whole[name]), [read for read, _ in run.seconds]
            common = {"what": "frozen ViT-Ti/16", "unit": "samples/s"}
            peer = {} if name == MEDIA else {"peer": MEDIA, "ratio": base / taken}
            bench.add(**common, run=name, rate=1 / taken, noise=spread(whole[name]), **peer)
            read = statistics.median(loader)
            share = {"limit": "the step's time", "share": read / taken}
            bench.add(**common, run=f"{name}, loader alone", rate=1 / read, noise=spread(loader), **share)
        size = {name: sum(tar.stat().st_size for tar in path.glob("*.tar")) / SAMPLES for name, path in shards.items()}
        bench.note("bytes a sample: " + ", ".join(f"{name} {held:,.0f}" for name, held in size.items()))
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
