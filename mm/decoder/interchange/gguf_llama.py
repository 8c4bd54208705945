"""Llama-like GGUF files under the names that Hugging Face gives to the same settings and tensors.

llama.cpp renames everything, and for the architecture "llama" reorders the rows of queries and keys: it turns
neighbours (2i, 2i + 1) of a head where the original turns (i, i + dim/2).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.decoder.interchange.gguf import GGUFFile, Shape
from mm.decoder.interchange.settings import Settings

# general.architecture -> model_type
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_HARMLESS = ("rope.scaling.finetuned", "vocab_size", "tensor_data_layout", "source.")
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource:
    """A GGUF file as a Source: its tensors under Hugging Face's names. `config` is what config.json would say."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.config = _config(file)
        self._names = {_their_name(name): name for name in file.shapes if name != _ROPE_FACTORS}
        self.shapes: dict[str, Shape] = {new: file.shapes[old] for new, old in self._names.items()}
        self._undo: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.config["model_type"] == "llama":
            heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
            for matrix, count in zip(("q_proj", "k_proj"), heads, strict=True):
                for name in self._names:
                    if f".{matrix}." in name:
                        self._undo[name] = _in_halves(count)

    def get(self, name: str) -> Tensor:
        tensor = self._file.get(self._names[name])
        return self._undo[name](tensor) if name in self._undo else tensor

    def file(self, name: str) -> Path:
        return self._file.path


def _in_halves(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of each head from (2i, 2i + 1) back to (i, i + dim/2)."""

    def undo(x: Tensor) -> Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return undo


def _their_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{kind}"
    block, number, part = (stem.split(".", 2) + ["", ""])[:3]
    if block == "blk" and part in _LAYER_TENSORS:
        return f"model.layers.{number}.{_LAYER_TENSORS[part]}.{kind}"
    return name  # nobody asks for it: the reader then reports it as unexpected


def _config(file: GGUFFile) -> dict[str, Any]:
    """config.json's content. Raises ValueError naming the metadata key that is missing, unknown or unsupported."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture = {architecture!r} is not supported; only {', '.join(ARCHITECTURES)}"
        )
    if "token_embd.weight" not in file.shapes:
        raise ValueError(f"{file.path}: missing tensor token_embd.weight")
    prefix = f"{architecture}."
    known = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix) and not key.removeprefix(prefix).startswith(_HARMLESS)
    }
    s = Settings(known, f"{file.path}: {architecture}")
    width, heads = s.integer("embedding_length"), s.integer("attention.head_count")
    dim = s.integer("attention.key_length", width // heads)
    s.only("attention.value_length", dim)
    s.only("rope.dimension_count", dim)
    s.only("expert_count", 0)
    s.only("expert_used_count", 0)
    config = {
        "model_type": ARCHITECTURES[architecture],
        "hidden_size": width,
        "intermediate_size": s.integer("feed_forward_length"),
        "num_hidden_layers": s.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": s.integer("attention.head_count_kv", heads),
        "head_dim": dim,
        "hidden_act": "silu",
        "rms_norm_eps": s.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": s.integer("context_length"),
        "rope_parameters": _rope(s, file),
        "vocab_size": file.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }
    if architecture == "llama" and "blk.0.attn_q.bias" in file.shapes:
        config["attention_bias"] = True
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in file.metadata:
            config[f"{name}_token_id"] = file.metadata[f"tokenizer.ggml.{name}_token_id"]
    window = s.integer("attention.sliding_window", 0)
    if window:
        s.refuse("attention.sliding_window", "windows are not read from GGUF files; load the original directory")
    s.finish()
    return config


def _rope(s: Settings, file: GGUFFile) -> dict[str, Any]:
    """rope_parameters. Llama 3's frequencies are stored as what each is divided by, whatever rule they came from."""
    rope: dict[str, Any] = {"rope_theta": s.number("rope.freq_base", 10_000.0), "rope_type": "default"}
    kind = s.text("rope.scaling.type", "none")
    factor = s.number("rope.scaling.factor", 1.0)
    original = s.integer("rope.scaling.original_context_length", None)
    attention = s.number("rope.scaling.attn_factor", 1.0)
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind != "none":
        s.refuse("rope.scaling.type", "must be none, linear or yarn")
    if attention != 1.0:
        s.refuse("rope.scaling.attn_factor", "only 1 is supported")
    if _ROPE_FACTORS in file.shapes:
        if kind != "none":
            s.refuse("rope.scaling.type", f"stands beside the tensor {_ROPE_FACTORS}")
        factors = file.get(_ROPE_FACTORS).tolist()
        same = {"short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": s.integer("context_length"), **same}
    return rope
