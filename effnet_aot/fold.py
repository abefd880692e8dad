"""Batch norm folded into the convolution before it, and the folded weights kept for as long as they are true.

    scale = bn.weight / sqrt(bn.running_var + bn.eps)
    bn(conv(x, weight)) == conv(x, weight * scale) + (bn.bias - bn.running_mean * scale)

Folding is done as in float64: the product is then rounded once, to the model's dtype. The bias keeps float32, the type the
kernels accumulate in. It is an op of its own, one launch for a layer: PyTorch's kernels for it would be loaded one by one
at a network's first call, 50 ms in all.

FoldedModule is the base of the modules that fold. It chooses, call by call, between three ways to compute one function.

A look for changes takes the host longer than a launch. So a GPU is given the work with the weights of the last call first, and
the host looks meanwhile; where something has changed, the result is thrown away and the call begins again.
"""

import warnings
from itertools import chain, starmap
from operator import attrgetter, is_not
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ops

VERSION, EPS = attrgetter("_version"), attrgetter("eps")
COUNTER = "num_batches_tracked"
EARLY = {"cuda"}  # types of devices that work while the host looks


class Folded(NamedTuple):
    """A layer ready to run: activation(conv(x, weight) + bias)."""

    weight: torch.Tensor
    bias: torch.Tensor


def fold_batch_norm(conv, bn, dtype=None):
    """`bn(conv(x))` in eval mode as one convolution with weights of `dtype` (default: the convolution's own)."""
    dtype = dtype or conv.weight.dtype
    vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    if is_for_the_op(conv.weight, vectors, dtype):
        return Folded(*ops.fold_batch_norm(conv.weight, *vectors, bn.eps, dtype, is_depthwise(conv.weight, conv.groups)))
    scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    bias = bn.bias.double() - bn.running_mean.double() * scale
    weight = weight.to(dtype, memory_format=torch.contiguous_format)
    return Folded(stored(weight, conv.groups), bias.to(bias_dtype(dtype)))


def stored(weight, groups):
    """A folded weight, in memory as the kernels read it fastest: a depthwise one tap by tap."""
    return ops.taps_first(weight) if is_depthwise(weight, groups) else weight


def is_depthwise(weight, groups):
    return groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1


def is_for_the_op(weight, vectors, dtype):
    """Whether the op folds these: what is float64, or mixed otherwise than models are, is left to PyTorch."""
    vector_dtypes = {v.dtype for v in vectors}
    return (
        dtype in (torch.float16, torch.bfloat16, torch.float32)
        and weight.dtype in (dtype, torch.float32)
        and vector_dtypes in ({weight.dtype}, {torch.float32})
        and weight.device.type in ("cpu", "cuda")
        and all(v.device == weight.device for v in vectors)
    )


def bias_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_foldable(conv, bn):
    """Whether the two are what the ops compute: a user may have put other layers in their place."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.bias is None
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and isinstance(bn, _BatchNorm)
        and bn.weight is not None
        and bn.running_mean is not None
    )


def autocast_dtype(x):
    """The dtype that autocast asks for on the device of x, or None."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


class Watch:
    """Everything that a module's output in eval mode depends on, flattened once: a look for changes costs microseconds.

    A tensor may be replaced in its module (another object), get other data (`p.data = ...`, `.half()`: another address)
    or be changed in place (another version). Writing through `p.data` or from a CUDA graph's replay is seen by nobody,
    autograd included; going to training mode and back starts afresh.
    """

    def __init__(self, module):
        modules = list(module.modules())
        self._children = [m._modules for m in modules if m._modules]
        self._children_then = list(map(dict, self._children))
        self._foldable = all(starmap(is_foldable, module.layers()))
        self._batch_norms = [m for m in modules if isinstance(m, _BatchNorm)]
        # A hook on the outermost module fires in its own __call__, whichever way the module computes.
        self._hooks = [
            hooks for m in modules if m is not module
            for hooks in (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)
        ]  # fmt: skip
        self._slots = [tensors for m in modules for tensors in (m._parameters, m._buffers) if tensors]
        self._slots_then = list(map(dict, self._slots))
        self._held = self._held_now()
        # Of batch norm's buffers the one that counts does not matter.
        self._tensors = [tensor for tensors in self._slots for name, tensor in tensors.items() if tensor is not None and name != COUNTER]
        self._has_scalars = any(tensor.numel() == 1 for tensor in self._tensors)
        self._parameters = [tensor for tensor in self._tensors if isinstance(tensor, nn.Parameter)]
        self._state = None

    def remember(self):
        """Takes the present state as the one to compare with; False where it cannot be watched."""
        try:
            # Alive as long as the watch, so that no other data can come to lie at a remembered address.
            self._data = [parameter.detach() for parameter in self._parameters]
            self._state = self._state_now()
        except RuntimeError:  # an inference tensor has no version, a functional tensor no address
            self._state = None
            if any(map(torch.Tensor.is_inference, self._tensors)):
                warnings.warn(
                    "weights made under torch.inference_mode() do not record changes, so they are folded again at every call: "
                    "make or move the model outside of it (torch.no_grad() is as good there)",
                    stacklevel=2,
                )
        return self._state is not None

    def same_structure(self):
        """Whether the same modules hold the same parameters and buffers, so that the rest of the watch means something."""
        try:
            # Comparing begins with identity, and so ends there but for what was replaced: that is unequal, or, of tensors, an
            # error, unless both have one element.
            same = self._children == self._children_then and self._slots == self._slots_then
        except RuntimeError:
            return False
        return same and not (self._has_scalars and any(map(is_not, self._held_now(), self._held)))

    def same_state(self):
        """Whether nothing has changed since remember()."""
        return self._state is not None and self._state == self._state_now()

    def is_ordinary(self):
        """Whether the ops say it all: the layers are of the kinds they compute, use running statistics, and have no hooks."""
        return self._foldable and not any(self._hooks) and not any(map(attrgetter("training"), self._batch_norms))

    def requires_grad(self):
        return any(map(attrgetter("requires_grad"), self._parameters))

    # What follows runs at every call, so the loops are the interpreter's own.

    def _held_now(self):
        return list(chain.from_iterable(map(dict.values, self._slots)))

    def _state_now(self):
        return (
            sum(map(VERSION, self._tensors)),  # each of them only grows
            list(map(torch.Tensor.data_ptr, self._parameters)),
            list(map(EPS, self._batch_norms)),
        )


