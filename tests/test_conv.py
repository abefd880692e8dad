import pytest
import torch
from op_cases import IMAGE_LAYOUTS, Case, cases, check_accuracy, check_special_values


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases("conv", "conv_bn_relu"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["conv", "conv_bn_relu"])
def test_special_values(op, layout, device, dtype):
    check_special_values(Case(op, (2, 3, 9, 8), 5, (3, 3), (2, 2), (1, 1, 1, 1)), device, dtype, layout)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_result(memory_format, layout, device, dtype):
    for x in [(2, 3, 9, 9), (0, 3, 9, 9), (1, 3, 3, 3), (2, 1, 1, 1)]:
        case = Case("conv", x, 8, (3, 3), (2, 2), (1, 1, 1, 1), memory_format=memory_format)
        check_accuracy(case, device, dtype, layout)


def test_strided_weight(device, dtype):
    case = Case("conv", (2, 3, 9, 9), 8, (3, 3), (2, 2), (1, 1, 1, 1))
    args = case.arguments(dtype, device)
    out = case.call(args | {"weight": args["weight"].contiguous(memory_format=torch.channels_last)})
    torch.testing.assert_close(out, case.call(args))


def test_defaults(device):
    """stride 2 and padding 1."""
    args = Case("conv", (1, 3, 9, 8), 4, (3, 3)).arguments(torch.float32, device)
    x, weight, bias = args["x"], args["weight"], args["bias"]
    assert torch.equal(torch.ops.effnet.conv(x, weight, bias), torch.ops.effnet.conv(x, weight, bias, [2, 2], [1, 1, 1, 1], "none"))
