"""The import rule of the project: who may import whom inside `mm`, read from the source of every file.

An import inside a function counts like any other, but for the two named in LAZY, which must stay inside one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Unit -> what it may import, in the order of data. A unit is all that stands below its name; `import mm` itself (for
# the version) is free to all.
TYPES = {"mm.types"}
STAGES = {"mm.tokenizers", "mm.encoders", "mm.fusion", "mm.decoder"}
NETWORK = TYPES | STAGES | {"mm.parts", "mm.model", "mm.pretrained", "mm.checkpoint"}
USES = NETWORK | {"mm.datasets"}
RUNS = USES | {"mm.arguments", "mm.objectives", "mm.generation", "mm.allowlist", "mm.config_errors", "mm.info"}
ALLOWED: dict[str, set[str]] = {
    "mm": set(),
    "mm.types": set(),
    "mm.allowlist": set(),
    "mm.arguments": set(),
    "mm.config_errors": {"mm.allowlist"},
    "mm.parts": {"mm.allowlist", "mm.config_errors"},
    "mm.tokenizers": TYPES,
    "mm.encoders": TYPES,
    "mm.fusion": TYPES,
    "mm.decoder": TYPES,
    "mm.datasets": TYPES | {"mm.arguments", "mm.tokenizers.text"},
    "mm.testing": USES,
    "mm.model": TYPES | STAGES | {"mm.parts", "mm.datasets.chat_template"},
    "mm.checkpoint": TYPES | STAGES | {"mm.parts", "mm.model"},
    "mm.pretrained": TYPES | STAGES | {"mm.parts", "mm.model", "mm.datasets.published_template"},
    "mm.export": NETWORK | {"mm.arguments"},
    "mm.upcycle": NETWORK | {"mm.arguments"},
    "mm.info": NETWORK | {"mm.arguments"},
    "mm.shard": USES | {"mm.arguments"},
    "mm.objectives": USES,
    "mm.generation": USES,
    "mm.generate": RUNS,
    "mm.training": RUNS,
    "mm.evaluation": RUNS,
    "mm.tools": RUNS | {"mm.evaluation.sandbox", "mm.generate"},
    "mm.chat": RUNS | {"mm.tools"},
    "mm.serve": RUNS | {"mm.evaluation.sandbox", "mm.explain", "mm.tools"},
    "mm.report": RUNS,
    "mm.explain": RUNS | {"mm.report"},
    "mm.doctor": RUNS | {"mm.training"},
    "mm.validate": RUNS | {"mm.training", "mm.evaluation"},
    "mm.harness": RUNS | {"mm.evaluation"},
    "mm.demo": RUNS | {"mm.training", "mm.evaluation", "mm.chat", "mm.report"},
    "mm.cli": set(),  # finds commands by name, so that it stays light
}
# Files of one unit import one another freely, but the tokenizers do not: a video is made of images, and .model files
# are read by a module of their own.
TOKENIZERS = {
    "mm.tokenizers.video": {"mm.tokenizers.image"},
    "mm.tokenizers.text": {"mm.tokenizers.sentencepiece"},
    "mm.tokenizers.missing": {"mm.tokenizers.text"},
    "mm.tokenizers.gguf": {"mm.tokenizers.sentencepiece"},
}
# Against the order, so only when called: `mm.load`, its other formats, and `MultimodalModel.generate`.
LAZY = {("mm", "mm.checkpoint"), ("mm.checkpoint", "mm.pretrained"), ("mm.model", "mm.generation")}


def python_files(folder: Path) -> Iterator[Path]:
    """Every .py file below, through the links to the stage folders."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(ROOT / "mm")}


def unit(module: str) -> str:
    return ".".join(module.split(".")[:2])


def below(module: str, prefixes: set[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def imports(node: ast.AST, module: str, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(imported module of mm, whether only inside a function or for type checking), in the file's order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: line {child.lineno}: relative imports do not say where they lead"
            full = [f"{child.module}.{alias.name}" for alias in child.names]
            names = [name if name in MODULES else str(child.module) for name in full]
        else:
            names = []
        yield from ((name, lazy) for name in names if name.startswith("mm."))
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        inside = typing_only or isinstance(child, ast.FunctionDef)
        yield from imports(child, module, lazy or inside)


def violations(module: str, source: str) -> list[str]:
    own = unit(module)
    assert own in ALLOWED, f"{own} has no place in the order of imports: give it one in ALLOWED"
    wrong = []
    for name, lazy in imports(ast.parse(source), module):
        if own == "mm.tokenizers" == unit(name):
            fits = below(name, TOKENIZERS.get(module, {module}))
        else:
            for_tests = module.endswith(".testing") and name == "mm.testing"
            fits = (
                unit(name) == own or below(name, ALLOWED[own]) or for_tests or (lazy and (module, unit(name)) in LAZY)
            )
        if not fits:
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_file_keeps_the_import_rule(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_stage_folder_is_read() -> None:
    assert {"mm.tokenizers", "mm.encoders", "mm.fusion", "mm.datasets"} <= {unit(module) for module in MODULES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mm.encoders.none", "from mm.fusion.splice import splice"),
        ("mm.encoders.none", "def f():\n    import mm.model"),
        ("mm.datasets.packing", "from mm.tokenizers import image"),
        ("mm.datasets.packing", "from mm import model"),
        ("mm.tokenizers.audio", "from mm.tokenizers.text import TextTokenizer"),
        ("mm.decoder.decoder", "try:\n    from mm.objectives.base import Loss\nexcept ImportError:\n    pass"),
        ("mm.model", "from mm.generation.engine import generate"),
        ("mm.cli", "def run():\n    from mm.chat.cli import main"),
        ("mm.training.module", "import mm.evaluation.runner as runner"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mm.tokenizers.video", "from mm.tokenizers.image import ImageTokenizer\nimport tokenizers"),
        ("mm.model", "def generate():\n    from mm.generation.engine import generate"),
        ("mm.datasets.processor", "import mm\nfrom mm.tokenizers.text import TextTokenizer"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
