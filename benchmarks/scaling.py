"""How a training step's time and memory grow: with length, experts, images a sample, and the vocabulary.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--axes length,experts] [--page]

Each point is a process of its own: forward and backward of a small model on random data, in float32 on one thread. Time
is the processor's, the least of some repeats; memory is how far the resident set rose above what it was before the
step, gradients included. Points are kept in docs/scaling.json as they come, and a run goes on where another stopped
(--again measures anew). Beside each stands what the operations counted by `mm info` and its estimate of the memory come
to, so that the slope of what was measured stands beside the slope of theory over the same values.

--page writes docs/scaling.md and its figures from docs/scaling.json, measuring nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
WIDTH, HEADS, LAYERS, LENGTH, DOCUMENT, EXPERT, CHOSEN = 128, 2, 2, 1024, 512, 64, 2
SIDE, PATCH, VOCABULARY = 224, 14, 512
ENOUGH = 12.0  # seconds of steps after which a point is not repeated
# Student's t, 97.5 %, by degrees of freedom
T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
LENGTHS = [1024, 2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768]


@dataclass(frozen=True)
class Axis:
    """`values` are measured; the line is fitted from `fit` on; `time` and `memory` are theory's exponents for large
    values."""

    values: list[int]
    fit: int
    time: float
    memory: float
    unit: str


AXES = {
    "length": Axis(LENGTHS, 8192, 2, 1, "tokens of one document"),
    "documents": Axis(LENGTHS, 4096, 1, 1, f"tokens in documents of {DOCUMENT}"),
    "experts": Axis([8, 16, 32, 64, 128, 256], 8, 0, 1, "experts a layer"),
    "images": Axis([1, 2, 4, 6, 8, 12, 16], 2, 2, 1, "images a sample"),
    "vocabulary": Axis([4096, 8192, 16384, 32768, 65536, 131072, 262144], 16384, 1, 1, "tokens in the vocabulary"),
}


def built(axis: str, value: int) -> tuple[Any, Any]:
    """The model of one point, and its batch."""
    from functools import partial

    import torch

    from mm.datasets.packing import collate
    from mm.datasets.processor import Processor
    from mm.decoder.attention.grouped import GroupedAttention
    from mm.decoder.decoder import Decoder, LayerGroup
    from mm.decoder.ffn.dense import GatedFFN
    from mm.decoder.ffn.moe import SparseMoE
    from mm.encoders.transformer import TransformerEncoder
    from mm.fusion.projector import LinearProjector
    from mm.model import MultimodalModel, TowerConfig
    from mm.testing import picture, tiny_tokenizer
    from mm.tokenizers.image import ImageTokenizer
    from mm.types import Batch, Sample

    torch.manual_seed(0)
    sparse = partial(SparseMoE, hidden=EXPERT, num_experts=value, experts_per_token=CHOSEN)
    ffn: Any = sparse if axis == "experts" else partial(GatedFFN, hidden=4 * WIDTH)
    words = value if axis == "vocabulary" else VOCABULARY
    mixer = partial(GroupedAttention, heads=HEADS, kv_heads=HEADS)
    decoder = Decoder(WIDTH, {"m": mixer}, {"f": ffn}, [LayerGroup(["m/f"], LAYERS)], words)
    encoder = partial(TransformerEncoder, width=WIDTH, layers=LAYERS, heads=HEADS)
    image = TowerConfig(ImageTokenizer(patch=PATCH, size=(SIDE, SIDE)), LinearProjector, encoder)
    model = MultimodalModel(tiny_tokenizer(), decoder, {"image": image} if axis == "images" else {})
    if axis == "images":
        processor = Processor(model.tokenizer, model.template, model.media_specs(), None)
        media = [picture(number, (SIDE, SIDE)) for number in range(value)]
        parts = [{"type": "image", "media": number} for number in range(value)]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a red circle " * 20}]
        return model, collate([[processor.encode(Sample("a", messages, media))]])
    length = value if axis in ("length", "documents") else LENGTH
    ids = torch.randint(words, (1, length))
    share = DOCUMENT if axis == "documents" else length
    return model, Batch(ids, ids.clone(), torch.arange(length)[None] // share + 1, torch.zeros_like(ids))


def theory(model: Any, axis: str, value: int) -> tuple[float, float]:
    """(FLOPs, bytes) of a step, as `mm info` counts them: gradients and activations, but no logits, which the loss
    makes in pieces; the encoder's attention beside its matrices."""
    from mm.info.counting import describe

    cells = (SIDE // PATCH) ** 2
    length = {"length": value, "documents": value, "images": value * cells}.get(axis, LENGTH)
    info = describe(model, DOCUMENT if axis == "documents" else length, precision="32-true")
    flops = length * (info.flops_training - 1.5 * info.flops_attention)  # a causal row sees half of it
    activations = length / info.context * info.memory.activations
    if axis == "images":
        tower = next(part for part in info.parts if part.name == "image tower")
        flops += 3 * length * (tower.flops + 4 * LAYERS * WIDTH * cells)
        kept = 2 * (1 + 1) + (3 + 1) + (1 + 1) + (1 + 4) + (4 + 1)  # norms; qkv; out; up; down: widths in and out
        activations += length * 4 * LAYERS * kept * WIDTH
    return flops, info.memory.gradients + activations


def measure(axis: str, value: int) -> dict[str, Any]:
    """One point, in this process."""
    import torch

    from mm.objectives.instruct import NextToken

    torch.set_num_threads(1)
    model, batch = built(axis, value)
    flops, expected = theory(model, axis, value)
    objective, seconds, rose = NextToken(), [], 0
    while len(seconds) < 7 and sum(seconds) < ENOUGH:
        if not seconds:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            rose = -_status("VmRSS")
        start = time.process_time()
        objective(model, batch).total.backward()
        seconds.append(time.process_time() - start)
        if rose < 0:
            rose += _status("VmHWM")
        for parameter in model.parameters():
            parameter.grad = None
    # The first step is slower by what is set up once, which a long one does not notice.
    return {"seconds": seconds[1:] or seconds, "bytes": rose, "flops": flops, "expected_bytes": expected}


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


@dataclass(frozen=True)
class Fit:
    """y = c * x^slope: the slope, and half of its 95 % confidence interval."""

    slope: float
    half: float

    def __str__(self) -> str:
        return f"{self.slope:.2f} ± {self.half:.2f}"


def fit(values: list[float], found: list[float]) -> Fit:
    """The line through the logarithms (least squares). Raises ValueError for fewer than three points."""
    if len(values) < 3:
        raise ValueError(f"a slope with an interval needs three points or more, not {len(values)}")
    x, y = [math.log(value) for value in values], [math.log(value) for value in found]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    wide = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / wide
    off = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    free = len(x) - 2
    return Fit(slope, T[min(free, max(T))] * math.sqrt(off / free / wide))


def points_of(kept: dict[str, Any], axis: str) -> dict[int, dict[str, Any]]:
    """value -> its point, in order."""
    points = kept["points"].get(axis, {})
    return {value: points[str(value)] for value in AXES[axis].values if str(value) in points}


def about() -> dict[str, Any]:
    import torch

    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":")
    return {"cpu": model.partition(":")[2].strip(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help="(default: %(default)s)")
    parser.add_argument("--file", type=Path, default=DOCS / "scaling.json", help="where points are kept")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    parser.add_argument("--point", nargs=2, metavar=("AXIS", "VALUE"), help="measure one, in this process")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(args.point[0], int(args.point[1]))))
        return
    kept = json.loads(args.file.read_text()) if args.file.exists() else {"points": {}}
    if args.page:
        from scaling_page import write

        write(kept, args.file.parent)
        return
    axes = args.axes.split(",")
    if unknown := set(axes) - AXES.keys():
        parser.error(f"no axis {min(unknown)}; there are {', '.join(AXES)}")
    for axis in axes:
        for value in AXES[axis].values:
            points = kept["points"].setdefault(axis, {})
            if str(value) in points and not args.again:
                continue
            command = [sys.executable, __file__, "--point", axis, str(value)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            points[str(value)] = one = json.loads(said)
            kept["about"] = about()
            part = args.file.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1) + "\n")
            part.replace(args.file)
            seconds = min(one["seconds"])
            rate = f"{one['flops'] / seconds / 1e9:.0f} GFLOP/s"
            print(f"{axis} {value:,}: {seconds:.3g} s, {one['bytes'] / 1e6:,.0f} MB, {rate}", flush=True)


if __name__ == "__main__":
    main()
