"""The static cache: the tokens of the dynamic one, through a compiled step; and what it cannot do, said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from mm.decoder.attention.linear import LinearAttention
from mm.decoder.ffn.dense import GatedFFN
from mm.generation.caches.static import ROOM, StaticCache
from mm.generation.engine import generate_ids
from mm.model import MultimodalModel
from mm.testing import tiny_decoder
from mm.tokenizers.text import TextTokenizer
from tests.decoder.families.parity import Case, make_pair
from tests.generation.test_transformers import CONFIGS


@pytest.fixture(scope="module")
def model(tokenizer: TextTokenizer) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size)).eval()


@pytest.fixture
def ids() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(10, 60, (3, 9), generator=torch.Generator().manual_seed(0))  # below every vocabulary here
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 2 + [0] * 7])
    return ids, mask


def eagerly(model: MultimodalModel) -> MultimodalModel:
    """The same model, whose step is not compiled: what the cache does, without a minute of compiling."""
    model = copy.copy(model)
    model._compiled_step = model._step
    return model


def test_tokens_of_the_dynamic_cache_compiled(model: MultimodalModel, ids: Any) -> None:
    """Rows of different lengths that end at different times, more tokens than there was room for."""
    options: dict[str, Any] = {"max_new_tokens": ROOM + 8, "stop": {7, 8}, "temperature": 1.0, "seed": [1, 2, 3]}
    expected = generate_ids(model, *ids, **options)
    lengths = {int((row != 0).sum()) for row in expected}
    assert len(lengths) > 1 and expected.shape[1] == ROOM + 8  # or the seeds show too little
    with inductor.patch(compile_threads=1):  # others would be processes, which load torch
        assert torch.equal(generate_ids(model, *ids, **options, cache="static"), expected)


def test_models_keep_to_their_own_programs(tokenizer: TextTokenizer, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps are the same code, and what would tell them apart is not checked. What is traced is not compiled
    here, which takes most of the time."""
    compile = torch.compile

    def trace(function: Any, *, fullgraph: bool, options: dict[str, Any]) -> Any:
        kept = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile(function, fullgraph=fullgraph, backend="eager", options=kept)

    monkeypatch.setattr(torch, "compile", trace)
    torch.manual_seed(1)
    size = tokenizer.vocab_size
    decoders = tiny_decoder(vocab_size=size), tiny_decoder(vocab_size=size, ffn=partial(GatedFFN, hidden=48))
    one, other = (MultimodalModel(tokenizer, decoder).eval() for decoder in decoders)  # alike but for a layer's inside
    for each in (one, other, one):
        expected = generate_ids(each, *ids, max_new_tokens=6, stop={7})
        assert torch.equal(generate_ids(each, *ids, max_new_tokens=6, stop={7}, cache="static"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_published_families_compiled(family: str, ids: Any, tmp_path: Path) -> None:
    """Latent attention, windows and sinks, biases, every kind of router."""
    model = make_pair(Case(CONFIGS[family]), tmp_path).model
    expected = generate_ids(model, *ids, max_new_tokens=20, stop={7})
    assert torch.equal(generate_ids(model, *ids, max_new_tokens=20, stop={7}, cache="static"), expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_published_families(family: str, ids: Any, published: Callable[[str], MultimodalModel]) -> None:
    model = eagerly(published(family))
    expected = generate_ids(model, *ids, max_new_tokens=20, stop={7})
    assert torch.equal(generate_ids(model, *ids, max_new_tokens=20, stop={7}, cache="static"), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"repetition_penalty": 1.3}], ids=str)
def test_tokens_of_the_dynamic_cache(model: MultimodalModel, ids: Any, options: dict[str, Any]) -> None:
    model = eagerly(model)
    expected = generate_ids(model, *ids, max_new_tokens=20, stop={7}, **options)
    assert torch.equal(generate_ids(model, *ids, max_new_tokens=20, stop={7}, cache="static", **options), expected)


@torch.inference_mode()
def test_several_tokens_at_once_and_back(model: MultimodalModel) -> None:
    model = eagerly(model)
    ids = torch.randint(10, 60, (2, ROOM + 30), generator=torch.Generator().manual_seed(1))
    dynamic, static = model.new_cache(), StaticCache(len(model.decoder.layers), model.compiled_step)
    for cache in (dynamic, static):
        model(input_ids=ids[:, :5], cache=cache)
        model.advance(ids[:, 5 : ROOM + 10], cache)
        cache.drop_last(7)
    assert len(dynamic) == len(static) == ROOM + 3
    for start in (ROOM + 3, ROOM + 4):
        there, here = (model.step(ids[:, start], cache) for cache in (dynamic, static))
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)  # sums over more (masked) keys, float32


def test_a_copy_of_a_model_has_no_program(model: MultimodalModel) -> None:
    first = model.compiled_step
    assert copy.deepcopy(model)._compiled_step is None
    assert model.compiled_step is first
    other = copy.deepcopy(model)
    assert other.compiled_step is not first and other.double()._compiled_step is None


def test_what_it_cannot_do(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, model: MultimodalModel) -> None:
    ids = torch.tensor([[11, 12, 13]])
    recurrent = MultimodalModel(
        tokenizer, tiny_decoder(mixer=partial(LinearAttention, heads=4), vocab_size=tokenizer.vocab_size)
    ).eval()
    with pytest.raises(ValueError, match=r"cache='static': recurrent layers"):
        generate_ids(recurrent, ids, cache="static")
    for name in ("draft", "penalty_alpha"):
        options = {"draft": "lookup"} if name == "draft" else {"penalty_alpha": 0.5, "top_k": 4}
        with pytest.raises(ValueError, match=f"{name} and the static cache do not go together"):
            generate_ids(model, ids, cache="static", **options)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"takes a C\+\+ compiler"):
        generate_ids(model, ids, cache="static")
