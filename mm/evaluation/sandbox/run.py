"""One untrusted Python program in a process of its own: did it run to its end?

    run(program) -> parent: temporary folder, clock, kill         (this file)
                    child:  limits, Landlock, seccomp, then exec  (jail.py)

The child can use a bounded amount of time and memory, read Python's own files and its temporary folder, write in that
folder, and nothing else: no other process, no network, no signal, no other file. Where the kernel cannot promise that
(Linux 5.13 or later on x86-64 or ARM64), nothing is run at all.

This contains what a language model writes by accident or in bad habit. A program that knows this file can claim to have
ended well (its checks run in its own process, as everywhere), and against an attacker who holds a kernel exploit only a
virtual machine helps.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO

JAIL = Path(__file__).with_name("jail.py")
REPORT_BYTES = 4_096  # of what the child may say about itself
STARTUP = 60.0  # seconds until Python itself has started: the program's clock runs after that
READY = b"+"  # the child is shut in, or has something to report
UNCONTAINED = "cannot contain: "
_ALLOWED: ContextVar[bool] = ContextVar("code_execution_allowed", default=False)


@dataclass(frozen=True)
class Outcome:
    """`passed` only if the program ran to its very end; `reason` else says why not ("timed out", "AssertionError").
    `output` is the beginning of what it printed, where that was asked for."""

    passed: bool
    reason: str
    seconds: float
    output: str = ""


@contextlib.contextmanager
def code_execution_allowed() -> Iterator[None]:
    """Generated programs run inside this block only: nothing that a config says can enter it."""
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def require_allowed(who: str) -> None:
    """Raises ValueError, naming `who` asks, outside `code_execution_allowed`."""
    if not _ALLOWED.get():
        raise ValueError(f"{who} runs programs that the model wrote: add --allow-code-execution if you want that")


def run(
    program: str,
    timeout: float = 3.0,
    memory: int = 512 * 2**20,
    file_bytes: int = 16 * 2**20,
    output_bytes: int = 0,
    who: str = "this evaluation",
) -> Outcome:
    """Runs `program` with `timeout` seconds of wall clock, `memory` bytes of address space, files of `file_bytes`.

    With `output_bytes`, so much of what it prints (standard output and error) is kept; without, nothing is. Raises
    ValueError, naming `who`, outside `code_execution_allowed`, and RuntimeError where this machine cannot contain it.
    """
    require_allowed(who)
    start = time.perf_counter()
    # What is printed goes to a file without a name: like any other it can hold `file_bytes`, and no reader is needed.
    with tempfile.TemporaryDirectory(prefix="mm-sandbox-") as folder, tempfile.TemporaryFile() as printed:
        passed, reason = _run_in(folder, program, timeout, memory, file_bytes, printed if output_bytes else None)
        printed.seek(0)
        output = printed.read(output_bytes).decode("utf-8", "replace")
    return Outcome(passed, reason, time.perf_counter() - start, output)


def _run_in(
    folder: str, program: str, timeout: float, memory: int, file_bytes: int, printed: IO[bytes] | None
) -> tuple[bool, str]:
    # The child says "ended" with a word of its own: os._exit(0) is not success.
    secret = secrets.token_hex(16)
    reading, writing = os.pipe()
    arguments = [str(value) for value in (writing, memory, file_bytes, math.ceil(timeout) + 1)]
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", *(["-u"] if printed else []), str(JAIL), *arguments],
        stdin=subprocess.PIPE,
        stdout=printed or subprocess.DEVNULL,
        stderr=printed or subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": "", "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        pass_fds=(writing,),
        start_new_session=True,
    )
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        try:
            late = _watch(child, pipe, f"{secret}\n{program}".encode("utf-8", "surrogatepass"), timeout)
        finally:
            _kill(child)
        report = (pipe.read(REPORT_BYTES) or b"").decode("utf-8", "replace")
    if report.startswith(UNCONTAINED):
        raise RuntimeError(f"this machine cannot run generated code safely: {report.removeprefix(UNCONTAINED)}")
    if report == secret:
        return True, "passed"
    if late or child.returncode == -signal.SIGXCPU:
        return False, "timed out"
    return False, report.strip() or _death(child.returncode)


def _watch(child: subprocess.Popen[bytes], pipe: io.RawIOBase, program: bytes, timeout: float) -> bool:
    """Feeds the child, waits until it is shut in, then gives it its time; whether that was too short."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
        stdin.write(program)
    if not select.select([pipe], [], [], STARTUP)[0]:
        raise RuntimeError(f"the sandbox's Python did not start within {STARTUP:.0f} s")
    if pipe.read(1) != READY:
        return False  # it died before the program began
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child cannot have made other processes; its group is killed all the same."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended the process with status {code}"
    return f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"killed by signal {-code}"
