"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2 layers with a few layers of attention, SwiGLU after each."""

from __future__ import annotations

from mm.decoder.families import llama, mamba2
from mm.decoder.interchange.family import Family, Tree, decoder_tree, rms_block
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, fused, layers, same


def decoder(s: Settings) -> Tree:
    s.only("attention_bias", False)
    s.read.add("num_logits_to_keep")  # how many logits a prompt gets there
    eps = s.number("rms_norm_eps", 1e-5)
    attention = llama.attention(s)
    rotary = attention["init_args"]["positions"]["init_args"]
    half = rotary.setdefault("fraction", 0.5)  # the architecture's, where a file does not repeat it
    if s.integer("attn_rotary_emb", None) not in (None, int(half * llama.head_dim(s))):
        s.refuse("attn_rotary_emb", f"only half a head's width, {llama.head_dim(s) // 2}, is supported")
    if half != 0.5:
        s.refuse("partial_rotary_factor", "only 0.5 is supported", half)
    attends = _attends(s)
    return decoder_tree(
        width=s.integer("hidden_size"),
        mixers={"ssm": mamba2.hybrid_mixer(s, eps), "attention": attention},
        ffns={"dense": llama.swiglu(s)},
        layers=["attention/dense" if attend else "ssm/dense" for attend in attends],
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        block=rms_block(eps),
    )


def weights(s: Settings) -> list[Rule]:
    ours, theirs, attends = "layers.{i}.", "model.layers.{i}.", _attends(s)
    hidden, mlp = s.integer("intermediate_size"), f"{theirs}feed_forward."
    every = [
        same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight"),
        same(f"{ours}ffn_norm.weight", f"{theirs}pre_ff_layernorm.weight"),
        fused(f"{ours}ffn.gate_up.weight", [f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"], rows=[hidden, hidden]),
        same(f"{ours}ffn.down.weight", f"{mlp}down_proj.weight"),
    ]
    ssm = mamba2.mixer_rules(f"{theirs}mamba.", s.flag("mamba_proj_bias", False), s.flag("mamba_conv_bias", True))
    return [
        same("embed.weight", "model.embed_tokens.weight"),
        same("norm.weight", "model.final_layernorm.weight"),
        same("head.weight", "lm_head.weight"),
        *layers(range(len(attends)), every),
        *layers((i for i, attend in enumerate(attends) if attend), llama.attention_rules(s)),
        *layers((i for i, attend in enumerate(attends) if not attend), ssm),
    ]


def _attends(s: Settings) -> list[bool]:
    """Per layer: whether it is attention."""
    chosen, count = s.items("attn_layer_indices", []), s.integer("num_hidden_layers")
    if any(not isinstance(i, int) or not 0 <= i < count for i in chosen):
        s.refuse("attn_layer_indices", f"must be numbers of layers, 0 to {count - 1}")
    return [i in chosen for i in range(count)]


FAMILY = Family("bamba", "BambaForCausalLM", decoder, weights)
