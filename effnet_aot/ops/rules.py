"""What the ops accept, for the fake kernels: the same checks in the same order and words as csrc/arguments.cpp, written so
that sizes may be symbolic. tests/test_errors.py holds the two against each other."""

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

MAX_INT32 = 2**31 - 1
ACTIVATIONS = ("none", "relu", "relu6")


class BatchNorm(NamedTuple):
    """(y - mean) / sqrt(var + eps) * weight + bias, channel by channel."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float


class Convolution(NamedTuple):
    """activation(batch_norm(conv(x, weight)) + bias + residual), each part but the first optional: a call of any of the
    convolution ops."""

    op: str
    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0, 0, 0)
    memory_format: torch.memory_format | None = None
    # What the errors call x, the weight and bias (with "_weight" and "_bias" behind it), and the result.
    x_name: str = "x"
    prefix: str = ""
    out_name: str = "the output"


class ExpandDepthwise(NamedTuple):
    """activation(depthwise(activation(expand(x)))): the first two steps of an Mbconv."""

    op: str
    x: Tensor
    expand_weight: Tensor
    expand_bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (1, 1, 1, 1)
    activation: str = "relu6"

    def expand(self, x: Tensor) -> Convolution:
        return expand_step(self, x)

    def depthwise(self, x: Tensor) -> Convolution:
        return depthwise_step(self, x)


class Mbconv(NamedTuple):
    """project(activation(depthwise(activation(expand(x))))) + residual, the expand step optional."""

    op: str
    x: Tensor
    expand_weight: Tensor | None
    expand_bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    residual: Tensor | None = None
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (1, 1, 1, 1)
    activation: str = "relu6"
    x_name: str = "x"  # in errors

    def expand(self, x: Tensor) -> Convolution:
        return expand_step(self, x)

    def depthwise(self, x: Tensor) -> Convolution:
        step = depthwise_step(self, x)._replace(out_name="the filtered map")
        return step._replace(x_name=self.x_name) if self.expand_weight is None else step

    def project(self, x: Tensor) -> Convolution:
        return Convolution(
            self.op, x, self.project_weight, bias=self.project_bias, residual=self.residual, memory_format=format_of(self.x),
            x_name="the filtered map", prefix="project_",
        )  # fmt: skip


# The steps of both on their inputs. All maps have x's format, also those of one pixel or one channel.


def expand_step(c: ExpandDepthwise | Mbconv, x: Tensor) -> Convolution:
    return Convolution(
        c.op, x, c.expand_weight, bias=c.expand_bias, activation=c.activation, memory_format=format_of(c.x),
        prefix="expand_", out_name="the expanded map",
    )  # fmt: skip


def depthwise_step(c: ExpandDepthwise | Mbconv, x: Tensor) -> Convolution:
    return Convolution(
        c.op, x, c.depthwise_weight, bias=c.depthwise_bias, activation=c.activation, stride=c.stride, padding=c.padding,
        memory_format=format_of(c.x), x_name="x" if c.expand_weight is None else "the expanded map", prefix="depthwise_",
    )  # fmt: skip


class StemMbconv(NamedTuple):
    """A network's first convolution, and a block without expansion and residual on its map."""

    op: str
    x: Tensor
    stem_weight: Tensor
    stem_bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    stem_stride: Sequence[int] = (2, 2)
    stem_padding: Sequence[int] = (1, 1, 1, 1)
    stem_activation: str = "relu"
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (1, 1, 1, 1)
    activation: str = "relu6"
    memory_format: torch.memory_format | None = None

    def stem(self) -> Convolution:
        return Convolution(
            self.op, self.x, self.stem_weight, bias=self.stem_bias, activation=self.stem_activation, stride=self.stem_stride, padding=self.stem_padding,
            memory_format=self.memory_format, prefix="stem_", out_name="the stem's map",
        )  # fmt: skip

    def block(self, x: Tensor) -> Mbconv:
        weights = (self.depthwise_weight, self.depthwise_bias, self.project_weight, self.project_bias)
        return Mbconv(self.op, x, None, None, *weights, None, self.stride, self.padding, self.activation, x_name="the stem's map")


