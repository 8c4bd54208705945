"""DeepSeek-V3 and R1 (arXiv 2412.19437): sigmoid routing with a selection bias, FP8 files, multi-token prediction.

The files of a prediction layer repeat the embedding and the head. Both are the main model's (section 2.2), so the
copies are passed over on load and not written on export.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mm.decoder.families.deepseek_v2 import (
    THEIRS,
    expert_rules,
    experts,
    latent_attention,
    latent_rules,
    layer_rules,
    stack,
)
from mm.decoder.families.llama import norms, stem
from mm.decoder.interchange.family import Family, Tree, part, rms_block
from mm.decoder.interchange.quantised import with_fp8
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, same

MTP_LAYERS = "num_nextn_predict_layers"


def decoder(s: Settings) -> Tree:
    pairs = "adjacent" if s.flag("rope_interleave", True) else "halves"
    mixer, moe = latent_attention(s, pairs), experts(s, router(s))
    return stack(s, mixer, moe, **mtp(s, mixer, moe))


def router(s: Settings) -> Tree:
    s.only("scoring_func", "sigmoid")
    s.only("topk_method", "noaux_tc")
    return part(
        "mm.decoder.ffn.routers.sigmoid_bias.SigmoidBiasRouter",
        groups=s.integer("n_group", 8),
        groups_chosen=s.integer("topk_group", 4),
        normalise=s.flag("norm_topk_prob", True),
        scale=s.number("routed_scaling_factor", 2.5),
    )


def mtp(s: Settings, mixer: Tree, moe: Tree) -> dict[str, Any]:
    """Prediction layers are built like the last main layers: latent attention and experts."""
    depths = s.integer(MTP_LAYERS, 0)
    if not depths:
        return {}
    block = rms_block(s.number("rms_norm_eps", 1e-6))
    kind = "mm.decoder.mtp.MultiTokenPrediction"
    return {"mtp": part(kind, mixer=mixer, ffn=moe, depths=depths, block=block)}


def settle(config: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """Files may leave out the prediction layers that the config counts (transformers writes none)."""
    first = rf"(model\.)?layers\.{config.get('num_hidden_layers')}\."
    return config if any(re.match(first, name) for name in stored) else {**config, MTP_LAYERS: 0}


def weights(s: Settings) -> list[Rule]:
    bias = same("layers.{i}.ffn.router.bias", f"{THEIRS}mlp.gate.e_score_correction_bias")
    moe = [*expert_rules(s), bias]
    first, depths = s.integer("num_hidden_layers"), s.integer(MTP_LAYERS, 0)
    rules = [*stem(), *layer_rules(s, moe)]
    for depth in range(depths):
        of_depth = layers([first + depth], [*norms(), *latent_rules(s), *moe, *mtp_rules()])
        rules += [_in_depth(rule, first + depth, depth) for rule in of_depth]
    return _quantised(s, rules)


def mtp_rules() -> list[Rule]:
    pairs = {"token_norm": "enorm", "state_norm": "hnorm", "join": "eh_proj", "norm": "shared_head.norm"}
    return [same(f"mtp.{ours}.weight", f"{THEIRS}{theirs}.weight") for ours, theirs in pairs.items()]


def _in_depth(rule: Rule, layer: int, depth: int) -> Rule:
    """Where the tensors of a prediction layer lie on our side."""
    old_new = ((f"layers.{layer}.", f"mtp.depths.{depth}.layer."), ("mtp.", f"mtp.depths.{depth}."))
    (name,) = rule.ours
    for old, new in old_new:
        if name.startswith(old):
            return replace(rule, ours=(new + name.removeprefix(old),))
    raise AssertionError(f"{name} is of no prediction layer")


def _quantised(s: Settings, rules: list[Rule]) -> list[Rule]:
    """The rules for FP8 files, where the config says so: every projection but the head and `eh_proj`."""
    how = s.section("quantization_config")
    if how is None:
        return rules
    how.only("quant_method", "fp8")
    how.only("fmt", "e4m3")
    how.only("activation_scheme", "dynamic")  # how others compute; here all is computed from float32
    rows, columns = (int(size) for size in how.items("weight_block_size", [128, 128]))
    stored = re.compile(r".*(?<!\.eh)_proj(_with_mqa)?\.weight")
    return [
        with_fp8(rule, (rows, columns)) if rule.theirs and all(map(stored.fullmatch, rule.theirs)) else rule
        for rule in rules
    ]


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    decoder,
    weights,
    ignored=(r".*\.rotary_emb\.inv_freq", r"(model\.)?layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"),
    settle=settle,
)
