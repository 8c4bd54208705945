"""Programs that the model wrote, run in the sandbox of `mm.evaluation.sandbox`: off unless it is asked for.

The program gets Python's standard library, a temporary folder, and bounded time, memory, files and output. It gets no
other process, no network and no other file; where the kernel cannot promise that, nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm.evaluation.sandbox.run import code_execution_allowed, run

# The traceback is printed within the sandbox: it names lines of the program alone.
_WRAPPER = """\
import sys as _sys, traceback as _traceback
try:
    exec(compile({program!r}, "<program>", "exec"), {{"__name__": "__main__"}})
except SystemExit:
    pass
except BaseException as _error:
    _lines = _traceback.TracebackException.from_exception(_error, limit=-3)
    print("".join(_lines.format_exception_only()), end="", file=_sys.stderr)
    raise
"""


@dataclass(frozen=True)
class CodeTool:
    """Runs programs: `seconds` of wall clock, `memory` bytes of address space, `output_bytes` of what they print."""

    seconds: float = 5.0
    memory: int = 512 * 2**20
    file_bytes: int = 2**20
    output_bytes: int = 8_192

    def __call__(self, program: str) -> str:
        """What the program printed, and why it ended if not by itself.

        Raises ValueError for a program that is empty or fails, with what it printed, and RuntimeError where this
        machine cannot contain it.
        """
        if not program.strip():
            raise ValueError("code: the program is empty")
        with code_execution_allowed():
            wrapped = _WRAPPER.format(program=program)
            outcome = run(wrapped, self.seconds, self.memory, self.file_bytes, self.output_bytes, "the tool code")
        output = outcome.output.rstrip("\n")
        if len(outcome.output.encode()) >= self.output_bytes:
            output += f"\n(cut after {self.output_bytes:,} bytes)"
        if not outcome.passed:
            raise ValueError(f"code: {outcome.reason}" + (f"\n{output}" if output else ""))
        return output or "(nothing printed)"