def fail(op: str, expected: str, actual) -> NoReturn:
    raise RuntimeError(f"effnet::{op}: {expected}, got {actual}")


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_input_dtype(op: str, x: Tensor, name: str = "x") -> None:
    allowed = [torch.float32, torch.float16, torch.bfloat16] + ([] if x.device.type == "cuda" else [torch.float64])
    if x.dtype not in allowed:
        fail(op, f"{name} must be float16, bfloat16 or float32 (on the CPU also float64)", dtype_name(x.dtype))


def check_device(op: str, name: str, t: Tensor, x: Tensor, like: str = "x") -> None:
    """`like` is what the errors call x, of which every other tensor takes device and type."""
    if t.device != x.device:
        fail(op, f"{name} must be on {x.device} like {like}", t.device)


def check_like_input(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        fail(op, f"{name} must be {dtype_name(x.dtype)} like x", dtype_name(t.dtype))
    check_device(op, name, t, x)


def check_vector(op: str, name: str, t: Tensor, x: Tensor, length_name: str, length: int, like: str = "x") -> None:
    if t.dtype not in (x.dtype, torch.float32):
        fail(op, f"{name} must be {dtype_name(x.dtype)}" + ("" if x.dtype == torch.float32 else " or float32"), dtype_name(t.dtype))
    check_device(op, name, t, x, like)
    if t.dim() != 1 or t.shape[0] != length:
        fail(op, f"{name} must be ({length_name},) with {length_name} = {length}", shape_of(t))


def check_batch_norm(op: str, bn: BatchNorm, x: Tensor, out_channels: int, like: str = "x") -> None:
    check_vector(op, "bn_weight", bn.weight, x, "C_out", out_channels, like)
    for name, t in (("bn_bias", bn.bias), ("bn_mean", bn.mean), ("bn_var", bn.var)):
        if t.dtype != bn.weight.dtype:
            fail(op, f"{name} must be {dtype_name(bn.weight.dtype)} like bn_weight", dtype_name(t.dtype))
        check_vector(op, name, t, x, "C_out", out_channels, like)
    if not bn.eps >= 0:
        fail(op, "eps must be at least 0", f"{bn.eps:g}")


def check_indexable(op: str, name: str, sizes: Sequence[int]) -> None:
    numel = math.prod(sizes)
    # A symbolic size stays free: a guard here would bound an exported model's batch. The launch checks the real one.
    if isinstance(numel, int) and numel > MAX_INT32:
        expected = f"{name} must have at most 2147483647 elements on CUDA, where the kernels index in 32 bits"
        fail(op, expected, min(numel, 2**63 - 1))


def check_image(op: str, x: Tensor, name: str = "x") -> None:
    if x.dim() != 4 or any(size < 1 for size in x.shape[1:]):
        fail(op, f"{name} must be (N, C, H, W) with C, H and W at least 1", shape_of(x))
    check_input_dtype(op, x)


def check_activation(op: str, activation: str, prefix: str = "") -> None:
    if activation not in ACTIVATIONS:
        fail(op, f"{prefix}activation must be 'none', 'relu' or 'relu6'", "'{}'".format(activation.replace("\0", "\\x00")))


def check_window(op: str, stride: Sequence[int], padding: Sequence[int], prefix: str = "") -> None:
    if len(stride) != 2 or not all(1 <= s <= MAX_INT32 for s in stride):
        fail(op, f"{prefix}stride must be two numbers from 1 to 2147483647", tuple(stride))
    if len(padding) != 4 or not all(0 <= p <= MAX_INT32 for p in padding):
        fail(op, f"{prefix}padding must be four numbers (left, right, top, bottom) from 0 to 2147483647", tuple(padding))


def check_arguments(c: Convolution) -> None:
    check_activation(c.op, c.activation)
    check_window(c.op, c.stride, c.padding)
    check_memory_format(c.op, c.memory_format)


def check_memory_format(op: str, memory_format: torch.memory_format | None) -> None:
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        fail(op, "memory_format must be contiguous_format or channels_last", dtype_name(memory_format))


def check_convolution(c: Convolution, pooled: bool = False) -> tuple[int, int, int, int]:
    """The part that all convolutions share, once the weight's shape is known to be right. Returns the output's shape."""
    op, x = c.op, c.x
    batch, _, height, width = x.shape
    out_channels = c.weight.shape[0]
    kernel = tuple(c.weight.shape[2:]) or (1, 1)

    if c.batch_norm is not None:
        check_batch_norm(op, c.batch_norm, x, out_channels)
    if c.bias is not None:
        check_vector(op, f"{c.prefix}bias", c.bias, x, "C_out", out_channels)

    left, right, top, bottom = c.padding
    padded = (height + top + bottom, width + left + right)
    if kernel[0] > padded[0] or kernel[1] > padded[1]:
        fail(op, f"{c.prefix}weight must have a kernel no larger than the padded input {padded}", kernel)
    out = (batch, out_channels, *((p - k) // s + 1 for p, k, s in zip(padded, kernel, c.stride)))

    if c.residual is not None:
        check_like_input(op, "residual", c.residual, x)
        if shape_of(c.residual) != out:
            fail(op, f"residual must be {out} like the output", shape_of(c.residual))

    if x.device.type == "cuda":
        check_indexable(op, c.x_name, x.shape)
        check_indexable(op, f"{c.prefix}weight", c.weight.shape)
        check_indexable(op, c.out_name, out[:2] if pooled else out)
        check_indexable(op, f"the padded height of {c.x_name}", padded[:1])
        check_indexable(op, f"the padded width of {c.x_name}", padded[1:])
    return out


def check_pointwise(c: Convolution, pooled: bool = False) -> tuple[int, int, int, int]:
    check_arguments(c)
    check_image(c.op, c.x, c.x_name)
    check_like_input(c.op, f"{c.prefix}weight", c.weight, c.x)
    w, in_channels = c.weight.shape, c.x.shape[1]
    if not (len(w) == 2 or (len(w) == 4 and w[2] == 1 and w[3] == 1)) or w[0] < 1 or w[1] != in_channels:
        fail(c.op, f"{c.prefix}weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = {in_channels}", shape_of(c.weight))
    return check_convolution(c, pooled)


def check_depthwise(c: Convolution) -> tuple[int, int, int, int]:
    check_arguments(c)
    check_image(c.op, c.x, c.x_name)
    check_like_input(c.op, f"{c.prefix}weight", c.weight, c.x)
    w, channels = c.weight.shape, c.x.shape[1]
    if len(w) != 4 or w[0] != channels or w[1] != 1 or w[2] != w[3] or w[2] not in (3, 5):
        fail(c.op, f"{c.prefix}weight must be (C, 1, k, k) with C = {channels} and k = 3 or 5", shape_of(c.weight))
    if max(c.stride) > 2:
        fail(c.op, "stride must be 1 or 2 in each direction", tuple(c.stride))
    return check_convolution(c)


def check_conv(c: Convolution) -> tuple[int, int, int, int]:
    check_arguments(c)
    check_image(c.op, c.x, c.x_name)
    check_like_input(c.op, f"{c.prefix}weight", c.weight, c.x)
    w, in_channels = c.weight.shape, c.x.shape[1]
    if len(w) != 4 or w[0] < 1 or w[1] != in_channels or w[2] < 1 or w[3] < 1:
        fail(c.op, f"{c.prefix}weight must be (C_out, C_in, k_h, k_w) with C_in = {in_channels}", shape_of(c.weight))
    return check_convolution(c)


def check_expand_depthwise(c: ExpandDepthwise) -> Convolution:
    """Returns the second step, whose output is the op's. A fused kernel does not store the map between the steps, but is held to
    the same limits."""
    check_arguments(Convolution(c.op, c.x, c.depthwise_weight, activation=c.activation, stride=c.stride, padding=c.padding))
    expand = c.expand(c.x)
    depthwise = c.depthwise(empty_image(expand, check_pointwise(expand)))
    check_depthwise(depthwise)
    check_biases_alike(c, ("expand_bias", "depthwise_bias"))
    return depthwise


def check_biases_alike(c: ExpandDepthwise | Mbconv, names: Sequence[str]) -> None:
    """The first of them decides."""
    biases = [(name, t) for name in names if (t := getattr(c, name)) is not None]
    for name, t in biases:
        if t.dtype != biases[0][1].dtype:
            fail(c.op, f"{name} must be {dtype_name(biases[0][1].dtype)} like {biases[0][0]}", dtype_name(t.dtype))


def check_mbconv(c: Mbconv) -> Convolution:
    """Returns the last step, whose output is the block's. A fused kernel stores no map between the steps, but is held to the
    same limits."""
    x = c.x
    check_arguments(Convolution(c.op, x, c.depthwise_weight, activation=c.activation, stride=c.stride, padding=c.padding))
    if c.expand_weight is not None:
        expand = c.expand(x)
        x = empty_image(expand, check_pointwise(expand))
    elif c.expand_bias is not None:
        fail(c.op, "expand_bias must be None where expand_weight is", shape_of(c.expand_bias))
    depthwise = c.depthwise(x)
    project = c.project(empty_image(depthwise, check_depthwise(depthwise)))
    check_pointwise(project)
    check_biases_alike(c, ("expand_bias", "depthwise_bias", "project_bias"))
    return project


def check_stem_mbconv(c: StemMbconv) -> Convolution:
    """Returns the block's last step, whose output is the whole's."""
    check_activation(c.op, c.stem_activation, "stem_")
    check_activation(c.op, c.activation)
    check_window(c.op, c.stem_stride, c.stem_padding, "stem_")
    check_window(c.op, c.stride, c.padding)
    check_memory_format(c.op, c.memory_format)
    stem = c.stem()
    project = check_mbconv(c.block(empty_image(stem, check_conv(stem))))
    return project._replace(memory_format=c.memory_format or format_of(c.x))


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    if x.dim() != 2 or x.shape[1] < 1:
        fail(op, "x must be (rows, in_features) with in_features at least 1", shape_of(x))
    check_input_dtype(op, x)
    check_like_input(op, "weight", weight, x)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[1]:
        fail(op, f"weight must be (out_features, in_features) with in_features = {x.shape[1]}", shape_of(weight))
    if bias is not None:
        check_vector(op, "bias", bias, x, "out_features", weight.shape[0])
    out = (x.shape[0], weight.shape[0])
    if x.device.type == "cuda":
        check_indexable(op, "x", x.shape)
        check_indexable(op, "weight", weight.shape)
        check_indexable(op, "the output", out)
    return out


def check_fold_batch_norm(
    op: str, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, bn_mean: Tensor, bn_var: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None, taps_first: bool = False
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Returns the folded weight's dtype and strides."""
    w = weight.shape
    if len(w) not in (2, 4) or any(size < 1 for size in w):
        fail(op, "weight must be (C_out, C_in, k_h, k_w) or (C_out, C_in), each at least 1", shape_of(weight))
    check_input_dtype(op, weight, "weight")
    check_batch_norm(op, BatchNorm(bn_weight, bn_bias, bn_mean, bn_var, eps), weight, w[0], "weight")
    dtype = dtype or weight.dtype
    wide = [torch.float64, torch.float32]
    allowed = [*wide[wide.index(weight.dtype) :], torch.float16, torch.bfloat16] if weight.dtype in wide else [weight.dtype]
    if dtype not in allowed:  # folding rounds, it never widens
        *others, last = map(dtype_name, allowed)
        fail(op, f"dtype must be {', '.join(others)} or {last}" if others else f"dtype must be {last} like weight", dtype_name(dtype))
    if taps_first and (len(w) != 4 or w[1] != 1):
        fail(op, "weight must be (C, 1, k_h, k_w) with taps_first", shape_of(weight))
    if weight.device.type == "cuda":
        check_indexable(op, "weight", w)
    if taps_first:
        return dtype, (1, w[2] * w[3] * w[0], w[3] * w[0], w[0])
    return dtype, (w[1], 1) if len(w) == 2 else (w[1] * w[2] * w[3], w[2] * w[3], w[3], 1)


def format_of(x: Tensor) -> torch.memory_format:
    """The format that a result takes over from x. NCHW where both readings hold; what is dense in neither goes by its innermost
    dimension."""
    if x.dim() != 4 or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) or (x.shape[1] > 1 and x.stride(1) == 1):
        return torch.channels_last
    return torch.contiguous_format


def is_channels_last(c: Convolution) -> bool:
    """The output's format: what the call asks for, else the input's."""
    return (c.memory_format or format_of(c.x)) == torch.channels_last


def empty_image(c: Convolution, shape: tuple[int, int, int, int]) -> Tensor:
    """An uninitialised output with the strides that the real kernels give it."""
    _, channels, height, width = shape
    strides = (channels * height * width, height * width, width, 1)
    if is_channels_last(c):
        strides = (channels * height * width, 1, width * channels, channels)
    return c.x.new_empty_strided(shape, strides)
