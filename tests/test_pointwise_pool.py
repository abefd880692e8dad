import pytest
import torch
from op_cases import IMAGE_LAYOUTS, Case, cases, check_accuracy, check_special_values


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases("pointwise_bn_relu_pool", "pointwise_pool"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_special_values(activation, layout, device, dtype):
    check_special_values(Case("pointwise_pool", (2, 9, 4, 5), 7, activation=activation), device, dtype, layout)


def test_activation_comes_before_the_mean(device):
    x = torch.tensor([1.0, -1.0], device=device).view(1, 1, 1, 2)
    assert torch.ops.effnet.pointwise_pool(x, torch.ones(1, 1, device=device), None, "relu").item() == 0.5
