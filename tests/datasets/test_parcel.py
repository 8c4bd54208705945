"""A batch arrives from a worker as it was made, by one file descriptor."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.datasets import loading
from mm.datasets.parcel import ALIGNMENT, Parcel
from mm.types import Batch, MediaBatch, Tokens

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([[True, False], [False, True]]),
    "half": torch.randn(3, 1, 5).bfloat16(),
    "turned": torch.arange(12.0).view(3, 4).T,
    "spread": torch.tensor(2.5).expand(2, 3),
    "single": torch.tensor(-3),
    "empty": torch.empty(0, 4, dtype=torch.float64),
}


def test_tensors_of_every_kind() -> None:
    found = Parcel.pack({"name": "x", **TENSORS}).open()
    assert found.pop("name") == "x"
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
        assert torch.equal(tensor, TENSORS[name]) and tensor.data_ptr() % ALIGNMENT == 0


def test_what_is_the_same_stays_the_same() -> None:
    ids = torch.arange(3)
    first, others = Parcel.pack((ids, [ids, ids.clone()])).open()
    assert others[0] is first and others[1] is not first and torch.equal(others[1], ids)


def test_it_is_a_copy_of_its_own() -> None:
    ids = torch.arange(3)
    parcel = Parcel.pack([ids])
    ids.zero_()
    [found] = parcel.open()
    assert found.tolist() == [0, 1, 2] and found._is_view()
    found += 1
    assert parcel.open()[0].tolist() == [1, 2, 3]


def test_what_holds_no_tensor() -> None:
    assert Parcel.pack(["nothing", 3]).open() == ["nothing", 3]


def batch(number: int) -> Batch:
    ids = torch.full((2, 5), number)
    media = MediaBatch(
        Tokens(torch.randn(3, 4, 2), torch.zeros(3, 4, 3).long(), torch.ones(3, 4).bool(), torch.ones(3, 3).long()),
        rows=torch.tensor([0, 0, 1]),
        columns=torch.tensor([1, 3, 0]),
        lengths=torch.tensor([4, 4, 4]),
        names=["a", "b", "c"],
    )
    return Batch(ids, ids - 1, ids * 0, ids * 0, {"image": media}, [[], []])


class Batches:
    def __getitem__(self, number: int) -> Batch:
        torch.manual_seed(number)
        return batch(number)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for each in inner for tensor in tensors(each)]


def test_workers_give_the_batches_that_no_workers_give() -> None:
    alone, together = (list(loading._read(Batches(), range(4), workers, 1)) for workers in (0, 2))  # type: ignore[arg-type]
    for mine, theirs in zip(alone, together, strict=True):
        assert mine.media["image"].names == theirs.media["image"].names
        assert len(tensors(mine)) == 11
        for a, b in zip(tensors(mine), tensors(theirs), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(theirs)}) == 1
        assert theirs.input_ids.untyped_storage().is_shared()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list a process's files")
def test_batches_that_are_gone_keep_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for found in loading._read(Batches(), range(20), 1, 1):  # type: ignore[arg-type]
        assert int(found.input_ids[0, 0]) >= 0
    del found
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_worker_says_what_cannot_be_packed() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        Parcel.pack([torch.ones(1), lambda: 0])
