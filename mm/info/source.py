"""From a file that describes a model to the model itself, on the meta device: shapes without memory."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mm.decoder.decoder import Decoder
from mm.decoder.families import family_of
from mm.model import MultimodalModel
from mm.parts import build
from mm.tokenizers.missing import MissingTokenizer

MODELS: dict[str, type[nn.Module]] = {f"{part.__module__}.{part.__name__}": part for part in (MultimodalModel, Decoder)}


def build_meta(source: Path, vocab_size: int | None = None) -> nn.Module:
    """The model that a YAML file or a model directory describes, on the meta device: shapes without memory.

    A YAML file may be a stage's config (`model:` anywhere in it) or a part's own `{class_path, init_args}`; a directory
    is our own, with config.yaml, or a published one, with config.json (that file alone will do).
    `vocab_size` stands in for a tokenizer that is not there yet, and for a decoder's unset `vocab_size`.
    Raises ValueError naming the file and what is wrong with it.
    """
    path = source
    if source.is_dir():
        own, published = source / "config.yaml", source / "config.json"
        path = published if published.is_file() and not own.is_file() else own
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    section = _published(path) if path.suffix == ".json" else _own(path)
    part = MODELS[section["class_path"]]
    settings = dict(section.get("init_args") or {})
    if part is MultimodalModel:
        settings["tokenizer"] = _tokenizer(settings.get("tokenizer"), source, vocab_size)
    elif vocab_size is not None:
        settings["vocab_size"] = vocab_size
    elif settings.get("vocab_size") is None:
        raise ValueError(f"{path}: the decoder's vocab_size is not set (its tokenizer decides); give --vocab-size N")
    with torch.device("meta"):
        return build({"class_path": section["class_path"], "init_args": settings}, part)


def _own(path: Path) -> dict[str, Any]:
    """The `{class_path, init_args}` of the model in a YAML file."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    section = _find_section(config, MODELS)
    if section is None:
        raise ValueError(f"{path}: no class_path in it is {' or '.join(MODELS)}")
    return section


def _published(path: Path) -> dict[str, Any]:
    """The same of the decoder that a published config.json describes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path}: no model_type in it: not the config.json of a published model")
    return family_of(config["model_type"], str(path)).read(config, str(path))[0]


def _find_section(config: Any, kinds: Container[str]) -> dict[str, Any] | None:
    """The outermost `{class_path, init_args}` in a config whose class_path is one of `kinds`."""
    level = [config]
    while level:
        for node in level:
            if isinstance(node, dict) and str(node.get("class_path")) in kinds:
                return node
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return None


def _tokenizer(named: object, source: Path, vocab_size: int | None) -> Any:
    """What the model shall take as its tokenizer: a stand-in of `vocab_size`, or what the config names."""
    if vocab_size is not None:
        return MissingTokenizer(vocab_size, str(source))  # counting needs no text
    if isinstance(named, dict):
        return named  # a part's tree
    path = source / str(named) if source.is_dir() else Path(str(named))
    if not path.exists():
        raise ValueError(f"{source}: its tokenizer {path} is not there (yet); give --vocab-size N to count without it")
    return str(path)
