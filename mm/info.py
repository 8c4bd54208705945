"""`mm info`: what a model costs, from its config alone. Nothing is allocated: it is built on the meta device.

mm info configs/decoder/moe.yaml --context 8192
mm info runs/demo/model --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn

HOW_COUNTED = {
    "parameters": "every weight once; a tied or shared one belongs to the first part that lists it",
    "active": "parameters less the experts a token does not choose: E - K of the E routed experts of each layer",
    "embedding": "rows of the lookup tables, which cost memory but no multiplication",
    "forward": "2 FLOPs per active parameter outside the embedding (a tied output head counts as one), "
    "plus attention scores and weighted sums of one query over the whole context (media beside it left out)",
    "training": "3 x forward, as the backward pass multiplies twice as often; nothing recomputed. It is the context's "
    "last query, the dearest: those of a causal sequence see half of it on average",
    "towers": "2 FLOPs per parameter for each media token that enters, attention scores left out: an upper bound where "
    "a tower merges tokens. Not in the FLOPs per decoder token. An encoder that two towers share counts in both",
    "cache": "numbers that the layers keep for a token x bytes per number",
}


@dataclass(frozen=True)
class Part:
    """One row of the table. `flops` is the forward pass of one token of this part (a media token for a tower)."""

    name: str
    parameters: int
    active: int
    embedding: int
    flops: int


@dataclass(frozen=True)
class Info:
    """What a model costs, as `HOW_COUNTED` explains. FLOPs are per decoder token, sizes in bytes."""

    model: str
    context: int
    parameters: int
    active: int
    embedding: int
    flops_forward: int
    flops_attention: int
    flops_training: int
    cache_bytes_per_number: int
    cache_bytes_per_token: int
    cache_bytes_at_context: int
    parts: list[Part]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "counted": HOW_COUNTED}, indent=2)


class _Counter:
    """Counts one part after another. A weight's memory belongs to the first part that has it, its use to all."""

    def __init__(self, model: nn.Module) -> None:
        self.counted: set[nn.Parameter] = set()
        self.idle = _idle_shares(model)
        self.tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}

    def part(self, name: str, modules: Iterable[nn.Module]) -> Part:
        """A row whose FLOPs are two per weight used and not looked up."""
        weights = {weight: None for module in modules for weight in module.parameters()}  # in order, each once
        new = [weight for weight in weights if weight not in self.counted]
        self.counted.update(new)
        return Part(
            name,
            parameters=sum(weight.numel() for weight in new),
            active=self._active(new),
            embedding=sum(weight.numel() for weight in new if weight in self.tables),
            flops=2 * self._active(weight for weight in weights if weight not in self.tables),
        )

    def _active(self, weights: Iterable[nn.Parameter]) -> int:
        return round(sum(weight.numel() * (1 - self.idle.get(weight, 0.0)) for weight in weights))


def _idle_shares(model: nn.Module) -> dict[nn.Parameter, float]:
    """Weight -> the share of it that one token does not use: (E - K) / E for routed experts."""
    shares = {}
    for layer in model.modules():
        if hasattr(layer, "experts") and hasattr(layer, "experts_per_token"):
            idle = 1 - layer.experts_per_token / layer.num_experts  # type: ignore[operator]
            shares |= dict.fromkeys(layer.experts.parameters(), idle)  # type: ignore[union-attr]
    return shares


def describe(model: nn.Module, context: int = 4096, cache_bytes: int = 2) -> Info:
    """Counts a decoder, or a model with a `.decoder` and `.towers` (on any device, meta too).

    `context` is in tokens; `cache_bytes` is the size of one cached number (2: bfloat16).
    Raises ValueError if either is not positive.
    """
    for name, value in (("context", context), ("cache bytes", cache_bytes)):
        if value < 1:
            raise ValueError(f"{name} must be positive, not {value}")
    decoder: Any = getattr(model, "decoder", model)
    mixers: list[Any] = [layer.mixer for layer in decoder.layers]
    attention = sum(mixer.attention_flops(context) for mixer in mixers)

    counter = _Counter(model)
    embedding = counter.part("decoder: embedding", [decoder.embed])
    mixing = counter.part("decoder: mixers", mixers)
    feed_forward = counter.part("decoder: feed-forward", [layer.ffn for layer in decoder.layers])
    head = counter.part("decoder: output head", [decoder.head])
    other = counter.part("decoder: the rest", [decoder])
    mixing = replace(mixing, flops=mixing.flops + attention)
    head = replace(head, flops=2 * decoder.head.weight.numel())  # a tied head multiplies with the embedding's weight
    other = replace(other, flops=2 * other.active)  # of the whole decoder, only what the parts above left
    decoder_parts = [embedding, mixing, feed_forward, head, other]
    by_kind: Any = getattr(model, "towers", nn.ModuleDict())
    towers = [counter.part(f"{kind} tower", [tower]) for kind, tower in by_kind.items()]
    beside = replace(counter.part("slots, retrieval head", [model]), flops=0)  # used once an item, not once a token
    parts = [part for part in (*decoder_parts, *towers, beside) if part.parameters or part.flops]

    forward = sum(part.flops for part in decoder_parts)
    per_token = cache_bytes * sum(mixer.cache_numbers_per_token() for mixer in mixers)
    return Info(
        model=type(model).__name__,
        context=context,
        parameters=sum(part.parameters for part in parts),
        active=sum(part.active for part in parts),
        embedding=sum(part.embedding for part in parts),
        flops_forward=forward,
        flops_attention=attention,
        flops_training=3 * forward,
        cache_bytes_per_number=cache_bytes,
        cache_bytes_per_token=per_token,
        cache_bytes_at_context=per_token * context,
        parts=parts,
    )


