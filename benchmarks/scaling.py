"""How a training step's time and memory grow: with length, experts, images a sample, and the vocabulary.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--axes length,experts,images,vocabulary] [--out docs]

Each point is a process of its own: forward and backward of a small model on random data, the processor time of one
thread (the least of some repeats) and how far the resident memory rose above what it was before the step. The exponent
is the slope of a line through the logarithms of the last three points, beside what theory says of large values.
Writes scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

AXES: dict[str, tuple[list[int], str, str]] = {
    "length": ([1024, 2048, 4096, 8192, 16384], "2 (attention; 1 before it weighs)", "1 (activations)"),
    "documents": ([1024, 2048, 4096, 8192, 16384], "1 (documents of 512 attend alone)", "1"),
    "experts": ([8, 16, 32, 64, 128, 256], "0 (chosen ones; slices grow shorter)", "1 (weights' gradients)"),
    "images": ([1, 2, 4, 8, 16], "1", "1"),
    "vocabulary": ([4096, 16384, 65536, 262144], "1 (logits)", "1 (weights' gradient; logits in chunks)"),
}  # fmt: skip
WIDTH, LAYERS, LENGTH = 128, 2, 1024


def step(axis: str, value: int) -> tuple[float, float]:
    """(seconds, bytes) of one step, in this process."""
    import resource
    import time
    from functools import partial

    import torch

    from mm.datasets.packing import collate
    from mm.datasets.processor import Processor
    from mm.decoder.attention.grouped import GroupedAttention
    from mm.decoder.decoder import Decoder, LayerGroup
    from mm.decoder.ffn.dense import GatedFFN
    from mm.decoder.ffn.moe import SparseMoE
    from mm.encoders.none import NoEncoder
    from mm.fusion.projector import LinearProjector
    from mm.model import MultimodalModel, TowerConfig
    from mm.objectives.instruct import NextToken
    from mm.testing import picture, tiny_tokenizer
    from mm.tokenizers.image import ImageTokenizer
    from mm.types import Batch, Sample

    torch.manual_seed(0)
    torch.set_num_threads(1)
    experts = value if axis == "experts" else 0
    ffn: Any = partial(SparseMoE, hidden=64, num_experts=experts) if experts else partial(GatedFFN, hidden=4 * WIDTH)
    tokenizer = tiny_tokenizer()
    words = value if axis == "vocabulary" else tokenizer.vocab_size
    mixer = partial(GroupedAttention, heads=4, kv_heads=4)
    decoder = Decoder(WIDTH, {"m": mixer}, {"f": ffn}, [LayerGroup(["m/f"], LAYERS)], words)
    towers = {"image": TowerConfig(ImageTokenizer(patch=14, size=(224, 224)), LinearProjector, NoEncoder)}
    model = MultimodalModel(tokenizer, decoder, towers if axis == "images" else {})
    length = value if axis in ("length", "documents") else LENGTH
    if axis == "images":
        processor = Processor(model.tokenizer, model.template, model.media_specs(), None)
        media = [picture(number, (224, 224)) for number in range(value)]
        parts = [{"type": "image", "media": number} for number in range(value)]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a red circle " * 20}]
        batch = collate([[processor.encode(Sample("a", messages, media))]])
    else:
        ids = torch.randint(words, (1, length))
        share = 512 if axis == "documents" else length
        batch = Batch(ids, ids.clone(), torch.arange(length)[None] // share + 1, torch.zeros_like(ids))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.process_time()
        NextToken()(model, batch).total.backward()
        seconds.append(time.process_time() - start)
        for parameter in model.parameters():
            parameter.grad = None
    return min(seconds), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def exponent(values: list[int], found: list[float]) -> float:
    """The slope through the logarithms of the last three points."""
    points = [(math.log(x), math.log(max(y, 1e-9))) for x, y in zip(values, found, strict=True)][-3:]
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def plot(found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, len(found), figsize=(3 * len(found), 5.4), squeeze=False, layout="constrained")
    for column, (axis, points) in enumerate(found.items()):
        for row, (what, unit, scale) in enumerate((("seconds", "seconds a step", 1), ("bytes", "MB above rest", 1e-6))):
            axes = rows[row][column]
            axes.loglog(points["values"], [scale * value for value in points[what]], "o-", color="#2563a8", base=10)
            axes.set_title(f"{axis}: {points['exponents'][what]:.2f}", fontsize=10)
            axes.set_xlabel(axis)
            axes.set_ylabel(unit if column == 0 else "")
            axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--point", nargs=2, metavar=("AXIS", "VALUE"), help="measure one, in this process")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(step(args.point[0], int(args.point[1]))))
        return
    found: dict[str, Any] = {}
    print("| axis | values | seconds | exponent | theory | MB above rest | exponent | theory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for axis in args.axes.split(","):
        values, time_theory, memory_theory = AXES[axis]
        seconds, sizes = [], []
        for value in values:
            command = [sys.executable, __file__, "--point", axis, str(value)]
            one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            seconds.append(one[0])
            sizes.append(one[1])
        exponents = {"seconds": exponent(values, seconds), "bytes": exponent(values, sizes)}
        found[axis] = {"values": values, "seconds": seconds, "bytes": sizes, "exponents": exponents}
        print(
            f"| {axis} | {', '.join(f'{value:,}' for value in values)} | {', '.join(f'{x:.3g}' for x in seconds)} "
            f"| {exponents['seconds']:.2f} | {time_theory} | {', '.join(f'{x / 1e6:.0f}' for x in sizes)} "
            f"| {exponents['bytes']:.2f} | {memory_theory} |",
            flush=True,
        )
    args.out.mkdir(exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.out / "scaling.png")


if __name__ == "__main__":
    main()
