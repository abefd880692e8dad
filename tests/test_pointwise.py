import pytest
import torch
from op_cases import IMAGE_LAYOUTS, Case, cases, check_accuracy, check_special_values

import effnet_aot

OPS = ["pointwise_bn", "pointwise_bn_relu", "pointwise_bn_relu6", "pointwise"]


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases(*OPS), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_special_values(op, layout, device, dtype):
    check_special_values(Case(op, (2, 9, 4, 5), 7, activation="relu6" if op == "pointwise" else "none"), device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channels_are_not_mixed_with_pixels(layout, device):
    """Reading NCHW memory as a (pixels, channels) matrix would."""
    case = Case("pointwise_bn_relu6", (2, 4, 3, 3), 4)
    args = case.arguments(torch.float32, device, layout)
    args["weight"] = torch.eye(4, device=device)[:, :, None, None]
    args |= {"bn_weight": torch.ones(4), "bn_bias": torch.zeros(4), "bn_mean": torch.zeros(4), "bn_var": torch.ones(4), "eps": 0.0}
    args = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    torch.testing.assert_close(case.call(args), args["x"].clamp(0, 6))


def test_residual_of_another_layout(device, dtype):
    case = Case("pointwise", (2, 8, 4, 5), 8, residual=True)
    args = case.arguments(dtype, device, "contiguous")
    other = args | {"residual": args["residual"].contiguous(memory_format=torch.channels_last)}
    assert torch.equal(case.call(args), case.call(other)) and case.call(other).is_contiguous()


def test_strided_weight(device, dtype):
    case = Case("pointwise", (2, 8, 4, 5), 6, matrix_weight=True)
    args = case.arguments(dtype, device)
    strided = args | {"weight": args["weight"].t().contiguous().t()}
    assert torch.equal(case.call(args), case.call(strided))


def test_vectors_of_odd_strides(device, dtype):
    case = Case("pointwise_bn_relu", (2, 8, 4, 5), 6)
    args = case.arguments(dtype, device)
    strided = {k: torch.stack([v, v], 1)[:, 0] if k.startswith("bn_") else v for k, v in args.items()}
    # Eager's batch norm takes another path for them.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(case.call(args), case.call(strided), rtol=4 * eps, atol=4 * eps)


def test_public_name(device):
    args = Case("pointwise_bn_relu6", (2, 8, 4, 5), 6).arguments(torch.float32, device)
    assert torch.equal(effnet_aot.fused_pointwise_conv_bn_relu6(**args), torch.ops.effnet.pointwise_bn_relu6(**args))
