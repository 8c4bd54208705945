"""Filters against brute-force definitions, and draws against the distribution that they should follow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.generation.sampling import (
    INVALID,
    Sampler,
    draw,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    scale_temperature,
)

logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12).map(lambda row: torch.tensor([row]))


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits[0].isfinite().nonzero().flatten().tolist())


@given(logit_rows, st.integers(1, 15))
def test_top_k_keeps_the_k_largest_and_their_equals(logits, k):
    values = sorted(logits[0].tolist(), reverse=True)
    smallest = values[min(k, len(values)) - 1]
    assert kept(filter_top_k(logits, k)) == {i for i, value in enumerate(logits[0].tolist()) if value >= smallest}


def test_top_p_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert kept(filter_top_p(logits, 0.4)) == {1}
    assert kept(filter_top_p(logits, 0.6)) == {1, 3}
    assert kept(filter_top_p(logits, 0.76)) == {1, 2, 3}
    assert kept(filter_top_p(logits, 1.0)) == {0, 1, 2, 3}
    assert kept(filter_top_p(logits, 1e-9)) == {1}  # never nothing


@given(logit_rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    probabilities = logits[0].double().softmax(0)
    chosen = kept(filter_top_p(logits, p))
    mass = float(probabilities[list(chosen)].sum())
    smallest = min(float(probabilities[i]) for i in chosen)
    # 1e-5: the filter sums float32 probabilities, 12 of them, each right to 6e-8
    assert mass >= p - 1e-5
    assert len(chosen) == 1 or mass - smallest <= p + 1e-5
    assert int(logits[0].argmax()) in chosen or logits[0].max() == logits[0][list(chosen)].max()


@given(logit_rows, st.floats(0, 1))
def test_min_p_keeps_what_is_likely_enough(logits, p):
    probabilities = logits[0].softmax(0)
    expected = {i for i, value in enumerate(probabilities) if not value < p * probabilities.max()}
    assert kept(filter_min_p(logits, p)) == expected
    assert int(logits[0].argmax()) in expected


def test_filters_leave_their_input_and_other_rows_alone():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 5.0]])
    before = logits.clone()
    for filtered in (filter_top_k(logits, 1), filter_top_p(logits, 0.3), filter_min_p(logits, 0.9)):
        assert filtered.isfinite().tolist() == [[True, False, False], [False, False, True]]
        assert filtered.dtype == torch.float32
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_k": 0}, {"top_k": -3}, {"top_k": True}, {"top_k": 2.5},
        {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": math.nan},
        {"min_p": -0.1}, {"min_p": 1.5}, {"min_p": math.nan},
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}="):
        Sampler(**options)


def test_temperature_zero_is_greedy_not_a_division():
    with pytest.raises(ValueError, match="^temperature=0"):
        scale_temperature(torch.zeros(1, 2), 0)
    ids = Sampler(temperature=0, top_k=2).choose(torch.tensor([[1.0, 3.0, 3.0]]), [])
    assert ids.tolist() == [1]  # the first of equals


@given(logit_rows, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_distribution(logits, uniform):
    token = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
    probabilities = logits[0].double().softmax(0)
    below, above = float(probabilities[:token].sum()), float(probabilities[: token + 1].sum())
    assert below - 1e-12 <= uniform <= above + 1e-12  # float64 sums of 12 numbers in another order


def test_draw_never_gives_a_forbidden_token():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    extremes = [0.0, 0.5, 1 - 2**-53]
    drawn = [int(draw(logits, torch.tensor([u], dtype=torch.float64))) for u in extremes]
    assert drawn == [1, 3, 3]


def test_samples_follow_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    sampler = Sampler(temperature=1.3, top_k=4, top_p=0.95)
    expected = sampler.filter(logits)[0].softmax(0)
    assert expected[4] == 0
    generator, n = torch.Generator().manual_seed(5), 20_000
    ids = sampler.choose(logits.expand(n, -1), [generator] * n)
    counts = torch.bincount(ids, minlength=5).double()
    real = expected > 0
    chi_square = float(((counts - n * expected)[real] ** 2 / (n * expected[real])).sum())
    assert counts[~real].sum() == 0
    assert chi_square < 16.3  # p = 0.001 at 3 degrees of freedom


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True))
def test_a_row_draws_the_same_alone(seeds):
    logits = torch.randn(len(seeds), 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(temperature=1.0)
    together = sampler.choose(logits, [torch.Generator().manual_seed(seed) for seed in seeds])
    alone = [sampler.choose(logits[i : i + 1], [torch.Generator().manual_seed(seed)]) for i, seed in enumerate(seeds)]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_distribution_are_marked(temperature, bad):
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, bad, 9.0], [-math.inf, -math.inf, -math.inf], [-math.inf, 0.0, -9.0]])
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    ids = Sampler(temperature, top_k=1).choose(logits, generators)
    assert ids.tolist() == [1, INVALID, INVALID, 1]  # -inf beside numbers only forbids
