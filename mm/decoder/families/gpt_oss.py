"""gpt-oss 20b and 120b (OpenAI 2025, arXiv 2508.10925): sinks, alternating windows, biased clamped SwiGLU experts.

Gate and up stand in alternating rows of one matrix; published files hold the experts as MXFP4.
"""

from __future__ import annotations

from torch import Tensor

from mm.decoder.families.llama import attention, attention_rules, norms, stem
from mm.decoder.interchange.family import Family, Tree, decoder_tree, part, rms_block
from mm.decoder.interchange.quantised import MXFP4_BLOCK, dequantise_mxfp4
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, Shape, constant, layers, mapped, same

OURS, THEIRS = "layers.{i}.ffn.experts.", "model.layers.{i}.mlp.experts."


def decoder(s: Settings) -> Tree:
    bias, window = s.flag("attention_bias", True), s.integer("sliding_window", 128)
    full = attention(s, 150_000.0, bias=bias, scores={"sinks": True})
    sliding = part(full["class_path"], **full["init_args"], window=window)
    kinds = _layer_types(s)
    return decoder_tree(
        width=s.integer("hidden_size"),
        mixers={name: tree for name, tree in (("sliding", sliding), ("full", full)) if f"{name}/moe" in kinds},
        ffns={"moe": _experts(s)},
        layers=kinds,
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        block=rms_block(s.number("rms_norm_eps", 1e-5)),
    )


def _layer_types(s: Settings) -> list[str]:
    count = s.integer("num_hidden_layers")
    words = s.items("layer_types", ["sliding_attention", "full_attention"] * count)[:count]
    known = {"sliding_attention": "sliding/moe", "full_attention": "full/moe"}
    if len(words) != count or not known.keys() >= set(words):
        s.refuse("layer_types", f"must be {count} of {', '.join(known)}")
    return [known[word] for word in words]


def _experts(s: Settings) -> Tree:
    s.only("hidden_act", "silu")
    s.only("experts_per_token", s.integer("num_experts_per_tok"))  # two names of one number in the published files
    s.only("initial_context_length", _original_length(s))
    alpha, limit = s.number("swiglu_alpha", 1.702), s.number("swiglu_limit", 7.0)
    return part(
        "mm.decoder.ffn.moe.SparseMoE",
        hidden=s.integer("intermediate_size"),
        num_experts=s.integer("num_local_experts"),
        experts_per_token=s.integer("num_experts_per_tok"),
        router=part("mm.decoder.ffn.routers.topk.TopKRouter", logit_bias=True),
        experts=part("mm.decoder.ffn.experts.ClampedSwigluExperts", alpha=alpha, limit=limit),
    )


def _original_length(s: Settings) -> int | None:
    """The length before YaRN, which the published files also call initial_context_length."""
    rope = s.section("rope_parameters") or s.section("rope_scaling")
    return rope.integer("original_max_position_embeddings", None) if rope is not None else None


def weights(s: Settings) -> list[Rule]:
    bias = s.flag("attention_bias", True)
    each = [
        *norms(),
        *attention_rules(s, bias=bias, out_bias=bias),
        same("layers.{i}.mixer.sinks", "model.layers.{i}.self_attn.sinks"),
        same("layers.{i}.ffn.router.weight", "model.layers.{i}.mlp.router.weight"),
        same("layers.{i}.ffn.router.logit_bias", "model.layers.{i}.mlp.router.bias"),
        constant("layers.{i}.ffn.router.bias", 0.0),
        mapped(f"{OURS}gate_up_bias", f"{THEIRS}gate_up_proj_bias", _gate_first, _alternating),
        same(f"{OURS}down_bias", f"{THEIRS}down_proj_bias"),
        *(_mxfp4_matrices() if _is_mxfp4(s) else _matrices()),
    ]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), each)]


def _matrices() -> list[Rule]:
    """Stored input by output."""
    return [
        mapped(
            f"{OURS}gate_up",
            f"{THEIRS}gate_up_proj",
            lambda x: _gate_first(x.transpose(1, 2)),
            lambda x: _alternating(x).transpose(1, 2),
        ),
        mapped(f"{OURS}down", f"{THEIRS}down_proj", lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
    ]


def _is_mxfp4(s: Settings) -> bool:
    how = s.section("quantization_config")
    if how is None:
        return False
    how.only("quant_method", "mxfp4")
    how.items("modules_to_not_convert", [])  # the names say it too: what is packed ends in _blocks and _scales
    return True


def _mxfp4_matrices() -> list[Rule]:
    """Stored output by input, the inputs in blocks of 32 with a scale each."""

    def load(parts: list[Tensor]) -> list[Tensor]:
        return [_gate_first(dequantise_mxfp4(*parts))]

    def load_down(parts: list[Tensor]) -> list[Tensor]:
        return [dequantise_mxfp4(*parts)]

    def shapes(ours: list[Shape]) -> list[Shape]:
        (experts, rows, columns) = ours[0]
        if columns % MXFP4_BLOCK:
            raise ValueError(f"MXFP4: rows of {columns} numbers do not divide into blocks of {MXFP4_BLOCK}")
        scales = (experts, rows, columns // MXFP4_BLOCK)
        return [(*scales, MXFP4_BLOCK // 2), scales]

    def packed(name: str) -> tuple[str, ...]:
        return (f"{THEIRS}{name}_blocks", f"{THEIRS}{name}_scales")

    return [
        Rule((f"{OURS}gate_up",), packed("gate_up_proj"), load, None, shapes),
        Rule((f"{OURS}down",), packed("down_proj"), load_down, None, shapes),
    ]


def _gate_first(x: Tensor) -> Tensor:
    """(E, 2F, ...) of alternating gate and up rows -> all gates, then all ups."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _alternating(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


FAMILY = Family("gpt_oss", "GptOssForCausalLM", decoder, weights)
