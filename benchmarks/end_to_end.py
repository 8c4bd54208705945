"""Training from shards to weights: samples and tokens a second, the share of the machine's products, and of waiting.

    OMP_NUM_THREADS=1 python benchmarks/end_to_end.py [--clock cpu --threads 1]

A run under Lightning as the demo's: shards of pictures, sounds and text (generated, of mixed sizes), a transformer over
patches, a CNN over frames, a sparse decoder of 4 layers, AdamW; batches are made by one worker process meanwhile. The
peer is the same trainer on the same samples as most scripts are: one sample a row, rows padded to the batch's longest,
loaded in the training process. The share of products counts the FLOPs of tokens that are no padding (`mm info`: three
times the forward pass, of a media token its tower's too) against a product of 1024^3 in the same run. Rates are by
`--clock`; with `cpu` the worker's time is its own core's and not counted. The share of waiting is of wall-clock time.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import Bench, spread
from packing import sample

from mm.datasets.datamodule import DataSet, StreamingDataModule
from mm.datasets.shards import write_shards
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.encoders.audio_cnn import AudioCNNEncoder
from mm.encoders.transformer import TransformerEncoder
from mm.fusion.projector import MLPProjector
from mm.info.counting import describe
from mm.model import MultimodalModel, TowerConfig
from mm.testing import tiny_tokenizer
from mm.tokenizers.audio import AudioTokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.training.module import InstructionModule

WARMUP = 3  # steps that are not measured


def model() -> MultimodalModel:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    ffns = {"dense": partial(GatedFFN, hidden=688), "moe": partial(SparseMoE, hidden=344, num_experts=8)}
    groups = [LayerGroup(["m/dense"]), LayerGroup(["m/moe"], 3)]
    decoder = Decoder(256, {"m": partial(GroupedAttention, heads=4, kv_heads=2)}, ffns, groups, tokenizer.vocab_size)
    image, audio = (
        partial(TransformerEncoder, width=192, layers=3, heads=3),
        partial(AudioCNNEncoder, width=192, stride=4, layers=2, heads=3),
    )
    towers = {
        "image": TowerConfig(ImageTokenizer(patch=16, max_tokens=256), MLPProjector, image),
        "audio": TowerConfig(AudioTokenizer(), MLPProjector, audio),
    }
    return MultimodalModel(tokenizer, decoder, towers)


class Meter(pl.Callback):
    """Of every step after WARMUP: seconds by the clock and by the wall, seconds waited for its batch, samples, tokens,
    positions, and tokens of each medium before its tower."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.steps = clock, []
        self.ended = (0.0, 0.0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.waited = time.perf_counter() - self.ended[1]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, step = (self.clock(), time.perf_counter()), pl_module.last_step
        if batch_idx >= WARMUP:
            media = {kind: int(given.tokens.mask.sum()) for kind, given in batch.media.items()}
            taken = (now[0] - self.ended[0], now[1] - self.ended[1])
            self.steps.append((*taken, self.waited, step.samples, step.tokens, step.positions, media))
        self.ended = now


def train(shards: Path, packed: bool, workers: int, steps: int, clock: Any) -> list[Any]:
    data = StreamingDataModule(
        {"mixed": DataSet(str(shards))}, samples_per_batch=16, row_length=512, pack=packed, workers=workers, seed=1
    )
    meter = Meter(clock)
    trainer = pl.Trainer(
        max_steps=WARMUP + steps, accelerator="cpu", logger=False, callbacks=[meter], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(InstructionModule(model()), data)
    return meter.steps


def flops(steps: list[Any]) -> float:
    """Of all tokens that are no padding, a token looking back on 128 others."""
    info = describe(model(), 128)
    parts = {part.name.removesuffix(" tower"): 3 * part.flops for part in info.parts if part.name.endswith(" tower")}
    return sum(step[4] * info.flops_training + sum(parts[kind] * n for kind, n in step[6].items()) for step in steps)


def main() -> int:
    bench = Bench(__doc__, _arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    steps, generator, a = bench.args.steps, random.Random(0), torch.randn(1024, 1024)
    with tempfile.TemporaryDirectory() as name:
        write_shards((sample(i, generator) for i in range(16 * (WARMUP + steps))), Path(name) / "shards")
        runs: dict[str, list[Any]] = {"padded rows, no worker": [], "mm": []}
        products: list[float] = []
        for _ in range(2):  # in turn
            for run, found in runs.items():
                found += train(Path(name) / "shards", run == "mm", int(run == "mm"), steps, bench.clock)
                products.append(bench.times({"product": lambda: a @ a})["product"][0])
    peak = 2 * 1024**3 / statistics.median(products)
    by = {run: [step[0] / step[4] for step in found] for run, found in runs.items()}  # seconds a token
    for run, found in runs.items():
        seconds, walls, waits, samples, tokens, positions = (
            sum(column) for column in list(zip(*found, strict=True))[:6]
        )
        common = {"run": run, "noise": spread(by[run])}
        judged: dict[str, Any] = {"judged": "share"} if run == "mm" else {}
        ratio = sum(by["padded rows, no worker"]) / len(by["padded rows, no worker"]) / (sum(by[run]) / len(by[run]))
        against = {"peer": "padded rows", "ratio": ratio, "judged": "ratio"} if run == "mm" else {}
        bench.add(what="samples", rate=samples / seconds, unit="samples/s", **common)
        bench.add(what="tokens", rate=tokens / seconds, unit="tokens/s", **common, **against)
        rate = flops(found) / seconds
        bench.add(what="FLOPs of tokens (MFU)", rate=rate / 1e9, unit="GFLOP/s", **common, limit="a product",
                  share=rate / peak, **judged)  # fmt: skip
        bench.add(what="positions that are no padding", rate=positions / seconds, unit="positions/s", **common,
                  limit="all", share=tokens / positions, **judged)  # fmt: skip
        bench.note(f"{run}: {waits / walls:.1%} of {walls:.0f} s waited for batches")
    return bench.end()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="measured, twice (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
