"""Whether a GPU computes what the CPU does: attention's values and gradients, logits of small published decoders.

    python benchmarks/gpu/parity.py

Every backend against sdpa in float32 on the CPU, which the CPU's tests hold to transformers; rates are the largest
difference as parts of a million of the largest value. Logits in float32 without TF32 agree to the order of sums (1e-4);
in bfloat16, which keeps 8 bits, to 2e-2 of the largest for attention, and to 5e-2 after a Llama's three layers.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from on_gpu import GpuBench
from torch import Tensor

import mm
from attention import layout_of
from mm.decoder.attention.backends import BACKENDS, sdpa
from mm.decoder.layout import Layout, Places

GOALS: dict[str, tuple[float, float]] = {}  # it passes or fails
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
HEAD: dict[str, Any] = {"head_dim": 32}
MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT: dict[str, Any] = {
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 64, "num_key_value_heads": 4,
}  # fmt: skip


def configs() -> dict[str, Any]:
    return {
        "Llama": transformers.LlamaConfig(**SIZES),
        "Qwen3-MoE": transformers.Qwen3MoeConfig(**SIZES, **MOE, **HEAD),
        "DeepSeek-V3": transformers.DeepseekV3Config(**SIZES | LATENT),
        "gpt-oss": transformers.GptOssConfig(
            **SIZES, **HEAD, num_local_experts=8, num_experts_per_tok=2, sliding_window=16
        ),
    }


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted.double()).abs().max() / wanted.double().abs().max())


def check(bench: GpuBench, what: str, run: str, found: float, allowed: float) -> None:
    if not found <= allowed:
        raise SystemExit(f"{what}, {run}: differs by {found:.2g} of the largest, more than {allowed:g}")
    bench.add(what=what, run=run, rate=1e6 * found, unit=f"ppm of {1e6 * allowed:g}", noise=0.0)


def logits(bench: GpuBench) -> None:
    ids = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(0))
    for name, config in configs().items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            model = mm.load(folder).eval()
        with torch.inference_mode():
            wanted = model(input_ids=ids).logits
            for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
                if dtype == torch.bfloat16 and name != "Llama":
                    continue  # a router's choice between near experts is another one in bfloat16
                found = model.to(bench.device, dtype)(input_ids=ids.to(bench.device)).logits
                run = str(dtype).removeprefix("torch.")
                check(bench, f"logits, {name}", run, difference(found, wanted), allowed)


def attention(bench: GpuBench) -> None:
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "documents": (3, {}), "a window": (1, {"window": 40}), "a soft cap": (3, {"softcap": 20.0}),
        "sinks": (3, {"sinks": torch.linspace(-1, 1, 4)}),
    }  # fmt: skip
    for what, (documents, options) in cases.items():
        torch.manual_seed(0)
        inputs = [torch.randn(1, 240, heads, 32) for heads in (4, 2, 2)]
        grad, layout = torch.randn(1, 240, 4, 32), layout_of(240, documents)
        wanted = results(sdpa.attend, inputs, grad, layout, options)
        places = layout.queries
        parts = (places.index, places.document_ids, places.branch_ids)
        moved = Places(*(part.to(bench.device) for part in parts))
        there = Layout(moved, moved, layout.positions.to(bench.device))
        given = {key: value.to(bench.device) if isinstance(value, Tensor) else value for key, value in options.items()}
        for name, attend in BACKENDS.items():
            half = [part.to(bench.device, torch.bfloat16) for part in inputs]
            try:
                found = results(attend, half, grad.to(bench.device, torch.bfloat16), there, given)
            except ValueError as error:
                bench.note(f"attention, {what}, {name}: {error}")
                continue
            worst = max(difference(a, b) for a, b in zip(found, wanted, strict=True))
            check(bench, f"attention, {what}", name, worst, 2e-2)


def results(attend: Any, inputs: list[Tensor], grad: Tensor, layout: Layout, options: dict[str, Any]) -> list[Tensor]:
    leaves = [part.clone().requires_grad_() for part in inputs]
    out = attend(*leaves, layout, scale=32**-0.5, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def main(argv: Sequence[str] | None = None) -> int:
    bench = GpuBench(__doc__, argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    attention(bench)
    logits(bench)
    return bench.end()


if __name__ == "__main__":
    sys.exit(main())
