"""Bad input is rejected in the same words by the CPU kernel, the CUDA kernel and the fake kernel (csrc/arguments.cpp and
effnet_aot/ops/rules.py). The table below is those words."""

import pytest
import torch
from op_cases import OPS, SMALL, Case, MbconvCase, StemMbconvCase, beginning
from torch._subclasses.fake_tensor import FakeTensorMode

PW = Case("pointwise", (2, 8, 4, 5), 6)
BN = Case("pointwise_bn_relu6", (2, 8, 4, 5), 6)
PROJECT = Case("pointwise_bn", (2, 8, 4, 5), 6, residual=True)
DW = Case("depthwise", (2, 8, 6, 5), 8, (3, 3), (1, 1), (1, 1, 1, 1))
DW_BN = Case("depthwise_bn_relu6", (2, 8, 6, 5), 8, (3, 3), (1, 1), (1, 1, 1, 1))
CONV = Case("conv", (2, 3, 6, 5), 8, (3, 3), (2, 2), (1, 1, 1, 1))
STEM = Case("conv_bn_relu", (2, 3, 6, 5), 8, (3, 3), (2, 2), (1, 1, 1, 1))
POOL = Case("pointwise_pool", (2, 8, 4, 5), 6)
LINEAR = Case("linear", (2, 8), 6)
LINEAR_BIAS = Case("linear_bias", (2, 8), 6)
BLOCK = MbconvCase((2, 8, 6, 5), 16, 6)
BEGINNING = beginning((2, 8, 6, 5), 16)
NO_EXPAND = MbconvCase((2, 8, 6, 5), None, 6)
BOTH = StemMbconvCase((2, 3, 6, 5), 8, 6)
RESIDUAL_BLOCK = MbconvCase((2, 8, 6, 5), 16, 8, residual=True)

IMAGE = "x must be (N, C, H, W) with C, H and W at least 1"
FLOATS = "x must be float16, bfloat16 or float32 (on the CPU also float64)"
MATRIX = "weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = 8"
WINDOW = "weight must be (C, 1, k, k) with C = 8 and k = 3 or 5"
NUMBERS = "from 0 to 2147483647"

h, i, d = torch.float16, torch.int64, torch.float64


