"""The splice against a plain loop written from the contract."""

import pytest
import torch
from torch import nn

from mm.fusion.splice import Features, splice
from mm.testing import element_batch
from mm.types import MODALITIES, Tokens


def features_of(*grids, width=8, inline=True):
    torch.manual_seed(0)
    items = [Tokens.of_grid(torch.randn(t * h * w, width), (t, h, w)) for t, h, w in grids]
    return items, Features(Tokens.stack(items), inline)


def embeddings():
    torch.manual_seed(1)
    return nn.Embedding(50, 8), nn.Embedding(3, 8)


ROWS = [
    # document 1 with an image and two branches, document 2 text alone; padding fills the row
    [(1, 0, "5"), (1, 0, "image"), (1, 1, "6"), (1, 1, "7"), (1, 2, "8"), (2, 0, "9"), (2, 0, "10")],
    # two images around text, one of them in a branch
    [(1, 0, "11"), (1, 0, "12"), (1, 1, "image"), (1, 1, "13")],
]


def test_everything_expands_together():
    items, features = features_of((1, 2, 3), (1, 1, 2))
    embed, slots = embeddings()
    batch = element_batch(ROWS, {"image": items})
    out = splice(batch, embed, {"image": features}, slots)
    # row 0: text, 6 image tokens, branch 1 of 2, branch 2 of 1, document 2 of 2 tokens
    assert out.mask.sum(1).tolist() == [12, 5]
    assert out.document_ids[0].tolist() == [1] * 10 + [2] * 2
    assert out.branch_ids[0].tolist() == [0] * 7 + [1, 1, 2] + [0, 0]
    assert out.modality_ids[0].tolist() == [0] + [MODALITIES.index("image")] * 6 + [0] * 5
    # the index runs along each branch from the end of the common part, and restarts with the document
    assert out.index[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 0, 1]
    # M-RoPE: the image spans (1, 2, 3) from 1; text goes on after its largest extent, 3
    assert out.positions[0, 1:7].tolist() == [[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [1, 2, 2], [1, 2, 3]]
    assert out.positions[0, 7:, 0].tolist() == [4, 5, 4, 0, 1]
    assert (out.positions[0, 7:] == out.positions[0, 7:, :1]).all()
    # the first position of a branch is predicted by the last common one
    assert out.predecessor[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7, 6, -1, 10]
    assert out.predecessor[1].tolist()[:5] == [-1, 0, 1, 2, 3]
    torch.testing.assert_close(out.embeddings[0, 1:7], items[0].values)
    torch.testing.assert_close(out.embeddings[1, 2:4], items[1].values)
    torch.testing.assert_close(out.embeddings[0, 0], embed.weight[5])
    torch.testing.assert_close(out.embeddings[1, 4], embed.weight[13])


def test_branch_equals_its_own_document():
    """Positions and indices of [common + branch 2] are those of the same tokens as one plain document."""
    items, features = features_of((1, 2, 2))
    embed, slots = embeddings()
    branched = element_batch([[(1, 0, "5"), (1, 0, "image"), (1, 1, "6"), (1, 2, "7"), (1, 2, "8")]], {"image": items})
    plain = element_batch([[(1, 0, "5"), (1, 0, "image"), (1, 0, "7"), (1, 0, "8")]], {"image": items})
    a = splice(branched, embed, {"image": features}, slots)
    b = splice(plain, embed, {"image": features}, slots)
    keep = a.branch_ids[0] != 1
    assert a.index[0, keep].tolist() == b.index[0].tolist()
    assert a.positions[0, keep].tolist() == b.positions[0].tolist()


def test_wrong_count_names_the_item_and_both_numbers():
    items, features = features_of((1, 2, 2))
    embed, slots = embeddings()
    batch = element_batch([[(1, 0, "image")]], {"image": items}, {"image": [3]})
    with pytest.raises(ValueError, match=r"sample 0: image 0: .* 4 tokens .* counted 3"):
        splice(batch, embed, {"image": features}, slots)


def test_cross_media_stand_beside():
    items, features = features_of((1, 2, 2), (1, 1, 1), inline=False)
    embed, slots = embeddings()
    rows = [[(1, 0, "4"), (1, 0, "image"), (1, 0, "5"), (2, 0, "image"), (2, 0, "6")], [(1, 0, "7")]]
    batch = element_batch(rows, {"image": items}, {"image": [1, 1]})
    out = splice(batch, embed, {"image": features}, slots)
    assert out.mask.sum(1).tolist() == [5, 1]
    assert out.cross is not None
    assert out.cross.document_ids.tolist() == [[1, 1, 1, 1, 2], [0, 0, 0, 0, 0]]
    assert out.cross.index[0].tolist() == [1, 1, 1, 1, 0]
    torch.testing.assert_close(out.cross.values[0, :4], items[0].values)
    torch.testing.assert_close(out.embeddings[0, 1], slots.weight[0])


def test_no_media_at_all_keeps_the_towers_in_the_graph():
    embed, slots = embeddings()
    empty = Tokens(
        torch.zeros(0, 1, 8, requires_grad=True),
        torch.zeros(0, 1, 3, dtype=torch.long),
        torch.zeros(0, 1, dtype=torch.bool),
        torch.ones(0, 3),
    )
    for inline in (True, False):
        out = splice(element_batch([[(1, 0, "4")]]), embed, {"image": Features(empty, inline)}, slots)
        out.embeddings.sum().backward()
        assert empty.values.grad is not None
