"""`mm upcycle`: a dense model directory, or anything else `mm.load` opens, as a mixture of experts to train further.

mm upcycle somewhere/llama runs/llama-moe --experts 8 --per-token 2 --keep-dense 1
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import yaml

from mm import checkpoint
from mm.arguments import Parser
from mm.decoder.decoder import Decoder
from mm.decoder.upcycle import Upcycling, copy_into_experts
from mm.model import MultimodalModel
from mm.parts import build

PROBE = 32  # random ids that both models read at the end


def upcycle(
    model: MultimodalModel, upcycling: Upcycling, generator: torch.Generator | None = None
) -> tuple[MultimodalModel, bool]:
    """The sparse model, in eval mode, and whether it computes what the dense one does.

    Towers and all else are copied. The result is no published checkpoint any more: `mm export` has no class for it.
    Raises ValueError naming a part that cannot be changed.
    """
    if model.config is None:
        raise ValueError("upcycle: the model does not know its config; open it with mm.load")
    config = deepcopy(model.config)
    config["init_args"]["decoder"] = upcycling.tree(config["init_args"]["decoder"])
    decoder = build(config["init_args"]["decoder"], Decoder)
    decoder.set_vocabulary(model.decoder.vocab_size)
    if any(getattr(layer, "cross", None) is not None for layer in model.decoder.layers):
        decoder.add_cross_attention()
    same = copy_into_experts(model.decoder, decoder, upcycling, generator)
    sparse = deepcopy(model, {id(model.decoder): decoder})  # a copy of all else, around the other decoder
    sparse.config, sparse.origin = config, None
    return sparse.eval(), same


def main(argv: Sequence[str]) -> int:
    """Writes the directory and says how far the two models' logits lie apart."""
    parser = Parser(
        "mm upcycle",
        "Make a mixture of experts of a dense model: each expert begins as a copy of the feed-forward part that it "
        "stands for, so that the model computes what it did before.",
        usage="mm upcycle SRC DST [options]",
        examples=["mm upcycle runs/llama runs/llama-moe --experts 8 --per-token 2"],
    )
    what = "a model directory, ours or a published one, or a GGUF file"
    parser.add_argument("source", metavar="SRC", type=Path, help=what)
    parser.add_argument("target", metavar="DST", type=Path, help="the model directory to write")
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="experts a layer (default: 8)")
    parser.add_argument("--per-token", type=int, default=2, metavar="N", help="experts a token visits (default: 2)")
    parser.add_argument("--keep-dense", type=int, default=0, metavar="N", help="first layers left dense (default: 0)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="change every N-th layer (default: 1)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help="noise on copies, as a share of the weights' spread (default: 0)",
    )
    start = "the router's weights: random or zero (default: random)"
    parser.add_argument("--start", choices=["random", "zero"], default="random", metavar="HOW", help=start)
    parser.add_argument("--router", type=Path, metavar="YAML", help="a router's class_path and init_args")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of noise and router (default: 0)")
    options = parser.parse_args(argv)
    if (options.target / "manifest.json").exists() or (options.target / "config.json").exists():
        raise ValueError(f"{options.target}: there is a model already; give another directory")
    router = None if options.router is None else yaml.safe_load(options.router.read_text(encoding="utf-8"))
    upcycling = Upcycling(
        options.experts,
        options.per_token,
        options.keep_dense,
        options.every,
        options.noise,
        options.start,
        router,
    )
    torch.manual_seed(options.seed)
    dense = checkpoint.load(options.source)
    sparse, same = upcycle(dense, upcycling, torch.Generator().manual_seed(options.seed))
    checkpoint.save(sparse, options.target)
    apart = difference(dense, sparse, options.seed)
    counts = [sum(p.numel() for p in model.parameters()) for model in (dense, sparse)]
    print(f"{options.target}: {counts[0]:,} parameters became {counts[1]:,}")
    expected = "the same but for rounding" if same else "not the same (noise, or a router without constant weights)"
    print(f"logits differ from the dense model's by at most {apart:.2g} of the largest: {expected}")
    return 0


@torch.no_grad()
def difference(dense: MultimodalModel, sparse: MultimodalModel, seed: int) -> float:
    """The largest difference of logits on random ids, relative to the largest logit."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, dense.decoder.vocab_size, (1, PROBE), generator=generator)
    before, after = (model(input_ids=ids).logits for model in (dense, sparse))
    return float((after - before).abs().max() / before.abs().max())
