"""`mm fit | validate | test | predict`: a short help of our own, and all else to Lightning's command line.

Lightning's help is some 400 lines and takes as long as training takes to start: `--help-all` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm.arguments import Parser

WHAT = {
    "fit": "Train a stage from a config: alignment, instruction.",
    "validate": "Score a stage or a model: benchmarks, with controls.",
    "test": "Run the test loop of a config's module.",
    "predict": "Run the prediction loop of a config's module.",
}
EXAMPLES = {
    "fit": [
        "mm fit --config configs/demo/instruct.yaml",
        "mm fit --config configs/demo/instruct.yaml --trainer.max_steps 100 --model.optim.lr 3e-4",
        "mm fit --config configs/demo/instruct.yaml --ckpt_path last",
    ],
    "validate": [
        "mm validate --config configs/evaluation/mmmu.yaml --model.model runs/demo/model",
        "mm validate --benchmarks mmmu,vqav2 --model.model runs/demo/model --controls",
        "mm validate --reproduce runs/demo/results/easy_vqa.json",
    ],
    "test": ["mm test --config FILE"],
    "predict": ["mm predict --config FILE"],
}
KEYS = (
    "Any key of a config can be given on the line by its path: --trainer.max_steps 50, --data.workers 4. "
    "A config is data: its class_paths name mm, torch and lightning only."
)


def main(argv: Sequence[str]) -> int | None:
    """`argv[0]` is the command. Errors as in mm.training.cli."""
    name, *rest = argv
    options = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in options or "--help" in options:
        short_help(name).print_help()
        return 0
    from mm.training.cli import main as lightning  # slow to import

    lightning([name, *("--help" if argument == "--help-all" else argument for argument in rest)])
    return None


def short_help(name: str) -> Parser:
    """What one wants to know first."""
    parser = Parser(
        f"mm {name}",
        WHAT[name],
        usage=f"mm {name} --config FILE [--KEY VALUE ...]",
        notes=KEYS,
        examples=EXAMPLES[name],
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="a YAML file; later ones override earlier ones")
    if name == "validate":
        add("--benchmarks", metavar="A,B", help="the named configs of configs/evaluation, together")
        add("--controls", action="store_true", help="also without media and with other media; --no-controls does not")
        add("--reproduce", metavar="FILE", help="run a result again, and say whether it comes out the same")
        add("--allow-code-execution", action="store_true", help="run generated programs (humaneval), in a sandbox")
    add("--ckpt_path", metavar="PATH", help="a checkpoint to go on from; last: the run's own last one")
    if name == "fit":
        add("--allow-change", metavar="KEY", help="let a resumed run differ from its checkpoint in KEY; repeatable")
    add("--allow-import", metavar="NAME", help="let configs name this package too, which you trust; repeatable")
    add("--print_config", action="store_true", help="print the whole config that these arguments make, and end")
    add("--model.help", metavar="CLASS", help="the options of a class, as of any class_path: --data.help, ...")
    add("--help-all", action="store_true", help="every key of trainer, model and data (long)")
    return parser
