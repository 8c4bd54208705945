"""Random bit flips over shards, indexes, manifests and checkpoints: `mm doctor` notices all, no wrong byte is read.

    python benchmarks/bitflips.py [--flips 1000] [--seed 0]

One bit of one file is flipped, the checks run, the bit is put back. Of shards, all samples are read too: each must come
out as it was, or not at all.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from mm.checkpoint import save, verify
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.datasets.sources.world_audio import AudioWorld
from mm.doctor.data import check_shards
from mm.doctor.findings import all_well
from mm.testing import tiny_model
from mm.training.checkpoint_file import verify_checkpoint, write_checkpoint
from mm.types import Sample


def accepted(check: Callable[[Path], object], path: Path) -> bool:
    try:
        check(path)
    except ValueError:
        return False
    return True


def wrong_samples(folder: Path, originals: list[Sample]) -> int:
    """How many samples come out of a damaged folder other than they were."""
    try:
        samples = ShardDataset(folder)
    except (ValueError, OSError):
        return 0
    wrong = 0
    for index, original in enumerate(originals[: len(samples)]):
        try:
            wrong += samples[index] != original
        except (ValueError, OSError):
            continue
    return wrong


def run(flips: int, seed: int) -> Counter[str]:
    """Counts of flips by kind of file, and of "undetected" and "wrong bytes"."""
    draw = random.Random(seed)
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        shards, model, checkpoint = Path(scratch) / "shards", Path(scratch) / "model", Path(scratch) / "last.ckpt"
        write_shards(AudioWorld(6), shards, samples_per_shard=3)
        originals = list(ShardDataset(shards))
        small = tiny_model()
        small.config = {"class_path": "mm.model.MultimodalModel", "init_args": {}}  # what it says is never read here
        save(small, model)
        write_checkpoint({"state_dict": {"weight": torch.arange(1000.0)}, "global_step": 3}, checkpoint)
        shard_files = sorted(shards.iterdir())
        kinds = {
            "shard": [path for path in shard_files if path.suffix == ".tar"],
            "index": [path for path in shard_files if path.suffix == ".npy"],
            "manifest": [shards / "manifest.json", model / "manifest.json"],
            "checkpoint": [*sorted(path for path in model.iterdir() if path.name != "manifest.json"), checkpoint],
        }
        for number in range(flips):
            kind = list(kinds)[number % len(kinds)]
            path = draw.choice(kinds[kind])
            data = bytearray(path.read_bytes())
            place, bit = draw.randrange(len(data)), draw.randrange(8)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            if path.parent == shards:
                well = all_well(check_shards(shards, 1)[0])
                counts["wrong bytes"] += wrong_samples(shards, originals)
            else:
                well = accepted(verify_checkpoint, checkpoint) if path == checkpoint else accepted(verify, model)
            if well:
                counts["undetected"] += 1
                print(f"undetected: {path.name}, byte {place}, bit {bit}")
            data[place] ^= 1 << bit
            path.write_bytes(data)
            counts[kind] += 1
        assert (
            all_well(check_shards(shards, 1)[0]) and accepted(verify, model) and accepted(verify_checkpoint, checkpoint)
        )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = run(options.flips, options.seed)
    shown = ", ".join(f"{counts[kind]} {kind}" for kind in ("shard", "index", "manifest", "checkpoint"))
    print(f"{options.flips} flips ({shown}): {counts['undetected']} undetected, {counts['wrong bytes']} wrong samples")
    raise SystemExit(1 if counts["undetected"] or counts["wrong bytes"] else 0)


if __name__ == "__main__":
    main()
