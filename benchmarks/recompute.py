"""Memory and time of a training step by what the decoder recomputes: a Llama of 21M parameters, rows of 4 x 256.

    OMP_NUM_THREADS=1 python benchmarks/recompute.py --clock cpu --threads 1 --repeats 3

Each policy runs in a process of its own, so that its peak memory (ru_maxrss above what the model took) is its own;
ratios are of times. Losses of the first step are compared before anything is shown.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from common import Bench, spread

from mm.decoder.attention.grouped import GroupedAttention
from mm.decoder.decoder import Decoder, LayerGroup
from mm.decoder.ffn.dense import GatedFFN
from mm.model import MultimodalModel
from mm.objectives.instruct import NextToken
from mm.testing import tiny_tokenizer
from mm.types import Batch

POLICIES: tuple[Any, ...] = ("none", "selective", 2, "full")
ROWS, LENGTH, VOCABULARY = 4, 256, 8192


def child(policy: Any, clock: Any, repeats: int, threads: int | None) -> dict[str, Any]:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    ffns: dict[str, Any] = {"f": partial(GatedFFN, hidden=1216)}
    mixers: dict[str, Any] = {"m": partial(GroupedAttention, heads=7)}
    groups = [LayerGroup(["m/f"], 7)]
    decoder = Decoder(448, mixers, ffns, groups, VOCABULARY, checkpoint_activations=policy)
    model = MultimodalModel(tiny_tokenizer(), decoder).train()
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    batch = Batch(ids, ids.clone(), torch.ones_like(ids), torch.zeros_like(ids))
    before, losses, seconds = _peak(), [], []
    for _ in range(1 + repeats):
        start = clock()
        loss = NextToken()(model, batch)
        (loss.total / loss.count).backward()
        seconds.append(clock() - start)
        losses.append(float(loss.total.detach() / loss.count))
        model.zero_grad(set_to_none=True)
    return {"loss": losses[0], "seconds": seconds[1:], "bytes": _peak() - before}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    bench = Bench(__doc__)
    found = {}
    for policy in POLICIES:
        options = [json.dumps(policy), bench.args.clock, str(bench.args.repeats), str(bench.args.threads or 0)]
        done = subprocess.run([sys.executable, __file__, "child", *options], stdout=subprocess.PIPE, check=True)
        found[policy] = json.loads(done.stdout)
    first = found["none"]
    for policy, run in found.items():
        assert abs(run["loss"] - first["loss"]) < 1e-4, found
        taken = statistics.median(run["seconds"])
        bench.add(
            what="20.7M Llama, 4 x 256", run=f"recompute {policy}", rate=ROWS * LENGTH / taken, unit="tokens/s",
            noise=spread(run["seconds"]), peer="none", ratio=statistics.median(first["seconds"]) / taken,
            limit="none's memory", share=run["bytes"] / first["bytes"],
        )  # fmt: skip
    bench.note("peak MB of a step: " + ", ".join(f"{name} {run['bytes'] / 1e6:,.0f}" for name, run in found.items()))
    return bench.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        clock = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
        print(json.dumps(child(json.loads(sys.argv[2]), clock, int(sys.argv[4]), int(sys.argv[5]))))
    else:
        sys.exit(main())
