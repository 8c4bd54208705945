"""`explain(model, sample)`: answers, reads prompt and answer once more in one pass, and writes down what happened.

One pass over both gives what decoding token by token gives: a position never sees what comes after it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from mm.datasets.packing import collate
from mm.datasets.processor import Encoded, EncodedMedia
from mm.explain.explanation import Explanation, LayerAttention, LayerRouting, Position, SeenMedia, Step
from mm.explain.recorder import Recorder, rollout
from mm.fusion.splice import Features
from mm.generation.engine import generate
from mm.generation.options import Options
from mm.generation.requests import check_at_least_one, check_model, encode_requests, stop_ids
from mm.model import ModelOutput, MultimodalModel
from mm.tokenizers.text import TextTokenizer
from mm.types import IGNORE, Grid, Reduction, Sample, Tokens

ROLLOUT_LONGEST = 2048  # positions: a rollout keeps that squared, 16 MB a layer


@torch.inference_mode()
def explain(
    model: MultimodalModel,
    sample: Sample,
    max_new_tokens: int = 32,
    seed: int = 0,
    answer: str | None = None,
    top: int = 8,
    **options: Unpack[Options],
) -> Explanation:
    """How the model's answer to a chat comes about; with `answer`, how that one would.

    `top` is how many likeliest tokens are named a step. Other arguments and errors as in `mm.generation.generate`;
    ValueError too for an `answer` without a token.
    """
    check_model(model)
    check_at_least_one(top=top)
    ids, ended = _answer(model, sample, max_new_tokens, seed, answer, options)
    (request,) = encode_requests(model, [sample], seed, max_new_tokens, None)
    whole, prompt = _with_answer(request.encoded, ids), request.encoded.length
    columns = torch.arange(prompt - 1, prompt + len(ids) - (not ended), device=model.device)
    batch = collate([[whole]]).to(model.device)
    with Recorder(model, columns, squares=whole.length <= ROLLOUT_LONGEST) as seen:
        features = model.encode_media(batch)
        output = model(batch, features=features)
    positions, starts = _positions(model, whole, prompt)
    media = _media(model, whole, features, starts, seen)
    flow, notes = _rollout(model, seen, columns, media, whole.length)
    return Explanation(
        question=_question(sample),
        answer=model.tokenizer.decode(ids),
        steps=_steps(model, output, columns, ids, top),
        positions=positions,
        media=media,
        attention=_attention(seen),
        routing=_routing(output),
        rollout=flow,
        notes=notes,
    )


def _answer(
    model: MultimodalModel, sample: Sample, max_new_tokens: int, seed: int, answer: str | None, options: Any
) -> tuple[list[int], bool]:
    """The ids of the answer, and whether the model's own closing of it is a step too."""
    if answer is not None:
        ids = model.tokenizer.encode(answer)
        if not ids:
            raise ValueError("answer: it is empty; give some text")
        return ids, True
    [found] = generate(model, [sample], max_new_tokens, seed, **options)
    return found.ids, found.finish_reason == "stop" or not found.ids


def _with_answer(encoded: Encoded, ids: list[int]) -> Encoded:
    more = torch.tensor(ids, dtype=torch.long)
    return replace(
        encoded,
        ids=torch.cat([encoded.ids, more]),
        labels=torch.cat([encoded.labels, torch.full_like(more, IGNORE)]),
        branch_ids=torch.cat([encoded.branch_ids, torch.zeros_like(more)]),
        length=encoded.length + len(ids),
    )


def _question(sample: Sample) -> str:
    asked = [message["content"] for message in sample.messages if message["role"] == "user"]
    content = asked[-1] if asked else ""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def spelled(tokenizer: TextTokenizer, token: int) -> str:
    """One token as text; bytes that are no whole character by their numbers, and what is no token by its id."""
    try:
        data = tokenizer.token_bytes(token)
    except (ValueError, KeyError, IndexError):
        return f"#{token}"  # a row of the output that only pads the vocabulary
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in data)


def _steps(model: MultimodalModel, output: ModelOutput, columns: Tensor, ids: list[int], top: int) -> list[Step]:
    p = output.head(output.hidden[0, columns]).float().softmax(-1)
    taken = list(ids)
    if len(taken) < len(columns):  # the end: the likeliest of what closes the turn
        taken.append(max(stop_ids(model), key=lambda token: float(p[-1, token])))
    best, places = p.topk(min(top, p.shape[-1]), -1)
    return [
        Step(
            spelled(model.tokenizer, token),
            float(p[step, token]),
            [
                (spelled(model.tokenizer, other), value)
                for other, value in zip(places[step].tolist(), best[step].tolist(), strict=True)
            ],
            int(columns[step]),
        )
        for step, token in enumerate(taken)
    ]


