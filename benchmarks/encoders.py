"""Encoders against the libraries that they wrap, or the plain modules of torch that do the same, on the same weights.

    OMP_NUM_THREADS=1 python benchmarks/encoders.py --clock cpu

Both begin with the same uint8 pixels (or log-mel frames) and end with the same features, which are compared before
anything is timed; a ratio below 1 is what this project's side costs: folding patches to images, positions, masks.
Frozen: forward, no gradient. Trained: forward and backward. The limit is a matrix product of 1024^3 in the same run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from common import Bench
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mm.encoders.audio_cnn import AudioCNNEncoder
from mm.encoders.open_clip_tower import OpenClipEncoder
from mm.encoders.timm_vision import TimmEncoder
from mm.encoders.transformer import Block, TransformerEncoder, sincos
from mm.types import Encoder, Tokens, grid_positions

Pair = tuple[Encoder, nn.Module, Tokens, Callable[[], Tensor], int]  # ours, theirs, our input, their call, items


def images(count: int, patch: int) -> tuple[Tensor, Tokens]:
    """uint8 pixels (count, 3, 224, 224), and their patches."""
    pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    side = 224 // patch
    cut = pixels.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5)
    return pixels, tokens(cut.reshape(count, side * side, -1), (1, side, side))


def tokens(values: Tensor, grid: tuple[int, int, int]) -> Tokens:
    count = len(values)
    positions = grid_positions(grid).expand(count, -1, -1)
    return Tokens(values, positions, torch.ones(values.shape[:2], dtype=torch.bool), torch.tensor([grid] * count))


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    return (pixels.float() / 255 - shift) / scale


def timm_pair(name: str, count: int, stride: int, folder: Path) -> Pair:
    theirs: Any = timm.create_model(name, pretrained=False, num_classes=0)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, folder / "timm.safetensors")
    ours = TimmEncoder(3 * stride**2, name, str(folder / "timm.safetensors"))
    pixels, patches = images(count, stride)
    config = theirs.pretrained_cfg

    def call() -> Tensor:
        features = theirs.forward_features(normalised(pixels, config["mean"], config["std"]))
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, theirs.num_prefix_tokens :]

    return ours, theirs, patches, call, count


def open_clip_pair(name: str, count: int, folder: Path) -> Pair:
    theirs: Any = open_clip.create_model(name).visual
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, folder / "clip.safetensors")
    theirs.output_tokens = True
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    ours = OpenClipEncoder(3 * 32**2, name, str(folder / "clip.safetensors"), mean=mean, std=std)
    pixels, patches = images(count, 32)
    return ours, theirs, patches, lambda: theirs(normalised(pixels, mean, std))[1], count


class Plain(nn.Module):
    """torch's own TransformerEncoder with the weights of our blocks."""

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True, layer_norm_eps=1e-6
        )
        self.stack = nn.TransformerEncoder(layer, len(blocks), norm, enable_nested_tensor=False)
        for theirs, ours in zip(self.stack.layers, blocks, strict=True):
            assert isinstance(ours, Block)
            with torch.no_grad():
                theirs.self_attn.in_proj_weight.copy_(ours.qkv.weight)  # type: ignore[union-attr, operator]
                theirs.self_attn.in_proj_bias.copy_(ours.qkv.bias)  # type: ignore[union-attr, operator]
            for name, part in (("self_attn.out_proj", ours.out), ("linear1", ours.up), ("linear2", ours.down),
                               ("norm1", ours.norm1), ("norm2", ours.norm2)):  # fmt: skip
                theirs.get_submodule(name).load_state_dict(part.state_dict())


def transformer_pair(count: int) -> Pair:
    width, heads = 384, 6
    ours = TransformerEncoder(3 * 16**2, width, 6, heads)
    theirs = Plain(ours.blocks, ours.norm, width, heads)
    theirs.add_module("embed", ours.embed)
    _, patches = images(count, 16)
    table = sincos(patches.positions, width)
    return (
        ours,
        theirs,
        patches,
        lambda: theirs.stack(ours.embed((patches.values.float() / 255 - 0.5) / 0.5) + table),
        count,
    )


def audio_pair(count: int, seconds: int) -> Pair:
    width, heads = 384, 6
    ours: Any = AudioCNNEncoder(80, width, 4, 4, heads)
    theirs = Plain(ours.blocks, ours.norm, width, heads)
    convs: Any = nn.ModuleList(
        nn.Conv1d(80 if i == 0 else width, width, 3, conv.stride, 1) for i, conv in enumerate(ours.convs)
    )
    for conv, one in zip(convs, ours.convs, strict=True):  # ours is a linear layer over a frame and its neighbours
        with torch.no_grad():
            conv.weight.copy_(one.linear.weight.unflatten(1, (3, -1)).transpose(1, 2))
            conv.bias.copy_(one.linear.bias)
    theirs.add_module("convs", convs)
    frames = torch.randn(count, 100 * seconds, 80)
    table = sincos(torch.arange(25 * seconds)[:, None], width)

    def call() -> Tensor:
        x = frames.transpose(1, 2)
        for conv in convs:
            x = F.gelu(conv(x))
        return theirs.stack(x.transpose(1, 2) + table)

    return ours, theirs, tokens(frames, (100 * seconds, 1, 1)), call, count


def measure(bench: Bench, name: str, library: str, pair: Pair) -> None:
    ours, theirs, given, call, count = pair
    for each in (ours, theirs):
        each.eval()  # batch norm by its statistics, nothing drawn
    with torch.no_grad():
        torch.testing.assert_close(
            ours(given).values, call(), rtol=1e-3, atol=1e-4
        )  # other orders of sums, 6-12 layers
        with FlopCounterMode(display=False) as counter:
            ours(given)  # torch's own encoder hides its products from the counter
    flops = counter.get_total_flops()
    grad = torch.randn_like(call())

    def frozen(run: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(run)

    def trained(run: Callable[[], Tensor], module: nn.Module) -> Callable[[], object]:
        def step() -> None:
            run().backward(grad)
            module.zero_grad()

        return step

    a = torch.randn(1024, 1024)
    for what, calls, work in (
        ("frozen", {"mm": frozen(lambda: ours(given).values), "theirs": frozen(call)}, flops),
        ("trained", {"mm": trained(lambda: ours(given).values, ours), "theirs": trained(call, theirs)}, 3 * flops),
    ):
        seconds = bench.times({**calls, "product": lambda: a @ a}, warmup=1)
        taken, noise = seconds["mm"]
        peak = 2 * 1024**3 / seconds["product"][0]
        bench.add(
            what=f"{name}, {what}", run="mm", rate=count / taken, unit="items/s", noise=noise, peer=library,
            ratio=seconds["theirs"][0] / taken, limit="a product", share=work / taken / peak, judged="ratio",
        )  # fmt: skip


def main() -> int:
    bench = Bench(__doc__)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(bench, "timm ViT-Ti/16, 4 images", "timm", timm_pair("vit_tiny_patch16_224", 4, 16, folder))
        measure(bench, "timm ResNet-18, 4 images", "timm", timm_pair("resnet18", 4, 32, folder))
        measure(bench, "open_clip ViT-B/32, 2 images", "open_clip", open_clip_pair("ViT-B-32", 2, folder))
    measure(bench, "transformer of 6 x 384, 2 images", "torch", transformer_pair(2))
    measure(bench, "audio CNN and 4 x 384, 2 x 5 s", "torch", audio_pair(2, 5))
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
