"""Packed documents of short rows as rows of their own: attention and gradients are those of a mask of whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.decoder.attention.apart import apart
from mm.decoder.attention.backends import sdpa
from mm.decoder.attention.windows import StreamingSinks
from mm.decoder.layout import Layout, Places

H, G, D, E = 4, 2, 6, 5  # query and key heads, widths of keys and of values


def layout(branches: bool) -> Layout:
    """Documents of 5, 4, 6 and 3 positions; padding, 6 and 5, the last of which may end in two branches."""
    documents = torch.tensor([[1] * 5 + [2] * 4 + [3] * 6 + [4] * 3 + [0] * 2, [0] * 3 + [1] * 6 + [2] * 5 + [0] * 6])
    index = torch.cat([torch.arange(n) for n in (5, 4, 6, 3, 2, 3, 6, 5, 6)]).view(2, 20)
    branch = torch.zeros_like(index)
    if branches:
        branch[1, 11], branch[1, 12:14] = 1, 2
        index[1, 12:14] -= 1
    places = Places(index, documents, branch)
    return Layout(places, places, index[..., None].expand(-1, -1, 3))


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 20, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((H, D), (G, D), (G, E))]


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("window", [None, 3, StreamingSinks(1, 2)])
@pytest.mark.parametrize("options", ["", "softcap sinks", "slopes"])
def test_values_and_gradients_are_those_of_whole_rows(branches, window, options):
    lay = layout(branches)
    assert apart(lay) is not None and apart(lay) is apart(lay)  # once a forward pass
    given: dict[str, Any] = {"scale": 0.7, "window": window, "softcap": None, "sinks": None, "slopes": None}
    given |= {"softcap": 1.5, "sinks": torch.randn(H)} if "sinks" in options else {}
    given |= {"slopes": torch.rand(H)} if "slopes" in options else {}
    real, found = lay.queries.document_ids > 0, []
    for attend in (sdpa.attend, sdpa._masked):
        parts = inputs()
        out = attend(*parts, lay, **given)  # type: ignore[operator]
        grads = torch.autograd.grad(out[real].square().sum(), parts)
        found.append([out[real], *grads])
        if attend is sdpa.attend:
            assert not out[~real].any()  # padding is seen by nobody, and says nothing
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)  # the softmax may be float32


def test_it_holds_fewer_pairs_or_is_not_done():
    assert apart(layout(True)).layout.queries.index.shape == (6, 6)  # type: ignore[union-attr]
    index = torch.arange(20)[None]
    for ids in (torch.ones(1, 20), torch.zeros(1, 20), (torch.arange(20)[None] >= 15) + 1):  # the last: 15 and 5
        places = Places(index, ids.long(), torch.zeros_like(index))
        assert apart(Layout(places, places, index[..., None].expand(-1, -1, 3))) is None
