"""The code tool: what a program prints, and that it can do nothing else. The walls themselves: tests/evaluation."""

from __future__ import annotations

import pytest

from mm.evaluation.sandbox import run as sandbox
from mm.tools.code import CodeTool


def test_what_is_printed_comes_back() -> None:
    assert CodeTool()("import math\nfor i in range(3): print(math.factorial(i))") == "1\n1\n2"
    assert CodeTool()("x = 1") == "(nothing printed)"
    assert CodeTool()("import sys; print('a'); sys.exit(3)") == "a"
    assert CodeTool()("if __name__ == '__main__': print('main')") == "main"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('before'); 1/0", "code: ZeroDivisionError\nbefore\nZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "PermissionError"),
        ("open('/etc/passwd')", "Permission denied"),
        ("import os; os.fork()", "PermissionError"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("", "the program is empty"),
    ],
)
def test_a_program_that_fails_says_why(program: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        CodeTool()(program)
    assert message in str(error.value)


def test_time_and_output_are_bounded() -> None:
    with pytest.raises(ValueError, match="timed out\nstarted"):
        CodeTool(seconds=1)("print('started')\nwhile True: pass")
    with pytest.raises(ValueError, match="cut after 100 bytes") as error:
        CodeTool(seconds=20, output_bytes=100)("while True: print('x' * 1000)")
    assert len(str(error.value)) < 200


def test_nothing_runs_where_the_kernel_cannot_contain_it(tmp_path, monkeypatch) -> None:
    weak = tmp_path / "jail.py"
    weak.write_text(sandbox.JAIL.read_text(encoding="utf-8").replace("_RESTRICT = 444", "_RESTRICT = 9444"))
    monkeypatch.setattr(sandbox, "JAIL", weak)
    with pytest.raises(RuntimeError, match="cannot run generated code safely"):
        CodeTool()("print(1)")


def test_running_a_tool_allows_no_other_program() -> None:
    CodeTool()("print(1)")
    with pytest.raises(ValueError, match="--allow-code-execution"):
        sandbox.run("print(1)")
