"""The LightningModule on a real Trainer: what learns, and that the loss is one mean over the whole global batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mm.checkpoint import load, save
from mm.decoder.ffn.balance import Balance
from mm.model import MultimodalModel
from mm.objectives.align import Align, embed_pairs
from mm.objectives.instruct import NextToken
from mm.objectives.retrieval import RetrievalPool
from mm.parts import build
from mm.testing import picture, sample_batch, tiny_model, tiny_tokenizer
from mm.training.module import AlignmentModule, InstructionModule
from mm.training.optim import OptimConfig
from mm.types import Batch, Sample

ROOT = Path(__file__).resolve().parents[2]
LM_ALONE = Balance(switch=0, z=0)


@dataclass
class PlainGradient(OptimConfig):
    """Steps by the gradient itself: AdamW's first step is its sign, which says nothing of its size."""

    lr: float = 0.05
    warmup: float = 0

    def optimizer(self, module: torch.nn.Module) -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=self.lr)


class Ready:
    """A loader of batches that are made already. (Lightning would take a plain list for several loaders.)"""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def fit(module: pl.LightningModule, batches: Sequence[Batch], **options: Any) -> pl.Trainer:
    trainer = quiet(max_steps=1, **options)
    trainer.fit(module, train_dataloaders=Ready(batches))
    return trainer


def quiet(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def chat(key: str, answer: str | None, image: int | None = None) -> Sample:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "what color?"}]
    if image is not None:
        parts.insert(0, {"type": "image", "media": 0})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Sample(key, messages, [] if image is None else [picture(image)])


ANSWERS = ["red", "a green shape or two blue beeps", None, None, "two", "how many", "green", "the red or the blue one"]
SAMPLES = [chat(str(i), answer, i if i % 3 else None) for i, answer in enumerate(ANSWERS)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("train", "names"),
    [
        (["towers.image.bridge"], {"towers.image.bridge.linear.weight", "towers.image.bridge.linear.bias"}),
        (["decoder.norm", "slots"], {"decoder.norm.weight", "slots.weight"}),
        (
            ["decoder.layers.1.ffn"],
            {f"decoder.layers.1.ffn.{part}" for part in ("router.weight", "experts.gate_up", "experts.down")},
        ),
    ],
)
def test_exactly_the_named_parameters_train(train: list[str], names: set[str]) -> None:
    model = tiny_model(embedding_dim=8)
    module = InstructionModule(model, optim=PlainGradient(), train=train)
    assert set(module.trained) == names == {name for name, p in model.named_parameters() if p.requires_grad}
    before = weights(model)
    fit(module, [sample_batch(model, [SAMPLES])])
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == names - {"slots.weight"}  # which may learn, but stand in no sequence of inline media


