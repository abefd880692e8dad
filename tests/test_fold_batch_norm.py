"""The op fold_batch_norm against float64: numbers, layouts, errors, tracing and gradients. What its kernels compute is in
test_variants_emulated.py and test_variants_gpu.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from variants import half_an_ulp

from effnet_aot import ops
from effnet_aot.fold import fold_batch_norm, is_for_the_op
from effnet_aot.ops import taps_first

h, b, f, d, i = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64
PAIRS = [(h, h), (b, b), (f, f), (f, h), (f, b), (d, d), (d, f), (d, h), (d, b)]  # of the weight, of the folded weight; float64 on the CPU
SHAPES = [(32, 3, 3, 3), (96, 16, 1, 1), (40, 1, 5, 5), (70, 1, 3, 3), (17, 9), (1, 1, 1, 1), (3, 2, 2, 4)]


def arguments(shape=(6, 4, 3, 3), weight_dtype=f, vector_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=d)

    channels, vector_dtype = shape[0], vector_dtype or weight_dtype
    vectors = [normal(channels).abs() + 0.5, normal(channels), normal(channels) / 2, normal(channels).abs() + 0.3]
    return normal(*shape).to(device, weight_dtype), *(v.to(device, vector_dtype) for v in vectors)


def truth(weight, gamma, beta, mean, var, eps=1e-5):
    weight, gamma, beta, mean, var = (t.cpu().double() for t in (weight, gamma, beta, mean, var))
    scale = gamma / (var + eps).sqrt()
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), beta - mean * scale


def assert_rounded_once(actual, expected):
    """eps is rounded to float32 on CUDA, which counts where the variance is small."""
    excess = (actual.cpu().double() - expected).abs() / (1.01 * half_an_ulp(expected, actual.dtype) + 2.0**-40 * expected.abs().max())
    assert excess.max() <= 1


@pytest.mark.parametrize("weight_dtype, folded_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(shape, weight_dtype, folded_dtype, device):
    if device == "cuda" and weight_dtype == d:
        pytest.skip("float64 is for the CPU")
    for vector_dtype in {weight_dtype, f}:
        args = arguments(shape, weight_dtype, vector_dtype, device)
        before = [t.clone() for t in args]
        weight, bias = ops.fold_batch_norm(*args, 1e-5, folded_dtype)
        assert (weight.dtype, bias.dtype) == (folded_dtype, d if folded_dtype == d else f)
        assert weight.shape == shape and weight.is_contiguous() and bias.shape == shape[:1]
        for actual, expected in zip((weight, bias), truth(*args)):
            assert_rounded_once(actual, expected)
        assert all(map(torch.equal, args, before))
        assert all(map(torch.equal, ops.fold_batch_norm(*args, 1e-5, folded_dtype), (weight, bias)))
    if folded_dtype == weight_dtype:
        assert all(map(torch.equal, torch.ops.effnet.fold_batch_norm(*args), (weight, bias)))


def test_layouts(device, dtype):
    """Of the weight and of vectors: the values count."""
    args = arguments((5, 3, 4, 3), dtype, device=device)
    expected = ops.fold_batch_norm(*args)
    weight = args[0]
    strided = torch.zeros(10, 6, 4, 9, dtype=dtype, device=device)[::2, ::2, :, ::3].copy_(weight)
    backwards = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for laid_out in (weight.contiguous(memory_format=torch.channels_last), strided, backwards):
        assert all(map(torch.equal, ops.fold_batch_norm(laid_out, *args[1:]), expected))
    vectors = [torch.stack([v, v], 1)[:, 1] for v in args[1:]]
    assert all(map(torch.equal, ops.fold_batch_norm(weight, *vectors), expected))


@pytest.mark.parametrize("shape", [(16, 1, 3, 3), (7, 1, 5, 5), (2, 1, 3, 3), (4, 1, 1, 3)], ids=str)
def test_taps_first(shape, device, dtype):
    args = arguments(shape, dtype, device=device)
    weight, bias = ops.fold_batch_norm(*args)
    laid_out, same_bias = ops.fold_batch_norm(*args, taps_first=True)
    assert torch.equal(laid_out, weight) and torch.equal(same_bias, bias)
    assert laid_out.stride() == taps_first(weight).stride()


def test_special_values(device):
    inf, nan = torch.inf, torch.nan
    weight = torch.tensor([[1.0, inf, -inf, nan, 0.0]] * 8, device=device)
    gamma = torch.tensor([2.0, inf, nan, 0.0, 1.0, 1.0, 1.0, -1.0], device=device)
    var = torch.tensor([1.0, 1.0, 1.0, 0.0, inf, nan, -1.0, 0.0], device=device)
    mean = torch.tensor([0.5, 0.0, 1.0, inf, 3.0, 1.0, 1.0, -inf], device=device)
    beta = torch.tensor([inf, 1.0, 2.0, 3.0, nan, 5.0, 6.0, -7.0], device=device)
    for eps in (0.0, 1e-5):
        args = weight, gamma, beta, mean, var
        for actual, expected in zip(ops.fold_batch_norm(*args, eps), truth(*args, eps)):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(actual).cpu(), kind(expected.float()))


SHAPE = "weight must be (C_out, C_in, k_h, k_w) or (C_out, C_in), each at least 1"


def t(*shape, dtype=f):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


# What differs from arguments(), by position or name, and the error.
TABLE = [
    ({0: t(6)}, f"{SHAPE}, got (6,)"),
    ({0: t(6, 4, 3)}, f"{SHAPE}, got (6, 4, 3)"),
    ({0: t(6, 0, 3, 3)}, f"{SHAPE}, got (6, 0, 3, 3)"),
    ({0: t(6, 4, 3, 3, dtype=i)}, "weight must be float16, bfloat16 or float32 (on the CPU also float64), got int64"),
    ({1: t(5)}, "bn_weight must be (C_out,) with C_out = 6, got (5,)"),
    ({2: t(6, 1)}, "bn_bias must be (C_out,) with C_out = 6, got (6, 1)"),
    ({1: t(6, dtype=h)}, "bn_weight must be float32, got float16"),
    ({0: t(6, 4, 3, 3, dtype=h), 1: t(6, dtype=b)}, "bn_weight must be float16 or float32, got bfloat16"),
    ({4: t(6, dtype=h)}, "bn_var must be float32 like bn_weight, got float16"),
    ({"eps": -1.0}, "eps must be at least 0, got -1"),
    ({"dtype": d}, "dtype must be float32, float16 or bfloat16, got float64"),
    ({"dtype": i}, "dtype must be float32, float16 or bfloat16, got int64"),
    ({0: t(6, 4, dtype=h), "dtype": f}, "dtype must be float16 like weight, got float32"),
    ({0: t(6, 4, dtype=b), "dtype": h}, "dtype must be bfloat16 like weight, got float16"),
    ({"taps_first": True}, "weight must be (C, 1, k_h, k_w) with taps_first, got (6, 4, 3, 3)"),
    ({0: t(6, 1), "taps_first": True}, "weight must be (C, 1, k_h, k_w) with taps_first, got (6, 1)"),
    ({"eps": -1.0, "dtype": d, "taps_first": True, 3: t(2)}, "bn_mean must be (C_out,) with C_out = 6, got (2,)"),
]


def rejected(changes, device, args=None):
    args, options = list(args or (torch.empty_like(a, device=device) for a in arguments())), {}
    for key, value in changes.items():
        (args if isinstance(key, int) else options)[key] = value(device) if callable(value) else value
    with pytest.raises(RuntimeError) as info:
        torch.ops.effnet.fold_batch_norm(*args, **options)
    return str(info.value)


@pytest.mark.parametrize("changes, expected", TABLE, ids=[expected for _, expected in TABLE])
def test_words(changes, expected, device):
    assert rejected(changes, device) == f"effnet::fold_batch_norm: {expected}"


@pytest.mark.parametrize("changes, expected", TABLE, ids=[expected for _, expected in TABLE])
def test_words_of_the_fake_kernel(changes, expected):
    with FakeTensorMode():
        for device in ("cpu", "cuda", "meta"):
            assert rejected(changes, device) == f"effnet::fold_batch_norm: {expected}"


def test_words_where_float64_is_taken():
    args = arguments(weight_dtype=d)
    expected = "effnet::fold_batch_norm: dtype must be float64, float32, float16 or bfloat16, got int64"
    assert rejected({"dtype": i}, "cpu", args) == expected
    with FakeTensorMode() as mode:
        assert rejected({"dtype": i}, "cpu", map(mode.from_tensor, args)) == expected


def test_device_mix():
    with FakeTensorMode():
        for device, other in (("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")):
            for place, name in enumerate(("bn_weight", "bn_bias", "bn_mean", "bn_var"), 1):
                changes = {place: lambda _: torch.empty(6, device=other)}
                assert rejected(changes, device) == f"effnet::fold_batch_norm: {name} must be on {device} like weight, got {other}"


@pytest.mark.gpu
def test_words_of_cuda_alone():
    weight, *vectors = arguments(device="cuda")
    assert rejected({}, "cuda", [weight, *(v.cpu() for v in vectors)]) == "effnet::fold_batch_norm: bn_weight must be on cuda:0 like weight, got cpu"
    args = arguments(weight_dtype=d, device="cuda")
    assert rejected({}, "cuda", args) == "effnet::fold_batch_norm: weight must be float16, bfloat16 or float32 (on the CPU also float64), got float64"


def test_too_large_for_32_bits():
    with FakeTensorMode():
        weight, vectors = torch.empty(2**16, 2**15, device="cuda"), [torch.empty(2**16, device="cuda")] * 4
        with pytest.raises(RuntimeError, match="weight must have at most 2147483647 elements on CUDA, where the kernels index in 32 bits, got 2147483648"):
            torch.ops.effnet.fold_batch_norm(weight, *vectors)


@pytest.mark.parametrize("options", [{}, {"dtype": h}, {"taps_first": True}], ids=str)
def test_opcheck(options, device):
    args = [a.requires_grad_() for a in arguments((5, 1, 3, 3), device=device)]
    torch.library.opcheck(torch.ops.effnet.fold_batch_norm.default, args, options)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (4, 1, 3, 3), (3, 4)], ids=str)
def test_gradients(shape):
    args = [a.requires_grad_() for a in arguments(shape, d)]
    assert gradcheck(lambda *args: ops.fold_batch_norm(*args, 1e-3, None, shape == (4, 1, 3, 3)), args)
    assert gradgradcheck(lambda *args: ops.fold_batch_norm(*args, 1e-3), args)


def test_gradients_have_the_types_of_what_they_belong_to(device):
    args = [a.requires_grad_() for a in arguments(weight_dtype=h, vector_dtype=f, device=device)]
    weight, bias = ops.fold_batch_norm(*args)
    (weight.sum() + bias.sum()).backward()
    assert [a.grad.dtype for a in args] == [h, f, f, f, f]
    exact = [a.detach().cpu().double().requires_grad_() for a in args]
    sum(t.sum() for t in truth(*exact)).backward()
    for a, e in zip(args, exact):
        torch.testing.assert_close(a.grad.cpu().double(), e.grad, rtol=2e-3, atol=2e-3)


def test_autocast_leaves_it_alone(device):
    args = arguments(device=device)
    with torch.autocast(device, dtype=b):
        assert all(map(torch.equal, ops.fold_batch_norm(*args), torch.ops.effnet.fold_batch_norm(*args)))
        assert ops.fold_batch_norm(*args)[0].dtype == f


def test_compile(device):
    args = arguments((8, 1, 3, 3), device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: ops.fold_batch_norm(*args, 1e-5, b, True), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*args), ops.fold_batch_norm(*args, 1e-5, b, True)):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def test_folds_the_convolution(device):
    weight, *vectors = arguments((6, 4, 3, 3), device=device)
    gamma, beta, mean, var = vectors
    x = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(1)).to(device)
    torch.testing.assert_close(F.conv2d(x, *ops.fold_batch_norm(weight, *vectors)), F.batch_norm(F.conv2d(x, weight), mean, var, gamma, beta))


@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("model_dtype", [h, b, f])
def test_modules_fold_by_the_op_what_they_fold_otherwise(model_dtype, groups, device, monkeypatch):
    conv, bn = nn.Conv2d(12, 12, 3, groups=groups, bias=False).to(device, model_dtype), nn.BatchNorm2d(12).to(device, model_dtype)
    for tensor, value in zip((bn.weight, bn.bias, bn.running_mean, bn.running_var), arguments((12, 1))[1:]):
        tensor.data.copy_(value)
    for dtype in {None, f, h, b} if model_dtype == f else {None}:
        vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        assert is_for_the_op(conv.weight, vectors, dtype or model_dtype)
        with torch.no_grad():
            by_op = fold_batch_norm(conv, bn, dtype)
            with monkeypatch.context() as patch:
                patch.setattr("effnet_aot.fold.is_for_the_op", lambda *args: False)
                otherwise = fold_batch_norm(conv, bn, dtype)
        for actual, expected in zip(by_op, otherwise):
            assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
            assert ((actual - expected).abs().double() <= 2.002 * half_an_ulp(expected.double(), expected.dtype)).all()


def test_what_modules_do_not_fold_by_the_op():
    weight, *vectors = arguments()
    assert is_for_the_op(weight, vectors, f)
    assert not is_for_the_op(weight, vectors, d)
    assert not is_for_the_op(weight.half(), [v.half() for v in vectors], b)
    assert not is_for_the_op(weight, [v.half() for v in vectors], f)
    assert not is_for_the_op(weight.half(), [vectors[0], *(v.half() for v in vectors[1:])], h)
    assert not is_for_the_op(weight.to("meta"), [v.to("meta") for v in vectors], f)
    assert not is_for_the_op(weight, [v.to("meta") for v in vectors], f)
