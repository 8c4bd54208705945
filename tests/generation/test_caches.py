"""Caches that keep less: exact where they say so, and bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.decoder.attention.windows import StreamingSinks
from mm.decoder.decoder import Decoder
from mm.generation.caches import EvictingCache, QuantisedCache, WindowedCache, make
from mm.generation.caches.quantised import pack, unpack
from mm.generation.engine import generate_ids
from mm.generation.options import Decoding
from mm.model import MultimodalModel
from mm.parts import build

WIDTH, VOCABULARY = 24, 40
GROUPED = "mm.decoder.attention.grouped.GroupedAttention"
ROTARY = {"class_path": "mm.decoder.positions.Rotary", "init_args": {}}
ALIBI = {"class_path": "mm.decoder.positions.Alibi", "init_args": {}}
LATENT = {
    "class_path": "mm.decoder.attention.latent.LatentAttention",
    "init_args": {"heads": 2, "kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "v_dim": 6},
}


def model_of(tokenizer, *mixers: dict, **options) -> MultimodalModel:
    """A layer for each mixer, weights large enough that every position matters."""
    torch.manual_seed(0)
    ffn = {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 32}}
    arguments = {
        "width": WIDTH, "mixers": {f"m{i}": mixer for i, mixer in enumerate(mixers)}, "ffns": {"f": ffn},
        "layers": [{"pattern": [f"m{i}/f" for i in range(len(mixers))]}], "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    decoder = build({"class_path": "mm.decoder.decoder.Decoder", "init_args": arguments | options}, Decoder)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.3 / parameter.shape[-1] ** 0.5)
    return MultimodalModel(tokenizer, decoder).eval()


def grouped(**arguments) -> dict:
    return {"class_path": GROUPED, "init_args": {"heads": 4, "kv_heads": 2} | arguments}


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Rows of 13, 6 and 2 tokens."""
    ids = torch.randint(0, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([[1] * n + [0] * (13 - n) for n in (13, 6, 2)])


def steps(model: MultimodalModel, cache, prompts: tuple[Tensor, Tensor], further: Tensor) -> Tensor:
    """Logits after the prompts and after each of further (B, N): (B, N + 1, V)."""
    ids, mask = prompts
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, cache=cache)
        logits = [output.logits[torch.arange(len(ids)), mask.sum(1) - 1]]
        logits += [model.step(further[:, n], cache) for n in range(further.shape[1])]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("window", [5, {"class_path": "mm.decoder.attention.windows.StreamingSinks",
                                        "init_args": {"first": 2, "last": 4}}])  # fmt: skip
@pytest.mark.parametrize("positions", [ROTARY, ALIBI], ids=["rotary", "alibi"])
@pytest.mark.parametrize("full", [True, False], ids=["beside_full", "alone"])
def test_a_window_is_exact_and_bounded(tokenizer, prompts, window, positions, full) -> None:
    layers = [grouped(window=window, positions=positions), *([grouped(positions=positions)] if full else [])]
    model = model_of(tokenizer, *layers)
    further = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))
    cache, everything = WindowedCache(len(layers)), model.new_cache()
    found = steps(model, cache, prompts, further)
    expected = steps(model, everything, prompts, further)
    # The same sums over keys in another order, float32.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    kept = cache.layers[0]["keys"].shape[1]
    assert kept == (5 if window == 5 else 6) < everything.layers[0]["keys"].shape[1]
    assert len(cache) == (13 + 20 if full else 1)


def test_a_window_goes_on_with_several_tokens_at_once(tokenizer, prompts) -> None:
    model = model_of(tokenizer, grouped(window=5), grouped(window=8))
    ids, mask = prompts
    cache, everything = WindowedCache(2), model.new_cache()
    with torch.no_grad():
        for length in (4, 1, 7, 1, 1, 2):
            more = torch.randint(0, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(length))
            if cache.places is None:
                model(input_ids=ids, attention_mask=mask, cache=cache)
                model(input_ids=ids, attention_mask=mask, cache=everything)
            lengths = torch.tensor([length, max(1, length - 1), 1])
            found, expected = (model.advance(more, each, lengths) for each in (cache, everything))
            real = torch.arange(length) < lengths[:, None]
            torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


