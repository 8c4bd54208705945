"""The kernels' sources compile for older processors than the one that runs the tests."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from mm.decoder import kernels


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of x86")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])  # SSE2; AVX2; AVX-512 without bfloat16
def test_sources_compile_for_older_processors(processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.available()
    flags = ["-O1" if flag == "-O3" else flag for flag in kernels.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(kernels, "FLAGS", (*flags, f"-march={processor}"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = kernels.compiler()
    assert compiler is not None
    try:
        assert kernels._build(compiler).stat().st_size > 0
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode(errors="replace")[-2000:])
