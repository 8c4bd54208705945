"""Steps as graphs, and what a step must not do to be one: wait for the host, copy from it, change sizes or addresses.

There is no GPU here. A recorder stands for CUDA's graphs: it notes a step's operations, undoes them, and repeats them
on the same memory. And tensors that pretend to lie on a GPU (FakeTensorMode) raise where the host would read one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm.decoder.ffn import dispatch
from mm.decoder.ffn.moe import moe_layers
from mm.generation.caches import choose
from mm.generation.caches.static import ROOM, StaticCache
from mm.generation.engine import generate_ids
from mm.model import MultimodalModel
from tests.decoder.families.parity import Case, make_pair
from tests.generation.test_transformers import CONFIGS

LONG, NEW = ROOM - 8, 24  # positions of a prompt, and more tokens than there is room for


class Recorder(TorchDispatchMode):
    """Operations as a graph would hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(given):
                    self.before.setdefault(id(x), (x, x.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for x, was in self.before.values():
            x.copy_(was)

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _memory(old) not in given:  # else it is a view of what was given
                    old.copy_(new)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Graphs:
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        with Recorder() as recorder:
            result = function()
        recorder.undo()

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        return replay, result


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Every static cache's steps are recorded."""
    made = Graphs()
    monkeypatch.setattr(choose, "_static", lambda model, layers: StaticCache(layers, model._step, made.capture))
    monkeypatch.setitem(choose._MAKERS, r"static", choose._static)
    return made


@pytest.fixture
def ids() -> tuple[Tensor, Tensor]:
    """So long that their room is soon full."""
    ids = torch.randint(10, 60, (3, LONG), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([[1] * LONG, [0] * 4 + [1] * (LONG - 4), [1] * 2 + [0] * (LONG - 2)])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "logprobs": 2}], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_replayed_steps_give_the_tokens_of_the_dynamic_cache(
    family: str, options: dict[str, Any], graphs: Graphs, ids: Any, published: Callable[[str], MultimodalModel]
) -> None:
    """Rows that end, beams that change places, and more tokens than there was room for."""
    model = published(family)
    given = options | {"max_new_tokens": NEW}
    given["stop"] = {int(generate_ids(model, *ids, **given, stop=())[0, NEW // 2])}
    expected = generate_ids(model, *ids, **given)
    assert "num_beams" in options or (expected[0, NEW // 2 + 1 :] == 0).all()
    assert torch.equal(generate_ids(model, *ids, **given, cache="static"), expected)
    if "num_beams" not in options:  # beams change places in each step, which moves the tensors: no graph lasts
        grown = ids[0].shape[1] + expected.shape[1] - 1 > ROOM  # room was made, so another graph
        assert graphs.captured == 1 + grown and graphs.replayed > expected.shape[1] // 2


def test_tokens_taken_back(graphs: Graphs, published: Callable[[str], MultimodalModel]) -> None:
    model = published("llama")
    ids = torch.randint(10, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    dynamic, static = model.new_cache(), choose.make(model, "static")
    with torch.inference_mode():
        for cache in (dynamic, static):
            model(input_ids=ids[:, :5], cache=cache)
            for column in range(5, 20):
                model.step(ids[:, column], cache)
            cache.drop_last(6)
        assert len(dynamic) == len(static) == 14
        kept = model.step(ids[:, 20], static)
        first = kept.clone()
        torch.testing.assert_close(first, model.step(ids[:, 20], dynamic), rtol=0, atol=1e-5)
        again = model.step(ids[:, 21], static)
        torch.testing.assert_close(again, model.step(ids[:, 21], dynamic), rtol=0, atol=1e-5)
        assert torch.equal(kept, first)  # what a step gave is its caller's: the next one must not write over it
    assert graphs.captured == 1 and graphs.replayed == 16


class Copies(TorchDispatchMode):
    """Raises where something travels between a GPU and the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.ndim}
        if len(devices) > 1:
            raise AssertionError(f"{func} copies between {' and '.join(sorted(devices))}")
        return result


def on_whole_rows(family: str, folder: Path) -> MultimodalModel:
    """With experts as wide as a GPU's grouped product takes them."""
    config = copy.deepcopy(CONFIGS[family])
    if hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = 16
    return make_pair(Case(config), folder).model


def pretend(model: MultimodalModel, mode: FakeTensorMode, dtype: torch.dtype = torch.bfloat16) -> MultimodalModel:
    """The model as if it lay on a GPU."""
    model = copy.deepcopy(model)
    parts = [*model.named_parameters(), *model.named_buffers()]
    with mode:
        fakes = {name: torch.empty(x.shape, dtype=dtype, device="cuda") for name, x in parts}
    for name, fake in fakes.items():
        holder = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if last in holder._parameters:
            holder._parameters[last] = torch.nn.Parameter(fake, requires_grad=False)
        else:
            holder._buffers[last] = fake
    return model


def step_on_a_pretended_gpu(model: MultimodalModel) -> None:
    """A first pass, as far as it may wait, and then a step of the static cache under the eyes of both detectors."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    model = pretend(model, mode)
    with mode, torch.inference_mode():
        rows, length, layers = 2, 8, len(model.decoder.layers)
        cache = StaticCache(layers, model._step)
        ids = torch.ones(rows, length, dtype=torch.long, device="cuda")
        sequence = model.text_after(ids, ids[:, 0] * 0, ids[:, 0] * 0)
        layout = cache.begin(sequence)
        assert layout.queries.index.is_cuda
        cache.next_index = cache.next_position = ids[:, 0] * length
        for number, layer in enumerate(model.decoder.layers):
            _fill(cache, number, layer.mixer, rows, length, layout)
        with Copies():
            logits = cache.step(model._step, ids[:, 0])
        assert logits.shape == (rows, model.decoder.vocab_size) and logits.is_cuda


def _fill(cache: StaticCache, number: int, mixer: Any, rows: int, length: int, layout: Any) -> None:
    """What a layer's first pass leaves in the cache."""
    if hasattr(mixer, "kv_rank"):
        sizes = {"rope_key": (mixer.rope_dim,), "latent": (mixer.kv_rank,)}
    else:
        sizes = dict.fromkeys(("keys", "values"), (mixer.kv_heads, mixer.head_dim))
    new: Any = {
        name: torch.zeros(rows, length, *size, dtype=torch.bfloat16, device="cuda") for name, size in sizes.items()
    }
    cache.extend(number, layout, **new)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_step_neither_waits_for_the_gpu_nor_sends_it_anything(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_on_the_device", lambda device: True)
    step_on_a_pretended_gpu(on_whole_rows(family, tmp_path))


def test_a_gpu_whose_experts_ask_the_host_has_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in float32 on any GPU, and in bfloat16 on one whose grouped product is a loop."""
    model = on_whole_rows("qwen3_moe", tmp_path)
    for dtype, new_enough, captures in (("bfloat16", True, True), ("bfloat16", False, False), ("float32", True, False)):
        monkeypatch.setattr(dispatch, "_on_the_device", lambda device, answer=new_enough: answer)
        pretended = pretend(model, FakeTensorMode(), getattr(torch, dtype))
        assert isinstance(cache := choose.make(pretended, "static"), StaticCache)
        assert (cache._graph is not None) == captures, (dtype, new_enough)


def test_the_detectors_detect(published: Callable[[str], MultimodalModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = published("llama")
    logits = MultimodalModel.logits

    def waits(self: MultimodalModel, hidden: Tensor) -> Tensor:
        return logits(self, hidden) * float(hidden.amax())

    def sends(self: MultimodalModel, hidden: Tensor) -> Tensor:
        return logits(self, hidden) * torch.ones(1).to(hidden.device)

    monkeypatch.setattr(MultimodalModel, "logits", waits)
    with pytest.raises(DataDependentOutputException):
        step_on_a_pretended_gpu(model)
    monkeypatch.setattr(MultimodalModel, "logits", sends)
    with pytest.raises(AssertionError, match="copies between cpu and cuda"):
        step_on_a_pretended_gpu(model)


@pytest.mark.gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_cuda_graphs_give_the_tokens_of_the_dynamic_cache(family: str, ids: Any, tmp_path: Path) -> None:
    """float32, so that sums in another order seldom change the likeliest token of these random models.

    Experts in it ask the host how many tokens each has, so theirs is a plain step."""
    model = make_pair(Case(CONFIGS[family]), tmp_path).model.cuda()
    given: dict[str, Any] = {"max_new_tokens": NEW, "stop": {7}}
    expected = generate_ids(model, *ids, **given)
    assert isinstance(choose.make(model, "static"), StaticCache)
    captures = choose.make(model, "static")._graph is not None  # type: ignore[attr-defined]
    assert captures == (not moe_layers(model.decoder.layers))
    assert torch.equal(generate_ids(model, *ids, **given, cache="static"), expected)
