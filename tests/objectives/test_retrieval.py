"""Recall@k against numbers found by hand."""

from __future__ import annotations

import pytest
import torch

from mm.objectives.retrieval import RetrievalPool
from mm.types import IGNORE

TEXT = torch.eye(3)
# Rows of similarities to the three texts: item 0 is right at once, item 1 second, item 2 last.
MEDIA = torch.tensor([[1.0, 0.5, 0.0], [0.9, 0.8, 0.0], [0.9, 0.85, 0.7]])


def pool(*texts: list[int]) -> RetrievalPool:
    """The three pairs, added in two batches whose texts are padded to different lengths."""
    filled = RetrievalPool()
    for rows in (slice(0, 2), slice(2, 3)):
        longest = max(map(len, texts[rows])) + 1
        ids = torch.tensor([text + [IGNORE] * (longest - len(text)) for text in texts[rows]])
        filled.add(MEDIA[rows], TEXT[rows], ids)
    return filled


def test_recalls_by_hand() -> None:
    filled = pool([5], [5, 6], [7])
    assert len(filled) == 3
    recalls = filled.recalls([1, 2, 3])
    # down the columns: text 0 finds item 0, text 1 finds item 2 before its own, text 2 finds item 2
    expected = {1: (1 / 3, 2 / 3), 2: (2 / 3, 1.0), 3: (1.0, 1.0)}
    for k, (to_text, to_media) in expected.items():
        assert recalls[f"media_to_text_recall_at_{k}"] == pytest.approx(to_text)
        assert recalls[f"text_to_media_recall_at_{k}"] == pytest.approx(to_media)
        assert recalls[f"recall_at_{k}"] == pytest.approx((to_text + to_media) / 2)
        assert recalls[f"chance_at_{k}"] == pytest.approx(k / 3)
    assert len(recalls) == 12


def test_any_item_with_the_same_text_is_right() -> None:
    """Pictures 0 and 1 share a name, whatever padding their batches gave it: picture 1 now finds it at once."""
    recalls = pool([5, 6], [5, 6], [7]).recalls([1])
    assert recalls["media_to_text_recall_at_1"] == pytest.approx(2 / 3)
    assert recalls["text_to_media_recall_at_1"] == pytest.approx(2 / 3)
    across = pool([5], [6], [5]).recalls([1])  # 0 and 2 share one, in different batches
    assert across["media_to_text_recall_at_1"] == pytest.approx(2 / 3)


def test_k_beyond_the_pool_finds_everything() -> None:
    recalls = pool([5], [6], [7]).recalls([10])
    assert recalls == {"media_to_text_recall_at_10": 1.0, "text_to_media_recall_at_10": 1.0,
                       "recall_at_10": 1.0, "chance_at_10": 1.0}  # fmt: skip


def test_an_empty_pool_says_nothing() -> None:
    assert RetrievalPool().recalls([1]) == {} and len(RetrievalPool()) == 0


def test_a_pool_keeps_no_graph() -> None:
    filled = RetrievalPool()
    media = MEDIA.clone().requires_grad_()
    filled.add(media * 1, TEXT, torch.tensor([[1], [2], [3]]))
    assert filled.recalls([1])["recall_at_1"] > 0  # `.item()` of a tensor with a graph would warn
    assert not any(tensor.requires_grad for pair in filled._pairs for tensor in pair[:2])
