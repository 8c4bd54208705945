"""Gemma 3's text decoder (Gemma Team 2025, arXiv 2503.19786): five local layers a global one, q/k norms, two thetas."""

from __future__ import annotations

from mm.decoder.families.gemma2 import gemma_rules, gemma_tree, mixer, score_options, window_kinds
from mm.decoder.interchange.family import Family, Tree, part
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, same

LOCAL_THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0


def decoder(s: Settings) -> Tree:
    kinds = window_kinds(s, every=_pattern(s))
    norm = part("mm.decoder.attention.grouped.QKNorm", kind="head", eps=s.number("rms_norm_eps", 1e-6), offset=1.0)
    s.only("attn_logit_softcapping", None)  # the reference implementation does not apply it
    scores, positions = score_options(s, None), _positions(s)
    mixers = {k: mixer(s, k, positions[k], scores=scores, qk_norm=norm) for k in dict.fromkeys(kinds)}
    return gemma_tree(s, mixers, kinds, softcap=s.number("final_logit_softcapping", None))


def _pattern(s: Settings) -> int:
    """Files spell it in two ways, and both may stand beside layer_types."""
    hidden, open_ = s.integer("_sliding_window_pattern", 6), s.integer("sliding_window_pattern", None)
    return open_ or hidden


def _positions(s: Settings) -> dict[str, Tree]:
    """Rotary for each kind of layer. Older files scale the global layers alone, and name the local theta apart."""
    local_theta = s.number("rope_local_base_freq", LOCAL_THETA)
    if s.has("rope_parameters"):
        return {
            "local": rotary(s, LOCAL_THETA, section="sliding_attention"),
            "full": rotary(s, GLOBAL_THETA, section="full_attention"),
        }
    return {"local": part("mm.decoder.positions.Rotary", theta=local_theta), "full": rotary(s, GLOBAL_THETA)}


def weights(s: Settings) -> list[Rule]:
    norms = [
        same(f"layers.{{i}}.mixer.{name}.weight", f"model.layers.{{i}}.self_attn.{name}.weight")
        for name in ("q_norm", "k_norm")
    ]
    return gemma_rules(s, norms)


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", decoder, weights)
