"""How full packed rows are on a mixed stream of pictures, sounds and text, and what packing costs.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --clock cpu

Real tokenizers on generated media of mixed sizes; positions are the decoder's, after the bridge. The share is of a
batch's positions that hold a token, all rows padded to the batch's longest. A note says the share if every row were
padded to its full length, and what packing and collating cost beside a training step of a small model on the batch.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
from functools import partial

import numpy as np
import soundfile
import torch
from common import Bench, spread

from mm.datasets.packing import collate, pack
from mm.datasets.processor import Encoded, Processor
from mm.encoders.none import NoEncoder
from mm.fusion.projector import LinearProjector, MLPProjector
from mm.model import MultimodalModel, TowerConfig
from mm.objectives.instruct import NextToken
from mm.testing import picture, tiny_decoder, tiny_tokenizer
from mm.tokenizers.audio import AudioTokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.types import Media, Sample

WORDS = "what color is the shape red green or blue how many beeps two".split()


def sample(number: int, generator: random.Random) -> Sample:
    """40 % pictures (to 256 tokens), 20 % sounds (to 3 s), 40 % text; answers of 5 to 150 words."""
    kind, media = generator.choices(("image", "audio", "text"), (4, 2, 4))[0], []
    if kind == "image":
        media = [picture(number, (generator.randrange(56, 400), generator.randrange(56, 400)))]
    elif kind == "audio":
        file = io.BytesIO()
        soundfile.write(file, np.zeros(generator.randrange(8_000, 48_000)), 16_000, format="WAV")
        media = [Media("audio", file.getvalue(), "a.wav")]
    parts = [{"type": item.kind, "media": 0} for item in media] + [{"type": "text", "text": "what color is the shape?"}]
    words = min(150, 5 + int(generator.lognormvariate(2.7, 0.9)))
    answer = " ".join(generator.choice(WORDS) for _ in range(words))
    return Sample(str(number), [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}], media)


def model(width: int, layers: int) -> MultimodalModel:
    tokenizer = tiny_tokenizer()
    towers = {
        "image": TowerConfig(ImageTokenizer(patch=14), LinearProjector, NoEncoder),
        "audio": TowerConfig(AudioTokenizer(mels=40), partial(MLPProjector, shuffle=(4, 1, 1)), NoEncoder),
    }
    return MultimodalModel(tokenizer, tiny_decoder(width, layers, tokenizer.vocab_size), towers)


def main() -> int:
    bench = Bench(__doc__, _arguments)
    args = bench.args
    torch.manual_seed(0)
    network, generator = model(args.width, args.layers), random.Random(0)
    processor = Processor(network.tokenizer, network.template, network.media_specs(), args.row_length)
    stock = [processor.encode(sample(i, generator)) for i in range(4 * max(args.samples_per_batch))]
    for size in args.samples_per_batch:
        used = padded = fixed = 0
        packing: list[float] = []
        stepping: list[float] = []
        for number in range(args.batches):
            chosen: list[Encoded] = generator.sample(stock, size)
            start = bench.clock()
            rows = pack(chosen, args.row_length)
            batch = collate(rows)
            packing.append(bench.clock() - start)
            lengths = [sum(item.length for item in row) for row in rows]
            used, padded = used + sum(lengths), padded + max(lengths) * len(rows)
            fixed += args.row_length * len(rows)
            if number < args.steps:
                start = bench.clock()
                NextToken()(network, batch).total.backward()
                stepping.append(bench.clock() - start)
        spent, step = statistics.median(packing), statistics.median(stepping)
        judged = {"floor": 0.95, "goal": 0.99} if size == max(args.samples_per_batch) else {}
        bench.add(
            what=f"{size} samples a batch: not padding", run="mm", rate=used / spent / args.batches, unit="tokens/s",
            noise=spread(packing), limit="a batch", share=used / padded, judged="share", **judged,
        )  # fmt: skip
        bench.note(f"{size} samples: {used / fixed:.3f} if rows were padded to {args.row_length}; packing takes "
                   f"{1e3 * spent:.1f} ms, {spent / step:.2%} of a step of {1e3 * step:.0f} ms")  # fmt: skip
    return bench.end()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--samples-per-batch", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="batches of each size that are trained on, for the cost")


if __name__ == "__main__":
    sys.exit(main())
