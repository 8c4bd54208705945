"""Qwen2 and Qwen2.5 (Qwen Team 2024, arXiv 2407.10671, 2412.15115): Llama with biases on queries, keys and values."""

from __future__ import annotations

from mm.decoder.families.llama import attention, attention_rules, dense_tree, norms, stem, swiglu, swiglu_rules
from mm.decoder.interchange.family import Family, Tree
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers


def decoder(s: Settings) -> Tree:
    s.only("attention_bias", True)
    s.only("mlp_bias", False)
    kinds, window = windowed(s)
    mixers = {kind: attention(s, bias=True, out_bias=False, window=window.get(kind)) for kind in dict.fromkeys(kinds)}
    return dense_tree(s, mixers, [f"{kind}/dense" for kind in kinds], {"dense": swiglu(s)})


def weights(s: Settings) -> list[Rule]:
    rules = [*norms(), *attention_rules(s, bias=True, out_bias=False), *swiglu_rules(s)]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), rules)]


def windowed(s: Settings) -> tuple[list[str], dict[str, int]]:
    """The mixer, "full" or "window", of every layer, and the window's size.

    `layer_types` says it; older files have a window, if any, from layer `max_window_layers` on.
    """
    count, on = s.integer("num_hidden_layers"), s.flag("use_sliding_window", False)
    size, first = s.integer("sliding_window", 4096), s.integer("max_window_layers", 28)
    names = {"full_attention": "full", "sliding_attention": "window"}
    given = s.items("layer_types", None)
    if given is None:
        kinds = ["window" if on and i >= first else "full" for i in range(count)]
    elif len(given) != count or not set(given) <= names.keys():
        s.refuse("layer_types", f"must name {count} layers, each {' or '.join(names)}")
    else:
        kinds = [names[kind] for kind in given]
    if "window" in kinds and not on:
        s.refuse("layer_types", "has sliding_attention, but use_sliding_window is not true")
    return kinds, {"window": size}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", decoder, weights)
