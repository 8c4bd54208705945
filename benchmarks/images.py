"""JPEG -> patches of the model's image tokenizer, against plain Pillow (decode, bicubic resize, crop, normalise).

    OMP_NUM_THREADS=1 python benchmarks/images.py --clock cpu

Both give 224 x 224 pixels; the project's patches stay uint8 for the encoder to normalise, which is counted here too.
"""

from __future__ import annotations

import io
import sys

import numpy as np
import torch
from common import Bench
from PIL import Image

from mm.datasets.decode import decode_image
from mm.tokenizers.image import ImageTokenizer
from mm.types import Media

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of about a photograph's size: 1/f noise with smooth discs."""
    generator = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / width) ** 1.15
    noise = [np.fft.irfft2(amplitude * np.exp(2j * np.pi * generator.random(amplitude.shape)), (height, width))
             for _ in range(3)]  # fmt: skip
    pixels = np.stack([40 * (n - n.mean()) / n.std() + 120 for n in noise], -1)
    pixels = 0.7 * pixels.mean(-1, keepdims=True) + 0.3 * pixels + generator.normal(0, 3, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def plain(data: bytes) -> torch.Tensor:
    """What most loaders do."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = torch.from_numpy(np.asarray(image.crop((left, top, left + 224, top + 224))).copy())
    return pixels.permute(2, 0, 1).float().div_(255).sub_(MEAN).div_(STD)


def ours(data: bytes) -> torch.Tensor:
    values = TOKENIZER(decode_image(Media("image", data, "a.jpg"), resizer=TOKENIZER)).values
    return torch.addcmul(SHIFT, values, SCALE)


TOKENIZER = ImageTokenizer(patch=14, size=(224, 224))
SCALE = (1 / 255 / STD).expand(3, 14, 14).reshape(-1)
SHIFT = (-MEAN / STD).expand(3, 14, 14).reshape(-1)


GOALS = {(1600, 1200): (2.5, 2.9), (500, 375): (2.0, 2.3)}


def main() -> int:
    bench = Bench(__doc__, lambda parser: parser.add_argument("--images", type=int, default=8))
    for (width, height), (floor, goal) in GOALS.items():
        images = [photograph(width, height, seed) for seed in range(bench.args.images)]
        calls = {run.__name__: lambda run=run, images=images: [run(data) for data in images] for run in (plain, ours)}
        seconds = bench.times(calls)
        taken, noise = seconds["ours"]
        bench.add(
            what=f"JPEG {width}x{height} -> 224, {len(images[0]) // 1024} KiB", run="mm", rate=len(images) / taken,
            unit="images/s", noise=noise, peer="Pillow", ratio=seconds["plain"][0] / taken, judged="ratio",
            floor=floor, goal=goal,
        )  # fmt: skip
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
