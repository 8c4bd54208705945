"""The stream: a batch is a function of its number, so workers, ranks and resumes change nothing."""

from __future__ import annotations

import collections
import dataclasses
import io
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from mm.datasets.chat_template import ChatTemplate
from mm.datasets.datamodule import DataSet, StreamingDataModule
from mm.datasets.mixture import Mixture
from mm.datasets.packing import PackedBatch
from mm.datasets.shards import write_shards
from mm.datasets.stream import EvalSamples
from mm.tokenizers.image import ImageTokenizer
from mm.types import Media, MediaSpec, Sample


class Letters:
    """One id a character: 100 + code point."""

    def encode(self, text: str) -> list[int]:
        return [100 + ord(c) for c in text]

    def special(self, name: str) -> int:
        return ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>").index(name)


class Listed(list[Sample]):
    """A sample set without shards."""

    def locate(self, index: int) -> dict[str, Any]:
        return {"shard": "", "offset": 0, "key": self[index].key}


class Model(torch.nn.Module):
    """As much of a model as the data side asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.template = Letters(), ChatTemplate("compact")
        self.weight = torch.nn.Parameter(torch.ones(()))

    def media_specs(self) -> dict[str, MediaSpec]:
        return {"image": MediaSpec(ImageTokenizer(patch=4))}

    def encoder_learns(self, kind: str) -> bool:
        raise AssertionError("no shards here hold features")

    def encoder_identity(self, kind: str) -> dict[str, Any]:
        raise AssertionError("no shards here hold features")


class Probe(LightningModule):
    """Trains on nothing and writes down what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.seen: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(keys(batch))
        return self.model.weight * batch.document_ids.float().mean()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self.validated.append(keys(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Exception):
    pass


class Crash(Callback):
    """Ends training as a killed process would: without any last word to the data module."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(pl_module.seen) == self.batches:
            raise Stop


def keys(batch: PackedBatch) -> list[str]:
    return [f"{sample.key}:{len(sample.branches)}" for row in batch.samples for sample in row]


def samples(name: str, number: int) -> list[Sample]:
    out = []
    for i in range(number):
        file = io.BytesIO()
        Image.new("RGB", (4 + 4 * (i % 3), 4), (i, 0, 0)).save(file, "PNG")
        branches = [
            [{"role": "user", "content": "q" * (1 + (i + j) % 5)}, {"role": "assistant", "content": str(j)}]
            for j in range(3)
        ]
        messages = [{"role": "user", "content": [{"type": "image", "media": 0}]}]
        out.append(Sample(f"{name}{i:02}", messages, [Media("image", file.getvalue(), f"{name}{i}.png")], branches))
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataSet]:
    directory = tmp_path_factory.mktemp("shards")
    for name, number in {"a": 23, "b": 9}.items():
        write_shards(samples(name, number), directory / name, samples_per_shard=8)
    return {name: DataSet(str(directory / name)) for name in "ab"}


def data(shards: dict[str, DataSet], **options: Any) -> StreamingDataModule:
    options = {"samples_per_batch": 6, "row_length": 64, "seed": 3, "max_branches": 2, **options}
    module = StreamingDataModule(train=shards, val={"b": shards["b"]}, **options)
    module.attach(Model())
    return module


def batches(module: StreamingDataModule) -> list[PackedBatch]:
    return list(module.train_dataloader())


def test_a_batch_is_full_packed_and_knows_its_number(shards: dict[str, DataSet]) -> None:
    module = data(shards)
    found = batches(module)
    assert len(found) == len(module.train_dataloader()) == 6  # ceil(32 / 6)
    assert [batch.number for batch in found] == list(range(6))
    for batch in found:
        assert len(keys(batch)) == 6 and batch.input_ids.shape[0] < 6
        assert batch.media["image"].tokens.values.dtype == torch.uint8 and len(batch.media["image"].names) == 6
    assert module.counts == {"samples": 36}


def test_one_set_per_batch(shards: dict[str, DataSet]) -> None:
    sets = [{key[0] for key in keys(batch)} for batch in batches(data(shards, one_set_per_batch=True))]
    assert all(len(names) == 1 for names in sets) and set.union(*sets) == {"a", "b"}


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order(shards: dict[str, DataSet]) -> None:
    loader = data(shards, max_branches=None).train_dataloader()
    stream = [loader.batches.samples[g].key for g in range(96)]
    epochs = [stream[:32], stream[32:64], stream[64:]]
    assert all(len(set(epoch)) == 32 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream[:32] != sorted(stream[:32])


def test_branches_are_a_subset_drawn_anew_each_epoch(shards: dict[str, DataSet]) -> None:
    full = {s.key: s.branches for name, n in {"a": 23, "b": 9}.items() for s in samples(name, n)}
    loader = data(shards).train_dataloader()
    chosen = collections.defaultdict(set)
    for g in range(32 * 6):
        sample = loader.batches.samples[g]
        picked = [full[sample.key].index(branch) for branch in sample.branches]
        assert len(picked) == 2 and picked == sorted(set(picked))
        chosen[sample.key].add(tuple(picked))
    # A fixed subset, or one drawn by the same seed for all samples, would leave one or few of the three pairs.
    assert sum(len(pairs) for pairs in chosen.values()) / len(chosen) > 2


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards: dict[str, DataSet], workers: int) -> None:
    alone, together = batches(data(shards)), batches(data(shards, workers=workers))
    assert [batch.number for batch in together] == list(range(6))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.document_ids, other.document_ids)
        assert torch.equal(one.media["image"].tokens.values, other.media["image"].tokens.values)
        assert keys(one) == keys(other)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(shards: dict[str, DataSet], workers: int) -> None:
    before = torch.get_rng_state()
    next(iter(data(shards, workers=workers).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)  # else dropout after a resume would not be what it was


@pytest.mark.parametrize("end", ["teardown", "exception", "dropped"])
def test_workers_end_at_once(shards: dict[str, DataSet], end: str) -> None:
    before = set(multiprocessing.active_children())
    module = data(shards, workers=2)
    stream = iter(module.train_dataloader())
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    start = time.monotonic()
    if end == "teardown":
        module.teardown("fit")
    elif end == "exception":
        module.on_exception(KeyboardInterrupt())
    else:
        del stream
    assert not any(worker.is_alive() for worker in workers)
    # PyTorch waits 5 s for each worker that it cannot tell to end, and kills it then; told, they need milliseconds.
    assert time.monotonic() - start < 4


def test_ranks_share_a_batch_between_them(shards: dict[str, DataSet]) -> None:
    whole = data(shards).train_dataloader().batches
    places = []
    for rank in range(3):
        part = dataclasses.replace(whole, rank=rank, world=3)
        places += part.window(4)
        assert sorted(keys(part[4])) == sorted(f"{s.key}:2" for s in (whole.samples[g] for g in part.window(4)))
    assert places == list(whole.window(4))
    with pytest.raises(ValueError, match="samples_per_batch=6 .*multiple of 4"):
        dataclasses.replace(whole, world=4)


def test_validation_reads_each_sample_once_over_all_ranks(shards: dict[str, DataSet]) -> None:
    loader = data(shards, samples_per_batch=4).val_dataloader()
    whole = loader.batches  # type: ignore[union-attr]
    assert len(loader) == 3
    assert [k for batch in loader for k in sorted(keys(batch))] == [f"b{i:02}:3" for i in range(9)]
    seen = []
    for rank in range(4):
        part = dataclasses.replace(whole, rank=rank, world=4)
        found = [part[number] for number in range(3)]  # as many batches on every rank, though the last ones are empty
        seen += [key for batch in found for key in keys(batch)]
    assert sorted(seen) == [f"b{i:02}:3" for i in range(9)]
    assert all(sample.media[0].data for batch in loader for row in batch.samples for sample in row)


def test_validation_reads_its_sets_one_after_another() -> None:
    both = EvalSamples({"a": Listed(samples("a", 3)), "b": Listed(samples("b", 2))})
    assert both.locate(3)["key"] == "b00"
    assert [both[place].key for place in range(len(both))] == ["a00", "a01", "a02", "b00", "b01"]
    with pytest.raises(IndexError):
        both[5]


def test_training_batches_do_not_carry_bytes_twice(shards: dict[str, DataSet]) -> None:
    sample = batches(data(shards))[0].samples[0][0]
    assert sample.media[0].data == b"" and sample.media[0].name


def test_unpacked_rows_hold_one_sample(shards: dict[str, DataSet]) -> None:
    batch = batches(data(shards, pack=False))[0]
    assert batch.input_ids.shape[0] == 6 and int(batch.document_ids.max()) == 1


def test_samples_that_do_not_fit_are_dropped_counted_and_said(shards: dict[str, DataSet]) -> None:
    module = data(shards, row_length=11)
    with pytest.warns(UserWarning, match="samples so far are dropped: they take more than row_length=11"):
        found = batches(module)
    kept = sum(len(keys(batch)) for batch in found)
    assert 0 < module.counts["dropped_samples"] == 36 - kept < 36 and module.counts["dropped_branches"] > 0
    with pytest.warns(UserWarning, match="dropped"):
        nothing = batches(data(shards, row_length=2))
    assert len(nothing) == 6 and all(batch.document_ids.sum() == 0 for batch in nothing)


# The mixture


def test_weights_hold_everywhere_in_the_stream() -> None:
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    mixture = Mixture({"a": 10, "b": 1000, "c": 7}, dict(weights))
    counts = dict.fromkeys(weights, 0)
    for place in range(2000):
        name, within = mixture.locate(place)
        assert within == counts[name]  # each set is read from its start, without a gap
        counts[name] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - weight * (place + 1)) < 2  # chance would stray by tens
        if (place + 1) % 10 == 0:
            assert counts == {name: round(weight * (place + 1)) for name, weight in weights.items()}


def test_blocks_give_whole_batches_of_one_set() -> None:
    mixture = Mixture({"a": 10, "b": 1000}, {"a": 1, "b": 3}, block=8)
    blocks = [[mixture[8 * number + i] for i in range(8)] for number in range(40)]
    assert all(len({draw.name for draw in block}) == 1 for block in blocks)
    assert sum(block[0].name == "b" for block in blocks) == 30
    drawn = [(draw.epoch, draw.index) for block in blocks for draw in block if draw.name == "a"]
    assert drawn == sorted(drawn, key=lambda draw: draw[0]) and len(set(drawn)) == 80  # epoch by epoch, none twice


def test_the_mixture_is_a_function_of_seed_and_place() -> None:
    def stream(seed: int) -> list[object]:
        mixture = Mixture({"a": 50, "b": 50}, seed=seed)
        return [mixture[place] for place in reversed(range(150))]

    assert stream(1) == stream(1) != stream(2)
    mixture = Mixture({"a": 50, "b": 50}, seed=1)
    one, two = ([mixture[p].index for p in range(100) if mixture[p].name == name] for name in "ab")
    assert sorted(one) == sorted(two) == list(range(50)) and one != two  # equal sizes, still different orders
    far = mixture[10**15]
    assert far.epoch == 10**13 and 0 <= far.index < 50


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ({}, {}, "at least one"),
        ({"a": 0}, {}, "a is empty"),
        ({"a": 5}, {"a": 0.0}, "a: weight 0"),
        ({"a": 5}, {"a": -1.0}, "a: weight -1"),
    ],
)
def test_refuses_mixtures_that_mean_nothing(sizes: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, weights)


# Under Lightning


def trainer(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **options},
    )


def fit(
    shards: dict[str, DataSet], tmp_path: Path, callbacks: list[Callback], ckpt: Path | None = None, **options: Any
) -> Probe:
    stream = {k: options.pop(k) for k in ("workers", "samples_per_batch", "seed") if k in options}
    probe = Probe()
    module = data(shards, **stream)
    module.allow_change = options.pop("allow_change", ())
    module._reader = None  # the trainer's module says what to encode for
    try:
        trainer(tmp_path, *callbacks, **options).fit(probe, module, ckpt_path=ckpt, weights_only=False)
    except Stop:
        pass
    return probe


def saver(tmp_path: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **when)


@pytest.fixture(scope="module")
def unbroken(shards: dict[str, DataSet], tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The keys of every batch of two epochs of six."""
    probe = fit(shards, tmp_path_factory.mktemp("unbroken"), [])
    assert len(probe.seen) == 12 and len(probe.validated) == 4
    return probe.seen


def test_epochs_under_lightning_run_on(shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path) -> None:
    assert len({tuple(batch) for batch in unbroken}) == 12
    assert fit(shards, tmp_path, [], workers=1).seen == unbroken
    assert fit(shards, tmp_path, [], limit_train_batches=4).seen == unbroken[:8]


@pytest.mark.parametrize("step", [1, 5, 6, 8])
def test_resume_goes_on_with_the_next_batch(
    shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path, step: int
) -> None:
    broken = fit(shards, tmp_path, [saver(tmp_path, every_n_train_steps=1), Crash(step + 1)])
    (checkpoint,) = tmp_path.glob(f"*step={step}.ckpt")
    resumed = fit(shards, tmp_path, [], checkpoint)
    assert broken.seen[:step] + resumed.seen == unbroken
    state = torch.load(checkpoint, weights_only=False)["StreamingDataModule"]
    assert state["batches"] == step


def test_resume_with_other_workers_twice(shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path) -> None:
    fit(shards, tmp_path, [saver(tmp_path, every_n_train_steps=4), Crash(5)], workers=1)
    second = fit(
        shards,
        tmp_path,
        [saver(tmp_path, every_n_train_steps=5), Crash(7)],
        tmp_path / "epoch=0-step=4.ckpt",
        workers=2,
    )
    assert second.seen == unbroken[4:11]
    third = fit(shards, tmp_path, [], tmp_path / "epoch=1-step=10.ckpt")
    assert third.seen == unbroken[10:]


def test_resume_counts_batches_not_optimizer_steps(
    shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path
) -> None:
    # Epochs of 7 batches and 4 steps: the last step of an epoch has one batch, so no multiple of the steps is right.
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "samples_per_batch": 5}
    whole = fit(shards, tmp_path, [], **options).seen
    assert len(whole) == 14
    fit(shards, tmp_path, [saver(tmp_path, every_n_train_steps=1), Crash(10)], **options)
    for step, done in {3: 6, 4: 7, 5: 9}.items():
        (checkpoint,) = tmp_path.glob(f"*step={step}.ckpt")
        assert fit(shards, tmp_path, [], checkpoint, **options).seen == whole[done:], step


