"""`--help` of every command: what it says, how wide it is, how soon it comes."""

import subprocess
import sys

import pytest

from mm.arguments import WIDEST, Parser
from mm.cli import COMMANDS, main


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_each_command_fits_the_terminal_and_ends_with_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as done:  # how argparse ends
        assert not done.code
    shown = capsys.readouterr().out
    text, _, examples = shown.rpartition("\nexample")
    assert shown.startswith(f"usage: mm {name} ")
    assert f"\n  mm {name} " in examples
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "--help" in text and "%(" not in shown


@pytest.mark.parametrize("name", ["chat", "explain", "generate", "fit", "validate"])
def test_help_that_loads_nothing_heavy(name):
    code = f"import sys\nfrom mm.cli import main\ntry: main([{name!r}, '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'lightning', 'rich', 'numpy') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines()[-1] == "[]"


def parser() -> Parser:
    notes = "Some words " * 20 + "\n\nkeys:\n  one    what it is " + "and more " * 20 + "\n  two  short"
    made = Parser("mm try", "Try it.", examples=["mm try " + "--long " * 20], notes=notes)
    made.add_argument("--size", type=int, default=3, metavar="N", help="how large (%(default)s), --no-breaks " * 5)
    return made


@pytest.mark.parametrize("columns", [60, 300])
def test_notes_are_wrapped_and_examples_are_not(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = parser().format_help().splitlines()
    assert "  mm try " + "--long " * 19 + "--long" in [line.rstrip() for line in lines]
    assert max(len(line) for line in lines if "--long" not in line) <= min(columns, WIDEST)
    start = next(n for n, line in enumerate(lines) if line.startswith("  one    what"))
    assert lines[start + 1].startswith(" " * 9) and lines[start + 1][9] != " "
    assert "how large (default: 3)" in " ".join(lines)
    assert not any(line.endswith("--no-") for line in lines)


def test_a_mistake_is_one_line_that_names_the_help():
    with pytest.raises(ValueError, match=r"^argument --size: invalid int value: 'many'; see mm try --help$"):
        parser().parse_args(["--size", "many"])