def count(number: float) -> str:
    """Three figures and a suffix, in powers of a thousand: 999, 1.23K, 45.6M, 7.89B, 1.20T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * limit:
            scaled = number / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{number:.0f}"


def size(number: int) -> str:
    """Bytes in powers of 1024: 512 B, 1.5 KiB, 3.00 GiB."""
    value = float(number)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if suffix == "B" else f"{value:.2f} {suffix}"
        value /= 1024
    return f"{value:.2f} TiB"


def render(info: Info) -> Group:
    """The table for humans."""
    parts = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=info.model, title_justify="left")
    parts.add_column("part")
    for heading in ("parameters", "active", "embedding", "FLOPs / token"):
        parts.add_column(heading, justify="right")
    for part in info.parts:
        parts.add_row(part.name, *map(_blank_zero, (part.parameters, part.active, part.embedding, part.flops)))
    parts.add_section()
    decoder_flops = Text(f"{count(info.flops_forward)} (decoder)", style="bold")
    totals = (_blank_zero(number) for number in (info.parameters, info.active, info.embedding))
    parts.add_row("total", *totals, decoder_flops, style="bold")

    costs = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    share = f"{info.flops_attention / info.flops_forward:.0%} attention"
    context = f"at {info.context:,} tokens"
    costs.add_row("FLOPs per token, forward", count(info.flops_forward), f"{share} {context}")
    costs.add_row("FLOPs per token, training", count(info.flops_training), "3 x forward")
    costs.add_row("KV cache, one token", size(info.cache_bytes_per_token), f"{info.cache_bytes_per_number} bytes each")
    costs.add_row("KV cache, one sequence", size(info.cache_bytes_at_context), context)

    footer = Text("How it is counted\n", style="dim")
    for name, how in HOW_COUNTED.items():
        footer.append(f"  {name}: ", style="bold dim").append(f"{how}.\n", style="dim")
    return Group(parts, costs, footer)


def _blank_zero(number: int) -> str:
    return count(number) if number else "-"


def build_meta(source: Path, vocab_size: int | None = None) -> nn.Module:
    """The model that a YAML file or a model directory describes, on the meta device: shapes without memory.

    A YAML file may be a stage's config (`model:` anywhere in it) or a part's own `{class_path, init_args}`.
    `vocab_size` stands in for a tokenizer that is not there yet, and for a decoder's unset `vocab_size`.
    Raises ValueError naming the file and what is wrong with it.
    """
    from mm.decoder.decoder import Decoder
    from mm.model import MultimodalModel
    from mm.parts import build

    path = source / "config.yaml" if source.is_dir() else source
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    parts: tuple[type[nn.Module], ...] = (MultimodalModel, Decoder)
    kinds = {f"{part.__module__}.{part.__name__}": part for part in parts}
    section = _find_section(config, kinds)
    if section is None:
        raise ValueError(f"{path}: no class_path in it is {' or '.join(kinds)}")
    kind, settings = kinds[section["class_path"]], dict(section.get("init_args") or {})
    if kind is MultimodalModel:
        settings["tokenizer"] = _tokenizer(settings.get("tokenizer"), source, vocab_size)
    elif vocab_size is not None:
        settings["vocab_size"] = vocab_size
    elif settings.get("vocab_size") is None:
        raise ValueError(f"{path}: the decoder's vocab_size is not set (its tokenizer decides); give --vocab-size N")
    with torch.device("meta"):
        return build({"class_path": section["class_path"], "init_args": settings}, kind)


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
    """What the model shall take as its tokenizer: a stand-in of `vocab_size`, or the path named by the config."""
    from mm.tokenizers.text import TextTokenizer

    class Vocabulary(TextTokenizer):
        """Only a size: counting needs no text."""

        def __init__(self, size: int) -> None:
            self.vocab_size = size

    if vocab_size is not None:
        return Vocabulary(vocab_size)
    path = source / str(named) if source.is_dir() else Path(str(named))
    if not path.exists():
        raise ValueError(f"{source}: its tokenizer {path} is not there (yet); give --vocab-size N to count without it")
    return str(path)


def main(argv: Sequence[str]) -> int:
    """Prints the table, or JSON. Raises ValueError for what cannot be counted."""
    parser = argparse.ArgumentParser(prog="mm info", description="Parameters, FLOPs and cache bytes of a model.")
    parser.add_argument("model", type=Path, metavar="CONFIG|MODEL_DIR", help="a YAML config, or a model directory")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens already seen (default: 4096)")
    parser.add_argument("--cache-bytes", type=int, default=2, metavar="N", help="bytes of a cached number (default: 2)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="count with this vocabulary, not the tokenizer's")
    parser.add_argument("--json", action="store_true", help="print JSON, exact numbers")
    options = parser.parse_args(argv)
    info = describe(build_meta(options.model, options.vocab_size), options.context, options.cache_bytes)
    if options.json:
        print(info.to_json())
    else:
        Console().print(render(info))
    return 0
