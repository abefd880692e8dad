"""How an op gets its fake kernel, its gradient and its autocast rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .gradients import convolution_backward
from .rules import BatchNorm, Convolution

_fragment = torch.library.Library("effnet", "FRAGMENT")


def call(op: Callable, *args) -> Any:
    """op(*args). Where no gradient can be asked for, past the autograd key, whose Python kernel takes 12 us a call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def register(name: str, *, fake: Callable, setup_context: Callable, backward: Callable, autocast: bool = True) -> None:
    """Registers what the stable C++ ABI cannot. `backward(ctx, grad, wanted)`, with a grad for each result, returns
    gradients by argument name. Without `autocast` tensors keep their types there."""
    if _library.error is not None:
        return
    op = getattr(torch.ops.effnet, name).default
    names = [argument.name for argument in op._schema.arguments]

    def backward_in_order(ctx, *grads_of_results):
        needs = dict(zip(names, ctx.needs_input_grad))
        wanted = {name for name, needed in needs.items() if (any(needed) if isinstance(needed, list) else needed)}
        grads = backward(ctx, *grads_of_results, wanted)
        return tuple(grads.get(name) if name in wanted else [None] * len(needed) if isinstance(needed, list) else None for name, needed in needs.items())

    torch.library.register_fake(op, fake, lib=_fragment)
    torch.library.register_autograd(op, backward_in_order, setup_context=setup_context, lib=_fragment)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")) if autocast else ():
        _fragment.impl(op, _autocast_kernel(op, names, device_type, key), key, with_keyset=True)


def _autocast_kernel(op, names: list[str], device_type: str, key: str) -> Callable:
    # torch.library.register_autocast would cast the batch norm vectors and the bias too.
    cast_positions = {i for i, name in enumerate(names) if name in ("x", "residual", "weights") or (name.endswith("weight") and name != "bn_weight")}
    autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_, *args):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(t):  # as autocast does it: float64 keeps its precision
            if isinstance(t, (list, tuple)):  # of weights and of vectors
                return [cast(item) if item.dim() > 1 else item for item in t]
            eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type
            return t.to(dtype) if eligible else t

        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            return op(*(cast(a) if i in cast_positions else a for i, a in enumerate(args)))

    return kernel


def register_convolution(name: str, check: Callable[[Convolution], Tensor], describe: Callable[..., Convolution]) -> None:
    """Registers an op whose call is a Convolution: `describe` takes the schema's arguments, `check` gives the fake output."""

    def setup_context(ctx, inputs, output):
        c = describe(*inputs)
        bn = c.batch_norm
        ctx.save_for_backward(c.x, c.weight, c.bias, *(bn[:4] if bn else ()), output if c.activation != "none" else None)
        ctx.call = c._replace(x=None, weight=None, bias=None, residual=None, batch_norm=None)
        ctx.eps = bn.eps if bn else None

    def backward(ctx, grad, wanted):
        x, weight, bias, *vectors, out = ctx.saved_tensors
        bn = BatchNorm(*vectors, ctx.eps) if vectors else None
        return convolution_backward(ctx.call._replace(x=x, weight=weight, bias=bias, batch_norm=bn), grad, out, wanted)

    register(name, fake=lambda *args: check(describe(*args)), setup_context=setup_context, backward=backward)