class Kept(NamedTuple):
    watch: Watch
    dtype: torch.dtype | None  # that was asked for
    folded: object  # what module.fold(dtype) returned


@runtime_checkable
class Keepable(Protocol):
    """What module.fold returns may be one: told that it is kept, it may prepare what pays off over many calls."""

    def keep(self) -> None: ...


class FoldedCache:
    """The folded weights of one module, and the watch that says whether they still are. Copies and pickles are empty."""

    def __init__(self):
        self._captured = []
        self.clear()

    def __reduce__(self):
        return FoldedCache, ()

    def clear(self):
        self._watch = None
        self._entry = None

    def forget(self):
        """Keeps the watch and drops the weights."""
        self._entry = None

    def last(self, dtype):
        """The Kept weights of the last call, be they true or not; None where that was of another dtype."""
        entry = self._entry
        return entry if entry is not None and entry.dtype == dtype else None

    def is_true(self, kept, watch):
        """Whether these are what `watch`, which has just been asked for, says."""
        # Another thread may be folding: it drops the entry before it lets the watch remember the present state.
        return kept is not None and kept.watch is watch and watch.same_state() and kept is self._entry

    def watch(self, module):
        """The watch over the module as it is built now."""
        watch = self._watch
        if watch is None or not watch.same_structure():
            self._entry = None
            watch = self._watch = Watch(module)
        return watch

    def folded(self, module, watch, dtype, device):
        """What `module.fold(dtype)` returns, computed again only when something that it came from has changed."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        kept = self.last(dtype)
        if self.is_true(kept, watch):
            if capturing:
                self._captured.append(kept.folded)  # the graph is going to read them for as long as it lives
            return kept.folded
        self._entry = None
        with torch.inference_mode(False), torch.no_grad():
            watchable = watch.remember()
            folded = module.fold(dtype)
        if watchable and not capturing:  # a capture only records the folding, and every replay repeats it
            if isinstance(folded, Keepable):
                folded.keep()
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # later calls may come on other streams
            self._entry = Kept(watch, dtype, folded)
        return folded


class FoldedModule(nn.Module):
    """A module with three ways to compute one function, of which forward() takes the fastest that the call allows.

    A subclass defines
        layers()                    its (convolution, batch norm) pairs
        fold(dtype)                 what forward_folded needs, in `dtype` (None: each layer in its own)
        forward_modules(x)          plain torch.nn: in training, or when a layer is not what the ops compute
        forward_batch_norm(x)       ops with raw batch norm: differentiable in everything, and traceable
        forward_folded(x, folded)   ops with folded weights: inference
    """

    def __init__(self):
        super().__init__()
        self._cache = FoldedCache()

    def forward(self, x):
        if self.training or self._cache is None:
            return self.forward_modules(x)
        if torch.compiler.is_compiling():
            ordinary = all(is_foldable(conv, bn) and not bn.training for conv, bn in self.layers())
            return self.forward_batch_norm(x) if ordinary else self.forward_modules(x)
        kept, early = self._launch_early(x)
        watch = self._cache.watch(self)
        if not watch.is_ordinary():
            self._cache.forget()  # nothing is to be launched in vain as long as that lasts
            return self.forward_modules(x)
        if self._cache.is_true(kept, watch):
            return early
        if torch.is_grad_enabled() and (watch.requires_grad() or x.requires_grad):
            return self.forward_batch_norm(x)
        dtype = autocast_dtype(x)
        return self._launch(x, dtype, self._cache.folded(self, watch, dtype, x.device))

    def _launch_early(self, x):
        """(the weights of the last call, the result by them), whether they are true or not; two None where that is not to be tried."""
        try:
            dtype = autocast_dtype(x)
            kept = self._cache.last(dtype)
            if (
                kept is None
                or x.device.type not in EARLY
                or (torch.is_grad_enabled() and (kept.watch.requires_grad() or x.requires_grad))
                or (x.is_cuda and torch.cuda.is_current_stream_capturing())
            ):
                return None, None
            return kept, self._launch(x, dtype, kept.folded)
        except Exception:  # an image that does not suit the weights of the last call may suit the present ones, which tell if not
            return None, None

    def _launch(self, x, dtype, folded):
        # Past the ops' autograd and autocast kernels, which are Python: 12 us a call.
        with torch._C._AutoDispatchBelowAutograd():
            if dtype is None:
                return self.forward_folded(x, folded)
            with torch.autocast(x.device.type, enabled=False):
                return self.forward_folded(x.to(dtype) if x.is_floating_point() else x, folded)

    def train(self, mode=True):
        if mode != self.training:
            self._cache.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._cache = None  # it holds plain tensors where parameters are looked for
        return replica
