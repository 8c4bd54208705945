"""Multi-token prediction: documents and branches, drafting with a cache, its losses, and training (families compare it
with transformers')."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder
from mm.decoder.ffn.balance import Balance
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.decoder.mtp import MultiTokenPrediction
from mm.fusion.splice import splice
from mm.model import MultimodalModel
from mm.objectives.align import Align
from mm.objectives.instruct import NextToken
from mm.parts import build
from mm.testing import element_batch, finite_nonzero_gradients, tiny_decoder, tiny_tokenizer
from mm.training.module import ObjectiveModule
from mm.types import Batch

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mtp"
TOKENIZER = tiny_tokenizer()
ATTENTION = partial(GroupedAttention, heads=4, kv_heads=2)
PREDICTION = partial(MultiTokenPrediction, mixer=ATTENTION, ffn=partial(SparseMoE, hidden=24, num_experts=4), depths=2)
DENSE = partial(MultiTokenPrediction, mixer=ATTENTION, ffn=partial(GatedFFN, hidden=24), depths=2)


def close(actual: Tensor, expected: Tensor) -> None:
    """float32 sums of tens of terms in another order: 1e-5 is ten times that noise."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def mtp_of(decoder: Decoder) -> MultiTokenPrediction:
    assert isinstance(decoder.mtp, MultiTokenPrediction)
    return decoder.mtp


def text(*rows: str) -> Batch:
    """Rows like "1:5 1:6 2:7" or "1.2:8" (document, branch, id)."""
    parsed = []
    for row in rows:
        places = [word.split(":") for word in row.split()]
        parsed.append([(int(place.split(".")[0]), int((place + ".0").split(".")[1]), id) for place, id in places])
    return element_batch(parsed)


