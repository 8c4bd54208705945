"""What attacks on `mm serve` count: the slow tests of tests/serve with all their requests, and the lines they print.

    python benchmarks/hostile.py [TEST ...]

200 slow sockets of each kind, 10,000 arbitrary requests, 1,000 cancelled streams, 1,000 texts that spell special
tokens, URLs that must lead nowhere, bombs as data: URLs and uploads. About ten minutes on 2 cores; fails if a test
does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["slow_sockets", "hostile_http", "cancelled", "specials", "media_over_http", "survives"]


def main(names: list[str]) -> int:
    files = [f"tests/serve/test_{name}.py" for name in names or TESTS]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "slow", "-o", "faulthandler_timeout=0", *files]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            if "counted:" in line or line.startswith(("FAILED", "ERROR", "E  ", "=")):
                print(line.rstrip(), flush=True)
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
