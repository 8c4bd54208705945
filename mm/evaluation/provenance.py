"""What produced a score: enough to run it again and to notice that something changed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mm
from mm.evaluation.benchmarks.base import Benchmark
from mm.types import Media, MediaSpec, Sample

PACKAGES = ("torch", "torchvision", "torchaudio", "lightning", "tokenizers", "timm", "av", "pillow", "soundfile")


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over every sample's id, chat, answers and media bytes, in order: equal exactly if the data set is."""
    total = hashlib.sha256()
    known: dict[Media, str] = {}
    for sample in samples:
        for item in sample.media:
            if item not in known:
                known[item] = hashlib.sha256(media_bytes(item)).hexdigest()
        content = [sample.key, sample.messages, sample.meta["answers"], [known[item] for item in sample.media]]
        total.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode())
    return total.hexdigest()


def media_bytes(item: Media) -> bytes:
    """The file's bytes. Raises ValueError naming a file that cannot be read."""
    if isinstance(item.data, bytes):
        return item.data
    try:
        return Path(item.data).read_bytes()
    except OSError as error:
        raise ValueError(f"{item.name}: cannot read {item.data}: {error.strerror}") from None


def describe(model: Any, benchmark: Benchmark, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
    """The "provenance" of a result; `settings` are added as they are (decoding, seed, paths)."""
    path = settings.get("model_path")
    return {
        "model": {"path": None if path is None else str(path), "manifest_sha256": _manifest_hash(path)},
        "config": getattr(model, "config", None),
        "template": _public(model.template) if hasattr(model, "template") else None,
        "media": _media(model),
        "attention_backend": _attention_backend(model),
        "precision": _precision(model),
        "device": str(getattr(model, "device", "cpu")),
        "benchmark": benchmark.config(),
        "prompt": benchmark.prompt,
        "dataset": {"origin": benchmark.origin(), "n": len(samples), "fingerprint": fingerprint(samples)},
        "generated": bool(samples[0].meta.get("generated", False)),
        "versions": versions(),
        **{name: value for name, value in settings.items() if name != "model_path"},
    }


def versions() -> dict[str, str]:
    found = {"mm": mm.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _manifest_hash(path: str | Path | None) -> str | None:
    manifest = None if path is None else Path(path) / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest and manifest.is_file() else None


def _media(model: Any) -> dict[str, Any]:
    """Per kind: resolution and patch (or rate and hop), and what encoder and bridge do to the grid."""
    specs: dict[str, MediaSpec] = model.media_specs() if hasattr(model, "media_specs") else {}
    return {
        kind: {
            "tokenizer": _public(spec.tokenizer),
            "reductions": [asdict(reduction) for reduction in spec.reductions],
            "inline": spec.inline,
        }
        for kind, spec in specs.items()
    }


def _public(part: Any) -> dict[str, Any]:
    """A part's plain settings (resolution, patch, rate, ...)."""
    plain = (bool, int, float, str, tuple, type(None))
    settings = {k: v for k, v in vars(part).items() if not k.startswith("_") and isinstance(v, plain)}
    return {"class": type(part).__name__, **settings}


def _precision(model: Any) -> str:
    """Dtype of the weights, and of autocast where it is on."""
    parameters = getattr(model, "parameters", None)
    weights = str(next(parameters()).dtype).removeprefix("torch.") if parameters else "unknown"
    device = torch.device(getattr(model, "device", "cpu")).type
    if not torch.is_autocast_enabled(device):
        return weights
    return f"{weights} weights, {str(torch.get_autocast_dtype(device)).removeprefix('torch.')} autocast"


def _attention_backend(model: Any) -> list[str]:
    """The backends that the attention layers call: the names of their modules ("sdpa", "flash")."""
    modules = model.modules() if hasattr(model, "modules") else ()
    calls = (getattr(module, "attend", None) for module in modules)
    return sorted({call.__module__.rpartition(".")[2] for call in calls if call is not None})