def states(decoder: Decoder, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    sequence = splice(batch, decoder.embed, {}, nn.Embedding(3, decoder.width))
    hidden, _ = decoder(sequence)
    return [(state, there) for state, _, there in mtp_of(decoder)(hidden, sequence)]


@torch.no_grad()
def test_documents_and_branches_are_read_as_if_alone() -> None:
    torch.manual_seed(0)
    decoder = tiny_decoder(mtp=PREDICTION).eval()
    alone = states(decoder, text("1:5 1:6 1:7 1:8 1:9"))
    packed = states(decoder, text("1:30 1:31 2:5 2:6 2:7 2:8 2:9 3:40", "1:5 1:6 1:7 1:8 1:9"))
    branched = states(decoder, text("1:5 1:6 1:7 1.1:20 1.1:21 1.2:8 1.2:9"))
    for depth in range(2):
        state, there = alone[depth]
        assert there[0].tolist() == [False] * (depth + 1) + [True] * (4 - depth)
        real = there[0]
        for place, (other, other_there) in (
            ((0, slice(2, 7)), packed[depth]),
            ((1, slice(0, 5)), packed[depth]),
            ((0, [0, 1, 2, 5, 6]), branched[depth]),
        ):
            assert torch.equal(other_there[place], real)
            close(other[place][real], state[0][real])


@torch.no_grad()
def test_drafting_step_by_step_is_the_whole_pass() -> None:
    """A prompt, then one token after the other, each depth with a cache of its own."""
    torch.manual_seed(0)
    decoder = tiny_decoder(mtp=DENSE).eval()
    mtp, batch = mtp_of(decoder), text("1:5 1:6 1:7 1:8 1:9 1:10 1:11 1:12")
    sequence = splice(batch, decoder.embed, {}, nn.Embedding(3, decoder.width))
    hidden, _ = decoder(sequence)
    whole = [hidden, *(state for state, _, _ in mtp(hidden, sequence))]
    for depth in (1, 2):
        cache, parts = mtp.new_cache(), []
        for start, end in ((depth, 5), (5, 6), (6, 8)):
            piece = replace(
                sequence,
                embeddings=sequence.embeddings[:, start:end],
                index=sequence.index[:, start:end],
                positions=sequence.positions[:, start:end],
                document_ids=sequence.document_ids[:, start:end],
                branch_ids=sequence.branch_ids[:, start:end],
            )
            previous = whole[depth - 1][:, start - 1 : end - 1]
            parts.append(mtp.step(depth - 1, previous, piece, cache)[0])
        close(torch.cat(parts, 1), whole[depth][:, depth:])


def supervised(model: MultimodalModel, *rows: str) -> Batch:
    batch = text(*rows)
    batch.labels = torch.where(batch.document_ids > 0, batch.input_ids, batch.labels)
    return batch


def model_with(mtp: Any) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(TOKENIZER, tiny_decoder(vocab_size=TOKENIZER.vocab_size, mtp=mtp))


def test_losses_are_those_of_tokens_further_ahead() -> None:
    """At depth k the main state of place i and the k tokens after it predict token i + k + 1; all are weighed."""
    model = model_with(DENSE)
    batch = supervised(model, "1:5 1:6 1:7 1:8 1:9 1:10", "1:5 1:6 2:7 2:8")
    quiet = Balance(switch=0, z=0)
    plain = NextToken(quiet)(model, batch)
    loss = NextToken(quiet, mtp=(0.3, 0.1))(model, batch)
    assert loss.count == plain.count == 7
    terms, ids = [], batch.input_ids
    for depth, (state, there) in enumerate(states(model.decoder, batch), 1):
        logits = model.decoder.logits(state)
        targets = [(0, t) for t in range(depth + 1, 6)]  # row 1's documents are too short: two tokens each
        losses = [F.cross_entropy(logits[r, t - 1], ids[r, t]) for r, t in targets]
        term = torch.stack(losses).sum()
        assert there.sum() == len(targets) + 1 + (2 if depth == 1 else 0)
        terms.append(term)
        assert loss.parts[f"mtp{depth}"] == pytest.approx(term.item() / len(targets), rel=1e-5)
        assert 0 <= loss.parts[f"mtp{depth}_accuracy"] <= 1
    expected = plain.total.item() + 0.3 * terms[0].item() + 0.1 * terms[1].item()
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_every_depth_and_the_main_model() -> None:
    model = model_with(PREDICTION)
    row = " ".join(f"1:{i}" for i in range(3, 90))
    loss = NextToken(mtp=(1.0, 1.0))(model, supervised(model, row))
    loss.total.backward()
    gradients = finite_nonzero_gradients(model.decoder)
    assert {name.split(".")[0] for name in gradients} >= {"mtp", "layers", "embed", "norm"}


@pytest.mark.parametrize(("mtp", "weights"), [(None, (0.3,)), (DENSE, (0.3,)), (DENSE, (0.3, 0.2, 0.1))])
def test_weights_must_be_as_many_as_depths(mtp: Any, weights: tuple[float, ...]) -> None:
    model = model_with(mtp)
    built = 0 if mtp is None else 2
    with pytest.raises(ValueError, match=f"has {len(weights)} weights, but the decoder's mtp has {built} depths"):
        NextToken(mtp=weights)(model, supervised(model, "1:5 1:6 1:7"))


def test_a_batch_without_labels_trains_nothing_and_breaks_nothing() -> None:
    model = model_with(DENSE)
    loss = NextToken(mtp=(0.3, 0.1))(model, text("1:5", "1:7"))
    loss.total.backward()
    assert loss.count == 0 and loss.total.item() == pytest.approx(0, abs=1e-3)


def test_the_module_balances_prediction_layers_where_they_train_and_freezes_them_where_not() -> None:
    model = model_with(PREDICTION)
    module = ObjectiveModule(model, NextToken(Balance(switch=0, z=0, bias_rate=0.5), mtp=(0.3, 0.1)))
    loss = module.objective(model, supervised(model, "1:5 1:6 1:7 1:8 1:9 1:10"))
    assert loss.output is not None and len([r for r in loss.output.routings if r is not None]) == 3
    module._note_loads(loss)
    module._update_biases()
    assert len(module.moe) == 3 and all(layer.router.bias.any() for layer in module.moe)
    assert any(name.startswith("decoder.mtp.") for name in module.trained)
    for objective in (NextToken(), Align(contrastive="none")):
        module = ObjectiveModule(model, objective)
        assert len(module.moe) == 1 and not any(name.startswith("decoder.mtp.") for name in module.trained)
        assert not any(p.requires_grad for p in mtp_of(model.decoder).parameters())


def test_depths_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depths must be at least 1, not 0"):
        PREDICTION(32, depths=0)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_build_and_learn_with_the_objective(file: Path) -> None:
    """Each depth learns a text that repeats itself: what comes two tokens on is as sure as what comes next."""
    torch.manual_seed(0)
    arguments = {
        "width": 32,
        "mixers": {"m": {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {"heads": 4}}},
        "ffns": {"f": {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 40}}},
        "layers": [{"pattern": ["m/f"]}],
        "mtp": yaml.safe_load(file.read_text()),
        "init_std": None,
    }
    decoder = build({"class_path": "mm.decoder.decoder.Decoder", "init_args": arguments}, Decoder)
    model = MultimodalModel(TOKENIZER, decoder)
    depths = len(mtp_of(decoder).depths)
    objective = build(
        {"class_path": "mm.objectives.instruct.NextToken", "init_args": {"mtp": [0.5] * depths}}, NextToken
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = supervised(model, " ".join(f"1:{5 + i % 4}" for i in range(24)))
    for _ in range(25):
        loss = objective(model, batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    assert all(loss.parts[f"mtp{depth}_accuracy"] > 0.9 for depth in range(1, depths + 1)), loss.parts
