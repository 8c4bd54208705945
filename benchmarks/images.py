"""JPEG -> patches of the model's image tokenizer, against plain Pillow (decode, bicubic resize, crop, normalise).

    OMP_NUM_THREADS=1 python benchmarks/images.py

Process CPU time of one thread, alternatives in turn, median of the rounds. Both give 224 x 224 pixels; the project's
patches stay uint8 for the encoder to normalise, which is counted here too.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
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


def rate(function: Callable[[bytes], object], images: list[bytes]) -> float:
    start = time.process_time()
    for data in images:
        function(data)
    return len(images) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| JPEG | plain Pillow, images/s | here, images/s | ratio |\n| --- | --- | --- | --- |")
    for width, height in ((1600, 1200), (500, 375)):
        images = [photograph(width, height, seed) for seed in range(arguments.images)]
        both = {name: [] for name in ("plain", "ours")}
        for _ in range(arguments.rounds):
            both["plain"].append(rate(plain, images))
            both["ours"].append(rate(ours, images))
        ratio = statistics.median(b / a for a, b in zip(both["plain"], both["ours"], strict=True))
        one, other = (statistics.median(both[name]) for name in ("plain", "ours"))
        print(
            f"| {width}x{height}, {len(images[0]) // 1024} KiB | {one:.0f} | {other:.0f} | {ratio:.2f}x |", flush=True
        )


if __name__ == "__main__":
    main()
