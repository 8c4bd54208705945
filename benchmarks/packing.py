"""How full packed rows are on a mixed stream of pictures, sounds and text, and what packing costs.

    OMP_NUM_THREADS=1 python benchmarks/packing.py

Real tokenizers on generated media of mixed sizes; positions are the decoder's, after the bridge. "non-padding" is the
share of a batch's positions that hold a token, all rows padded to the batch's longest. "fixed" is that share if every
row were padded to its full length. "cost" is the processor time of packing and collating against that of a training
step, forward and backward, of a small model on the same batch: what a larger model makes smaller.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from functools import partial

import numpy as np
import soundfile
import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--samples-per-batch", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="batches of each size that are trained on, for the cost")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, generator = model(arguments.width, arguments.layers), random.Random(0)
    processor = Processor(network.tokenizer, network.template, network.media_specs(), arguments.row_length)
    print("| samples a batch | rows | non-padding | fixed | packing, ms | step, ms | cost |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    stock = [processor.encode(sample(i, generator)) for i in range(4 * max(arguments.samples_per_batch))]
    for size in arguments.samples_per_batch:
        used = padded = fixed = rows_made = 0
        packing: list[float] = []
        stepping: list[float] = []
        for number in range(arguments.batches):
            chosen: list[Encoded] = generator.sample(stock, size)
            start = time.process_time()
            rows = pack(chosen, arguments.row_length)
            batch = collate(rows)
            packing.append(time.process_time() - start)
            lengths = [sum(item.length for item in row) for row in rows]
            used, padded = used + sum(lengths), padded + max(lengths) * len(rows)
            fixed, rows_made = fixed + arguments.row_length * len(rows), rows_made + len(rows)
            if number < arguments.steps:
                start = time.process_time()
                NextToken()(network, batch).total.backward()
                stepping.append(time.process_time() - start)
        spent, step = sum(packing) / len(packing), sum(stepping) / len(stepping)
        print(f"| {size} | {rows_made / arguments.batches:.1f} | {used / padded:.3f} | {used / fixed:.3f} "
              f"| {1e3 * spent:.1f} | {1e3 * step:.0f} | {spent / step:.2%} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
