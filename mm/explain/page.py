"""An explanation as a page: one HTML file without scripts that fetches nothing and looks like `mm report`'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

import mm
from mm.explain import pictures
from mm.explain.explanation import Explanation, LayerAttention, SeenMedia
from mm.explain.maps import expert_loads, expert_map, grid_table, named, plain, visible
from mm.report import page as report

STEPS = 48  # of an answer that the page shows one by one
TABLE_SIDE = 40  # cells; an image finer than that has no table of numbers
RECENT_TEXT = 160  # text positions that are shown, the last ones


@dataclass(frozen=True)
class Overlay:
    """Heat over a media item, from one layer: its share of the layer's attention, and the cell that got most."""

    title: str
    uri: str
    share: float
    most: str


@dataclass(frozen=True)
class Shares:
    """Of one layer's attention, what went to each part, in the order of the sequence."""

    name: str
    parts: list[tuple[str, float]]


@dataclass(frozen=True)
class Panel:
    """What is shown of one step, or (`number` 0) of all of them together. `overlays` are lists, one a media item; of
    each text token `words` have its share of attention, the mean of layers, and how strongly that is drawn (0 to 1)."""

    number: int
    title: str
    probability: float | None
    top: list[tuple[str, float]]
    overlays: list[list[Overlay]]
    shares: list[Shares]
    words: list[tuple[str, float, float]]
    routing: list[tuple[int, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Shown:
    """A media item on the page: its picture and the picture's sides, and a table of where the answer looked."""

    item: SeenMedia
    title: str
    uri: str | None
    ratio: float
    table: Markup | None


def render(found: Explanation, model: str) -> str:
    """The page as HTML text; `model` is what it calls the model. Jinja escapes all that comes from data."""
    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader = FileSystemLoader(folder)
    environment.filters |= {"percent": report.percent, "plain": plain, "visible": visible}
    steps = found.steps[:STEPS]
    styles = (report.STYLE, folder / "style.css")
    return environment.get_template("page.html").render(
        found=found,
        model=model,
        version=mm.__version__,
        style=Markup("\n".join(path.read_text(encoding="utf-8") for path in styles)),
        media=[shown(found, number) for number in range(len(found.media))],
        panels=[panel(found, 0, torch.arange(len(found.steps)))]
        + [panel(found, step + 1, torch.tensor([step])) for step in range(len(steps))],
        loads=expert_loads(found),
        maps=[drawn for number in range(len(found.media)) if (drawn := expert_map(found, number))],
        tokens=token_routing(found),
        notes=notes(found),
    )


def shown(found: Explanation, number: int) -> Shown:
    item = found.media[number]
    height, width = (3, 8) if item.picture is None or item.kind == "audio" else item.picture.shape[-2:]
    if item.kind == "video" and item.picture is not None:
        width *= len(pictures.shown_frames(len(item.picture)))
    mean = mean_over_layers(found, number)
    rows, columns = (0, 0) if item.cells is None else item.cells[1:]
    table = None
    if mean is not None and item.kind == "image" and max(rows, columns) <= TABLE_SIDE:
        table = grid_table(mean[0])
    return Shown(item, named(item, number), pictures.picture(item), width / height, table)


def mean_over_layers(found: Explanation, number: int) -> Tensor | None:
    """(t, h, w): the mean over layers and steps of the attention on a media item's cells."""
    seen = [found.cells(attention.weights, attention.of, number) for attention in found.attention]
    seen = [cells for cells in seen if cells is not None]
    return torch.stack(seen).mean((0, 1)) if seen else None


def panel(found: Explanation, number: int, steps: Tensor) -> Panel:
    """`steps` are those that are shown together, as their mean."""
    step = found.steps[int(steps[0])] if number else None
    return Panel(
        number,
        step.text if step else "the whole answer",
        step.probability if step else None,
        step.top if step else [],
        [overlays(found, media, steps) for media in range(len(found.media))],
        [shares(found, attention, steps) for attention in found.attention],
        words(found, steps),
        [(routing.layer, routing.of(step.column)) for routing in found.routing] if step else [],
    )


def overlays(found: Explanation, media: int, steps: Tensor) -> list[Overlay]:
    """The rollout, where there is one, and each layer that sees the item."""
    seen = [(attention.name, attention) for attention in found.attention]
    if found.rollout is not None:
        seen.insert(0, ("all layers (rollout)", LayerAttention(-1, "own", found.rollout)))
    result = []
    for name, attention in seen:
        weights, of = attention.weights[steps], attention.of
        cells, share = found.cells(weights, of, media), found.share(weights, of, media)
        if cells is None or share is None:
            continue
        item, mean = found.media[media], cells.mean(0)
        most = int(mean.argmax())
        t, rest = divmod(most, mean.shape[1] * mean.shape[2])
        place = pictures.cell_name(item, (t, *divmod(rest, mean.shape[2])))
        strongest = f"most at {place}, {report.percent(float(mean.max()))}"
        result.append(Overlay(name, pictures.heat(mean, item), float(share.mean()), strongest))
    return result


def shares(found: Explanation, attention: LayerAttention, steps: Tensor) -> Shares:
    """Media by item; text as question (all of the prompt) and answer so far; what is missing from 1 went to sinks."""
    weights = attention.weights[steps].mean(0)
    parts: dict[str, float] = {}
    if attention.of == "own":
        for position, weight in zip(found.positions, weights.tolist(), strict=True):
            text = "prompt" if position.part == "prompt" else "answer so far"
            name = text if position.media is None else f"{position.modality} {position.media + 1}"
            parts[name] = parts.get(name, 0.0) + weight
        if (sinks := 1 - float(weights.sum())) > 0.005:
            parts["nothing (sinks)"] = sinks
    else:
        for number, item in enumerate(found.media):
            share = found.share(attention.weights[steps], "beside", number)
            if share is not None:
                parts[f"{item.kind} {number + 1}"] = float(share.mean())
    return Shares(attention.name, [(name, share) for name, share in parts.items() if share > 0])


def words(found: Explanation, steps: Tensor) -> list[tuple[str, float, float]]:
    """The last text tokens that the steps saw. The first of the sequence takes what nothing else should have
    (Xiao et al. 2023, arXiv 2309.17453), so the others set the scale."""
    own = [attention.weights[steps].mean(0) for attention in found.attention if attention.of == "own"]
    if not own:
        return []
    last = max(found.steps[step].column for step in steps.tolist())
    seen = [(p.text, c) for c, p in enumerate(found.positions[: last + 1]) if p.media is None][-RECENT_TEXT:]
    mean = torch.stack(own).mean(0).tolist()
    top = max([mean[column] for _, column in seen if column] or [1.0])
    return [(text, mean[column], min(1.0, mean[column] / max(top, 1e-9))) for text, column in seen]


def token_routing(found: Explanation) -> list[tuple[str, str, list[list[tuple[int, float]]]]]:
    """(text, part, the experts of each sparse layer) of the last text positions."""
    if not found.routing:
        return []
    text = [column for column, position in enumerate(found.positions) if position.media is None]
    return [
        (found.positions[column].text, found.positions[column].part, [layer.of(column) for layer in found.routing])
        for column in text[-RECENT_TEXT:]
    ]


def notes(found: Explanation) -> list[str]:
    """What the page leaves out, and why."""
    left = len(found.steps) - STEPS
    text = sum(position.media is None for position in found.positions) - RECENT_TEXT
    frames = [item for item in found.media if item.kind == "video" and item.grid[0] > pictures.FRAMES]
    return [
        *found.notes,
        *([f"the last {left} of {len(found.steps)} tokens are not shown one by one"] if left > 0 else []),
        *([f"the first {text} text tokens are not shown"] if text > 0 else []),
        *(f"{item.name}: {pictures.FRAMES} of {item.grid[0]} frames are shown" for item in frames),
        *(f"{item.name}: its tokens have no places any more to lay over it" for item in found.media if not item.cells),
        *([] if found.routing else ["no expert layers: every token takes the same weights"]),
    ]
