"""A whole training run in one folder, small enough to be killed hundreds of times: shards, tokenizer, config."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from mm.datasets.shards import write_shards
from mm.model import MultimodalModel
from mm.testing import picture, tiny_tokenizer
from mm.types import Media, Sample

COLOURS = ("red", "green", "blue")


def make_run(folder: Path, samples: int = 40, steps: int = 12, save_every: int = 2, **data: Any) -> Path:
    """Writes `folder`/shards, tokenizer and config.yaml, and returns the config's path.

    Two sets, one of pictures, one of sounds and plain text; a model of some ten thousand weights; a
    checkpoint every `save_every` steps; the SampleLog. `data` overrides settings of the data module.
    """
    write_shards(list(_pictures(samples)), folder / "shards" / "pictures", samples_per_shard=7)
    write_shards(list(_sounds(samples // 2)), folder / "shards" / "sounds", samples_per_shard=50)
    tiny_tokenizer().save(folder / "tokenizer")
    sets = {name: {"path": str(folder / "shards" / name)} for name in ("pictures", "sounds")}
    settings = {"train": sets, "samples_per_batch": 4, "row_length": 96, "workers": 0, "seed": 3, **data}
    checkpoint = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": save_every, "save_last": True}
    config = {
        "seed_everything": 5,
        "model": {
            "class_path": "mm.training.module.InstructionModule",
            "init_args": {"model": _model(folder), "optim": {"lr": 0.01, "warmup": 2}},
        },
        "data": {"class_path": "mm.datasets.datamodule.StreamingDataModule", "init_args": settings},
        "trainer": {
            "max_steps": steps, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "log", "version": ""},
            },
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
                {"class_path": "mm.training.callbacks.SampleLog"},
            ],
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _model(folder: Path) -> dict[str, Any]:
    bridge = {"class_path": "mm.fusion.projector.LinearProjector"}
    none = {"class_path": "mm.encoders.none.NoEncoder"}
    patches = {"class_path": "mm.tokenizers.image.ImageTokenizer", "init_args": {"patch": 2, "max_tokens": 16}}
    mixer = {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 2}}
    ffn = {"class_path": "mm.decoder.ffn.moe.SparseMoE", "init_args": {"hidden": 8, "num_experts": 2}}
    encoder = {
        "class_path": "mm.encoders.audio_cnn.AudioCNNEncoder",
        "init_args": {"width": 8, "layers": 0, "heads": 2},
    }
    sound = {"class_path": "mm.tokenizers.audio.AudioTokenizer", "init_args": {"mels": 20}}
    decoder = {"width": 16, "mixers": {"m": mixer}, "ffns": {"f": ffn}, "layers": [{"pattern": ["m/f"]}]}
    return {
        "class_path": f"{MultimodalModel.__module__}.MultimodalModel",
        "init_args": {
            "tokenizer": str(folder / "tokenizer"),
            "towers": {
                "image": {"tokenizer": patches, "encoder": none, "bridge": bridge},
                "audio": {"tokenizer": sound, "encoder": encoder, "bridge": bridge},
            },
            "decoder": {"class_path": "mm.decoder.decoder.Decoder", "init_args": decoder},
        },
    }


def _pictures(number: int) -> Iterator[Sample]:
    for i in range(number):
        parts = [{"type": "image", "media": 0}, {"type": "text", "text": "what color is the shape?"}]
        yield _chat(f"picture_{i:04}", parts, COLOURS[i % 3], [picture(i, (4, 4 + 2 * (i % 3)))])


def _sounds(number: int) -> Iterator[Sample]:
    for i in range(number):
        if i % 3 == 0:
            yield _chat(f"text_{i:04}", [{"type": "text", "text": "how many beeps? " * (1 + i % 4)}], "two", [])
            continue
        file = io.BytesIO()
        soundfile.write(file, np.sin(np.arange(1600 + 400 * (i % 5)) / (4 + i)), 8000, format="WAV")
        parts = [{"type": "audio", "media": 0}, {"type": "text", "text": "how many beeps?"}]
        yield _chat(f"sound_{i:04}", parts, "two", [Media("audio", file.getvalue(), f"{i}.wav")])


def _chat(key: str, parts: list[dict[str, Any]], answer: str, media: list[Media]) -> Sample:
    return Sample(key, [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}], media)


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module's weights in a checkpoint file."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]
