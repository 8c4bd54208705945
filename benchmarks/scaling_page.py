"""docs/scaling.md and its figures, from docs/scaling.json and `mm info --plan`: `benchmarks/scaling.py --page`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling import AXES, CHOSEN, DOCUMENT, LAYERS, LENGTH, WIDTH, Axis, Fit, fit, points_of

from mm.info import build_meta, describe
from mm.info.plan import GPUS, NODE, Plan, optimal, plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "decoder"
PLANNED = {"llama_3_1_8b": "Llama 3.1 8B", "qwen3_30b_a3b": "Qwen3 30B-A3B", "deepseek_v3": "DeepSeek-V3"}
SIZES = (8, 1024)
# config -> (name, context, tokens, published GPU-hours of an H100's speed, source)
PUBLISHED: dict[str, tuple[str, int, float, float, str]] = {
    "deepseek_v3": ("DeepSeek-V3", 4096, 14.8e12, 2.664e6, "arXiv 2412.19437, table 1 (H800)"),
    "llama_3_1_8b": ("Llama 3 8B", 8192, 15e12, 1.3e6, "Meta's model card (H100)"),
}
INK, BLUE, ORANGE = "#808080", "#3b82c4", "#d9822b"  # on a transparent ground: seen on white as on black

WHY = {
    "length": (
        "A token is multiplied with the weights once, and with every token before it: `a T + b T^2`. With {width} "
        "numbers a token the square weighs as much as the rest from {balance:,} tokens on, so that "
        "the counted operations "
        "themselves have the slope {flops} here and 2 only further on. A wide model stays linear longer: the balance "
        "lies at about 12 times the width for a layer of 12 D^2 weights. Memory is linear: no mask "
        "and no scores are held."
    ),
    "documents": (
        "The same tokens as documents of {document}, each of which attends to itself alone: what "
        "packing costs. Time is "
        "linear, and at 32,768 tokens a step takes {saved:.1f} times less than one document of that length. What lies "
        "above 1 is the cache: a row's activations leave it, and the same operations run at {slow:.0f} instead of "
        "{fast:.0f} GFLOP/s."
    ),
    "experts": (
        "A token chooses {chosen} experts however many there are: the counted operations grow by the router alone "
        "(slope {flops}). Measured time grows with {time}: with {most} experts each gets {rows:.0f} rows of a batch of "
        "{length:,}, too few for a product to run at full speed, and every expert's weights are read, "
        "and its gradients "
        "written, once a step whatever their rows. Larger batches flatten it. Memory is the experts' gradients beside "
        "what every step needs, which still weighs more here: the estimate itself has slope {memory_theory}, and 1 "
        "only for many more experts. Optimizer states, three times the gradients, are not in this figure."
    ),
    "images": (
        "An image is {cells} positions: the tower's work is linear, and so are the decoder's products; its attention "
        "over all images is the square, which theory ends in. Over these values the counted operations have slope "
        "{flops}; measured time grows more slowly ({time}), because small batches run further from the machine's speed "
        "than large ones ({slow:.0f} GFLOP/s with one image, {fast:.0f} with {most})."
    ),
    "vocabulary": (
        "The output head is a product of {length:,} tokens with the vocabulary: linear once it outweighs the layers. "
        "Besides, every logit passes through the softmax and its gradient, which are bound by memory and not counted: "
        "the rate falls from {fast:.0f} to {slow:.0f} GFLOP/s where the logits outgrow the processor's cache. Memory "
        "grows more slowly ({memory}) than the vocabulary: logits exist for as many rows at a time as hold 2^24 of "
        "them (`mm/objectives/cross_entropy.py`). What grows is the gradient of the embedding. Plain "
        "logits of the last "
        "point, with their gradient, would take {plain:.1f} GB instead of {peak:.2f} GB in all."
    ),
}


def write(kept: dict[str, Any], folder: Path) -> None:
    """Raises ValueError naming what was not measured."""
    missing = {axis: set(AXES[axis].values) - points_of(kept, axis).keys() for axis in AXES}
    if lacking := {axis: sorted(values) for axis, values in missing.items() if values}:
        raise ValueError(f"scaling.json lacks points: {lacking}; run benchmarks/scaling.py without --page first")
    (folder / "scaling.md").write_text(page(kept), encoding="utf-8")
    plot(kept, folder)


def fits(kept: dict[str, Any], axis: str) -> dict[str, Fit]:
    """Slopes of what was measured and of what was counted, over the same values."""
    points = {value: point for value, point in points_of(kept, axis).items() if value >= AXES[axis].fit}
    values = [float(value) for value in points]
    columns = {
        "time": [min(point["seconds"]) for point in points.values()],
        "flops": [point["flops"] for point in points.values()],
        "memory": [point["bytes"] for point in points.values()],
        "expected": [point["expected_bytes"] for point in points.values()],
    }
    return {name: fit(values, column) for name, column in columns.items()}


def page(kept: dict[str, Any]) -> str:
    about = kept["about"]
    parts = [
        "# How the cost of a step grows, and what a run would cost\n",
        "<!-- made by benchmarks/scaling.py --page from docs/scaling.json: edit those -->\n",
        f"A decoder of {LAYERS} layers, {WIDTH} wide, float32, forward and backward on one thread of {about['cpu']} "
        f"(torch {about['torch']}, {about['date']}). One thing grows at a time, the rest is {LENGTH:,} "
        "tokens. Time is the "
        "processor's, the least of up to six steps; memory is how far the resident set rises in a step, gradients "
        "included, weights not.\n",
        "    OMP_NUM_THREADS=1 python benchmarks/scaling.py && python benchmarks/scaling.py --page\n",
        "The exponent is the slope of a line through the logarithms, over the values named, with its "
        "95 % interval (how far "
        "points lie off the line, not how they would fall on another machine). Beside it stand the slope of what is "
        "*counted* over the same values, operations and bytes as `mm info` gives them, and theory's "
        "for large values. Where "
        "measured and counted differ, the machine is the reason; where counted and theory differ, the values are too "
        "small for the largest term to be alone.\n",
        _slopes(kept),
        "![Seconds of a step over each axis, measured and counted](scaling-time.png)\n",
        "![Megabytes of a step over each axis, measured and estimated](scaling-memory.png)\n",
        "The estimate of memory is of what is kept for the backward pass. What a step takes for a moment (products' "
        "results, copies in other layouts, the pieces of logits) comes on top: plan with twice the "
        "estimate at this width.\n",
        *(section(kept, axis) for axis in AXES),
        _paper(),
        _published(),
        _recipe(),
    ]
    return "\n".join(parts)


def _slopes(kept: dict[str, Any]) -> str:
    lines = [
        "| | fitted over | time | operations counted | theory | memory | estimated | theory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for axis, about in AXES.items():
        found = fits(kept, axis)
        over = f"{about.fit:,} to {about.values[-1]:,} {about.unit}"
        lines.append(
            f"| {axis} | {over} | {found['time']} | {found['flops'].slope:.2f} | {about.time:g} | {found['memory']} "
            f"| {found['expected'].slope:.2f} | {about.memory:g} |"
        )
    return "\n".join(lines) + "\n"


def section(kept: dict[str, Any], axis: str) -> str:
    points, found = points_of(kept, axis), fits(kept, axis)
    rates = [point["flops"] / min(point["seconds"]) / 1e9 for point in points.values()]
    most, last = max(points), points[max(points)]
    other = {"length": points_of(kept, "length"), "documents": points_of(kept, "documents")}
    per_token = describe_length(1024), describe_length(2048)  # a T + b T^2 from two counts
    square = (per_token[1] / 2048 - per_token[0] / 1024) / 1024
    text = WHY[axis].format(
        width=WIDTH, document=DOCUMENT, chosen=CHOSEN, length=LENGTH, most=most, cells=256,
        balance=round((per_token[0] / 1024 - 1024 * square) / square, -2).__int__(),
        flops=f"{found['flops'].slope:.2f}", time=f"{found['time'].slope:.2f}", memory=f"{found['memory'].slope:.2f}",
        memory_theory=f"{found['expected'].slope:.2f}", rows=LENGTH * CHOSEN / most, slow=min(rates), fast=max(rates),
        saved=min(other["length"][32768]["seconds"]) / min(other["documents"][32768]["seconds"]),
        plain=3 * 4 * LENGTH * most / 1e9, peak=last["bytes"] / 1e9,
    )  # fmt: skip
    lines = [f"| {AXES[axis].unit} | seconds | GFLOP/s | MB | MB estimated |", "| --- | --- | --- | --- | --- |"]
    for (value, point), rate in zip(points.items(), rates, strict=True):
        seconds, size = min(point["seconds"]), point["bytes"] / 1e6
        lines.append(f"| {value:,} | {seconds:.3g} | {rate:.0f} | {size:,.0f} | {point['expected_bytes'] / 1e6:,.0f} |")
    return f"## {axis.capitalize()}\n\n{text}\n\n" + "\n".join(lines) + "\n"


def describe_length(length: int) -> float:
    """Counted operations of a step of one document of so many tokens."""
    from scaling import built, theory

    return theory(built("length", length)[0], "length", length)[0]


def planned(config: str, gpus: int, context: int = 4096, **options: Any) -> Plan:
    model = build_meta(CONFIGS / f"{config}.yaml", None)
    return plan(model, describe(model, context), gpus, **options)


def _paper() -> str:
    lines = [
        "| model, tokens | GPUs | FLOPs | at 40 % | states a GPU | a row | moved a step: weights / "
        "tokens | a row: computing / moving "
        "| moving hides behind | bubble |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for config, name in PLANNED.items():
        for gpus in SIZES:
            found = planned(config, gpus)
            days = found.seconds / 86_400
            time = f"{days:,.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
            states = found.memory_states / 1e9
            lines.append(
                f"| {name}, {found.tokens / 1e9:,.0f}B | {gpus:,} | {found.flops:.1e} | {time} "
                f"| {states:,.{0 if states >= 10 else 1}f} GB{'' if found.fits else ' (too much)'} | "
                f"{found.memory_row / 1e9:.1f} GB "
                f"| {found.moved_weights / 1e9:,.1f} / {found.moved_tokens / 1e9:.1f} GB "
                f"| {found.step_compute:.2g} / {found.step_moving:.2g} s | {found.hidden:,.0f} tokens "
                f"| {found.bubble:.0%} |"
            )
    return (
        f"## On {SIZES[0]} and on {SIZES[1]:,} GPUs, on paper\n\n"
        "Published models on H200s, 20 tokens for each active weight, rows of 4,096 tokens, one row a GPU and step "
        "(`mm info configs/decoder/llama_3_1_8b.yaml --plan 1024`; `mm/info/plan.py` has the rules and their sources). "
        "Time is shared by the GPUs without loss: what more of them cost is in the columns of bytes. Weights are cut "
        "over all GPUs and gathered layer by layer (ZeRO-3); experts stay where they are and tokens travel to them. "
        f"Within a machine of {NODE} the links carry it; beyond, the network, an eighth of the gathered bytes through "
        "each GPU's card, but all of its own tokens.\n\n" + "\n".join(lines) + "\n\n"
        "Read it so. *Too much*: cut the model over more GPUs. *Moving* above *computing*: give each "
        "GPU more tokens a step, "
        "at least those of the last column but one, or the GPUs wait; for experts' tokens more rows "
        "do not help, as each "
        "brings its own: overlap them with computing, or keep a token's experts within a machine. The *bubble* is of a "
        "pipeline of 8 stages and 32 rows, for models that are cut by layers instead.\n"
    )


def _published() -> str:
    lines = [
        "| run | tokens | plan at 40 % | published | so its whole run had | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for config, (name, context, tokens, hours, source) in PUBLISHED.items():
        found = planned(config, 2048, context, gpu="h100", tokens=tokens)
        share = found.flops / (3600 * hours * GPUS["h100"].flops)
        lines.append(
            f"| {name} | {tokens / 1e12:g}T | {found.gpu_hours / 1e6:.2f}M hours | {hours / 1e6:.2f}M "
            f"hours | {share:.0%} "
            f"| {source} |"
        )
    weights, best = optimal(6 * 70e9 * 1.4e12)
    gpt3 = planned("gpt3_175b", 1024, 2048, tokens=300e9).flops
    return (
        "## Against published runs\n\n" + "\n".join(lines) + "\n\n"
        "The share is of an H100's dense bfloat16 speed. DeepSeek computed in FP8 and counts the run "
        "itself; Meta's hours are "
        "cumulative, restarts and all that was not a step included, in which a small model spends "
        "much of its time. So take "
        "40 % as what a good step reaches and 15 to 35 % as what a budget sees; `--mfu` says which. "
        f"GPT-3's 300B tokens come to {gpt3:.2e} FLOPs here, 3.14e23 in its paper (arXiv 2005.14165, "
        "table D.1, which leaves "
        f"attention's products out); Chinchilla's FLOPs (70B weights, 1.4T tokens) are best spent on "
        f"{weights / 1e9:.0f}B "
        f"weights and {best / 1e12:.2f}T tokens by the refit used here (arXiv 2404.10102).\n"
    )


def _recipe() -> str:
    return (
        "## Planning a run\n\n"
        "1. `mm info CONFIG --plan GPUS --gpu h100` says FLOPs, days, what fits, and how many tokens "
        "a GPU needs a step.\n"
        "2. Take the batch in tokens: at least *moving hides behind* times the GPUs, at most *largest useful batch*.\n"
        "3. Run 50 steps on one GPU; `throughput/tokens_per_second` times the FLOPs a token, over the "
        "GPU's, is your share. "
        "Put it in as `--mfu`.\n"
        "4. Choose the row's length by the first table: once attention weighs as much as the rest, packing documents "
        "costs nothing and long rows cost their square.\n"
        "5. More experts cost memory, not operations: give every expert some hundreds of rows a step and GPU.\n"
    )


def plot(kept: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    for name, measured, counted, unit, scale in (
        ("time", lambda p: min(p["seconds"]), lambda p: p["flops"], "seconds a step", 1.0),
        ("memory", lambda p: p["bytes"], lambda p: p["expected_bytes"], "MB above rest", 1e-6),
    ):
        with pyplot.rc_context({**colors, "font.size": 9}):
            figure, grid = pyplot.subplots(2, 3, figsize=(8.4, 5.2), layout="constrained")
            for (axis, about), axes in zip(AXES.items(), grid.flat, strict=False):
                _panel(axes, about, points_of(kept, axis), measured, counted, unit, scale)
                axes.set_title(f"{axis}: {fits(kept, axis)[name]}", fontsize=10)
            handles, labels = grid.flat[0].get_legend_handles_labels()
            grid.flat[-1].axis("off")
            grid.flat[-1].legend(handles, labels, loc="center", frameon=False, fontsize=9)
            figure.savefig(folder / f"scaling-{name}.png", dpi=110, transparent=True)
            pyplot.close(figure)


def _panel(
    axes: Any, about: Axis, points: dict[int, Any], measured: Any, counted: Any, unit: str, scale: float
) -> None:
    values, last = list(points), points[max(points)]
    found = [scale * measured(point) for point in points.values()]
    theory = [scale * measured(last) * counted(point) / counted(last) for point in points.values()]
    axes.axvspan(about.fit, values[-1], color=INK, alpha=0.12, lw=0, label="fitted over")
    axes.loglog(values, theory, "--", color=ORANGE, label="counted, through the last point")
    axes.loglog(values, found, "o-", color=BLUE, ms=4, label="measured (its slope above)")
    axes.set_xlabel(about.unit)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25, color=INK)