def _positions(model: MultimodalModel, encoded: Encoded, prompt: int) -> tuple[list[Position], list[int]]:
    """Every position, and where each media item's slot begins."""
    slots = {item.column: number for number, item in enumerate(encoded.media)}
    positions: list[Position] = []
    starts = [0] * len(encoded.media)
    for column, token in enumerate(encoded.ids.tolist()):
        part = "prompt" if len(positions) < prompt else "answer"
        if column in slots:
            item = encoded.media[slots[column]]
            starts[slots[column]] = len(positions)
            positions += [Position("", item.kind, part, slots[column])] * item.length
        else:
            positions.append(Position(spelled(model.tokenizer, token), "text", part))
    return positions, starts


def _media(
    model: MultimodalModel, encoded: Encoded, features: dict[str, Features], starts: list[int], seen: Recorder
) -> list[SeenMedia]:
    """The items in their order. Those beside the sequence stand there kind by kind, as the splice puts them."""
    found: list[SeenMedia | None] = [None] * len(encoded.media)
    beside = 0
    for kind, feature in features.items():
        of_kind = [number for number, item in enumerate(encoded.media) if item.kind == kind]
        for row, number in enumerate(of_kind):
            count = int(feature.tokens.mask[row].sum())
            start = starts[number] if feature.inline else beside
            beside += 0 if feature.inline else count
            read = seen.read.get(kind)
            item = encoded.media[number]
            bridged = _one(feature.tokens, row) if read is None else None
            found[number] = _item(
                model, item, bridged, None if read is None else read[row], feature.inline, start, count
            )
    return [item for item in found if item is not None]


def _item(
    model: MultimodalModel,
    item: EncodedMedia,
    bridged: Tokens | None,
    read: Tensor | None,
    inline: bool,
    start: int,
    count: int,
) -> SeenMedia:
    """`bridged` are the item's tokens after the bridge; None where `read` (Q, N) tells of the encoder's."""
    reductions = model.tower(item.kind).spec().reductions
    if read is not None:
        reductions = reductions[:1]
    grid = _grid(item.tokens.grid)
    stride: Grid = (1, 1, 1)
    cells: Grid = grid
    for reduction in reductions:
        (t, h, w), (times, down, across) = stride, reduction.stride
        stride, cells = (t * times, h * down, w * across), reduction(cells)
    if any(reduction.fixed is not None for reduction in reductions) or Reduction(stride)(grid) != cells:
        cells, stride = (0, 0, 0), (1, 1, 1)
    count_of_cells = math.prod(cells)
    if bridged is not None:
        places = bridged.positions.cpu()
    else:
        assert read is not None
        read = read[:, : count_of_cells or None]  # what is behind is padding
        places = _raster(cells)
    fits = count_of_cells > 0 and len(places) == count_of_cells
    return SeenMedia(
        item.kind,
        item.name.partition(": ")[2],
        _picture(item),
        grid,
        cells if fits else None,
        stride,
        places,
        inline,
        start,
        start + count,
        read,
    )


def _one(tokens: Tokens, row: int) -> Tokens:
    keep = tokens.mask[row]
    return Tokens(tokens.values[row][keep], tokens.positions[row][keep], keep[keep], tokens.grid[row])


def _grid(grid: Tensor) -> Grid:
    t, h, w = grid.tolist()
    return (t, h, w)


def _raster(cells: Grid) -> Tensor:
    return Tokens.of_grid(torch.zeros(math.prod(cells), 1), cells).positions


def _picture(item: EncodedMedia) -> Tensor | None:
    """What the tokens show: patches (N, 3 * p * p) uint8 put together again, or a sound's (N, mels) on its side."""
    values, (t, h, w) = item.tokens.values, _grid(item.tokens.grid)
    if item.kind == "audio":
        return values.float().T if values.ndim == 2 and h == w == 1 else None
    side = math.isqrt(values.shape[-1] // 3)
    if values.dtype != torch.uint8 or 3 * side * side != values.shape[-1]:
        return None
    cells = values.view(t, h, w, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(t, 3, h * side, w * side)


def _attention(seen: Recorder) -> list[LayerAttention]:
    beside = [LayerAttention(layer, "beside", weights) for layer, weights in seen.beside.items()]
    own = [LayerAttention(layer, "own", weights) for layer, weights in seen.own.items()]
    return sorted([*beside, *own], key=lambda attention: (attention.layer, attention.of != "beside"))


def _routing(output: ModelOutput) -> list[LayerRouting]:
    return [
        LayerRouting(
            layer,
            routing.logits.shape[-1],
            routing.indices.cpu(),
            routing.weights.float().cpu(),
            routing.taken().cpu(),
        )
        for layer, routing in enumerate(output.routings)
        if routing is not None
    ]


def _rollout(
    model: MultimodalModel, seen: Recorder, columns: Tensor, media: list[SeenMedia], length: int
) -> tuple[Tensor | None, list[str]]:
    layers = len(model.decoder.layers)
    without = layers - len(seen.own)
    notes = [f"{without} of {layers} layers have no attention to show"] if without else []
    if not seen.squares:
        return None, notes if seen.own else [*notes, "no attention: no rollout"]
    why = ""
    if without:
        why = "attention is not all that carries the past on"
    elif any(not item.inline for item in media):
        why = "the media stand beside the sequence"
    if why:
        return None, [*notes, f"no rollout: {why}"]
    return rollout(seen.squares, columns), notes
