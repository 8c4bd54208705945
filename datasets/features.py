"""Stored features: what a frozen encoder makes of a medium, kept beside it, so that training need not make it again.

    key.0.png                     the medium, as ever
    key.0.features.safetensors    features (N, C) of DTYPES: the encoder's output, before the bridge
                                  grid (3,) int64: the cells (t, h, w) of the medium's tokens, before the encoder

The manifest's "features" says what made them: {"model" (the SHA-256 of its manifest), "dtype", "batch" (media of one
pass), "towers": {kind: {"width", and what the model's `encoder_identity` gives}}}. They are of use to a model whose
encoder is the same and learns nothing.

float16 is the default: it keeps 11 bits of each number and bfloat16 keeps 8, for the same bytes. Its range ends at
65,504, which features seldom come near; those that do are refused, and bfloat16 has the range of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mm.datasets.fingerprint import differing, flatten
from mm.datasets.shard_reader import ShardDataset
from mm.types import KINDS, Grid, MediaSpec, Sample, Tokens

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
AGAIN = "make them again with mm shard --features, or set data.features: false to read the media"


class FeatureMaker(Protocol):
    """Gives samples the features of their media. Pickles, as it works in the processes of `mm shard`."""

    samples_at_once: int

    def describe(self) -> dict[str, Any]:
        """The manifest's "features"."""
        ...

    def __call__(self, samples: Sequence[Sample], /) -> list[Sample | ValueError]:
        """Each sample with features, or what is wrong with it. The same samples give the same bytes."""
        ...


class Encoders(Protocol):
    """What the data side asks a model about its encoders."""

    def encoder_learns(self, kind: str) -> bool: ...
    def encoder_identity(self, kind: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Precomputed:
    """The features of a medium, and the grid of the tokens that its encoder read."""

    tokens: Tokens
    grid: Grid


@dataclass(frozen=True)
class Stored:
    """What shards say of the features of one kind: their numbers a token, and their dtype."""

    width: int
    dtype: str

    def read(self, data: bytes | None, spec: MediaSpec, name: str) -> Precomputed:
        """Raises ValueError, beginning with `name`, for features that are absent or not as the manifest says."""
        if data is None:
            raise ValueError(f"{name}: has no features, though the manifest says so; {AGAIN}")
        try:
            found = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{name}: its features are no safetensors file ({error}); {AGAIN}") from None
        values, cells = found.get("features"), found.get("grid")
        if values is None or cells is None or cells.shape != (3,) or cells.dtype != torch.int64:
            raise ValueError(
                f"{name}: its features have tensors {', '.join(sorted(found))}, not features and grid (3,)"
            )
        t, h, w = cells.tolist()
        if min(t, h, w) < 1:
            raise ValueError(f"{name}: its features are of a grid {(t, h, w)}; {AGAIN}")
        grid = spec.encoded((t, h, w))
        wanted = (math.prod(grid), self.width)
        if tuple(values.shape) != wanted or values.dtype != DTYPES[self.dtype]:
            has = f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
            raise ValueError(f"{name}: its features are {has}, not {wanted} {self.dtype}; {AGAIN}")
        return Precomputed(Tokens.of_grid(values, grid), (t, h, w))


def pack_features(values: Tensor, grid: Grid, dtype: str, name: str) -> bytes:
    """The bytes of features (N, C) float. Raises ValueError, beginning with `name`, for what `dtype` cannot hold."""
    stored = values.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not bool(stored.isfinite().all()):
        if bool(values.isfinite().all()):
            raise ValueError(f"{name}: features of up to {values.abs().max():.3g}: {dtype} ends before; take bfloat16")
        raise ValueError(f"{name}: its features are not finite numbers")
    return safetensors.torch.save({"features": stored, "grid": torch.tensor(grid)})


def stored_features(sets: Mapping[str, ShardDataset], model: Encoders) -> dict[str, Stored]:
    """Kind -> the features that can stand for its media in all of these sets: empty where no set holds any.

    Raises ValueError, naming the set and what differs, where only some sets hold them; where they are of other towers
    than the model's, or of several dtypes; and where the model trains the encoder.
    """
    found = {}
    for kind in KINDS:
        having = {name: samples for name, samples in sets.items() if samples.manifest.get("media", {}).get(kind)}
        held = {name: made for name, samples in having.items() if (made := _made(samples, kind)) is not None}
        if not held:
            continue
        if without := [name for name in having if name not in held]:
            raise ValueError(
                f"data: set {next(iter(held))} holds {kind} features and set {without[0]} holds none, so that their "
                f"media cannot stand in one batch: make those too, or set data.features: false"
            )
        if model.encoder_learns(kind):
            raise ValueError(
                f"data: set {next(iter(held))} holds {kind} features of a frozen encoder, but this stage trains "
                f"towers.{kind}.encoder: they would be stale after a step. Name in `train` what learns without it, or "
                "set data.features: false to read the media"
            )
        own = model.encoder_identity(kind)
        for name, made in held.items():
            _check_same(made, own, f"data: set {name} ({sets[name].name}): its {kind} features")
        stored = {Stored(made["width"], sets[name].manifest["features"]["dtype"]) for name, made in held.items()}
        if len(stored) > 1:
            dtypes = ", ".join(sorted(one.dtype for one in stored))
            raise ValueError(f"data: the sets' {kind} features are of dtypes {dtypes}: make them all of one")
        [found[kind]] = stored
    return found


def _made(samples: ShardDataset, kind: str) -> dict[str, Any] | None:
    """What the manifest says of the tower that made this kind's features. It may come from elsewhere."""
    about = samples.manifest.get("features")
    if about is None:
        return None
    towers = about.get("towers") if isinstance(about, dict) else None
    widths = [made.get("width") for made in towers.values()] if isinstance(towers, dict) else [None]
    if not isinstance(towers, dict) or not all(isinstance(width, int) for width in widths):
        raise ValueError(f"{samples.name}: the manifest's 'features' are not as mm shard --features writes them")
    if about.get("dtype") not in DTYPES:
        raise ValueError(f"{samples.name}: the manifest's features are {about.get('dtype')!r}, not {', '.join(DTYPES)}")
    return towers.get(kind)


def _check_same(made: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    changed = differing(flatten({key: made.get(key) for key in own}), flatten(own), ())
    if changed:
        named = "; ".join(f"{key} {_short(then)}, here {_short(now)}" for key, (then, now) in [*changed.items()][:4])
        raise ValueError(f"{where} were made by another tower ({named}); {AGAIN}")


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