def test_all_is_the_default_and_a_typo_is_named() -> None:
    model = tiny_model()
    assert InstructionModule(model).trained == [name for name, _ in model.named_parameters()]
    paired = tiny_model(embedding_dim=8)
    everything = [name for name, _ in paired.named_parameters()]
    assert AlignmentModule(paired).trained == everything
    # the embedding head is not part of this objective: DDP would wait for its gradients, and decay would shrink it
    assert InstructionModule(paired).trained == [n for n in everything if not n.startswith("embedding_head.")]
    assert not any(p.requires_grad for p in paired.get_submodule("embedding_head").parameters())
    with pytest.raises(ValueError, match=r"train: 'towers.image.brigde' matches no parameter"):
        InstructionModule(model, train=["towers.image.brigde"])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_batches_step_as_one(clip: float | None) -> None:
    """1 x 8 samples and 4 x 2: the mean is over all supervised tokens, however they are spread over the batches.

    Clipping acts on the gradient of that mean, so it changes nothing about this.
    """
    after = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = tiny_model()
        batches = [sample_batch(model, [[s] for s in SAMPLES[i : i + size]]) for i in range(0, 8, size)]
        counts = [int((batch.labels >= 0).sum()) for batch in batches]
        assert size == 8 or (len(set(counts)) > 2 and 0 in counts)  # a mean of the batches' means would differ
        module = InstructionModule(model, NextToken(LM_ALONE), PlainGradient())
        before = weights(model)
        fit(module, batches, accumulate_grad_batches=8 // size, gradient_clip_val=clip)
        after.append(weights(model))
    moved = [(after[0][name] - before[name]).abs().max() for name in before]
    assert max(moved) > 1e-4
    for name, value in after[0].items():
        # the same products summed in another order: gradients of order 1 differ by some 1e-6, times the rate of 0.05
        torch.testing.assert_close(after[1][name], value, atol=1e-6, rtol=0, msg=name)


def test_clipping_bounds_the_gradient_of_the_mean() -> None:
    model = tiny_model()
    before = weights(model)
    fit(InstructionModule(model, optim=PlainGradient(lr=1.0)), [sample_batch(model, [SAMPLES])], gradient_clip_val=0.5)
    step = torch.cat([(p - before[name]).flatten() for name, p in weights(model).items()]).norm()
    assert float(step) == pytest.approx(0.5, rel=1e-3)


def test_a_batch_without_supervision_moves_nothing() -> None:
    model = tiny_model()
    before = weights(model)
    fit(InstructionModule(model, optim=PlainGradient()), [sample_batch(model, [[chat("q", None, 1)]])])
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("batches", [1, 2])
def test_the_bias_update_moves_against_the_load(batches: int) -> None:
    model = tiny_model()
    data = [sample_batch(model, [[s] for s in SAMPLES[i::batches]]) for i in range(batches)]
    model.train()
    routings = [routing for batch in data for routing in model(batch).routings if routing is not None]
    load = torch.stack([routing.load() for routing in routings]).sum(0)
    objective = NextToken(Balance(switch=0, z=0, bias_rate=0.125))
    module = InstructionModule(model, objective, PlainGradient(), train=["decoder.norm"])
    fit(module, data, accumulate_grad_batches=batches)
    [layer] = module.moe
    assert torch.equal(layer.router.bias, 0.125 * torch.sign(load.mean() - load)) and layer.router.bias.any()


def test_without_a_bias_rate_the_biases_stay() -> None:
    model = tiny_model()
    module = InstructionModule(model, optim=PlainGradient())
    fit(module, [sample_batch(model, [SAMPLES])])
    assert not module.moe[0].router.bias.any()


def test_what_callbacks_and_logs_are_told() -> None:
    model = tiny_model()
    batch = sample_batch(model, [SAMPLES[:3], SAMPLES[3:4]])
    module = InstructionModule(model, NextToken(LM_ALONE), PlainGradient())
    expected = NextToken(LM_ALONE)(model, batch)
    trainer = fit(module, [batch])
    step = module.last_step
    assert step is not None and expected.output is not None
    assert (step.samples, step.tokens) == (4, int(expected.output.sequence.mask.sum()))
    assert step.positions == expected.output.sequence.mask.numel() > step.tokens
    assert [routing is None for routing in step.routings] == [True, False]
    assert trainer.callback_metrics["train/loss"] == pytest.approx((expected.total / expected.count).item())
    assert {"train/lm", "train/accuracy"} <= set(trainer.callback_metrics)


def test_a_run_starts_from_a_directory_or_from_its_weights(tmp_path: Path) -> None:
    config = {
        "class_path": "mm.model.MultimodalModel",
        "init_args": {
            "tokenizer": str(tiny_tokenizer().save(tmp_path / "tokenizer")),
            "decoder": {
                "class_path": "mm.decoder.decoder.Decoder",
                "init_args": {
                    "width": 16,
                    "mixers": {"m": {"class_path": "mm.decoder.attention.grouped.GroupedAttention"}},
                    "ffns": {"f": {"class_path": "mm.decoder.ffn.dense.GatedFFN", "init_args": {"hidden": 8}}},
                    "layers": [{"pattern": ["m/f"]}],
                },
            },
        },
    }
    first, second = build(config, MultimodalModel), build(config, MultimodalModel)
    first.config = config
    save(first, tmp_path / "model")
    assert not torch.equal(first.decoder.embed.weight, second.decoder.embed.weight)
    InstructionModule(second, init_from=str(tmp_path / "model"))
    assert torch.equal(first.decoder.embed.weight, second.decoder.embed.weight)
    module = InstructionModule(str(tmp_path / "model"))
    assert module.model.training and torch.equal(first.decoder.embed.weight, module.model.decoder.embed.weight)
    assert not load(tmp_path / "model").training


def test_validation_is_retrieval_over_the_whole_set() -> None:
    model = tiny_model(embedding_dim=8)
    pairs = [chat(str(i), answer, i) for i, answer in enumerate(["red", "green", "two blue", "a shape", "red"])]
    batches = [sample_batch(model, [pairs[:2], pairs[2:3]]), sample_batch(model, [pairs[3:]])]
    module = AlignmentModule(model, Align("infonce", balance=LM_ALONE), recall_at=(1, 2))
    trainer = quiet()
    [logged] = trainer.validate(module, dataloaders=Ready(batches), verbose=False)
    pool = RetrievalPool()
    with torch.no_grad():
        for batch in batches:
            pool.add(*embed_pairs(model.eval(), batch, model.encode_media(batch)))
    for name, value in pool.recalls([1, 2]).items():
        assert logged[f"val/{name}"] == pytest.approx(value)
    assert logged["val/chance_at_1"] == pytest.approx(0.2) and "val/loss" in logged
    [again] = trainer.validate(module, dataloaders=Ready(batches), verbose=False)
    assert again["val/chance_at_1"] == pytest.approx(0.2)  # the pool starts anew each time


@pytest.mark.slow
def test_two_ranks_step_as_one_process(tmp_path: Path) -> None:
    """DDP over gloo: uneven tokens, a rank without images, one without samples, pairs in unequal numbers.

    The same weights as one process gets from the global batch, and no rank waits for another forever.
    """
    files = [run_ranks(world, tmp_path / f"{world}.pt") for world in (1, 2)]
    one, two = (torch.load(file) for file in files)
    assert one.keys() == two.keys() and len(one) >= 5
    for scenario in one:
        moved = max(float(change.abs().max()) for change in one[scenario].values())
        assert moved > 1e-4, scenario
        for name, change in one[scenario].items():
            # two steps of rate 0.05 along float32 gradients that are summed in another order
            torch.testing.assert_close(two[scenario][name], change, atol=2e-6, rtol=1e-4, msg=f"{scenario}: {name}")


def run_ranks(world: int, out: Path) -> Path:
    """Runs ranks.py in a process group of its own, and ends the whole group if a rank hangs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(world), str(out)]
    process = subprocess.Popen(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=out.parent, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{world} rank(s) hang: {process.communicate()[0][-2000:]}")
    assert process.returncode == 0, output[-4000:]
    return out


def test_gradients_are_clipped_in_mixed_precision() -> None:
    """The optimizer is fused, which the trainer takes for one that clipping is impossible with."""
    model = tiny_model()
    fit(InstructionModule(model), [sample_batch(model, [SAMPLES])], precision="bf16-mixed", gradient_clip_val=1e-3)
    left = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])  # of the last step
    assert float(left.norm()) == pytest.approx(1e-3, rel=1e-3)
