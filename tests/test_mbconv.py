import pytest
import torch
from op_cases import IMAGE_LAYOUTS, MbconvCase, cases, check_accuracy, check_special_values

from effnet_aot import ops


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases("mbconv"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("hidden", [10, None])
def test_special_values(hidden, layout, device, dtype):
    check_special_values(MbconvCase((2, 5, 7, 6), hidden, 4), device, dtype, layout)


def test_border_is_zero(device):
    """Outside the image the expanded map is 0, not the activation of a bias: a corner sees four taps."""
    one = torch.ones(1, 1, device=device)
    x, taps, bias = torch.zeros(1, 1, 4, 4, device=device), torch.ones(1, 1, 3, 3, device=device), torch.ones(1, device=device)
    out = ops.mbconv(x, one, bias, taps, None, one, None, activation="relu")
    assert out[0, 0, 0, 0] == 4 and out[0, 0, 0, 1] == 6 and out[0, 0, 1, 1] == 9


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["mbconv", "depthwise"])
def test_depthwise_weight_in_any_order(op, layout, device, dtype):
    for kernel in (3, 5):
        args = MbconvCase((2, 8, 7, 9), 24, 8, kernel).arguments(dtype, device, layout)
        if op == "depthwise":
            args = {"x": args["x"], "weight": args["depthwise_weight"][:8], "bias": args["project_bias"]}
        name = "weight" if op == "depthwise" else "depthwise_weight"
        weight = args[name]
        taps_first = ops.taps_first(weight)
        assert torch.equal(taps_first, weight) and taps_first.stride()[2:] == (kernel * weight.shape[0], weight.shape[0])
        want = getattr(ops, op)(**args)
        for other in (taps_first, weight.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([weight, weight], 1)[:, 0], weight.flip(0).flip(0)):
            torch.testing.assert_close(getattr(ops, op)(**args | {name: other}), want, rtol=0, atol=0)


def test_taps_first_stays():
    """What moves, copies or stores a weight keeps its order."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(ops.taps_first(torch.randn(8, 1, 3, 3)))
    strides = layer.weight.stride()
    assert layer.half().weight.stride() == strides and layer.to(torch.float64).weight.stride() == strides
    assert layer.weight.clone().stride() == strides and layer.weight.detach().to("cpu", torch.bfloat16).stride() == strides


def test_defaults(device):
    """stride 1, padding 1, relu6; one number stands for all directions."""
    args = MbconvCase((1, 4, 5, 6), 8, 4).arguments(torch.float32, device)
    weights = [args[name] for name in ("expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias")]
    plain = torch.ops.effnet.mbconv(args["x"], *weights)
    assert torch.equal(plain, torch.ops.effnet.mbconv(args["x"], *weights, None, [1, 1], [1, 1, 1, 1], "relu6"))
    assert torch.equal(ops.mbconv(args["x"], *weights, None, 2, 0), torch.ops.effnet.mbconv(args["x"], *weights, None, [2, 2], [0, 0, 0, 0]))


def test_is_its_three_steps(device, dtype):
    case = MbconvCase((2, 8, 9, 7), 24, 8, 3, (2, 2), (0, 1, 0, 1), wide_vectors=True)
    args = case.arguments(dtype, device)
    y = ops.pointwise(args["x"], args["expand_weight"], args["expand_bias"], None, "relu6")
    y = ops.depthwise(y, args["depthwise_weight"], args["depthwise_bias"], 2, (0, 1, 0, 1), "relu6")
    y = ops.pointwise(y, args["project_weight"], args["project_bias"])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(case.call(args), y, rtol=8 * eps, atol=32 * eps)
