from dataclasses import replace

import pytest
import torch
from op_cases import SMALL, Case, is_weight
from torch.autograd import gradcheck, gradgradcheck

import effnet_aot


def tensors_of(args: dict) -> dict:
    return {name: a for name, a in args.items() if isinstance(a, torch.Tensor)}


def differentiable(case: Case) -> dict:
    """Arguments with every pre-activation off 0 and 6, where finite differences mean nothing."""
    for seed in range(100):
        args = case.arguments(torch.float64, seed=seed)
        y = case.pre_activation(args)
        if min(y.abs().min(), (y - 6).abs().min()) > 1e-4:
            return args
    raise AssertionError("every draw has an element at a kink")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case, layout):
    if case.is_linear and layout == "channels_last":
        pytest.skip("a matrix has no channels_last")
    args = differentiable(case)
    if layout == "channels_last":
        args = {name: a.contiguous(memory_format=torch.channels_last) if getattr(a, "ndim", 0) == 4 else a for name, a in args.items()}
    # float64 throughout, the vectors too: finite differences in float32 are noise.
    inputs = {name: a.double().requires_grad_() for name, a in tensors_of(args).items()}

    def call(*tensors):
        return case.call(args | dict(zip(inputs, tensors)))

    assert gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("case", [c for c in SMALL if c.op in ("pointwise_bn", "conv_bn_relu", "pointwise_pool", "linear", "mbconv")], ids=str)
def test_gradgradcheck(case):
    args = differentiable(case)
    inputs = {name: a.double().requires_grad_() for name, a in tensors_of(args).items()}
    assert gradgradcheck(lambda *tensors: case.call(args | dict(zip(inputs, tensors))), tuple(inputs.values()))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_match_eager(case, device, dtype):
    """In every dtype, against float64, no worse than eager's. Of the running statistics eager has no gradient."""

    statistics = ("bn_mean", "bn_var")

    def gradients(function, names):
        leaves = {name: a.detach().clone().requires_grad_(name in names) if isinstance(a, torch.Tensor) else a for name, a in args.items()}
        out = function(leaves)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view(out.shape)
        out.backward(cotangent.to(out.dtype))
        return {name: leaves[name].grad for name in names}

    args = case.arguments(dtype, device)
    names = tensors_of(args).keys()
    actual = gradients(case.call, names)
    eager = gradients(case.reference, names - set(statistics))
    truth = gradients(lambda a: case.reference(a, torch.float64), names)
    eps = torch.finfo(dtype).eps
    for name, grad in actual.items():
        assert grad.dtype == args[name].dtype and grad.shape == args[name].shape
        exact = truth[name].double()

        def error(g):
            return ((g.double() - exact).norm() / exact.norm()).item()

        # With few elements eager may be lucky: a few roundings are always granted.
        assert error(grad) <= max(1.25 * error(eager[name]) if name in eager else 0, 8 * eps), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_only_what_is_asked_for(case):
    args = case.arguments(torch.float64)
    for name in tensors_of(args):
        wanted = args[name].detach().clone().requires_grad_()
        (alone,) = torch.autograd.grad(case.call(args | {name: wanted}).sum(), wanted)
        everything = {n: a.detach().clone().requires_grad_() for n, a in tensors_of(args).items()}
        together = torch.autograd.grad(case.call(args | everything).sum(), everything[name])[0]
        torch.testing.assert_close(alone, together, rtol=0, atol=0)


def test_mask_at_the_bounds():
    """At exactly 0 and 6, and for NaN, the gradient is PyTorch's."""
    values = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0, float("nan")])
    for activation in ("relu", "relu6"):
        grads = []
        for f in (lambda x: effnet_aot.ops.pointwise(x, torch.ones(1, 1), None, None, activation), getattr(torch.nn.functional, activation)):
            x = values.view(1, 1, 1, 6).clone().requires_grad_()
            f(x).backward(torch.ones(1, 1, 1, 6))
            grads.append(x.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_empty_batch(case):
    case = replace(case, x=(0, *case.x[1:]))
    args = case.arguments(torch.float32)
    inputs = {name: a.requires_grad_() for name, a in tensors_of(args).items()}
    case.call(args).sum().backward()
    assert all(a.grad.shape == a.shape and not a.grad.any() for a in inputs.values())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_gradients(case):
    """The same numbers with grad, under no_grad and in inference_mode, from the op and from its wrapper."""
    args = case.arguments(torch.float32)
    weight = next(filter(is_weight, tensors_of(args)))
    args[weight] = args[weight].requires_grad_()
    wrapper = getattr(effnet_aot.ops, case.op)
    out = case.call(args)
    assert out.requires_grad and wrapper(**args).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for f in (lambda: case.call(args), lambda: wrapper(**args)):
                assert torch.equal(f(), out) and not f().requires_grad


def test_inputs_are_watched():
    x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, requires_grad=True)
    out = effnet_aot.ops.pointwise(x, weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(case, low, device):
    """x, weight and residual are cast, vectors are not; gradients come back in the parameters' dtype."""
    args = case.arguments(torch.float32, device)
    weight = next(filter(is_weight, tensors_of(args)))
    args[weight] = args[weight].requires_grad_()
    with torch.autocast(device, dtype=low):
        out = case.call(args)
    by_hand = case.call({name: a.to(low) if a is not None and (name in ("x", "residual") or is_weight(name)) else a for name, a in args.items()})
    assert out.dtype == low and torch.equal(out, by_hand)
    out.float().sum().backward()
    assert args[weight].grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device):
    if device == "cuda":
        pytest.skip("no float64 on CUDA")
    args = Case("pointwise_bn", (2, 3, 4, 3), 5, residual=True).arguments(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.effnet.pointwise_bn(**args).dtype == torch.float64
