"""Is a family right? A random tiny transformers model, saved, opened by `mm.load`, and compared in float32.

A family's test file gives configs of odd sizes:

    class TestLlama(FamilyChecks):
        cases = {"odd": Case(LlamaConfig(...), length=40), ...}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

import mm
from mm import checkpoint
from mm.decoder.families import family_of
from mm.decoder.interchange.transfer import state
from mm.export import export
from mm.model import MultimodalModel
from mm.types import IGNORE

# Two float32 evaluations of the same sums in another order: a few units in the last place (6e-8) for each of some ten
# roundings on the way, against a mistake in the mathematics, which shows at 1e-2 with weights of this size.
BOUND = 2e-5
GRADIENT_BOUND = 2e-4  # products of two such chains, summed over all positions
NEW_TOKENS = 6
# The plain loops: transformers' grouped products refuse odd sizes.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Case:
    """`length` of the longest row: beyond the window, or the RoPE's original length, where there is one. `edit` may
    change the reference's weights before it is saved. `gradients` are compared too, where asked for. `bound` is
    relative to the largest logit.
    """

    config: PretrainedConfig
    length: int = 24
    gradients: bool = False
    edit: Callable[[Any], None] | None = None
    bound: float = BOUND


@dataclass
class Pair:
    case: Case
    reference: Any
    model: MultimodalModel
    path: Path


def randomise(reference: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part shows: matrices that keep the scale, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "embed" in name or "wte" in name or "wpe" in name:
                p.copy_(0.5 * noise)
            elif p.ndim > 1:
                p.copy_(1.2 * noise / p.shape[-1] ** 0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.3 * noise)


def make_pair(case: Case, path: Path) -> Pair:
    reference = AutoModelForCausalLM.from_config(case.config, **EAGER).float().eval()
    randomise(reference)
    if case.edit is not None:
        with torch.no_grad():
            case.edit(reference)
    reference.save_pretrained(path)
    return Pair(case, reference, mm.load(path), path)


def ragged(case: Case, left: bool) -> tuple[Tensor, Tensor]:
    """ids (3, length) and a mask: rows of the full length, of about half of it, and of 3."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = case.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (3, case.length), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((case.length, case.length // 2 + 1, 3)):
        mask[row, -length if left else 0 : None if left else length] = 1
    return ids, mask


def reference_logits(reference: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """With positions counted from each row's first real token, as `generate` of transformers gives them."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(reference.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return reference(**inputs, use_cache=False).logits


def assert_same(ours: Tensor, theirs: Tensor, mask: Tensor, bound: float) -> None:
    real = mask.bool()
    scale = theirs[real].abs().max()
    assert ours.shape == theirs.shape and scale > 0.1
    worst = (ours - theirs)[real].abs().max() / scale
    assert worst <= bound, f"logits differ by {worst:.2g} of the largest"


class FamilyChecks:
    cases: ClassVar[dict[str, Case]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        chosen, test = list(self.cases), metafunc.function.__name__
        if test == "test_gradients":
            chosen = [name for name in chosen if self.cases[name].gradients]
        if test == "test_our_own_checkpoint_keeps_all_of_it":
            chosen = chosen[:1]  # it goes the same way for all, and takes the longest
        metafunc.parametrize("pair", chosen, indirect=True, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
        return make_pair(cls.cases[request.param], tmp_path_factory.mktemp(request.param))

    @torch.no_grad()
    def test_logits(self, pair: Pair) -> None:
        for left in (True, False):
            ids, mask = ragged(pair.case, left)
            ours = pair.model(input_ids=ids, attention_mask=mask).logits
            assert_same(ours, reference_logits(pair.reference, ids, mask), mask, pair.case.bound)
        everything = torch.ones_like(ids)
        ours = pair.model(input_ids=ids).logits
        assert_same(ours, reference_logits(pair.reference, ids, everything), everything, pair.case.bound)

    @torch.no_grad()
    def test_greedy_decoding_with_a_cache_is_the_full_forward(self, pair: Pair) -> None:
        ids, mask = ragged(pair.case, left=True)
        new = pair.model.generate(ids, mask, max_new_tokens=NEW_TOKENS, temperature=0.0, stop=())
        assert new.shape == (len(ids), NEW_TOKENS)
        for row in range(len(ids)):
            known = ids[row][mask[row].bool()][None]
            full = torch.cat([known, new[row : row + 1]], 1)
            logits = pair.model(input_ids=full).logits[0, known.shape[1] - 1 : -1]
            assert torch.equal(logits.argmax(-1), new[row]), f"row {row}"

    def test_gradients(self, pair: Pair) -> None:
        ids, mask = ragged(pair.case, left=False)
        labels = torch.where(mask.bool(), ids, IGNORE)[:, 1:].reshape(-1)
        for module, logits in (
            (pair.reference, reference_logits(pair.reference, ids, mask)),
            (pair.model, pair.model(input_ids=ids, attention_mask=mask).logits),
        ):
            module.zero_grad()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE).backward()
        theirs = {name: p.grad for name, p in pair.reference.named_parameters()}
        compared = 0
        for name, ours in exported_gradients(pair).items():
            if name in theirs and theirs[name] is not None:
                worst = (ours - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-6)
                assert worst < GRADIENT_BOUND, f"{name}: gradients differ by {worst:.2g} of the largest"
                compared += 1
        assert compared > 5
        pair.model.zero_grad()

    @torch.no_grad()
    def test_what_is_exported_is_what_was_loaded(self, pair: Pair, tmp_path: Path) -> None:
        export(pair.model, tmp_path / "hf")
        options: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32, **EAGER}
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options)
        again, report = loaded
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        ids, mask = ragged(pair.case, left=False)
        theirs, before = (reference_logits(m, ids, mask) for m in (again.eval(), pair.reference))
        assert torch.equal(theirs, before)

    @torch.no_grad()
    def test_our_own_checkpoint_keeps_all_of_it(self, pair: Pair, tmp_path: Path) -> None:
        checkpoint.save(pair.model, tmp_path / "own")
        own = mm.load(tmp_path / "own")
        ids, mask = ragged(pair.case, left=True)
        before, after = (m(input_ids=ids, attention_mask=mask).logits for m in (pair.model, own))
        assert torch.equal(after, before)
        assert own.origin == pair.model.origin


def exported_gradients(pair: Pair) -> dict[str, Tensor]:
    """Our gradients under their names, for the rules that only move numbers about."""
    assert pair.model.origin is not None
    config = pair.model.origin["config"]
    rules = family_of(config["model_type"], "").read(config, "")[1]
    own = {name: x.grad for name, x in state(pair.model.decoder).items()}
    found: dict[str, Tensor] = {}
    for rule in rules:
        gradients = [own.get(name) for name in rule.ours]
        if rule.export is not None and rule.theirs and all(g is not None for g in gradients):
            found |= dict(zip(rule.theirs, rule.export([g for g in gradients if g is not None]), strict=True))
    return found
