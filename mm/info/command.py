"""The command `mm info`: its options, and the table that it prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mm.arguments import Parser
from mm.info.counting import HOW_COUNTED, KEYS, Info, describe
from mm.info.memory import BYTES, Memory
from mm.info.plan import GPUS, NODE, ROWS, STAGES, Plan, plan
from mm.info.source import build_meta


def count(number: float) -> str:
    """Three figures and a suffix, in powers of a thousand: 999, 1.23K, 45.6M, 7.89B, 1.20T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * limit:
            scaled = number / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{number:.0f}"


def size(number: int) -> str:
    """Bytes in powers of 1024: 512 B, 1.5 KiB, 3.00 GiB."""
    value = float(number)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if suffix == "B" else f"{value:.2f} {suffix}"
        value /= 1024
    return f"{value:.2f} TiB"


def render(info: Info) -> Group:
    """The table for humans."""
    parts = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=info.model, title_justify="left")
    parts.add_column("part")
    for heading in ("parameters", "active", "embedding", "FLOPs / token"):
        parts.add_column(heading, justify="right")
    for part in info.parts:
        parts.add_row(part.name, *map(_blank_zero, (part.parameters, part.active, part.embedding, part.flops)))
    parts.add_section()
    decoder_flops = Text(f"{count(info.flops_forward)} (decoder)", style="bold")
    totals = (_blank_zero(number) for number in (info.parameters, info.active, info.embedding))
    parts.add_row("total", *totals, decoder_flops, style="bold")
    parts.add_row("without embedding", "", count(info.active_without_embedding))
    if info.parameters_mtp:
        parts.add_row("beside: multi-token prediction", count(info.parameters_mtp))

    costs = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    share = f"{info.flops_attention / info.flops_forward:.0%} attention"
    context = f"at {info.context:,} tokens"
    costs.add_row("FLOPs per token, forward", count(info.flops_forward), f"{share} {context}")
    costs.add_row("FLOPs per token, training", count(info.flops_training), "3 x forward")
    costs.add_row("KV cache, one token", size(info.cache_bytes_per_token), _numbers_per_layer(info))
    if info.cache_bytes_fixed:
        costs.add_row("states, one sequence", size(info.cache_bytes_fixed), "whatever its length, float32")
    costs.add_row("KV cache, one sequence", size(info.cache_bytes_at_context), context)

    footer = Text("How it is counted\n", style="dim")
    for name, how in HOW_COUNTED.items():
        footer.append(f"  {name}: ", style="bold dim").append(f"{how}.\n", style="dim")
    return Group(parts, costs, _memory(info.memory), footer)


def _numbers_per_layer(info: Info) -> str:
    """How many numbers of how many bytes, and in how many layers."""
    kinds = Counter(number for number in info.cache_numbers_per_layer if number)
    words = [f"{number:,} numbers x {layers} layers" for number, layers in kinds.items()]
    return f"{' + '.join(words) or 'nothing'}, {info.cache_bytes_per_number} bytes each"


def _memory(memory: Memory) -> Table:
    title = f"to train, {memory.precision}, {memory.tokens:,} tokens a step, one device, AdamW"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False, title=title, title_justify="left")
    activations = "recomputed layer by layer" if memory.recomputed else "all kept; an estimate"
    table.add_row("weights", size(memory.weights))
    table.add_row("gradients", size(memory.gradients))
    table.add_row("optimizer", size(memory.optimizer), "two moments")
    table.add_row("activations", size(memory.activations), activations)
    table.add_row("logits", size(memory.logits), "if every token is supervised")
    table.add_row("total", size(memory.total), style="bold")
    return table


