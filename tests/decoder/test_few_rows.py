"""Products of few rows: right, the same to the last bit whatever stands beside a row, and used where they should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mm.decoder import few_rows as module
from mm.decoder import kernels
from mm.decoder.few_rows import MOST_ROWS, Linear, few_rows, linear, suits

# Outputs x inputs, beside the kernel's own steps, and more inputs than it takes at a time.
SHAPES = [(1, 1), (5, 7), (33, 64), (100, 641), (64, 8), (31, 129), (133, 3217)]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_there_is_a_kernel() -> None:
    assert kernels.available()  # or the tests below would only compare torch with itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    for rows in range(1, MOST_ROWS + 3):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        exact = x.double() @ weight.double().t()
        y = few_rows(x, weight)
        assert y.dtype == dtype
        # Rounding of a sum of `inputs` products of order 1, and of the result where that is kept in 8 bits.
        bound = 1e-6 * inputs**0.5 * 8 if dtype == torch.float32 else 2**-8 * exact.abs().clamp(min=1)
        assert ((y.double() - exact).abs() <= bound).all()
        alone = torch.cat([few_rows(row[None], weight) for row in x])
        assert torch.equal(alone, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_with_its_own_matrix(dtype: torch.dtype) -> None:
    x, weight = torch.randn(11, 37).to(dtype), torch.randn(5, 23, 37).to(dtype)
    group = torch.tensor([3, 0, -1, 3, 4, 4, 0, 3, -1, 2, 3])
    y = few_rows(x, weight, group)
    for row, matrix in enumerate(group.tolist()):
        expected = torch.zeros(23, dtype=dtype) if matrix < 0 else few_rows(x[row : row + 1], weight[matrix])[0]
        assert torch.equal(y[row], expected)


def test_sums_of_nothing() -> None:
    for rows in (1, 9):
        assert torch.equal(few_rows(torch.ones(rows, 0), torch.ones(5, 0)), torch.zeros(rows, 5))
    assert few_rows(torch.ones(0, 3), torch.ones(5, 3)).shape == (0, 5)


def test_without_a_compiler_torch_computes_the_same() -> None:
    x, weight, group = torch.randn(4, 19), torch.randn(3, 7, 19), torch.tensor([2, -1, 0, 2])
    assert torch.equal(module._with_torch(x, weight[0], None), F.linear(x, weight[0]))
    y = module._with_torch(x, weight, group)
    assert torch.allclose(y[3], weight[2] @ x[3]) and not y[1].any()


def test_what_does_not_fit_together() -> None:
    x, weight = torch.randn(2, 6), torch.randn(3, 8, 6)
    for wrong in (
        (x, weight[0].double(), None),
        (x.double(), weight[0].double(), None),
        (x, weight[0, :, :5], None),
        (x, weight, None),
        (x, weight, torch.zeros(3, dtype=torch.long)),
        (x, weight, torch.zeros(2, dtype=torch.int32)),
    ):
        with pytest.raises(RuntimeError, match=r"few_rows: x \(M, K\)"):
            few_rows(*wrong)


def test_what_it_is_for() -> None:
    weight = torch.randn(8, 6)
    assert suits(torch.randn(2, 3, 6), weight)
    assert not suits(torch.randn(MOST_ROWS + 1, 6), weight)
    assert not suits(torch.randn(0, 6), weight)
    assert not suits(torch.randn(1, 6), torch.randn(6, 8).t())
    assert not suits(torch.randn(1, 6).double(), weight.double())
    assert not suits(torch.randn(1, 6).bfloat16(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(torch.randn(1, 6), weight)
    with torch.enable_grad():
        assert not suits(torch.randn(1, 6), weight)


def test_a_linear_layer_is_the_same_with_and_without() -> None:
    layer = Linear(37, 21)
    x = torch.randn(2, 3, 37)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.enable_grad():
        layer(torch.randn(2, 37)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    many = torch.randn(MOST_ROWS + 1, 37)
    assert torch.equal(linear(many, layer.weight), F.linear(many, layer.weight))


def test_damaged_numbers_stay_visible() -> None:
    weight = torch.randn(9, 20)
    weight[4, 19], weight[7, 0] = float("nan"), float("inf")
    y = few_rows(torch.ones(1, 20), weight)[0]
    assert y[4].isnan() and y[7].isinf() and y[:4].isfinite().all()


def test_without_a_compiler_a_warning_says_so(tmp_path: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "import torch\n"
        "from mm.decoder.few_rows import few_rows\n"
        "with torch.no_grad():\n"
        "    try:\n        few_rows(torch.ones(1, 2), torch.ones(3, 2))\n"
        "    except UserWarning as warning:\n        print(warning)\n"
        "    warnings.simplefilter('ignore')\n"
        "    print(few_rows(torch.ones(1, 2), torch.ones(3, 2)).tolist())"
    )
    environment = {"PATH": str(tmp_path), "CXX": "/nonexistent/c++", "HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "decoding uses torch's slower operations" in found.stdout and "kernels" in found.stdout
    assert "[[2.0, 2.0, 2.0]]" in found.stdout
