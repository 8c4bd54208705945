"""`mm export` and `mm import`: between our model directories and the formats of others.

mm export --to hf runs/instruct/model somewhere/llama
mm import somewhere/llama runs/llama
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mm import checkpoint
from mm.arguments import Parser
from mm.checkpoint import write_atomically
from mm.decoder.families import family_of
from mm.decoder.interchange import transfer
from mm.model import MultimodalModel
from mm.parts import normal_form

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Arguments of our parts that change how a model is trained or computed, not what it computes.
FREE = frozenset({"vocab_size", "cross_every", "cross_heads", "checkpoint_activations", "init_std", "backend"})


def export(
    model: MultimodalModel, path: str | Path, dtype: torch.dtype | None = None, decoder_only: bool = False
) -> None:
    """Writes a directory that transformers loads; weights in `dtype`, or as they are.

    The model must come from a published checkpoint (trained further or not), with the same parts. What it gained beside
    the decoder (towers, the embedding head) has no place there: `decoder_only` leaves it out. Raises ValueError naming
    the part that is another one, and the tensor that cannot be written.
    """
    path = Path(path)
    if model.origin is None or model.config is None:
        raise ValueError(
            "export: the model did not come from a published checkpoint, so no transformers class is known to be the "
            "same; only what `mm.load` read from one can be written back"
        )
    config = {key: value for key, value in model.origin["config"].items() if key != "quantization_config"}
    family = family_of(str(config.get("model_type")), "family.json")
    tree, rules = family.read(config, "family.json")
    _check_parts(model, tree, family.architecture, decoder_only)
    kind = dtype or next(model.decoder.parameters()).dtype
    for old, new in (("torch_dtype", None), ("dtype", str(kind).removeprefix("torch."))):
        config.pop(old, None)
        config |= {} if new is None else {old: new}
    config |= {"architectures": [family.architecture], "vocab_size": model.decoder.vocab_size}
    path.mkdir(parents=True, exist_ok=True)
    written = set()
    for name, data in _weight_files(transfer.extract(model.decoder, rules), dtype):
        write_atomically(path / name, data)
        written.add(path / name)
    for stale in set(path.glob("model*.safetensors*")) - written:
        stale.unlink()  # of an earlier export, in another number of files
    for name, text in model.origin["files"].items():
        write_atomically(path / name, text.encode())
    if model.tokenizer.has_text:
        model.tokenizer.save(path)
    write_atomically(path / "config.json", json.dumps(config, indent=2).encode())


def _check_parts(model: MultimodalModel, tree: dict[str, Any], architecture: str, decoder_only: bool) -> None:
    """Raises ValueError unless the model's decoder is built as its family says, and nothing stands beside it."""
    assert model.config is not None
    extra = [f"towers.{kind}" for kind in model.towers] + (["embedding_head"] if model.embedding_head else [])
    if extra and not decoder_only:
        raise ValueError(
            f"export: {architecture} has no place for {', '.join(extra)}; --decoder-only writes the text decoder alone"
        )
    if any(getattr(layer, "cross", None) is not None for layer in model.decoder.layers):
        raise ValueError(f"export: {architecture} has no place for the cross-attention layers of this model's bridges")
    now = model.config["init_args"]["decoder"]
    if now == tree:
        return
    before, now = (normal_form(config, type(model.decoder)) for config in (tree, now))  # with all defaults spelled out
    changes = list(_differences("decoder", before, now))
    if changes:
        raise ValueError(
            f"export: the model is no longer what {architecture} computes; changed since it was loaded: "
            + "; ".join(changes[:5])
            + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
        )


def _differences(where: str, before: Any, now: Any) -> Iterator[str]:
    """What differs between two trees, as "path: before -> now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        if before.get("class_path") != now.get("class_path"):
            yield f"{where}: {before.get('class_path')} -> {now.get('class_path')}"
            return
        for key in sorted(before.keys() | now.keys(), key=str):
            if key not in FREE:
                inside = where if key == "init_args" else f"{where}.{key}"
                yield from _differences(inside, before.get(key), now.get(key))
    elif before != now:
        yield f"{where}: {before} -> {now}"


def _weight_files(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, bytes]]:
    """Safetensors files of at most SHARD_BYTES (one tensor at least), and the index if there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        kind = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        tensor = tensor.to(device="cpu", dtype=kind).contiguous()
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        yield "model.safetensors", safetensors_bytes(shards[0], metadata)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        yield name, safetensors_bytes(shard, metadata)
    index = {
        "metadata": {"total_size": sum(x.nbytes for shard in shards for x in shard.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    yield "model.safetensors.index.json", json.dumps(index, indent=2).encode()


def main(argv: Sequence[str]) -> int:
    """`mm export`. Raises ValueError for what cannot be written, and for a target that holds something else."""
    parser = Parser(
        "mm export",
        "Write a model in another library's format.",
        usage="mm export --to hf [--dtype D] [--decoder-only] SRC DST",
        examples=[
            "mm export --to hf runs/llama-moe exported",
            "mm export --to hf --decoder-only runs/demo/model exported",
        ],
    )
    what = "hf: a directory that transformers loads"
    parser.add_argument("--to", required=True, choices=["hf"], metavar="FORMAT", help=what)
    parser.add_argument("source", metavar="SRC", type=Path, help="a model directory (or GGUF file) that mm.load opens")
    parser.add_argument("target", metavar="DST", type=Path, help="the directory to write")
    dtypes = f"the weights' numbers: {', '.join(DTYPES)} (default: as they are)"
    parser.add_argument("--dtype", choices=DTYPES, metavar="D", help=dtypes)
    parser.add_argument("--decoder-only", action="store_true", help="leave out towers and the embedding head")
    options = parser.parse_args(argv)
    _check_target(options.source, options.target, ours=False)
    export(checkpoint.load(options.source), options.target, DTYPES.get(options.dtype), options.decoder_only)
    print(f"{options.target}: written")
    return 0


def import_main(argv: Sequence[str]) -> int:
    """`mm import`. Raises ValueError for what cannot be read, and for a target that holds something else."""
    parser = Parser(
        "mm import",
        "Make a model directory of a Hugging Face directory or a GGUF file.",
        notes="Commands that read a model take these as they are, too; this makes a directory to train from.",
        examples=["mm import Llama-3.1-8B runs/llama", "mm import model-q8_0.gguf runs/model"],
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="the directory with config.json, or the GGUF file")
    parser.add_argument("target", metavar="DST", type=Path, help="the model directory to write")
    options = parser.parse_args(argv)
    _check_target(options.source, options.target, ours=True)
    checkpoint.save(checkpoint.load(options.source), options.target)
    print(f"{options.target}: written")
    return 0


def _check_target(source: Path, target: Path, ours: bool) -> None:
    """One directory cannot be both ours and theirs, and a source is not written over."""
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source itself; name another directory")
    other = target / ("config.json" if ours else "config.yaml")
    if other.is_file():
        raise ValueError(f"{target} holds a model of the other format ({other.name}); name another directory")
