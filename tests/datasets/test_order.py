"""The order of an epoch: a permutation, the same everywhere, without a list of all samples."""

import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.datasets.order import Permutation, order


@given(st.integers(0, 2000), st.integers(1, 300), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_sample_once(n, block, window, seed, epoch):
    assert sorted(order(seed, epoch, n, block, window)) == list(range(n))


@given(st.integers(1, 5000), st.integers(0, 2**64), st.data())
@settings(max_examples=60, deadline=None)
def test_place_inverts_a_permutation(n, seed, data):
    permutation = Permutation(seed, n)
    index = data.draw(st.integers(0, n - 1))
    assert permutation.place(permutation[index]) == index


def test_the_same_on_every_machine():
    # Frozen: another order here breaks the exact resume of every run in progress.
    assert order(0, 0, 20)[:] == [6, 14, 8, 2, 19, 16, 18, 11, 17, 5, 1, 13, 9, 3, 0, 12, 4, 15, 7, 10]
    assert order(0, 1, 20)[:] == [13, 2, 10, 3, 17, 5, 12, 14, 1, 18, 7, 11, 0, 8, 9, 6, 15, 4, 19, 16]


def test_reading_out_of_order_changes_nothing():
    forward = list(order(7, 3, 950, 100, 3))
    jumping = order(7, 3, 950, 100, 3)
    assert [jumping[place] for place in reversed(range(950))] == forward[::-1]
    assert pickle.loads(pickle.dumps(jumping))[123] == forward[123]


def test_epochs_and_seeds_differ():
    orders = [order(seed, epoch, 1000)[:] for seed in range(3) for epoch in range(3)]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            same = sum(a == b for a, b in zip(one, other, strict=True))
            assert same < 12  # two random permutations agree in 1 +- 1 places


def test_a_window_keeps_few_shards_open_and_mixes_them():
    n, block, window = 100_000, 100, 8
    places = order(1, 0, n, block, window)
    seen = [place // block for place in places[: block * window]]
    assert len(set(seen)) == window  # locality: exactly these shards are read
    neighbours = sum(a == b for a, b in zip(seen, seen[1:], strict=False)) / len(seen)
    assert neighbours == pytest.approx(1 / window, abs=0.06)  # mixed: the next sample is from any of them (5 sigma)
    assert max(seen) - min(seen) > 200  # and they come from far apart


def test_a_billion_samples_cost_nothing():
    places = order(0, 0, 10**9)
    assert len({places[index * 999_983] for index in range(500)}) == 500
    assert sys.getsizeof(pickle.dumps(places)) < 4000


@pytest.mark.parametrize(("n", "block", "window"), [(-1, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_impossible_sizes(n, block, window):
    with pytest.raises(ValueError, match="order needs"):
        order(0, 0, n, block, window)


@pytest.mark.parametrize("place", [10, -11])
def test_outside(place):
    with pytest.raises(IndexError, match="of 10 samples"):
        order(0, 0, 10)[place]


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4096, 16000])
def test_a_table_is_what_single_places_give(n: int) -> None:
    permutation = Permutation(3, n)
    assert permutation.table().tolist() == [permutation[i] for i in range(n)]
