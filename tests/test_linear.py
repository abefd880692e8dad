import pytest
import torch
from op_cases import MATRIX_LAYOUTS, Case, cases, check_accuracy, check_special_values

import effnet_aot


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("case", cases("linear", "linear_bias"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("op", ["linear", "linear_bias"])
def test_special_values(op, device, dtype):
    check_special_values(Case(op, (6, 9), 7), device, dtype, "contiguous")


def test_strided_weight(device, dtype):
    case = Case("linear", (4, 8), 6)
    args = case.arguments(dtype, device)
    torch.testing.assert_close(case.call(args | {"weight": args["weight"].t().contiguous().t()}), case.call(args))


def test_public_name(device):
    args = Case("linear_bias", (4, 8), 6).arguments(torch.float32, device)
    assert torch.equal(effnet_aot.fused_linear_bias(**args), torch.ops.effnet.linear_bias(**args))
