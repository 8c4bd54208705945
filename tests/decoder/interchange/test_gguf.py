"""GGUF files: every number format against the `gguf` package, a whole model, its tokenizer, and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import mm
from mm.decoder.interchange.gguf import GGUFFile
from mm.export import export
from mm.model import MultimodalModel
from mm.testing import tiny_tokenizer
from mm.tokenizers.gguf import from_gguf
from mm.tokenizers.text import TextTokenizer

FORMATS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]
# Blocks are 32 wide, so all widths here are multiples of 32; 6 query heads of 32 on a stream of 96.
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def their_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, number, part = stem.split(".", 3)
        return f"blk.{number}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of queries and keys."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(
    path: Path, reference: Any, kind: Kind, rope_freqs: Tensor | None = None, **metadata: Any
) -> dict[str, Tensor]:
    """Writes the reference's weights with the gguf package; returns what they are once packed, under their names."""
    config = reference.config
    name = config.model_type
    writer = gguf.GGUFWriter(path, name)
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(5)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](f"{name}.{key}", value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    packed = {}
    for key, tensor in reference.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        rows = {"q_proj": heads, "k_proj": kv}.get(key.split(".")[-2])
        data = permute(data, rows) if rows and name == "llama" else data
        form = kind if data.ndim > 1 else Kind.F32
        raw = gguf.quantize(data, form)
        writer.add_tensor(their_name(key), raw, raw_dtype=form)
        unpacked = gguf.dequantize(raw, form).reshape(data.shape)
        packed[key] = torch.from_numpy(unpack(unpacked, rows) if rows and name == "llama" else unpacked.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return packed


def unpack(x: np.ndarray, heads: int) -> np.ndarray:
    """The rows of `permute` put back one by one."""
    half = x.shape[0] // heads // 2
    order = [h * 2 * half + 2 * i + part for h in range(heads) for part in range(2) for i in range(half)]
    return x[order].copy()


def random_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(**(SIZES | {"head_dim": 32, "attn_implementation": "eager"} | changes))
    ).eval()
    return spread(reference)


def spread(reference: Any) -> Any:
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.randn(p.shape) * 0.15 + (1.0 if p.ndim == 1 else 0.0))
    return reference


