import pytest
import torch
import torch.nn.functional as F
from op_cases import IMAGE_LAYOUTS, Case, cases, check_accuracy, check_special_values


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases("depthwise", "depthwise_bn_relu6"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["depthwise", "depthwise_bn_relu6"])
def test_special_values(op, layout, device, dtype):
    check_special_values(Case(op, (2, 5, 7, 6), 5, (3, 3), (1, 1), (1, 1, 1, 1)), device, dtype, layout)


def test_border_is_zero(device):
    """Outside the image the input is 0: a corner sees four taps, whatever the bias is."""
    x, weight = torch.ones(1, 1, 4, 4, device=device), torch.ones(1, 1, 3, 3, device=device)
    out = torch.ops.effnet.depthwise(x, weight, torch.full((1,), 10.0, device=device), 1, 1)
    torch.testing.assert_close(out, F.conv2d(x, weight, padding=1) + 10)
    assert out[0, 0, 0, 0].item() == 14


def test_defaults(device):
    """stride 1 and padding 1; one number stands for all directions."""
    args = Case("depthwise", (1, 4, 5, 6), 4, (3, 3)).arguments(torch.float32, device)
    x, weight, bias = args["x"], args["weight"], args["bias"]
    assert torch.equal(torch.ops.effnet.depthwise(x, weight, bias), torch.ops.effnet.depthwise(x, weight, bias, [1, 1], [1, 1, 1, 1]))
    assert torch.equal(torch.ops.effnet.depthwise(x, weight, bias, 2, 0), torch.ops.effnet.depthwise(x, weight, bias, [2, 2], [0, 0, 0, 0]))
