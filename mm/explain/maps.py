"""The page's drawings beyond overlays: tables of cells, experts by patch, experts by kind of token, text that shows."""

from __future__ import annotations

from markupsafe import Markup
from torch import Tensor

from mm.explain.explanation import Explanation, LayerRouting, SeenMedia
from mm.report import plots
from mm.report.page import Chart

MOST_CELLS = 1024  # of an image whose experts are drawn patch by patch
LEFT, HEAD = 26, 16


def plain(text: str) -> str:
    """Text without what steers a reader's screen: control characters as their pictures, half pairs as U+FFFD."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
    return text.translate(pictures | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD))


def visible(text: str) -> str:
    """A token as a reader can see it: spaces and line ends marked too; ∅ for none."""
    return plain(text).translate({0x20: "·", 0x0A: "⏎", 0x09: "⇥"}) or "∅"


def named(item: SeenMedia, number: int) -> str:
    """What the page calls a media item: "image 1: cat.png"."""
    name = item.name.rsplit("/", 1)[-1]
    return f"{item.kind} {number + 1}" + (f": {plain(name)}" if name else "")


def grid_table(cells: Tensor) -> Markup:
    """(h, w) attention as a table of percentages, every row and column named."""
    rows, columns = cells.shape
    head = Markup("").join(Markup('<th scope="col">column {}</th>').format(c + 1) for c in range(columns))
    body = Markup("").join(
        Markup('<tr><th scope="row">row {}</th>{}</tr>').format(
            r + 1, Markup("").join(Markup("<td>{:.1f}%</td>").format(100 * value) for value in cells[r].tolist())
        )
        for r in range(rows)
    )
    return Markup('<table class="cells"><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table>').format(
        head, body
    )


def expert_map(found: Explanation, number: int) -> tuple[str, list[Chart]] | None:
    """An image's name and, for each sparse layer, a drawing of the first expert of every cell. None if it has none."""
    item = found.media[number]
    if item.kind != "image" or not item.inline or item.read is not None or item.cells is None or not found.routing:
        return None
    if len(item.places) > MOST_CELLS:
        return None
    return named(item, number), [Chart(f"layer {layer.layer}", _experts(item, layer), []) for layer in found.routing]


def _experts(item: SeenMedia, layer: LayerRouting) -> Markup:
    assert item.cells is not None
    _, rows, columns = item.cells
    side = min((plots.WIDTH - LEFT) / columns, 44.0)
    parts = [
        Markup('<text x="{:.1f}" y="11" class="mid soft">{}</text>').format(LEFT + (c + 0.5) * side, c + 1)
        for c in range(0, columns, max(1, columns // 16))
    ]
    parts += [
        Markup('<text x="{}" y="{:.1f}" class="end soft">{}</text>').format(
            LEFT - 6, HEAD + (r + 0.5) * side + 3.5, r + 1
        )
        for r in range(0, rows, max(1, rows // 16))
    ]
    for place, position in zip(item.places.tolist(), range(item.start, item.stop), strict=True):
        _, r, c = place
        chosen = layer.of(position)
        first, weight = chosen[0] if chosen else (-1, 0.0)
        spelled = ", ".join(f"expert {expert} ({share:.2f})" for expert, share in chosen) or "no expert"
        x, y = LEFT + c * side, HEAD + r * side
        parts.append(
            Markup(
                '<g class="s{}"><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" fill="currentColor"'
                ' fill-opacity="{:.2f}"><title>row {}, column {}: {}</title></rect></g>'
            ).format(first % 6, x, y, side - 1, side - 1, 0.15 + 0.3 * weight, r + 1, c + 1, spelled)
        )
        if side >= 14 and chosen:
            middle = (x + (side - 1) / 2, y + side / 2 + 3.2)
            parts.append(Markup('<text x="{:.1f}" y="{:.1f}" class="mid">{}</text>').format(*middle, first))
    return plots.svg(parts, HEAD + rows * side + 2, f"first expert of each patch in layer {layer.layer}")


def expert_loads(found: Explanation) -> list[Chart]:
    """For each kind of token a heat map of how its choices fall on the experts of each layer."""
    charts = []
    kinds = dict.fromkeys((p.modality, p.part) if p.media is None else (p.modality, "") for p in found.positions)
    for modality, part in kinds:
        columns = [c for c, p in enumerate(found.positions) if p.modality == modality and part in (p.part, "")]
        loads = {}
        for layer in found.routing:
            counts = layer.indices[columns][layer.taken[columns]].bincount(minlength=layer.experts).tolist()
            if any(counts):
                loads[layer.layer] = counts
        if loads:
            name = f"{modality.capitalize()} of the {part}" if part else f"{modality.capitalize()} tokens"
            drawing = plots.heat_map(loads, top=4.0, label=f"expert load of {name.lower()}")
            charts.append(Chart(name, drawing, [], f"{len(columns):,} tokens"))
    return charts
