"""A model as a directory that anyone can read: weights, config, tokenizer, and a manifest of their hashes.

    model.safetensors (or model-00001-of-00003.safetensors ... and an index)
    config.yaml   tokenizer.json   manifest.json   (family.json, for a model that came from a published checkpoint)

Files are written beside their final name, synced and renamed, the manifest last: a directory with a manifest is whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

import mm
from mm.model import MultimodalModel
from mm.parts import build

SHARD_BYTES = 4 * 2**30
FORMAT = "mm-model-2"
UNSEALED = "mm-model-1"  # the same without the hash of the manifest itself: still read
BLANK = "0" * 64


def save(model: MultimodalModel, path: str | Path) -> None:
    """Writes the directory `path` (made if absent). Needs `model.config`, which the command line and `load` set."""
    if model.config is None:
        raise ValueError(
            "checkpoint.save: the model does not know its config; set model.config to its class_path/init_args tree"
        )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").unlink(missing_ok=True)
    arguments = copy.deepcopy(model.config["init_args"])
    if model.tokenizer.has_text:
        arguments["tokenizer"] = "tokenizer.json"
    for kind, tower in (arguments.get("towers") or {}).items():
        encoder = tower.get("init_args", tower).get("encoder")
        if encoder and "init_args" in encoder:
            encoder["init_args"] = model.tower(kind).encoder.saved(encoder["init_args"])
    config = {"class_path": model.config["class_path"], "init_args": arguments}
    files = {name: write_atomically(path / name, data) for name, data in _weight_files(model)}
    for stale in set(path.glob("model*.safetensors*")) - {path / name for name in files}:
        stale.unlink()  # of a model that was saved here before, in another number of files
    files["config.yaml"] = write_atomically(path / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    if model.tokenizer.has_text:
        model.tokenizer.save(path)
        files["tokenizer.json"] = hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()
    (path / "family.json").unlink(missing_ok=True)
    if model.origin is not None:
        files["family.json"] = write_atomically(path / "family.json", json.dumps(model.origin, indent=2).encode())
    manifest = {
        "sha256": files,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"mm": mm.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of the model directory `path`, with the SHA-256 of its own bytes in it."""
    data = json.dumps({**manifest, "format": FORMAT, "self_sha256": BLANK}, indent=2).encode()
    seal = hashlib.sha256(data).hexdigest().encode()
    write_atomically(path / "manifest.json", data.replace(BLANK.encode(), seal, 1))


def load(path: str | Path) -> MultimodalModel:
    """Opens a model in eval mode: a directory of ours, a Hugging Face directory, or a GGUF file.

    Weights are float32. Raises ValueError naming the file, and in it the setting that is unknown or the tensor with
    both shapes.
    """
    path = Path(path)
    if is_published(path):
        from mm.pretrained import load as load_published  # our own directories do not need it

        return load_published(path)
    verify(path)
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    if isinstance(config["init_args"]["tokenizer"], str):
        config["init_args"]["tokenizer"] = str(path)  # naming the file, jsonargparse reads it as YAML, for seconds
    try:
        model = build(config, MultimodalModel)
    except ValueError as error:
        raise ValueError(f"{path / 'config.yaml'}: {error}") from error
    model.config = config
    if (path / "family.json").is_file():
        model.origin = json.loads((path / "family.json").read_bytes())
    _copy_weights(model, path)
    return model.eval()


def is_published(path: Path) -> bool:
    """Whether this is somebody else's checkpoint: a file (GGUF), or a directory with a config.json and none of ours."""
    return path.is_file() or ((path / "config.json").is_file() and not (path / "config.yaml").is_file())


def load_weights(model: MultimodalModel, path: str | Path) -> None:
    """Copies the weights of a model directory into `model`, strictly: same names, same shapes. Errors as in `load`.

    A published checkpoint fills the decoder alone: towers and bridges start anew.
    """
    path = Path(path)
    if is_published(path):
        from mm.pretrained import load_decoder_weights

        return load_decoder_weights(model.decoder, path)
    verify(path)
    _copy_weights(model, path)


def _copy_weights(model: MultimodalModel, path: Path) -> None:
    """Copies nothing unless all names and shapes fit."""
    stored = {name: (file, shape) for file in _shards(path) for name, shape in _shapes(file).items()}
    wanted = dict(_tensors(model))
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{path}: "
            + "; ".join(
                f"{what} tensor {names[0]}{_more(names)}"
                for what, names in (("missing", missing), ("unexpected", extra))
                if names
            )
        )
    for name, (file, shape) in stored.items():
        if shape != tuple(wanted[name].shape):
            raise ValueError(f"{file}: tensor {name} has shape {shape}, the model's is {tuple(wanted[name].shape)}")
    for file in _shards(path):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            for name in tensors.keys():
                wanted[name].copy_(tensors.get_tensor(name))


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file it names is there and has its hash."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such model directory")
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path}: not a model directory, or one whose writing was cut off: it has no manifest.json")
    try:
        data = file.read_bytes()
        manifest = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); the file is damaged") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise ValueError(f"{file}: not the manifest of a model directory: it has no sha256 of files")
    if manifest.get("format") != UNSEALED:
        seal = str(manifest.get("self_sha256"))
        blank = data.replace(seal.encode(), BLANK.encode(), 1)
        if manifest.get("format") != FORMAT or hashlib.sha256(blank).hexdigest() != seal:
            raise ValueError(f"{file}: damaged (its SHA-256 differs from the one in it), or not of format {FORMAT}")
    for name, digest in manifest["sha256"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name}: the manifest names this file, and it is missing")
        with open(path / name, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise ValueError(f"{path / name}: its SHA-256 is not the manifest's; the file was changed or damaged")
    return manifest


def write_atomically(path: Path, data: bytes) -> str:
    """Writes a file whole or not at all, and returns its SHA-256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def _tensors(model: MultimodalModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each shared one once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _weight_files(model: MultimodalModel) -> Iterator[tuple[str, bytes]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _tensors(model):
        tensor = tensor.detach().cpu().contiguous()
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    if len(shards) == 1:
        yield "model.safetensors", safetensors_bytes(shards[0])
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        yield name, safetensors_bytes(shard)
    index = {"weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}}
    yield "model.safetensors.index.json", json.dumps(index, indent=2).encode()


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"{path}: no model.safetensors and no model.safetensors.index.json")
    return [path / "model.safetensors"]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