def test_rows_leave_and_double(tokenizer, prompts) -> None:
    model = model_of(tokenizer, grouped(window=5))
    further = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    alone = WindowedCache(1)
    expected = steps(model, alone, prompts, further)
    cache = WindowedCache(1)
    steps(model, cache, prompts, further[:, :4])
    rows = torch.tensor([2, 0, 2])
    cache.keep(rows)
    with torch.no_grad():
        for n in range(4, 8):
            logits = model.step(further[rows, n], cache)
            torch.testing.assert_close(logits, expected[rows, n + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixer", [grouped(), grouped(positions=ALIBI), grouped(positions=None), LATENT],
                         ids=["rotary", "alibi", "none", "latent"])  # fmt: skip
def test_sinks_are_those_of_a_prompt_that_has_only_them(tokenizer, mixer) -> None:
    """One layer: what it kept are functions of single tokens, so the paper's rule has a plain form: the first tokens
    and the last ones, put side by side, are the prompt."""
    model = model_of(tokenizer, mixer)
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(3))
    cache = WindowedCache(1, StreamingSinks(3, 6))
    found = steps(model, cache, (ids[:, :4], torch.ones(2, 4, dtype=torch.long)), ids[:, 4:])
    for length in (5, 9, 10, 17, 30):
        kept = ids[:, :length] if length <= 9 else torch.cat([ids[:, :3], ids[:, length - 6 : length]], 1)
        with torch.no_grad():
            expected = model(input_ids=kept).logits[:, -1]
        torch.testing.assert_close(found[:, length - 4], expected, atol=1e-4, rtol=1e-4)
    assert cache.layers[0][next(iter(cache.layers[0]))].shape[1] == 9 and len(cache) == 1


def test_sinks_after_a_long_prompt(tokenizer) -> None:
    model = model_of(tokenizer, grouped(), grouped())
    ids = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    cache = WindowedCache(2, StreamingSinks(2, 5))
    logits = steps(model, cache, (ids[:, :20], torch.ones(1, 20, dtype=torch.long)), ids[:, 20:])
    assert logits.isfinite().all() and cache.layers[1]["keys"].shape[1] == 7
    size = cache.bytes()
    with torch.no_grad():
        for _ in range(30):
            model.step(ids[:, 0], cache)
    assert cache.bytes() == size


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [64, 48, 10])
def test_rounding_is_as_small_as_the_bits_allow(size: int, bits: int) -> None:
    x = 5 * torch.randn(3, 4, 2, size, generator=torch.Generator().manual_seed(size))
    packed = pack(x, bits)
    groups = -(-size // 32)
    assert packed["codes"].dtype == torch.uint8 and packed["codes"].shape[-1] == groups * 32 * bits // 8
    off = (unpack(**packed, bits=bits, size=size) - x).abs()
    spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    # Half a step, and what 16 bits cost: the least is off by 2^-11 of some 15, the scale by 2^-11 over all the steps.
    assert (off <= spread / (2**bits - 1) / 2 + spread / 2**11 + 1e-2).all()
    assert off.mean() > 0
    still = torch.zeros(1, 1, 1, size)
    assert torch.equal(unpack(**pack(still, bits), bits=bits, size=size), still)
    huge = torch.full((1, size), 1e6)
    assert unpack(**pack(huge, bits), bits=bits, size=size).isfinite().all()


WIDE_LATENT = {"class_path": LATENT["class_path"], "init_args": LATENT["init_args"] | {"kv_rank": 64, "rope_dim": 32}}


@pytest.mark.parametrize("mixer", [grouped(head_dim=32), WIDE_LATENT], ids=["grouped", "latent"])
def test_int8_is_near_and_smaller(tokenizer, prompts, mixer) -> None:
    model = model_of(tokenizer, mixer, mixer)
    further = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(2))
    everything = model.new_cache()
    expected = steps(model, everything, prompts, further)
    caches = {bits: QuantisedCache(2, bits) for bits in (8, 4)}
    off = {bits: (steps(model, cache, prompts, further) - expected).std() for bits, cache in caches.items()}
    assert 0 < off[8] < 0.03 * expected.std() and off[8] < off[4]
    assert caches[4].bytes() < caches[8].bytes() < 0.6 * everything.bytes()