def render_plan(found: Plan, context: int) -> Table:
    title = f"on {found.gpus:,} x {found.gpu.upper()}, on paper: {found.mfu:.0%} of their FLOP/s assumed"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False, title=title, title_justify="left")
    wire = "within a machine" if found.gpus <= NODE else "between machines"
    fewest = "one row alone is too large" if found.fewest is None else f"fits on {found.fewest:,} or more"
    table.add_row("training", f"{count(found.tokens)} tokens", f"{found.flops:.2e} FLOPs")
    table.add_row("time", _duration(found.seconds), f"{found.gpu_hours:,.0f} GPU-hours")
    table.add_row("memory, a share of the states", size(int(found.memory_states)), "ZeRO-3")
    table.add_row("memory, a row", size(int(found.memory_row)), f"{'fits' if found.fits else 'TOO MUCH'}; {fewest}")
    table.add_row("moved a step, weights", size(int(found.moved_weights)), "a GPU, two gathers and a scatter")
    if found.moved_tokens:
        table.add_row("moved a step, tokens", size(int(found.moved_tokens)), "a GPU, to experts and back")
    table.add_row("a step of one row, computing", _duration(found.step_compute), f"{context:,} tokens")
    table.add_row("a step of one row, moving", _duration(found.step_moving), wire)
    table.add_row("moving hides behind", f"{count(found.hidden)} tokens", "a GPU and step, or more")
    table.add_row("pipeline bubble", f"{found.bubble:.0%}", f"{STAGES} stages, {ROWS} rows")
    table.add_row("expected loss", f"{found.loss:.3f}", "nats a token; dense models on English web text")
    table.add_row(
        "best use of these FLOPs", f"{count(found.optimal_weights)} weights", f"{count(found.optimal_tokens)} tokens"
    )
    table.add_row("largest useful batch", f"{count(found.critical_batch)} tokens", "at that loss")
    return table


def _duration(seconds: float) -> str:
    for limit, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _blank_zero(number: int) -> str:
    return count(number) if number else "-"


def main(argv: Sequence[str]) -> int:
    """Prints the table, or JSON. Raises ValueError for what cannot be counted."""
    parser = Parser(
        "mm info",
        "Print parameters, FLOPs, cache bytes and training memory of a model, from its config: no weights are read.",
        notes="keys of --json:\n" + "\n".join(f"  {key}: {what}" for key, what in KEYS.items()),
        examples=["mm info runs/demo/model", "mm info configs/decoder/deepseek_v3.yaml --context 131072 --json"],
    )
    precisions = f"of training: {', '.join(BYTES)} (%(default)s)"
    what = "a YAML config, a model directory, or a published config.json"
    parser.add_argument("model", type=Path, metavar="CONFIG|MODEL_DIR", help=what)
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens already seen (default: 4096)")
    parser.add_argument("--cache-bytes", type=int, default=2, metavar="N", help="bytes of a cached number (default: 2)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="count with this vocabulary, not the tokenizer's")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of a training step (default: 1)")
    parser.add_argument("--precision", choices=list(BYTES), default="bf16-mixed", metavar="P", help=precisions)
    parser.add_argument("--plan", type=int, metavar="GPUS", help="also what training on so many would cost, on paper")
    parser.add_argument("--gpu", choices=list(GPUS), default="h200", help="which, for --plan (%(default)s)")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="S", help="share of its FLOP/s (%(default)s)")
    parser.add_argument("--tokens", type=float, metavar="N", help="to train on (default: 20 for each active weight)")
    parser.add_argument("--json", action="store_true", help="print JSON, exact numbers")
    options = parser.parse_args(argv)
    model = build_meta(options.model, options.vocab_size)
    info = describe(model, options.context, options.cache_bytes, options.batch, options.precision)
    found = None
    if options.plan is not None:
        found = plan(model, info, options.plan, options.gpu, options.mfu, options.tokens)
    if options.json:
        more = {} if found is None else {"plan": asdict(found)}
        print(json.dumps(json.loads(info.to_json()) | more, indent=2))
    else:
        Console().print(render(info))
        if found is not None:
            Console().print(render_plan(found, info.context))
    return 0
