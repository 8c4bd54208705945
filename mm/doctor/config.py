"""A stage's config: does its model take its data, and what will it learn from it.

Samples go through the same processor as in training. The model is built with random weights to count its features
against the slots that the data side makes for them, unless it is too large to be built in passing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.text import Text

import mm
from mm.datasets.packing import collate
from mm.datasets.processor import Encoded, Processor
from mm.datasets.shard_reader import ShardDataset
from mm.doctor.findings import Finding, Histogram
from mm.info.source import build_meta
from mm.model import MultimodalModel
from mm.parts import build
from mm.types import IGNORE, SLOT_IDS

LARGEST = 400_000_000  # parameters of a model that is built to be tried
NAMES = {number: kind for kind, number in SLOT_IDS.items()}


@dataclass
class Encodings:
    """What became of the samples that were tried."""

    tried: int = 0
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0
    shown: list[tuple[str, Text]] = field(default_factory=list)

    def histograms(self) -> list[Histogram]:
        return [
            Histogram.of("length of a sample", "decoder positions", self.lengths),
            Histogram.of("supervised part of a sample", "tokens", self.supervised),
        ]


def read_config(path: Path) -> dict[str, Any]:
    """Raises ValueError naming a file that is no config of a stage."""
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"{path}: no `data:` in it, so no config of a training stage; give one, or a folder of shards")
    return config


def data_sets(config: dict[str, Any]) -> dict[str, str]:
    """ "train NAME" or "val NAME" -> directory of shards."""
    arguments = config["data"].get("init_args") or {}
    found = {}
    for split in ("train", "val"):
        for name, data in (arguments.get(split) or {}).items():
            found[f"{split} {name}"] = str(data["path"] if isinstance(data, dict) else data)
    return found


def open_model(config: dict[str, Any], path: Path) -> tuple[MultimodalModel, bool]:
    """The model of a stage, and whether it has weights (True) or is on the meta device. Errors as those of `build`."""
    section = ((config.get("model") or {}).get("init_args") or {}).get("model")
    if section is None:
        raise ValueError(f"{path}: no model.init_args.model in it")
    source = Path(section) if isinstance(section, str) else path
    if source.suffix in (".yaml", ".yml") and source != path:  # a file that a config names is beside it
        source = path.parent / source
        section = yaml.safe_load(source.read_text("utf-8")) if source.is_file() else {}
    shape = build_meta(source)
    if not isinstance(shape, MultimodalModel):
        raise ValueError(f"{path}: its model is a {type(shape).__name__}, not a MultimodalModel")
    if sum(weight.numel() for weight in shape.parameters()) > LARGEST:
        return shape, False
    with torch.random.fork_rng(devices=[]):
        model = mm.load(section) if isinstance(section, str) else build(section, MultimodalModel)
    return model.eval(), True


def check_encoding(
    model: MultimodalModel, with_weights: bool, samples: Mapping[str, ShardDataset], row_length: int | None, each: int
) -> tuple[list[Finding], Encodings]:
    """Encodes `each` samples of every set, evenly spread, and compares what the data side counts with the model."""
    processor = Processor(model.tokenizer, model.template, model.media_specs(), row_length)
    found = Encodings()
    findings: list[Finding] = []
    mismatches = 0
    for name, held in samples.items():
        for index in range(0, len(held), max(1, len(held) // each)):
            if found.tried and index // max(1, len(held) // each) >= each:
                break
            sample = held[index]
            found.tried += 1
            try:
                encoded = processor.encode(sample)
            except ValueError as error:
                findings.append(Finding("encoding", "fail", f"{name}: {error}"))
                break
            _note(found, encoded, name, model)
            if with_weights and encoded.fits:
                for line in _mismatches(model, encoded):
                    mismatches += 1
                    findings.append(Finding("slots", "fail", f"{name}: {line}"))
    findings += _verdicts(found, row_length)
    if not mismatches and found.tried:
        if with_weights:
            findings.append(Finding("slots", "ok", f"features fill their slots in {found.tried} samples"))
        else:
            findings.append(Finding("slots", "warn", f"not tried: the model has more than {LARGEST:,} parameters"))
    return findings, found


def _note(found: Encodings, encoded: Encoded, name: str, model: MultimodalModel) -> None:
    found.lengths.append(encoded.length)
    found.supervised.append(int((encoded.labels != IGNORE).sum()))
    found.dropped += not encoded.fits
    found.cut += bool(encoded.dropped)
    if len([one for one, _ in found.shown if one.startswith(f"{name}:")]) < 2:
        found.shown.append((f"{name}: {encoded.sample.key}", spans(encoded, model)))


def _mismatches(model: MultimodalModel, encoded: Encoded) -> Iterator[str]:
    """Items whose features are not as many as their slot has places."""
    batch = collate([[encoded]])
    with torch.no_grad():
        features = model.encode_media(batch)
    for kind, media in batch.media.items():
        counts = features[kind].tokens.mask.sum(1) if features[kind].inline else torch.ones_like(media.lengths)
        for item, (there, wanted) in enumerate(zip(counts.tolist(), media.lengths.tolist(), strict=True)):
            if there != wanted:
                yield f"{media.names[item]}: {there} features for {wanted} places"


def _verdicts(found: Encodings, row_length: int | None) -> Iterator[Finding]:
    if not found.tried:
        return
    zero = sum(not count for count in found.supervised)
    status = "fail" if zero == len(found.supervised) and zero else "warn" if zero else "ok"
    yield Finding("labels", status, f"{zero} of {len(found.supervised)} samples have nothing that is learned")
    if found.dropped:
        status = "fail" if found.dropped == found.tried else "warn"
        yield Finding("length", status, f"{found.dropped} of {found.tried} samples do not fit row_length={row_length}")
    elif found.cut:
        yield Finding("length", "warn", f"{found.cut} of {found.tried} samples lose turns to row_length={row_length}")
    elif found.lengths:
        yield Finding("length", "ok", f"the longest of {found.tried} samples takes {max(found.lengths)} positions")


def spans(encoded: Encoded, model: MultimodalModel) -> Text:
    """The elements of a sample as text: what is learned in green, media as [image: 49]."""
    lengths = {item.column: item.length for item in encoded.media}
    result, run = Text(), list[int]()
    learned = False

    def flush() -> None:
        if run:
            result.append(model.tokenizer.decode(run), style="bold green" if learned else "dim")
            run.clear()

    for column, (token, label) in enumerate(zip(encoded.ids.tolist(), encoded.labels.tolist(), strict=True)):
        if token in NAMES:
            flush()
            result.append(f"[{NAMES[token]}: {lengths.get(column, 0)}]", style="cyan")
            continue
        if (label != IGNORE) != learned:
            flush()
            learned = label != IGNORE
        run.append(token)
    flush()
    return result