def test_eviction_keeps_what_is_attended_to(tokenizer) -> None:
    """A layer whose queries look for one kind of token: it stays, however long ago it was."""
    model = model_of(tokenizer, grouped(heads=2, kv_heads=2, positions=None))
    mixer: Any = model.decoder.layers[0].get_submodule("mixer")
    embed = model.decoder.embed.weight
    with torch.no_grad():
        embed.normal_()
        mixer.qkv.weight.zero_()
        head = WIDTH // 2
        for row in range(0, WIDTH, head):
            mixer.qkv.weight[row] = 0.3  # every query points one way in a token's sum
        for row in range(WIDTH, 2 * WIDTH, head):
            mixer.qkv.weight[row] = embed[7] - embed.mean(0)  # and so do the keys of token 7
        embed += 1.0
        mixer.qkv.weight[2 * WIDTH :] = torch.eye(WIDTH)
    ids = torch.randint(8, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    ids[:, 20] = 7
    cache = EvictingCache(1, budget=16, recent=8)
    steps(model, cache, (ids[:, :40], torch.ones(2, 40, dtype=torch.long)), ids[:, 40:])
    kept = cache.layers[0]["index"]
    assert kept.shape == (2, 16)
    assert (kept == 20).any(1).all()
    assert [row[-8:].tolist() for row in kept] == [list(range(52, 60))] * 2


def test_a_budget_that_is_never_reached_changes_nothing(tokenizer, prompts) -> None:
    model = model_of(tokenizer, grouped(), grouped(window=4))
    further = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(2))
    found = steps(model, EvictingCache(2, 64), prompts, further)
    assert torch.equal(found, steps(model, model.new_cache(), prompts, further))


def test_by_name(tokenizer, prompts) -> None:
    ids, mask = prompts
    model = model_of(tokenizer, grouped(window=6), grouped())
    expected = generate_ids(model, ids, mask, 12, stop=[])
    for name in ("window", "int8", "sinks:4+64", "evict:64"):
        assert torch.equal(generate_ids(model, ids, mask, 12, stop=[], cache=name), expected), name
    assert generate_ids(model, ids, mask, 12, stop=[], cache="int4").shape == expected.shape
    beams = generate_ids(model, ids, mask, 12, stop=[], num_beams=3)
    assert torch.equal(generate_ids(model, ids, mask, 12, stop=[], num_beams=3, cache="window"), beams)


@pytest.mark.parametrize("name", ["", "static2", "sinks:4", "sinks:4+0", "evict:5", "int16"])
def test_nonsense_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cache=|must be"):
        Decoding(cache=name)


def test_what_a_model_cannot_have_is_refused(tokenizer) -> None:
    embedding = {"class_path": "mm.decoder.embedding.Embedding", "init_args": {"positions": "learned", "length": 64}}
    model = model_of(tokenizer, grouped(positions=None), embedding=embedding)
    with pytest.raises(ValueError, match="adds positions to its input"):
        make(model, "sinks:4+8")
    with pytest.raises(ValueError, match="latent attention"):
        generate_ids(model_of(tokenizer, LATENT), torch.ones(1, 3, dtype=torch.long), cache="evict:64")
