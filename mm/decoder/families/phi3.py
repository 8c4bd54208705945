"""Phi-3 and Phi-4-mini (Abdin et al. 2024, arXiv 2404.14219): Llama with fused matrices and LongRoPE."""

from __future__ import annotations

from mm.decoder.families.llama import attention, dense_tree, norms, stem
from mm.decoder.interchange.family import Family, Tree
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, same


def decoder(s: Settings) -> Tree:
    s.only("attention_bias", False)
    mixer = attention(s, window=s.integer("sliding_window", None))
    return dense_tree(s, mixers={"full": mixer}, kinds=["full/dense"] * s.integer("num_hidden_layers"), eps=1e-5)


def weights(s: Settings) -> list[Rule]:
    theirs = "model.layers.{i}."
    each = [
        *norms(),
        same("layers.{i}.mixer.qkv.weight", f"{theirs}self_attn.qkv_proj.weight"),
        same("layers.{i}.mixer.out.weight", f"{theirs}self_attn.o_proj.weight"),
        same("layers.{i}.ffn.gate_up.weight", f"{theirs}mlp.gate_up_proj.weight"),
        same("layers.{i}.ffn.down.weight", f"{theirs}mlp.down_proj.weight"),
    ]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), each)]


FAMILY = Family("phi3", "Phi3ForCausalLM", decoder, weights)
