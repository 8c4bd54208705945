"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window, in version 0.1 4096 places."""

from __future__ import annotations

from mm.decoder.families.llama import attention, attention_rules, dense_tree, norms, stem, swiglu, swiglu_rules
from mm.decoder.interchange.family import Family, Tree
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers


def decoder(s: Settings) -> Tree:
    s.only("attention_bias", False)
    s.only("mlp_bias", False)
    # Later versions switch the window off by null; a file that says nothing means the first version's.
    window = s.integer("sliding_window", None) if s.given("sliding_window") else 4096
    kind = "full" if window is None else "window"
    mixers = {kind: attention(s, window=window)}
    return dense_tree(s, mixers, [f"{kind}/dense"] * s.integer("num_hidden_layers"), {"dense": swiglu(s)})


def weights(s: Settings) -> list[Rule]:
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), [*norms(), *attention_rules(s), *swiglu_rules(s)])]


FAMILY = Family("mistral", "MistralForCausalLM", decoder, weights)
