import pytest
import torch
from op_cases import IMAGE_LAYOUTS, StemMbconvCase, cases, check_accuracy, check_special_values

from effnet_aot import ops


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("case", cases("stem_mbconv"), ids=str)
def test_accuracy(case, layout, device, dtype):
    check_accuracy(case, device, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values(layout, device, dtype):
    """Of a stem with other kernels: the one that has its own takes infinity for the largest number, see tests/variants.py."""
    check_special_values(StemMbconvCase((2, 3, 9, 8), 5, 4), device, dtype, layout)


def test_is_a_stem_and_a_block(device):
    args = StemMbconvCase((2, 3, 9, 8), 8, 8, memory_format=torch.channels_last).arguments(device=device)
    stem = ops.conv(args["x"], args["stem_weight"], args["stem_bias"], activation="relu", memory_format=torch.channels_last)
    block = ops.mbconv(stem, None, None, *(args[f"{step}_{part}"] for step in ("depthwise", "project") for part in ("weight", "bias")))
    both = torch.ops.effnet.stem_mbconv(**args)
    assert torch.equal(both, block) and both.is_contiguous(memory_format=torch.channels_last)
    del args["stem_stride"], args["stem_padding"], args["stem_activation"], args["stride"], args["padding"], args["activation"]
    assert torch.equal(ops.stem_mbconv(**args), both), "defaults"
