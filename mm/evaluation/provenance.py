"""What produced a score: enough to run it again and to notice that something changed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mm
from mm.evaluation.benchmarks.base import Benchmark
from mm.types import Media, MediaSpec, Sample

PACKAGES = (
    *("torch", "torchvision", "torchaudio", "lightning", "tokenizers", "timm", "open_clip_torch", "numpy"),
    *("av", "pillow", "soundfile", "pyarrow", "jiwer", "whisper-normalizer", "pycocoevalcap"),
)


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over every sample's id, chat, answers and media bytes, in order: equal exactly if the data set is."""
    total = hashlib.sha256()
    known: dict[Media, str] = {}
    for sample in samples:
        for item in sample.media:
            if item not in known:
                known[item] = hashlib.sha256(media_bytes(item)).hexdigest()
        content = [
            sample.key,
            sample.messages,
            sample.meta.get("answers"),
            sample.meta.get("text"),
            [known[item] for item in sample.media],
        ]
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


def describe(
    model: Any,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    model_path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The "provenance" of a result; `settings` are the runner's (seed, limit, batch size, ...), kept as they are."""
    return {
        "model": _model(model_path),
        "config": getattr(model, "config", None),
        "template": _public(model.template) if hasattr(model, "template") else None,
        "media": _media(model),
        "attention_backend": _attention_backend(model),
        "precision": _precision(model),
        "device": _device(model),
        "benchmark": benchmark.config(),
        "prompt": benchmark.prompt,
        "decoding": _decoding(benchmark),
        "dataset": {"origin": benchmark.origin(), "n": len(samples), "fingerprint": fingerprint(samples)},
        "generated": bool(samples[0].meta.get("generated", False)),
        "versions": versions(),
        **(settings or {}),
    }


def identity_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance on which single responses depend: the same, and responses may be used again.

    Neither limits, batch sizes and numbers of ranks are in it, nor the answers and scoring, nor where files lie.
    """
    told = ("template", "media", "attention_backend", "precision", "device", "prompt", "decoding", "config")
    return {
        "model": {name: value for name, value in provenance["model"].items() if name != "path"},
        "versions": {name: provenance["versions"].get(name) for name in ("mm", "torch", "tokenizers")},
        **{name: provenance[name] for name in told},
    }


def _decoding(benchmark: Benchmark) -> dict[str, Any]:
    if benchmark.ask != "text":
        return {"method": f"likelihood of {benchmark.ask}" if benchmark.ask != "embedding" else "embedding",
                "plain": benchmark.plain, "max_length": getattr(benchmark, "max_length", None)}  # fmt: skip
    return {
        "method": "sampled" if benchmark.temperature else "greedy",
        "temperature": benchmark.temperature,
        "max_new_tokens": benchmark.max_new_tokens,
        "stop": list(benchmark.stop),
        "plain": benchmark.plain,
    }


def versions() -> dict[str, str]:
    found = {"mm": mm.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _model(path: str | Path | None) -> dict[str, Any]:
    """Its path and the hash of its manifest (which holds its files' hashes) or, without one, of all its files."""
    if path is None:
        return {"path": None, "manifest_sha256": None}
    path = Path(path)
    manifest = path / "manifest.json"
    if manifest.is_file():
        return {"path": str(path), "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    total = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return {"path": str(path), "manifest_sha256": None, "files_sha256": total.hexdigest()}


def _device(model: Any) -> str:
    """ "cpu", or the GPU's own name."""
    device = torch.device(getattr(model, "device", "cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
