"""`mm shard`: the data side's command (mm.datasets.preprocess), and with --features a model's encoders within."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.datasets.decode import decode
from mm.datasets.features import DTYPES, pack_features
from mm.datasets.preprocess import execute, parser
from mm.types import Media, Sample, Tokens, grid_positions

if TYPE_CHECKING:
    from mm.model import MultimodalModel


def main(argv: Sequence[str] | None = None) -> int:
    """Raises ValueError and OSError for what a user can mend; `mm.cli` prints those as one line."""
    arguments = _parser().parse_args(argv)
    return execute(arguments, _features(arguments))


def _parser() -> argparse.ArgumentParser:
    result = parser()
    add = result.add_argument_group("features of a frozen encoder, kept beside the media").add_argument
    add("--features", metavar="MODEL", help="store what the encoders of this model directory make of the media")
    add("--feature-kinds", metavar="KINDS", help="image, audio, video, with commas between (default: all it reads)")
    help_text = "float16 keeps 11 bits of a number, bfloat16 8 and a wider range, float32 all 24 (%(default)s)"
    add("--feature-dtype", choices=tuple(DTYPES), default="float16", help=help_text)
    add("--feature-batch", type=int, default=16, metavar="N", help="media of one pass (%(default)s)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return result


def _features(arguments: argparse.Namespace) -> TowerFeatures | None:
    if arguments.features is None:
        return None
    if arguments.index is not None:
        raise ValueError(
            "--index leaves tars as they are; for features, mm shard shards:DIR --features MODEL --out OUT"
        )
    if arguments.feature_batch < 1:
        raise ValueError(f"--feature-batch must be 1 or more, got {arguments.feature_batch}")
    kinds = None if arguments.feature_kinds is None else [kind.strip() for kind in arguments.feature_kinds.split(",")]
    made = {"dtype": arguments.feature_dtype, "batch": arguments.feature_batch, "device": arguments.device}
    return TowerFeatures(arguments.features, kinds, **made)


class TowerFeatures:
    """The encoders of a model directory, as `mm.datasets.features.FeatureMaker`: every process opens the model anew.

    The weights are the directory's, in float32, in evaluation mode. On a CPU a pass takes one thread, whatever the
    number of processes: other sums would make other last bits.

    Raises ValueError for what is no model directory of ours, and for a kind that the model does not read.
    """

    def __init__(
        self,
        directory: str,
        kinds: Sequence[str] | None = None,
        dtype: str = "float16",
        batch: int = 16,
        device: str | None = None,
    ) -> None:
        from mm.checkpoint import is_published, verify

        if is_published(Path(directory)):
            raise ValueError(f"--features {directory}: a published checkpoint has no towers; give a model directory")
        self.directory, self.dtype, self.batch, self.device = directory, dtype, batch, device
        self.samples_at_once = 2 * batch
        self._model: MultimodalModel | None = None
        manifest = verify(Path(directory))
        towers = list(self.model.towers)
        for kind in kinds or ():
            if kind not in towers:
                read = ", ".join(towers) or "text only"
                raise ValueError(f"--feature-kinds {kind}: the model {directory} reads {read}")
        self.kinds = [kind for kind in towers if kinds is None or kind in kinds]
        if not self.kinds:
            raise ValueError(f"--features {directory}: the model reads text only, so it makes no features")
        self._described = {
            "model": manifest.get("self_sha256") or manifest["sha256"]["config.yaml"],
            "dtype": dtype,
            "batch": batch,
            "towers": {kind: self._describe(kind) for kind in self.kinds},
        }

    def _describe(self, kind: str) -> dict[str, Any]:
        return {"width": self.model.tower(kind).encoder.out_dim, **self.model.encoder_identity(kind)}

    @property
    def model(self) -> MultimodalModel:
        if self._model is None:
            from mm.checkpoint import load

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._model = load(self.directory).requires_grad_(False).to(device)
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}

    def describe(self) -> dict[str, Any]:
        return self._described

    def __call__(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        wrong: dict[int, ValueError] = {}
        tokens: dict[str, list[tuple[int, int, Tokens]]] = {kind: [] for kind in self.kinds}  # sample, item, its tokens
        for number, sample in enumerate(samples):
            try:
                read = [(m.kind, i, self._tokenize(m)) for i, m in enumerate(sample.media) if m.kind in self.kinds]
            except (ValueError, OSError) as error:
                wrong[number] = ValueError(f"sample {sample.key}: {error}")
                continue
            for kind, item, found in read:
                tokens[kind].append((number, item, found))
        media = [list(sample.media) for sample in samples]
        for kind, items in tokens.items():
            for start in range(0, len(items), self.batch):
                group = items[start : start + self.batch]
                encoded = self._encode(kind, [found for _, _, found in group])
                for (number, item, before), values in zip(group, encoded, strict=True):
                    name = f"sample {samples[number].key}: {media[number][item].name}"
                    t, h, w = before.grid.tolist()
                    try:
                        data = pack_features(values, (t, h, w), self.dtype, name)
                    except ValueError as error:
                        wrong[number] = error
                        continue
                    media[number][item] = replace(media[number][item], features=data)
        made = zip(samples, media, strict=True)
        return [wrong.get(number) or replace(sample, media=items) for number, (sample, items) in enumerate(made)]

    def _tokenize(self, media: Media) -> Tokens:
        tokenizer: Any = self.model.tower(media.kind).tokenizer
        return tokenizer(decode(media, resizer=tokenizer if hasattr(tokenizer, "resize") else None))

    def _encode(self, kind: str, items: list[Tokens]) -> Iterator[Tensor]:
        """The features (N, C) of each item, without padding."""
        tower = self.model.tower(kind)
        stacked = Tokens.stack(items).to(self.model.device)
        with torch.no_grad(), _one_thread(self.model.device.type == "cpu"):
            out = tower.encode(stacked)
        for item, before in enumerate(items):
            t, h, w = before.grid.tolist()
            grid = tower.spec().encoded((t, h, w))
            mask = out.mask[item]
            places = out.positions[item][mask].cpu()
            if not torch.equal(places, grid_positions(grid)):
                raise ValueError(
                    f"towers.{kind}.encoder: its features do not lie in the cells of the grid {grid} in order, so that "
                    "they cannot be stored by it"
                )
            yield out.values[item][mask]


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
