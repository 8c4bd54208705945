"""Packing: nothing lost, nothing over the length, little padding; and batches that say where everything stands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.datasets.packing import PackedBatch, best_fit, collate, count_dropped, pack
from mm.datasets.processor import Encoded, EncodedMedia
from mm.types import IGNORE, SLOT_IDS, Sample, Tokens


def encoded(key: str, elements: int, *media: tuple[str, int, int]) -> Encoded:
    """A sample of `elements` elements whose ids count from 10; media are (kind, column, tokens)."""
    ids = torch.arange(10, 10 + elements)
    labels = torch.full((elements,), IGNORE)
    labels[-1] = ids[-1]
    branch_ids = torch.zeros(elements, dtype=torch.int64)
    branch_ids[elements // 2 :] = 1
    items = []
    for kind, column, count in media:
        ids[column] = SLOT_IDS[kind]
        tokens = Tokens.of_grid(torch.full((count, 3), column, dtype=torch.uint8), (1, 1, count))
        items.append(EncodedMedia(kind, tokens, column, count, f"{key}: {kind}", len(tokens)))
    length = elements - len(items) + sum(item.length for item in items)
    return Encoded(Sample(key, []), ids, labels, branch_ids, items, length)


@given(st.lists(st.integers(1, 64), max_size=60))
def test_best_fit_places_each_once_and_never_overfills(lengths: list[int]) -> None:
    bins = best_fit(lengths, 64)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 64 for members in bins)
    assert all(members == sorted(members) for members in bins) and bins == sorted(bins)
    crowded = [sum(lengths[i] for i in members) for members in bins]
    assert all(a + b > 64 for i, a in enumerate(crowded) for b in crowded[:i])  # no two rows could have been one


def test_best_fit_fills_the_fullest_row_that_takes_it() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([], 10) == []


def test_packing_a_mixed_stream_wastes_little() -> None:
    generator = torch.Generator().manual_seed(0)
    spans = ((20, 100, 80), (150, 500, 16))  # lengths of many texts and some pictures
    lengths = [
        n for low, high, number in spans for n in torch.randint(low, high, (number,), generator=generator).tolist()
    ]
    rows = pack([encoded(str(i), n) for i, n in enumerate(lengths)], 1024)
    assert len(rows) == -(-sum(lengths) // 1024)  # no packing has fewer
    longest = max(sum(item.length for item in row) for row in rows)
    assert sum(lengths) / (longest * len(rows)) > 0.98


@given(st.lists(st.integers(1, 20), max_size=30))
def test_even_rows_are_no_more_rows(lengths: list[int]) -> None:
    rows = pack([encoded(str(i), n) for i, n in enumerate(lengths)], 24)
    assert len(rows) <= len(best_fit(lengths, 24)) and all(sum(item.length for item in row) <= 24 for row in rows)
    assert sorted(item.sample.key for row in rows for item in row) == sorted(str(i) for i in range(len(lengths)))


def test_pack_uses_positions_not_elements() -> None:
    rows = pack([encoded("a", 10, ("image", 1, 50)), encoded("b", 50), encoded("c", 41)], 110)
    assert [[item.sample.key for item in row] for row in rows] == [["a"], ["b", "c"]]  # 101 elements, 150 positions
    with pytest.raises(ValueError, match="sample b takes 50 positions; a row has 49"):
        pack([encoded("b", 50)], 49)


def test_collate_numbers_documents_and_pads_with_zero() -> None:
    batch = collate([[encoded("a", 4), encoded("b", 2)], [encoded("c", 3)]])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 10, 11], [10, 11, 12, 0, 0, 0]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.branch_ids.tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE] * 3 + [13, IGNORE, 11], [IGNORE, IGNORE, 12, IGNORE, IGNORE, IGNORE]]
    assert [[sample.key for sample in row] for row in batch.samples] == [["a", "b"], ["c"]]
    assert batch.media == {}
    assert all(t.dtype == torch.int64 for t in (batch.input_ids, batch.labels, batch.document_ids, batch.branch_ids))


def test_collate_stacks_media_by_kind_and_says_where_they_stand() -> None:
    rows = [
        [encoded("a", 4, ("image", 1, 3)), encoded("b", 5, ("audio", 2, 7), ("image", 3, 5))],
        [encoded("c", 4, ("image", 0, 1))],
    ]
    batch = collate(rows)
    assert list(batch.media) == ["image", "audio"]
    images = batch.media["image"]
    assert (
        images.rows.tolist() == [0, 0, 1]
        and images.columns.tolist() == [1, 7, 0]
        and images.lengths.tolist() == [3, 5, 1]
    )
    assert images.names == ["a: image", "b: image", "c: image"]
    assert images.tokens.values.shape == (3, 5, 3) and images.tokens.values.dtype == torch.uint8
    assert images.tokens.mask.sum(1).tolist() == [3, 5, 1] and images.tokens.grid.tolist() == [
        [1, 1, 3],
        [1, 1, 5],
        [1, 1, 1],
    ]
    for kind, media in batch.media.items():
        assert (batch.input_ids[media.rows, media.columns] == SLOT_IDS[kind]).all()
    slots = {kind: int((batch.input_ids == i).sum()) for kind, i in SLOT_IDS.items()}
    assert slots == {"image": 3, "audio": 1, "video": 0}


def test_a_batch_without_samples_still_has_a_row() -> None:
    batch = collate([])
    assert (
        batch.input_ids.tolist() == [[0]]
        and batch.document_ids.tolist() == [[0]]
        and batch.labels.tolist() == [[IGNORE]]
    )
    assert batch.samples == [[]] and batch.media == {}


def test_moves_as_one() -> None:
    moved = collate([[encoded("a", 4, ("image", 1, 3))]]).to("meta")
    assert moved.media["image"].tokens.values.is_meta and moved.input_ids.is_meta and isinstance(moved, PackedBatch)


def test_counts_what_was_left_out() -> None:
    fits, cut, too_long = encoded("a", 3), encoded("b", 3), encoded("c", 3)
    cut.dropped.update(turns=2, media=1)
    too_long.dropped.update(turns=5)
    too_long.fits = False
    assert count_dropped([fits, cut, too_long]) == {
        "samples": 3,
        "dropped_samples": 1,
        "dropped_turns": 2,
        "dropped_media": 1,
    }


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), max_size=30), st.integers(9, 20))
def test_media_budget_holds_in_every_row(items: list[tuple[int, int]], budget: int) -> None:
    lengths, media = [a for a, _ in items], [b for _, b in items]
    bins = best_fit(lengths, 24, media, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(items)))
    assert all(sum(lengths[i] for i in members) <= 24 for members in bins)
    assert all(sum(media[i] for i in members) <= budget for members in bins)


def test_media_budget_counts_tokens_before_the_bridge() -> None:
    resampled = [encoded(key, 10, ("image", 1, 50)) for key in "abc"]
    for item in resampled:
        item.media[0].length, item.length = 4, 13  # what the bridge leaves
    assert len(pack(resampled, 40)) == 1
    rows = pack(resampled, 40, media_budget=100)
    assert sorted(len(row) for row in rows) == [1, 2]
    with pytest.raises(ValueError, match="sample a has 50 media tokens; a row takes 49"):
        pack(resampled, 40, media_budget=49)
