"""Next-token loss against cross-entropies computed by hand, one chat at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mm.datasets.packing import collate
from mm.decoder.ffn.balance import Balance, switch_loss, z_loss
from mm.model import MultimodalModel
from mm.objectives.instruct import NextToken
from mm.testing import element_batch, picture, sample_batch, tiny_model
from mm.types import IGNORE, Sample

LM_ALONE = Balance(switch=0, z=0)


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    return tiny_model().train()


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SHOWN = {"role": "user", "content": [{"type": "image", "media": 0}]}
BRANCHES = [[ask("what color?"), answer("red")], [ask("what shape? "), answer("a blue or green shape")]]
PICTURE = Sample("picture", [SHOWN], [picture(1)], BRANCHES)
TALK = Sample("talk", [ask("how many?"), answer("two. "), ask("red?"), answer("green")])
SINGLES = [*(replace(PICTURE, messages=[SHOWN, *branch], branches=[]) for branch in BRANCHES), TALK]


def by_hand(model: MultimodalModel, sample: Sample) -> tuple[Tensor, int, int]:
    """Cross-entropy of an unbranched sample, its supervised tokens, and how many of them come out on top."""
    output = model(sample_batch(model, [[sample]]))
    labels = output.sequence.labels[0]
    places = [t for t in range(len(labels)) if labels[t] != IGNORE]
    scores = output.logits[0].log_softmax(-1)
    loss = -torch.stack([scores[t - 1, labels[t]] for t in places]).sum()
    return loss, len(places), sum(int(scores[t - 1].argmax() == labels[t]) for t in places)


def test_loss_is_the_cross_entropy_of_each_chat_alone(model: MultimodalModel) -> None:
    """Two packed rows, branches and an image: the same as three chats of their own."""
    loss = NextToken(LM_ALONE)(model, sample_batch(model, [[TALK, PICTURE], [TALK]]))
    losses, counts, rights = zip(*[by_hand(model, sample) for sample in [*SINGLES, TALK]], strict=True)
    # sums of some 30 cross-entropies of order 5 in float32
    torch.testing.assert_close(loss.total, torch.stack(losses).sum(), rtol=1e-5, atol=1e-4)
    assert int(loss.count) == sum(counts)
    torch.testing.assert_close(loss.parts["lm"], loss.total.detach() / loss.count)
    torch.testing.assert_close(loss.parts["accuracy"], torch.tensor(sum(rights) / sum(counts)))
    assert set(loss.parts) == {"lm", "accuracy"}


def test_what_is_supervised_is_what_the_assistant_says(model: MultimodalModel) -> None:
    loss = NextToken(LM_ALONE)(model, sample_batch(model, [[TALK]]))
    assert loss.output is not None
    labels = loss.output.sequence.labels[loss.output.sequence.labels != IGNORE]
    assert model.tokenizer.decode(labels.tolist(), skip_specials=False) == "two. <|end|>green<|end|>"


def test_other_tokens_labels_do_not_matter_and_their_inputs_do(model: MultimodalModel) -> None:
    """Only the answer's tokens are targets; the question is what they are predicted from."""
    totals = []
    for question in ("red?", "blue?"):
        batch = sample_batch(model, [[Sample("q", [ask(question), answer("two")])]])
        totals.append(NextToken(LM_ALONE)(model, batch))
    assert totals[0].count == totals[1].count and not torch.equal(totals[0].total, totals[1].total)


def test_a_branchs_first_token_is_predicted_by_the_last_common_one(model: MultimodalModel) -> None:
    batch = element_batch([[(1, 0, "20"), (1, 0, "21"), (1, 1, "30"), (1, 1, "31"), (1, 2, "32")]])
    batch.labels[0, 2], batch.labels[0, 4] = 30, 32
    loss = NextToken(LM_ALONE)(model, batch)
    scores = model(input_ids=torch.tensor([[20, 21]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(loss.total, -scores[1, 30] - scores[1, 32], rtol=1e-5, atol=1e-5)


def test_a_documents_first_token_is_predicted_by_nothing(model: MultimodalModel) -> None:
    """Least of all by the last token of the sample before it in the row."""
    batch = element_batch([[(1, 0, "20"), (1, 0, "21"), (2, 0, "22"), (2, 0, "23")]])
    batch.labels[0, 0], batch.labels[0, 2] = 20, 22
    loss = NextToken(LM_ALONE)(model, batch)
    assert loss.count == 0 and loss.total == 0


@pytest.mark.parametrize("case", ["nobody answers", "nothing at all"])
def test_without_supervised_tokens_the_loss_is_zero_and_has_a_graph(model: MultimodalModel, case: str) -> None:
    rows = [[Sample("q", [ask("red?")])]]
    batch = sample_batch(model, rows) if case == "nobody answers" else collate([])
    loss = NextToken()(model, batch)
    assert loss.count == 0 and loss.total == 0
    assert all(torch.isfinite(part) for part in loss.parts.values())
    model.zero_grad()
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    model.zero_grad()


def test_balance_is_added_once_per_supervised_token(model: MultimodalModel) -> None:
    """So that dividing by the global count leaves the mean loss plus the weighted balance losses."""
    batch = sample_batch(model, [[TALK, PICTURE]])
    plain, balanced = NextToken(LM_ALONE)(model, batch), NextToken(Balance(switch=0.5, z=0.25))(model, batch)
    assert plain.output is not None
    routings = [routing for routing in plain.output.routings if routing is not None]
    assert len(routings) == 1  # the second of two layers
    extra = 0.5 * switch_loss(routings[0]) + 0.25 * z_loss(routings[0])
    torch.testing.assert_close(balanced.total / balanced.count, plain.total / plain.count + extra)
    assert set(balanced.parts) == {"lm", "accuracy", "balance/switch", "balance/z"}
    torch.testing.assert_close(balanced.parts["lm"], plain.parts["lm"])
    assert balanced.total.requires_grad and not any(part.requires_grad for part in balanced.parts.values())