def test_resume_from_checkpoints_of_other_moments(
    shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "epoch").mkdir()
    fit(shards, tmp_path, [saver(tmp_path / "epoch", every_n_epochs=1, save_on_train_epoch_end=True)], max_epochs=1)
    (checkpoint,) = (tmp_path / "epoch").glob("epoch=0*.ckpt")
    assert fit(shards, tmp_path, [], checkpoint).seen == unbroken[6:]
    (tmp_path / "val").mkdir()
    fit(shards, tmp_path, [saver(tmp_path / "val", every_n_epochs=1)], val_check_interval=3)
    for checkpoint in (tmp_path / "val").glob("*.ckpt"):
        step = int(checkpoint.stem.split("step=")[1])
        assert fit(shards, tmp_path, [], checkpoint, val_check_interval=3).seen == unbroken[step:], checkpoint.name


def test_a_resume_with_other_data_settings_is_refused_by_name(
    shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path
) -> None:
    fit(shards, tmp_path, [saver(tmp_path, every_n_train_steps=4), Crash(5)])
    checkpoint = tmp_path / "epoch=0-step=4.ckpt"
    with pytest.raises(ValueError, match=r"data\.seed: 3 -> 4\..*--allow-change data\.seed"):
        fit(shards, tmp_path, [], checkpoint, seed=4)
    with pytest.raises(ValueError, match=r"data\.train\.a\.shards: .*data\.train\.b\.shards"):
        fit({"a": shards["b"], "b": shards["a"]}, tmp_path, [], checkpoint)
    changed = fit(shards, tmp_path, [], checkpoint, seed=4, allow_change=["data.seed"])
    assert len(changed.seen) == 8 and changed.seen != unbroken[4:]
    probe = Probe()
    trainer(tmp_path).validate(probe, data(shards, seed=4), ckpt_path=checkpoint, weights_only=False)
    assert sorted(sum(probe.validated, [])) == [f"b{i:02}:3" for i in range(9)]


class Note(Callback):
    """Writes the keys of each rank's batches to a file of its own."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        lines = "".join(" ".join(batch) + "\n" for batch in pl_module.seen)
        (Path(trainer.default_root_dir) / f"{trainer.global_rank}.txt").write_text(lines)


@pytest.mark.slow
def test_two_ranks_train_on_what_one_does(
    shards: dict[str, DataSet], unbroken: list[list[str]], tmp_path: Path
) -> None:
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    fit(shards, tmp_path, [Note(), saver(tmp_path, every_n_train_steps=4)], **ranks)
    first, second = ([line.split() for line in (tmp_path / f"{r}.txt").read_text().splitlines()] for r in range(2))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in unbroken]
    # and one rank goes on where two stopped
    assert fit(shards, tmp_path, [], tmp_path / "epoch=0-step=4.ckpt").seen == unbroken[4:]


def test_a_data_module_without_training_data_says_so() -> None:
    module = StreamingDataModule()
    module.attach(Model())
    with pytest.raises(ValueError, match="data.train is empty"):
        module.train_dataloader()
    assert module.val_dataloader() == []
