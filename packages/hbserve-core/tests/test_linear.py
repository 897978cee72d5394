"""Products on a CPU, whatever layout and dtype its processor likes for the weights."""

import pytest
import torch
import torch.nn.functional as F

from hbserve_core.model.layers import Linear, WidenedLinear, fewest_rows, make_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def numbers(request):
    """x (16, 40), weight (24, 40) and bias (24,)."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(request.param) for shape in ((16, 40), (24, 40), (24,))]


@pytest.mark.parametrize("make", [make_linear, WidenedLinear])
@pytest.mark.parametrize("rows", [1, 3, 4, 16])
def test_a_product_is_the_exact_one_rounded_to_the_weights_dtype(numbers, make, rows):
    x, weight, bias = numbers
    exact = F.linear(x[:rows].double(), weight.double(), bias.double())
    found = make(weight.clone(), bias.clone())(x[:rows])
    assert found.dtype == weight.dtype
    spacing = torch.finfo(weight.dtype).eps
    # 40 summands of float32, then one rounding.
    torch.testing.assert_close(found.double(), exact, rtol=spacing, atol=64 * torch.finfo(torch.float32).eps)


def test_a_product_may_be_added_to_what_is_there():
    torch.manual_seed(0)
    x, weight, bias, before = (torch.randn(shape) for shape in ((16, 40), (24, 40), (24,), (16, 24)))
    for given in (None, bias):
        target = before.clone()
        Linear(weight, given).add_to(target, x)
        torch.testing.assert_close(target, before + F.linear(x, weight, given))


def test_only_processors_with_avx512_get_steps_padded():
    padded = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert fewest_rows(torch.device("cpu")) == (4 if padded else 1)
    assert fewest_rows(torch.device("cuda")) == 1
