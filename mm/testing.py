"""Small real parts for tests: a tokenizer trained on a few words, tiny models, batches of random text and media."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mm.datasets.packing import PackedBatch, collate
from mm.datasets.processor import Processor
from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.decoder.ffn.moe import SparseMoE
from mm.encoders.audio_cnn import AudioCNNEncoder
from mm.encoders.transformer import TransformerEncoder
from mm.fusion.projector import LinearProjector
from mm.model import MultimodalModel, TowerConfig
from mm.tokenizers.audio import AudioTokenizer
from mm.tokenizers.image import ImageTokenizer
from mm.tokenizers.text import TextTokenizer
from mm.tokenizers.video import VideoTokenizer
from mm.types import IGNORE, SLOT_IDS, Batch, BridgeFactory, Grid, Media, MediaBatch, Sample, Tokens


def tiny_decoder(
    width: int = 32,
    layers: int = 2,
    vocab_size: int | None = 97,
    mixer: Callable[[int], nn.Module] | None = None,
    ffn: Callable[[int], nn.Module] | None = None,
    **options: Any,
) -> Decoder:
    """One dense layer and then sparse ones (or `ffn` everywhere), random weights large enough to tell things apart."""
    mixer = mixer or partial(GroupedAttention, heads=4, kv_heads=2)
    ffns = {"first": ffn or partial(GatedFFN, hidden=48), "rest": ffn or partial(SparseMoE, hidden=24, num_experts=4)}
    groups = [LayerGroup(["m/first"]), LayerGroup(["m/rest"], layers - 1)]
    decoder = Decoder(width, {"m": mixer}, ffns, groups, vocab_size, **options)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return decoder


def tiny_tokenizer(vocab_size: int = 300) -> TextTokenizer:
    return TextTokenizer.train(["what color is the shape? red, green or blue. how many beeps? two. "] * 4, vocab_size)


def tiny_model(bridge: BridgeFactory = LinearProjector, **options: Any) -> MultimodalModel:
    """Towers for images, sounds and videos (which share the images' encoder), random weights that let every part tell.

    Patches are 2 x 2 pixels, sounds have 20 mels. `options` are the model's.
    """
    tokenizer = tiny_tokenizer()
    encoder = partial(TransformerEncoder, width=16, layers=1, heads=2)
    image = ImageTokenizer(patch=2, max_tokens=16)
    towers = {
        "image": TowerConfig(image, bridge, encoder),
        "audio": TowerConfig(AudioTokenizer(mels=20), bridge, partial(AudioCNNEncoder, width=16, layers=0, heads=2)),
        "video": TowerConfig(VideoTokenizer(image, fps=2), bridge, encoder_of="image"),
    }
    return spread(MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size), towers, **options))


def spread(model: MultimodalModel) -> MultimodalModel:
    """Opens the gates, which start shut, and widens the weights, so that whatever is connected shows."""
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            nn.init.ones_(parameter)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def tiny_media(model: MultimodalModel, kind: str, grid: Grid, seed: int = 0) -> Tokens:
    """What the model's tokenizer of this kind could have given: random values on a grid."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    values = torch.randn(t * h * w, model.tower(kind).tokenizer.dim, generator=generator)
    return Tokens.of_grid(values if kind == "audio" else (values * 64 + 128).clamp(0, 255).byte(), grid)


def model_batch(
    model: MultimodalModel, rows: list[list[tuple[int, int, str]]], media: dict[str, list[Tokens]] | None = None
) -> Batch:
    """`element_batch` with the slot lengths that the model's own specs count."""
    lengths = {}
    for kind, items in (media or {}).items():
        grids = [item.grid.tolist() for item in items]
        lengths[kind] = [model.media_specs()[kind].slot_length((t, h, w)) for t, h, w in grids]
    return element_batch(rows, media, lengths)


def picture(seed: int, size: tuple[int, int] = (4, 4)) -> Media:
    """A PNG of random pixels, `size` (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return Media("image", buffer.getvalue(), f"random-{seed}.png")


def sample_batch(model: MultimodalModel, rows: list[list[Sample]]) -> PackedBatch:
    """Samples as the data module encodes and packs them for the model."""
    processor = Processor(model.tokenizer, model.template, model.media_specs())
    return collate([[processor.encode(sample) for sample in row] for row in rows])


def element_batch(
    rows: list[list[tuple[int, int, str]]],
    media: dict[str, list[Tokens]] | None = None,
    lengths: dict[str, list[int]] | None = None,
) -> Batch:
    """A Batch from rows of (document, branch, element), an element being a text id as a string or a kind of media.

    Media items are taken from `media[kind]` in raster order; `lengths[kind]` are their slot lengths (by default their
    token counts).
    """
    width = max(len(row) for row in rows)
    ids, documents, branches = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    slots: dict[str, list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        for c, (document, branch, element) in enumerate(row):
            documents[r, c], branches[r, c] = document, branch
            ids[r, c] = SLOT_IDS[element] if element in SLOT_IDS else int(element)
            if element in SLOT_IDS:
                slots.setdefault(element, []).append((r, c))
    batches = {}
    for kind, places in slots.items():
        items = (media or {})[kind]
        counts = (lengths or {}).get(kind) or [len(item) for item in items]
        where = torch.tensor(places)
        names = [f"sample {r}: {kind} {c}" for r, c in places]
        batches[kind] = MediaBatch(Tokens.stack(items), where[:, 0], where[:, 1], torch.tensor(counts), names)
    return Batch(ids, torch.full_like(ids, IGNORE), documents, branches, batches)


def finite_nonzero_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; raises AssertionError naming one that is missing, zero or not finite."""
    gradients = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name}: no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name}: gradient not finite"
        assert parameter.grad.abs().max() > 0, f"{name}: gradient is zero"
        gradients[name] = parameter.grad
    return gradients