@torch.no_grad()
def compare(reference: Any, path: Path, packed: dict[str, Tensor]) -> MultimodalModel:
    model = mm.load(path)
    reference.load_state_dict(packed, strict=not reference.config.tie_word_embeddings)
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(input_ids=ids).logits, reference(ids).logits
    # The packed numbers are the same; what is left is the order of float32 sums.
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    return model


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_every_format_unpacks_as_the_gguf_package_does(kind: Kind, tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    raw = gguf.quantize(data, kind)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", np.arange(3, dtype=np.float32))  # so that the second does not begin at 0
    writer.add_tensor("b", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.shapes == {"a": (3,), "b": (3, 5, 64)}
    assert np.array_equal(file.get("b").numpy(), gguf.dequantize(raw, kind).reshape(data.shape))
    assert file.get("b").dtype == torch.float32


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_llama_gives_the_logits_of_its_packed_weights(kind: Kind, tmp_path: Path) -> None:
    reference = random_llama(tie_word_embeddings=kind == Kind.F32)
    compare(reference, tmp_path / "x.gguf", write(tmp_path / "x.gguf", reference, kind))


def test_biased_heads_are_reordered_too_and_qwen_not_at_all(tmp_path: Path) -> None:
    reference = random_llama(attention_bias=True)
    compare(reference, tmp_path / "llama.gguf", write(tmp_path / "llama.gguf", reference, Kind.F32))
    qwen: Any = spread(Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval())
    compare(qwen, tmp_path / "qwen.gguf", write(tmp_path / "qwen.gguf", qwen, Kind.F32))


def test_rope_scaling_from_the_metadata(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    reference = random_llama(rope_parameters=linear)
    metadata = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    compare(reference, tmp_path / "x.gguf", write(tmp_path / "x.gguf", reference, Kind.F32, **metadata))


def test_llama_3_frequencies_stored_as_a_tensor(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    reference = random_llama(rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    plain = 1e4 ** -(torch.arange(0, 32, 2) / 32)
    divisors = (plain / reference.model.rotary_emb.inv_freq).float()
    assert divisors.max() > 7 and divisors.min() == 1
    compare(reference, tmp_path / "x.gguf", write(tmp_path / "x.gguf", reference, Kind.F32, divisors))


def test_a_model_from_gguf_can_be_exported(tmp_path: Path) -> None:
    reference = random_llama()
    model = compare(reference, tmp_path / "x.gguf", write(tmp_path / "x.gguf", reference, Kind.F16))
    assert model.template.stop_ids(model.tokenizer) == {5}
    export(model, tmp_path / "hf")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"clever__trick": 3}, "llama: clever.trick = 3: this setting is not supported"),
        ({"expert_count": 8}, "llama: expert_count = 8: only 0 is supported"),
        ({"rope__scaling__type": "su"}, "llama: rope.scaling.type = 'su': must be none, linear or yarn"),
        ({"attention__sliding_window": 8}, "llama: attention.sliding_window = 8: windows are not read"),
    ],
)
def test_metadata_is_refused_by_name(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, random_llama(), Kind.F32, **metadata)
    with pytest.raises(ValueError) as error:
        mm.load(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, random_llama(), Kind.Q8_0)
    data = path.read_bytes()
    for cut, message in (
        (data[:-200], "the file is cut off: tensor "),
        (data[:900], "the file is cut off or damaged"),
        (data[:20], "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"GGUF" + (9).to_bytes(4, "little") + data[8:], "GGUF version 9 is not supported"),
        (data[:8] + b"\xff" * 8 + data[16:], "the file is cut off or damaged"),
        (b"PK\3\4" + data[4:], "not a GGUF file"),
    ):
        path.write_bytes(cut)
        with pytest.raises(ValueError) as error:
            mm.load(path)
        assert str(error.value).startswith(f"{path}: {message}"), str(error.value)


def test_an_unknown_number_format_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 210), np.uint8), raw_dtype=Kind.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"tensor blk.0.ffn_up.weight is of GGML type 14, .* only F32, F16, Q4_0"):
        GGUFFile(tmp_path / "x.gguf")


def test_a_byte_level_tokenizer_comes_along() -> None:
    tokenizer = tiny_tokenizer()
    state = tokenizer._tokenizer
    tokens = [state.id_to_token(i) for i in range(tokenizer.vocab_size)]
    import json

    merges = [" ".join(pair) for pair in json.loads(state.to_str())["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if token in tokenizer.specials else 1 for token in tokens],
    }
    again = TextTokenizer(from_gguf(metadata))
    text = "what color is the red shape? 12345 naïve <|end|> 日本\n\n  two"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text and again.specials == tokenizer.specials
    for key, value in (("pre", "mystery"), ("model", "bert")):
        with pytest.raises(ValueError, match=f"tokenizer.ggml.{key} = '{value}' is not supported"):
            from_gguf(metadata | {f"tokenizer.ggml.{key}": value})
    with pytest.raises(ValueError, match=r"tokenizer.ggml.merges is missing"):
        from_gguf({key: value for key, value in metadata.items() if not key.endswith("merges")})


def test_a_sentencepiece_tokenizer_comes_along() -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(i), 1) for i, text in enumerate(["▁t", "he", "▁the", "▁", "t", "h", "e", "r", "ed"])]
    columns = zip(*pieces, strict=True)
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")]
    metadata: dict[str, Any] = {name: list(column) for name, column in zip(names, columns, strict=True)}
    tokenizer = TextTokenizer(from_gguf(metadata | {"tokenizer.ggml.model": "llama"}))
    ids = tokenizer.encode("the her</s>é")
    assert [tokenizer.token_bytes(i) for i in ids[:1]] == [b" the"] and 2 not in ids
    assert tokenizer.decode(ids) == "the her</s>é"
