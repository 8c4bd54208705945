"""What a family is: how its settings become a decoder's config, and its tensors our tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule

Tree = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A published architecture, as its config.json and its weight files describe it.

    model_type    what config.json calls it          architecture   the transformers class that has a head
    decoder       settings -> the `{class_path, init_args}` tree of our Decoder, plain data
    weights       settings -> the weight map
    prefix        what names lack in a file of the base model, saved without its head
    ignored       full-match patterns of stored tensors that hold nothing learned
    settle        (config, names of stored tensors) -> the config of what is stored: files may leave parts out
    """

    model_type: str
    architecture: str
    decoder: Callable[[Settings], Tree]
    weights: Callable[[Settings], list[Rule]]
    prefix: str = "model."
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    settle: Callable[[Tree, Collection[str]], Tree] = lambda config, stored: config

    def read(self, config: Mapping[str, Any], where: str) -> tuple[Tree, list[Rule]]:
        """The decoder's tree and the weight map. Raises ValueError naming the setting that is missing or unknown."""
        settings = Settings(config, where)
        tree, rules = self.decoder(settings), self.weights(settings)
        settings.finish()
        return tree, rules


def part(class_path: str, **arguments: Any) -> Tree:
    """The tree of a part; arguments that are None are left to the part's own defaults."""
    return {"class_path": class_path, "init_args": {k: v for k, v in arguments.items() if v is not None}}


def decoder_tree(layers: list[str], **arguments: Any) -> Tree:
    """The tree of a Decoder from the kind ("mixer/ffn") of every layer, folded into the shortest repeated pattern."""
    return part("mm.decoder.decoder.Decoder", layers=fold(layers), **arguments)


def rms_block(eps: float, offset: float | None = None, **arguments: Any) -> Tree:
    """The tree of a Block with RMSNorm; further arguments are Block's."""
    return part("mm.decoder.decoder.Block", norm=part("mm.decoder.norms.RMSNorm", eps=eps, offset=offset), **arguments)


def fold(kinds: list[str]) -> list[Tree]:
    """Kinds of layers as groups `{pattern, repeat}`: a cycle that fills them all, or else runs of one kind."""
    for size in range(1, min(len(kinds), 12) + 1):
        if len(kinds) % size == 0 and kinds == kinds[:size] * (len(kinds) // size):
            return [{"pattern": kinds[:size], "repeat": len(kinds) // size}]
    groups: list[Tree] = []
    for kind in kinds:
        if groups and groups[-1]["pattern"] == [kind]:
            groups[-1]["repeat"] += 1
        else:
            groups.append({"pattern": [kind], "repeat": 1})
    return groups
