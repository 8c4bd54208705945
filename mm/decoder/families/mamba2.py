"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): state-space layers and nothing else, one norm and one mixer a layer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mm.decoder.interchange.family import Family, Tree, decoder_tree, part, rms_block
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, mapped, same

# Only how weights begin, and how the stream is rounded below float32.
_NO_MATTER = """rescale_prenorm_residual residual_in_fp32 time_step_floor time_step_max time_step_min time_step_rank
norm_before_gate""".split()  # norm_before_gate: published files have it, no implementation reads it


def decoder(s: Settings) -> Tree:
    heads, head_dim = s.integer("num_heads", 128), s.integer("head_dim", 64)
    width, expand = s.integer("hidden_size", 4096), s.number("expand", 2)
    if width * expand != heads * head_dim:
        s.refuse("expand", f"times hidden_size {width} must be num_heads {heads} x head_dim {head_dim}")
    s.only("hidden_act", "silu")
    s.only("rms_norm", True)
    s.read.update(_NO_MATTER)
    eps = s.number("layer_norm_epsilon", 1e-5)
    mixer = part(
        "mm.decoder.attention.ssm.Mamba2",
        heads=heads,
        head_dim=head_dim,
        state=s.integer("state_size", 128),
        groups=s.integer("n_groups", 8),
        conv=s.integer("conv_kernel", 4),
        conv_bias=s.flag("use_conv_bias", True),
        bias=s.flag("use_bias", False),
        eps=eps,
        chunk=chunk(s, "chunk_size"),
        dt_limit=time_step_limit(s),
    )
    return decoder_tree(
        width=width,
        mixers={"ssm": mixer},
        ffns={},
        layers=["ssm/none"] * s.integer("num_hidden_layers", 64),
        vocab_size=s.integer("vocab_size", 32768),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        block=rms_block(eps),
    )


def weights(s: Settings) -> list[Rule]:
    theirs = "backbone.layers.{i}."
    rules = [
        same("layers.{i}.mixer_norm.weight", f"{theirs}norm.weight"),
        *mixer_rules(f"{theirs}mixer.", s.flag("use_bias", False), s.flag("use_conv_bias", True)),
    ]
    return [
        same("embed.weight", "backbone.embeddings.weight"),
        same("norm.weight", "backbone.norm_f.weight"),
        same("head.weight", "lm_head.weight"),
        *layers(range(s.integer("num_hidden_layers", 64)), rules),
    ]


# --- what the hybrids share ---------------------------------------------------------------------------------------


def hybrid_mixer(s: Settings, eps: float) -> Tree:
    """The Mamba-2 part of a model that has other mixers too (Bamba, Granite 4): keys begin with `mamba_`."""
    width, heads = s.integer("hidden_size"), s.integer("mamba_n_heads", 128)
    inner = s.integer("mamba_expand", 2) * width
    auto = s.values.get("mamba_d_head") in (None, "auto")
    s.read.add("mamba_d_head")
    head_dim = inner // heads if auto else s.integer("mamba_d_head")
    if heads * head_dim != inner:
        s.refuse("mamba_n_heads", f"times mamba_d_head {head_dim} must be mamba_expand x hidden_size, {inner}")
    return part(
        "mm.decoder.attention.ssm.Mamba2",
        heads=heads,
        head_dim=head_dim,
        state=s.integer("mamba_d_state", 256),
        groups=s.integer("mamba_n_groups", 1),
        conv=s.integer("mamba_d_conv", 4),
        conv_bias=s.flag("mamba_conv_bias", True),
        bias=s.flag("mamba_proj_bias", False),
        eps=eps,
        chunk=chunk(s, "mamba_chunk_size"),
        dt_limit=time_step_limit(s),
    )


def mixer_rules(theirs: str, bias: bool, conv_bias: bool) -> list[Rule]:
    """The weights of one Mamba-2 mixer, `theirs` being its prefix. Only the convolution is stored in another shape."""
    names = {
        "in_proj.weight": "in_proj.weight",
        "dt_bias": "dt_bias",
        "a_log": "A_log",
        "skip": "D",
        "norm.weight": "norm.weight",
        "out.weight": "out_proj.weight",
    }
    if bias:
        names |= {"in_proj.bias": "in_proj.bias", "out.bias": "out_proj.bias"}
    if conv_bias:
        names["conv.bias"] = "conv1d.bias"
    rules = [same(f"layers.{{i}}.mixer.{ours}", theirs + name) for ours, name in names.items()]
    return [*rules, mapped("layers.{i}.mixer.conv.weight", f"{theirs}conv1d.weight", _two_axes, _three_axes)]


def chunk(s: Settings, key: str) -> int:
    """Their kernels' 256 is too long for ours, whose memory grows with it; the result does not depend on it."""
    return min(s.integer(key, 256), 64)


def time_step_limit(s: Settings) -> list[float] | None:
    """Bounds of the time step, None for (0, inf). JSON has no infinity: files spell it in several ways."""
    limit = s.items("time_step_limit", None)
    if limit is None:
        return None
    if len(limit) != 2:
        s.refuse("time_step_limit", "must be two numbers")
    low, high = (_number(s, bound) for bound in limit)
    return None if low <= 0 and math.isinf(high) else [low, high]


def _number(s: Settings, value: Any) -> float:
    if isinstance(value, dict):
        value = value.get("__float__")
    try:
        return float(value)
    except (TypeError, ValueError):
        s.refuse("time_step_limit", "must be two numbers")


def _two_axes(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _three_axes(weight: Tensor) -> Tensor:
    return weight.unsqueeze(1)


FAMILY = Family("mamba2", "Mamba2ForCausalLM", decoder, weights, prefix="backbone.")