def t(*shape, dtype=torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


HALF_BLOCK = {"x": (2, 8, 6, 5), "expand_weight": (16, 8), "expand_bias": (16,), "depthwise_weight": (16, 1, 3, 3), "project_weight": (6, 16), "project_bias": (6,)}

# (a good call, what is changed in it, the error). Functions make tensors on the device under test.
TABLE = [
    (PW, {"x": t(8, 4, 5)}, f"{IMAGE}, got (8, 4, 5)"),
    (PW, {"x": t(8)}, f"{IMAGE}, got (8,)"),
    (PW, {"x": t()}, f"{IMAGE}, got ()"),
    (PW, {"x": t(2, 0, 4, 5)}, f"{IMAGE}, got (2, 0, 4, 5)"),
    (BN, {"x": t(2, 8, 0, 5)}, f"{IMAGE}, got (2, 8, 0, 5)"),
    (DW, {"x": t(2, 8, 6, 0)}, f"{IMAGE}, got (2, 8, 6, 0)"),
    (CONV, {"x": t(2, 3, 6, 5, 1)}, f"{IMAGE}, got (2, 3, 6, 5, 1)"),
    (POOL, {"x": t(2, 8, 4)}, f"{IMAGE}, got (2, 8, 4)"),
    (PW, {"x": t(2, 8, 4, 5, dtype=i)}, f"{FLOATS}, got int64"),
    (DW, {"x": t(2, 8, 6, 5, dtype=torch.bool)}, f"{FLOATS}, got bool"),
    (CONV, {"x": t(2, 3, 6, 5, dtype=torch.uint8)}, f"{FLOATS}, got uint8"),
    (LINEAR, {"x": t(2, 8, dtype=torch.complex64)}, f"{FLOATS}, got complex64"),
    (PW, {"weight": t(6, 8, 1, 1, dtype=h)}, "weight must be float32 like x, got float16"),
    (LINEAR, {"weight": t(6, 8, dtype=h)}, "weight must be float32 like x, got float16"),
    (BN, {"x": t(2, 8, 4, 5, dtype=h)}, "weight must be float16 like x, got float32"),
    (PW, {"weight": t(6, 7, 1, 1)}, f"{MATRIX}, got (6, 7, 1, 1)"),
    (BN, {"weight": t(6, 8, 3, 3)}, f"{MATRIX}, got (6, 8, 3, 3)"),
    (BN, {"weight": t(6, 8, 1)}, f"{MATRIX}, got (6, 8, 1)"),
    (PROJECT, {"weight": t(8, 6)}, f"{MATRIX}, got (8, 6)"),
    (POOL, {"weight": t(0, 8)}, f"{MATRIX}, got (0, 8)"),
    (DW, {"weight": t(8, 3, 3)}, f"{WINDOW}, got (8, 3, 3)"),
    (DW, {"weight": t(7, 1, 3, 3)}, f"{WINDOW}, got (7, 1, 3, 3)"),
    (DW, {"weight": t(8, 8, 3, 3)}, f"{WINDOW}, got (8, 8, 3, 3)"),
    (DW_BN, {"weight": t(8, 1, 3, 5)}, f"{WINDOW}, got (8, 1, 3, 5)"),
    (DW_BN, {"weight": t(8, 1, 7, 7)}, f"{WINDOW}, got (8, 1, 7, 7)"),
    (CONV, {"weight": t(8, 4, 3, 3)}, "weight must be (C_out, C_in, k_h, k_w) with C_in = 3, got (8, 4, 3, 3)"),
    (STEM, {"weight": t(8, 3, 0, 3)}, "weight must be (C_out, C_in, k_h, k_w) with C_in = 3, got (8, 3, 0, 3)"),
    (LINEAR, {"x": t(2, 8, 1)}, "x must be (rows, in_features) with in_features at least 1, got (2, 8, 1)"),
    (LINEAR, {"weight": t(6, 7)}, "weight must be (out_features, in_features) with in_features = 8, got (6, 7)"),
    (LINEAR_BIAS, {"weight": t(8)}, "weight must be (out_features, in_features) with in_features = 8, got (8,)"),
    (LINEAR_BIAS, {"bias": t(5)}, "bias must be (out_features,) with out_features = 6, got (5,)"),
    (LINEAR, {"bias": t(1, 6)}, "bias must be (out_features,) with out_features = 6, got (1, 6)"),
    (LINEAR, {"bias": t(6, dtype=h)}, "bias must be float32, got float16"),
    (PW, {"bias": t(5)}, "bias must be (C_out,) with C_out = 6, got (5,)"),
    (DW, {"bias": t(8, 1, 1)}, "bias must be (C_out,) with C_out = 8, got (8, 1, 1)"),
    (CONV, {"bias": t(8, dtype=d)}, "bias must be float32, got float64"),
    (POOL, {"bias": t(7)}, "bias must be (C_out,) with C_out = 6, got (7,)"),
    (PW, {"x": t(2, 8, 4, 5, dtype=h), "weight": t(6, 8, dtype=h), "bias": t(6, dtype=torch.bfloat16)}, "bias must be float16 or float32, got bfloat16"),
    (BN, {"bn_weight": t(7)}, "bn_weight must be (C_out,) with C_out = 6, got (7,)"),
    (BN, {"bn_bias": t(7)}, "bn_bias must be (C_out,) with C_out = 6, got (7,)"),
    (DW_BN, {"bn_mean": t(8, 1)}, "bn_mean must be (C_out,) with C_out = 8, got (8, 1)"),
    (STEM, {"bn_var": t(0)}, "bn_var must be (C_out,) with C_out = 8, got (0,)"),
    (BN, {"bn_weight": t(6, dtype=h)}, "bn_weight must be float32, got float16"),
    (BN, {"bn_var": t(6, dtype=h)}, "bn_var must be float32 like bn_weight, got float16"),
    (BN, {"eps": -1e-5}, "eps must be at least 0, got -1e-05"),
    (STEM, {"eps": -2.0}, "eps must be at least 0, got -2"),
    (DW_BN, {"eps": float("nan")}, "eps must be at least 0, got nan"),
    (PROJECT, {"residual": t(2, 6, 4, 4)}, "residual must be (2, 6, 4, 5) like the output, got (2, 6, 4, 4)"),
    (PROJECT, {"residual": t(1, 6, 4, 5)}, "residual must be (2, 6, 4, 5) like the output, got (1, 6, 4, 5)"),
    (PROJECT, {"residual": t(6)}, "residual must be (2, 6, 4, 5) like the output, got (6,)"),
    (PROJECT, {"residual": t(2, 6, 4, 5, dtype=h)}, "residual must be float32 like x, got float16"),
    (PW, {"activation": "gelu"}, "activation must be 'none', 'relu' or 'relu6', got 'gelu'"),
    (POOL, {"activation": ""}, "activation must be 'none', 'relu' or 'relu6', got ''"),
    (CONV, {"activation": "ReLU"}, "activation must be 'none', 'relu' or 'relu6', got 'ReLU'"),
    (PW, {"activation": "relu6\0"}, r"activation must be 'none', 'relu' or 'relu6', got 'relu6\x00'"),
    (DW, {"stride": [3, 1]}, "stride must be 1 or 2 in each direction, got (3, 1)"),
    (DW, {"stride": 0}, "stride must be two numbers from 1 to 2147483647, got (0, 0)"),
    (CONV, {"stride": [-1, 1]}, "stride must be two numbers from 1 to 2147483647, got (-1, 1)"),
    (STEM, {"stride": [1, 2**31]}, "stride must be two numbers from 1 to 2147483647, got (1, 2147483648)"),
    (DW_BN, {"padding": [1, 1, -1, 1]}, f"padding must be four numbers (left, right, top, bottom) {NUMBERS}, got (1, 1, -1, 1)"),
    (CONV, {"padding": [0, 0, 0, 2**31]}, f"padding must be four numbers (left, right, top, bottom) {NUMBERS}, got (0, 0, 0, 2147483648)"),
    (DW, {"x": t(2, 8, 2, 5), "padding": 0}, "weight must have a kernel no larger than the padded input (2, 5), got (3, 3)"),
    (CONV, {"x": t(2, 3, 6, 1), "padding": [0, 1, 0, 0]}, "weight must have a kernel no larger than the padded input (6, 2), got (3, 3)"),
    (CONV, {"memory_format": torch.preserve_format}, "memory_format must be contiguous_format or channels_last, got preserve_format"),
    (CONV, {"memory_format": torch.channels_last_3d}, "memory_format must be contiguous_format or channels_last, got channels_last_3d"),
    (BLOCK, {"x": t(8, 6, 5)}, f"{IMAGE}, got (8, 6, 5)"),
    (BLOCK, {"x": t(2, 8, 6, 5, dtype=i)}, f"{FLOATS}, got int64"),
    (BLOCK, {"x": t(2, 7, 6, 5)}, "expand_weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = 7, got (16, 8, 1, 1)"),
    (BLOCK, {"expand_weight": t(16, 8, dtype=h)}, "expand_weight must be float32 like x, got float16"),
    (BLOCK, {"expand_bias": t(8)}, "expand_bias must be (C_out,) with C_out = 16, got (8,)"),
    (BLOCK, {"expand_weight": None}, "expand_bias must be None where expand_weight is, got (16,)"),
    (BLOCK, {"depthwise_weight": t(8, 1, 3, 3)}, "depthwise_weight must be (C, 1, k, k) with C = 16 and k = 3 or 5, got (8, 1, 3, 3)"),
    (NO_EXPAND, {"depthwise_weight": t(8, 3, 3)}, "depthwise_weight must be (C, 1, k, k) with C = 8 and k = 3 or 5, got (8, 3, 3)"),
    (NO_EXPAND, {"x": t(8)}, f"{IMAGE}, got (8,)"),
    (BLOCK, {"depthwise_bias": t(16, dtype=d)}, "depthwise_bias must be float32, got float64"),
    (BLOCK, {"padding": 0, "x": t(2, 8, 2, 5)}, "depthwise_weight must have a kernel no larger than the padded input (2, 5), got (3, 3)"),
    (BLOCK, {"stride": [3, 1]}, "stride must be 1 or 2 in each direction, got (3, 1)"),
    (BLOCK, {"project_weight": t(6, 8)}, "project_weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = 16, got (6, 8)"),
    (BLOCK, {"project_bias": t(16)}, "project_bias must be (C_out,) with C_out = 6, got (16,)"),
    (RESIDUAL_BLOCK, {"residual": t(2, 8, 6, 4)}, "residual must be (2, 8, 6, 5) like the output, got (2, 8, 6, 4)"),
    (BLOCK, {"activation": "silu"}, "activation must be 'none', 'relu' or 'relu6', got 'silu'"),
    (BLOCK, {name: t(*shape, dtype=h) for name, shape in HALF_BLOCK.items()} | {"depthwise_bias": t(16)}, "depthwise_bias must be float16 like expand_bias, got float32"),
    (BOTH, {"x": t(3, 6, 5)}, f"{IMAGE}, got (3, 6, 5)"),
    (BOTH, {"stem_weight": t(8, 4, 3, 3)}, "stem_weight must be (C_out, C_in, k_h, k_w) with C_in = 3, got (8, 4, 3, 3)"),
    (BOTH, {"stem_weight": t(8, 3, 3, 3, dtype=h)}, "stem_weight must be float32 like x, got float16"),
    (BOTH, {"stem_bias": t(7)}, "stem_bias must be (C_out,) with C_out = 8, got (7,)"),
    (BOTH, {"stem_padding": 0, "x": t(2, 3, 2, 5)}, "stem_weight must have a kernel no larger than the padded input (2, 5), got (3, 3)"),
    (BOTH, {"stem_stride": 0}, "stem_stride must be two numbers from 1 to 2147483647, got (0, 0)"),
    (BOTH, {"stem_padding": -1}, f"stem_padding must be four numbers (left, right, top, bottom) {NUMBERS}, got (-1, -1, -1, -1)"),
    (BOTH, {"stem_activation": "silu"}, "stem_activation must be 'none', 'relu' or 'relu6', got 'silu'"),
    (BOTH, {"activation": "silu"}, "activation must be 'none', 'relu' or 'relu6', got 'silu'"),
    (BOTH, {"stride": [3, 1]}, "stride must be 1 or 2 in each direction, got (3, 1)"),
    (BOTH, {"padding": [0, -1, 0, 0]}, f"padding must be four numbers (left, right, top, bottom) {NUMBERS}, got (0, -1, 0, 0)"),
    (BOTH, {"padding": 0, "x": t(2, 3, 3, 9)}, "depthwise_weight must have a kernel no larger than the padded input (2, 5), got (3, 3)"),
    (BOTH, {"depthwise_weight": t(7, 1, 3, 3)}, "depthwise_weight must be (C, 1, k, k) with C = 8 and k = 3 or 5, got (7, 1, 3, 3)"),
    (BOTH, {"project_weight": t(6, 7)}, "project_weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = 8, got (6, 7)"),
    (BOTH, {"memory_format": torch.preserve_format}, "memory_format must be contiguous_format or channels_last, got preserve_format"),
    (BOTH, {"stem_activation": "silu", "activation": "gelu", "stem_stride": 0, "x": t(8)}, "stem_activation must be 'none', 'relu' or 'relu6', got 'silu'"),
    (BEGINNING, {"x": t(8, 6, 5)}, f"{IMAGE}, got (8, 6, 5)"),
    (BEGINNING, {"x": t(2, 7, 6, 5)}, "expand_weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = 7, got (16, 8, 1, 1)"),
    (BEGINNING, {"expand_bias": t(8)}, "expand_bias must be (C_out,) with C_out = 16, got (8,)"),
    (BEGINNING, {"depthwise_weight": t(8, 1, 3, 3)}, "depthwise_weight must be (C, 1, k, k) with C = 16 and k = 3 or 5, got (8, 1, 3, 3)"),
    (BEGINNING, {"depthwise_bias": t(16, dtype=d)}, "depthwise_bias must be float32, got float64"),
    (BEGINNING, {name: t(*shape, dtype=h) for name, shape in HALF_BLOCK.items() if "project" not in name} | {"depthwise_bias": t(16)},
     "depthwise_bias must be float16 like expand_bias, got float32"),
    (BEGINNING, {"stride": [3, 1]}, "stride must be 1 or 2 in each direction, got (3, 1)"),
    (BEGINNING, {"padding": 0, "x": t(2, 8, 2, 5)}, "depthwise_weight must have a kernel no larger than the padded input (2, 5), got (3, 3)"),
    (BEGINNING, {"activation": "silu"}, "activation must be 'none', 'relu' or 'relu6', got 'silu'"),
    # Several faults: the same one is named everywhere.
    (PW, {"activation": "gelu", "x": t(8), "bias": t(1)}, "activation must be 'none', 'relu' or 'relu6', got 'gelu'"),
    (CONV, {"x": t(2, 3, dtype=i), "stride": 0, "activation": "relu"}, "stride must be two numbers from 1 to 2147483647, got (0, 0)"),
    (BLOCK, {"stride": 0, "activation": "gelu", "x": t(8)}, "activation must be 'none', 'relu' or 'relu6', got 'gelu'"),
    (BLOCK, {"padding": -1, "x": t(8), "expand_weight": None}, f"padding must be four numbers (left, right, top, bottom) {NUMBERS}, got (-1, -1, -1, -1)"),
    (BN, {"eps": -1.0, "weight": t(6, 8, dtype=h), "bn_mean": t(3)}, "weight must be float32 like x, got float16"),
    (PROJECT, {"eps": -1.0, "residual": t(1), "bn_mean": t(3)}, "bn_mean must be (C_out,) with C_out = 6, got (3,)"),
]


def fake_arguments(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Under FakeTensorMode: devices that need not exist."""
    args = case.arguments(dtype, "meta")
    return {name: torch.empty(a.shape, dtype=a.dtype, device=device) if isinstance(a, torch.Tensor) else a for name, a in args.items()}


def rejected(case: Case, changes: dict, args: dict, device: str) -> str:
    args = args | {name: change(device) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(RuntimeError) as info:
        case.call(args)
    return str(info.value)


def ids(value):
    return value.op if isinstance(value, (Case, MbconvCase, StemMbconvCase)) else value if isinstance(value, str) else ""


@pytest.mark.parametrize("case, changes, expected", TABLE, ids=ids)
def test_words(case, changes, expected, device):
    assert rejected(case, changes, case.arguments(torch.float32, device), device) == f"effnet::{case.op}: {expected}"


@pytest.mark.parametrize("case, changes, expected", TABLE, ids=ids)
def test_words_of_the_fake_kernels(case, changes, expected):
    with FakeTensorMode():
        for device in ("cpu", "cuda", "meta"):
            assert rejected(case, changes, fake_arguments(case, torch.float32, device), device) == f"effnet::{case.op}: {expected}"


def test_table_covers_every_op():
    assert {case.op for case, _, _ in TABLE} | {"pointwise_bn_relu", "pointwise_bn_relu_pool"} == set(OPS)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_device_mix(case):
    """Each tensor on another device than x, as fake tensors: the devices need not be there."""
    with FakeTensorMode():
        for x_device, other in (("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")):
            args, others = fake_arguments(case, torch.float32, x_device), fake_arguments(case, torch.float32, other)
            for name in [name for name, a in args.items() if isinstance(a, torch.Tensor) and name != "x"]:
                with pytest.raises(RuntimeError) as info:
                    case.call(args | {name: others[name]})
                assert str(info.value) == f"effnet::{case.op}: {name} must be on {x_device} like x, got {other}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_device_mix_on_cuda(case):
    for x_device, other in (("cpu", "cuda:0"), ("cuda:0", "cpu")):
        args = case.arguments(torch.float32, x_device)
        for name in [name for name, a in args.items() if isinstance(a, torch.Tensor) and name != "x"]:
            with pytest.raises(RuntimeError) as info:
                case.call(args | {name: args[name].to(other)})
            assert str(info.value) == f"effnet::{case.op}: {name} must be on {x_device} like x, got {other}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float64_on_cuda(case):
    with pytest.raises(RuntimeError) as info:
        case.call(case.arguments(torch.float64, "cuda"))
    assert str(info.value) == f"effnet::{case.op}: {FLOATS}, got float64"


LIMIT = "must have at most 2147483647 elements on CUDA, where the kernels index in 32 bits"
# Tensors of one element expanded to billions: they need no memory, and nothing may be launched on them.
TOO_LARGE = [
    (PW, {"x": (2**28, 8, 1, 1)}, f"x {LIMIT}, got 2147483648"),
    (POOL, {"x": (1, 8, 2**14, 2**14)}, f"x {LIMIT}, got 2147483648"),
    (PW, {"x": (2**25, 8, 1, 1), "weight": (64, 8), "bias": (64,)}, f"the output {LIMIT}, got 2147483648"),
    (PW, {"x": (1, 2**16, 1, 1), "weight": (2**15, 2**16), "bias": (2**15,)}, f"weight {LIMIT}, got 2147483648"),
    (DW, {"x": (1, 8, 2**14, 2**14)}, f"x {LIMIT}, got 2147483648"),
    (CONV, {"x": (1, 3, 1, 1), "padding": [2**31 - 1] * 4, "stride": [1, 1]}, f"the output {LIMIT}, got 9223372036854775807"),
    (CONV, {"x": (1, 3, 1, 1), "padding": [1, 1, 2**31 - 1, 1], "stride": [2**20, 1]}, f"the padded height of x {LIMIT}, got 2147483649"),
    (BLOCK, {"x": (2**27, 8, 1, 1)}, f"the expanded map {LIMIT}, got 2147483648"),
    (NO_EXPAND, {"x": (2**16, 8, 63, 63), "padding": [1, 2, 1, 2]}, f"the filtered map {LIMIT}, got 2147483648"),
    (LINEAR, {"x": (2**28, 8)}, f"x {LIMIT}, got 2147483648"),
    (LINEAR, {"x": (2**26, 8), "weight": (32, 8), "bias": (32,)}, f"the output {LIMIT}, got 2147483648"),
]


def too_large(changes: dict, args: dict, device: str) -> dict:
    def change(value):
        return torch.zeros((1,) * len(value), dtype=torch.float16, device=device).expand(value) if isinstance(value, tuple) else value

    return args | {name: change(value) for name, value in changes.items()}


@pytest.mark.parametrize("case, changes, expected", TOO_LARGE, ids=ids)
def test_too_large_for_32_bits(case, changes, expected):
    with FakeTensorMode():
        with pytest.raises(RuntimeError) as info:
            case.call(too_large(changes, fake_arguments(case, torch.float16, "cuda"), "cuda"))
        assert str(info.value) == f"effnet::{case.op}: {expected}"
        if "padding" not in changes:
            case.call(too_large(changes, fake_arguments(case, torch.float16, "cpu"), "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("case, changes, expected", TOO_LARGE, ids=ids)
def test_too_large_for_32_bits_on_cuda(case, changes, expected):
    with pytest.raises(RuntimeError) as info:
        case.call(too_large(changes, case.arguments(torch.float16, "cuda"), "cuda"))
    assert str(info.value) == f"effnet::{case.op}: {expected}"


def test_pooled_output_may_be_large():
    """pointwise_pool does not store the convolution's output, so it does not have to be indexable."""
    case = Case("pointwise_pool", (2**20, 8, 8, 8), 64, bias=False)
    with FakeTensorMode():
        x, weight = torch.empty(case.x, device="cuda", dtype=torch.float16), torch.empty(64, 8, device="cuda", dtype=torch.float16)
        assert torch.ops.effnet.pointwise_pool(x, weight).shape == (2**20, 64)
