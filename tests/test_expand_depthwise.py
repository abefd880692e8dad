import pytest
import torch
from op_cases import IMAGE_LAYOUTS, beginning, cases, check_accuracy, check_special_values

from effnet_aot import ops


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases("expand_depthwise"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values(layout, device, dtype):
    check_special_values(beginning((2, 8, 7, 6), 24, wide_vectors=True, taps_first=True), device, dtype, layout)


def test_border_is_zero(device):
    """Outside the image the expanded map is 0, not the activation of a bias: a corner sees four taps."""
    x, one, taps, bias = torch.zeros(1, 8, 4, 4), torch.ones(8, 8), ops.taps_first(torch.ones(8, 1, 3, 3)), torch.ones(8)
    x, one, taps, bias = (t.to(device) for t in (x.to(memory_format=torch.channels_last), one, taps, bias))
    out = ops.expand_depthwise(x, one, bias, taps, torch.zeros_like(bias), activation="relu")
    assert out[0, 3, 0, 0] == 4 and out[0, 3, 0, 1] == 6 and out[0, 3, 1, 1] == 9


def test_defaults(device):
    """stride 1, padding 1, relu6; one number stands for all directions."""
    args = beginning((1, 4, 5, 6), 8).arguments(torch.float32, device)
    given = [args[name] for name in ("x", "expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias")]
    plain = torch.ops.effnet.expand_depthwise(*given)
    assert torch.equal(plain, torch.ops.effnet.expand_depthwise(*given, [1, 1], [1, 1, 1, 1], "relu6"))
    assert torch.equal(ops.expand_depthwise(*given, 2, 0), torch.ops.effnet.expand_depthwise(*given, [2, 2], [0, 0, 0, 0]))


def test_is_its_two_steps(device, dtype):
    args = beginning((2, 8, 9, 7), 24, 3, (2, 2), (0, 1, 0, 1), wide_vectors=True).arguments(dtype, device)
    y = ops.pointwise(args["x"], args["expand_weight"], args["expand_bias"], None, "relu6")
    y = ops.depthwise(y, args["depthwise_weight"], args["depthwise_bias"], 2, (0, 1, 0, 1), "relu6")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ops.expand_depthwise(**args), y, rtol=8 * eps, atol=32 * eps)
