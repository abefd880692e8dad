"""One table of calls for all tests: shapes out of real networks and the weird ones, and what plain PyTorch makes of them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import effnet_aot  # noqa: F401  (registers the ops)

IMAGE_LAYOUTS = ["contiguous", "channels_last", "transposed", "offset", "cropped", "expanded"]
MATRIX_LAYOUTS = ["contiguous", "transposed", "offset", "cropped", "expanded"]


@dataclass(frozen=True)
class Case:
    """A call of torch.ops.effnet.<op>. Vectors (batch norm, bias) have x's dtype, or float32 with wide_vectors."""

    op: str
    x: tuple[int, ...]
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    matrix_weight: bool = False
    wide_vectors: bool = False
    memory_format: torch.memory_format | None = None

    def __str__(self):
        parts = [self.op, "x".join(map(str, self.x)), f"to{self.out}"]
        if self.kernel != (1, 1):
            parts += [f"k{self.kernel[0]}{self.kernel[1]}", f"s{self.stride[0]}{self.stride[1]}", "p" + "".join(map(str, self.padding))]
        if not self.has_batch_norm and self.activation != "none":
            parts.append(self.activation)
        parts += [flag for flag in ("residual", "matrix_weight", "wide_vectors") if getattr(self, flag)]
        if not self.bias:
            parts.append("nobias")
        if self.memory_format:
            parts.append(str(self.memory_format).removeprefix("torch."))
        return "-".join(parts)

    @property
    def has_batch_norm(self) -> bool:
        return "_bn" in self.op

    @property
    def is_linear(self) -> bool:
        return self.op.startswith("linear")

    @property
    def groups(self) -> int:
        return self.x[1] if self.op.startswith("depthwise") else 1

    def arguments(self, dtype=torch.float32, device="cpu", layout="contiguous", seed=0) -> dict:
        """The op's arguments by name, drawn anew from `seed`: the same values for every layout but "expanded"."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        fan_in = self.x[1] // self.groups * self.kernel[0] * self.kernel[1]
        weight = normal(self.out, self.x[1] // self.groups, *self.kernel) / fan_in**0.5
        if self.matrix_weight or self.is_linear:
            weight = weight.flatten(1)
        args = {"x": lay_out(normal(*self.x).to(device, dtype), layout), "weight": weight.to(device, dtype)}
        vector_dtype = torch.float32 if self.wide_vectors else dtype
        if self.has_batch_norm:
            # Statistics of a trained network, not the 0 and 1 that hide mistakes.
            vectors = {"bn_weight": normal(self.out).abs() + 0.5, "bn_bias": normal(self.out), "bn_mean": normal(self.out) / 2, "bn_var": normal(self.out).abs() + 0.3}
            args |= {name: v.to(device, vector_dtype) for name, v in vectors.items()}
            args["eps"] = 1e-3
        elif self.bias:
            args["bias"] = normal(self.out).to(device, vector_dtype)
        if self.residual:
            args["residual"] = lay_out(normal(*self.out_shape()).to(device, dtype), layout)
        if not self.has_batch_norm and not self.is_linear:
            args["activation"] = self.activation
        if self.op.startswith(("depthwise", "conv")):
            args |= {"stride": list(self.stride), "padding": list(self.padding)}
        if self.memory_format:
            args["memory_format"] = self.memory_format
        return args

    def out_shape(self) -> tuple[int, ...]:
        if len(self.x) == 2 or self.op.endswith("_pool"):
            return (self.x[0], self.out)
        left, right, top, bottom = self.padding
        return (
            self.x[0],
            self.out,
            (self.x[2] + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (self.x[3] + left + right - self.kernel[1]) // self.stride[1] + 1,
        )

    def call(self, args: dict) -> Tensor:
        return getattr(torch.ops.effnet, self.op)(**args)

    def reference(self, args: dict, dtype: torch.dtype | None = None) -> Tensor:
        """The same in plain PyTorch: eager's result in the arguments' dtype, or the truth in float64."""
        eager = dtype is None
        if args["x"].dtype == torch.float64:
            dtype = torch.float64  # eager's batch_norm takes no float32 vectors then
        if dtype is not None:
            args = {name: a.to(dtype) if isinstance(a, Tensor) else a for name, a in args.items()}
        x, weight, bias = args["x"], args["weight"], args.get("bias")
        bias = None if bias is None else bias.to(x.dtype)
        if self.is_linear:
            return F.linear(x, weight, bias)
        weight = weight.reshape(self.out, -1, *self.kernel)
        y = F.conv2d(F.pad(x, self.padding), weight, bias, self.stride, groups=self.groups)
        if self.has_batch_norm:
            gamma, beta, mean, var = (args[f"bn_{name}"] for name in ("weight", "bias", "mean", "var"))
            if eager:
                y = F.batch_norm(y, mean, var, gamma, beta, eps=args["eps"])
            else:  # the formula itself, which can be differentiated in the statistics too
                gamma, beta, mean, var = (v[:, None, None] for v in (gamma, beta, mean, var))
                y = (y - mean) / (var + args["eps"]).sqrt() * gamma + beta
        if self.residual:
            y = y + args["residual"]
        activation = self.activation
        if self.has_batch_norm:
            activation = next((name for name in ("relu6", "relu") if name in self.op), "none")
        y = ACTIVATIONS[activation](y)
        return y.mean((2, 3)) if self.op.endswith("_pool") else y


    def pre_activation(self, args: dict) -> Tensor:
        """What the activation is applied to."""
        linear = replace(self, op=self.op.removesuffix("_pool").removesuffix("_relu6").removesuffix("_relu"), activation="none")
        return linear.reference(args)


@dataclass(frozen=True)
class MbconvCase:
    """A call of mbconv. `hidden` None: no expand step."""

    x: tuple[int, ...]
    hidden: int | None
    out: int
    kernel: int = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    activation: str = "relu6"
    bias: bool = True
    residual: bool = False
    matrix_weight: bool = False
    wide_vectors: bool = False
    taps_first: bool = False
    op: str = "mbconv"
    is_linear = False
    memory_format = None

    def __str__(self):
        parts = [self.op, "x".join(map(str, self.x)), f"{self.hidden}to{self.out}", f"k{self.kernel}", f"s{self.stride[0]}{self.stride[1]}"]
        parts += ["p" + "".join(map(str, self.padding)), self.activation]
        parts += [flag for flag in ("residual", "matrix_weight", "wide_vectors", "taps_first") if getattr(self, flag)]
        return "-".join(parts + ([] if self.bias else ["nobias"]))

    def arguments(self, dtype=torch.float32, device="cpu", layout="contiguous", seed=0) -> dict:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def pointwise(out, channels):
            weight = normal(out, channels, 1, 1) / channels**0.5
            return (weight.flatten(1) if self.matrix_weight else weight).to(device, dtype)

        channels = self.hidden or self.x[1]
        vector_dtype = torch.float32 if self.wide_vectors else dtype
        args = {"x": lay_out(normal(*self.x).to(device, dtype), layout), "expand_weight": None, "expand_bias": None}
        if self.hidden:
            args["expand_weight"] = pointwise(channels, self.x[1])
        depthwise = normal(channels, 1, self.kernel, self.kernel).to(device, dtype) / self.kernel
        args["depthwise_weight"] = effnet_aot.ops.taps_first(depthwise) if self.taps_first else depthwise
        args |= {"depthwise_bias": None, "project_weight": pointwise(self.out, channels), "project_bias": None}
        if self.bias:
            for name, length in (("expand_bias", channels), ("depthwise_bias", channels), ("project_bias", self.out)):
                if self.hidden or name != "expand_bias":
                    args[name] = normal(length).to(device, vector_dtype)
        if self.residual:
            args["residual"] = lay_out(normal(*self.out_shape()).to(device, dtype), layout)
        args = {name: a for name, a in args.items() if not name.startswith("project") or self.op == "mbconv"}
        return args | {"stride": list(self.stride), "padding": list(self.padding), "activation": self.activation}

    def out_shape(self) -> tuple[int, ...]:
        return Case("depthwise", self.x, self.out, (self.kernel, self.kernel), self.stride, self.padding).out_shape()

    def call(self, args: dict) -> Tensor:
        return getattr(torch.ops.effnet, self.op)(**args)

    def reference(self, args: dict, dtype: torch.dtype | None = None) -> Tensor:
        return self._steps(args, dtype)[-1]

    def pre_activation(self, args: dict) -> Tensor:
        return torch.cat([t.flatten() for t in self._steps(args)[:-1]])

    def _steps(self, args, dtype=None):
        """The maps before their activations, and the result."""
        args = {name: a.to(dtype) if dtype and isinstance(a, Tensor) else a for name, a in args.items()}
        x, activation = args["x"], ACTIVATIONS[args.get("activation", "relu6")]
        bias = {name: None if (b := args.get(f"{name}_bias")) is None else b.to(x.dtype) for name in ("expand", "depthwise", "project")}
        weight, steps = args["depthwise_weight"], []
        if args.get("expand_weight") is not None:
            steps.append(F.conv2d(x, args["expand_weight"].reshape(weight.shape[0], -1, 1, 1), bias["expand"]))
            x = activation(steps[-1])
        padding, stride = (numbers(args.get(name, 1), count) for name, count in (("padding", 4), ("stride", 2)))
        steps.append(F.conv2d(F.pad(x, padding), weight, bias["depthwise"], stride, groups=weight.shape[0]))
        if self.op == "expand_depthwise":
            return [*steps, activation(steps[-1])]
        y = F.conv2d(activation(steps[-1]), args["project_weight"].reshape(-1, weight.shape[0], 1, 1), bias["project"])
        return [*steps, y if args.get("residual") is None else y + args["residual"]]


@dataclass(frozen=True)
class StemMbconvCase:
    """A call of stem_mbconv: a convolution to `hidden` channels, and a block without expand step."""

    x: tuple[int, ...]
    hidden: int
    out: int
    stem_kernel: tuple[int, int] = (3, 3)
    stem_stride: tuple[int, int] = (2, 2)
    stem_padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    kernel: int = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    stem_activation: str = "relu"
    activation: str = "relu6"
    bias: bool = True
    matrix_weight: bool = False
    wide_vectors: bool = False
    taps_first: bool = False
    memory_format: torch.memory_format | None = None
    op: str = "stem_mbconv"
    is_linear = residual = False

    def __str__(self):
        sizes = [self.op, "x".join(map(str, self.x)), f"{self.hidden}to{self.out}", "k" + "".join(map(str, (*self.stem_kernel, self.kernel)))]
        sizes += ["s" + "".join(map(str, (*self.stem_stride, *self.stride))), "p" + "".join(map(str, (*self.stem_padding, *self.padding)))]
        sizes += [self.stem_activation, self.activation] + [flag for flag in ("matrix_weight", "wide_vectors", "taps_first") if getattr(self, flag)]
        return "-".join(sizes + ([] if self.bias else ["nobias"]) + ([str(self.memory_format).removeprefix("torch.")] if self.memory_format else []))

    def _stem(self) -> Case:
        return Case("conv", self.x, self.hidden, self.stem_kernel, self.stem_stride, self.stem_padding, self.stem_activation,
                    bias=self.bias, wide_vectors=self.wide_vectors, memory_format=self.memory_format)  # fmt: skip

    def _block(self) -> MbconvCase:
        return MbconvCase(self._stem().out_shape(), None, self.out, self.kernel, self.stride, self.padding, self.activation, self.bias,
                          matrix_weight=self.matrix_weight, wide_vectors=self.wide_vectors, taps_first=self.taps_first)  # fmt: skip

    def arguments(self, dtype=torch.float32, device="cpu", layout="contiguous", seed=0) -> dict:
        stem, block = self._stem().arguments(dtype, device, layout, seed), self._block().arguments(dtype, device, layout, seed + 1)
        args = {"x": stem["x"]} | {f"stem_{name}": stem.get(name) for name in ("weight", "bias")}
        args |= {name: value for name, value in block.items() if name.startswith(("depthwise_", "project_"))}
        args |= {"stem_stride": list(self.stem_stride), "stem_padding": list(self.stem_padding), "stem_activation": self.stem_activation}
        return args | {name: block[name] for name in ("stride", "padding", "activation")} | {"memory_format": self.memory_format}

    def out_shape(self) -> tuple[int, ...]:
        return self._block().out_shape()

    def call(self, args: dict) -> Tensor:
        return torch.ops.effnet.stem_mbconv(**args)

    def reference(self, args: dict, dtype: torch.dtype | None = None) -> Tensor:
        return self._steps(args, dtype)[-1]

    def pre_activation(self, args: dict) -> Tensor:
        return torch.cat([t.flatten() for t in self._steps(args)[:-1]])

    def _steps(self, args, dtype=None):
        args = {name: a.to(dtype) if dtype and isinstance(a, Tensor) else a for name, a in args.items()}
        x, bias = args["x"], args.get("stem_bias")
        padding, stride = numbers(args.get("stem_padding", 1), 4), numbers(args.get("stem_stride", 2), 2)
        stem = F.conv2d(F.pad(x, padding), args["stem_weight"], None if bias is None else bias.to(x.dtype), stride)
        block = {name: value for name, value in args.items() if not name.startswith("stem_") and name != "memory_format"}
        y = ACTIVATIONS[args.get("stem_activation", "relu")](stem)
        y = y.contiguous(memory_format=self.memory_format) if self.memory_format else y  # which decides on the order of sums, as ours does
        return [stem, *self._block()._steps(block | {"x": y})]


def beginning(x, hidden, *window, **options) -> MbconvCase:
    """A call of expand_depthwise: the same without the projection."""
    return MbconvCase(x, hidden, hidden, *window, op="expand_depthwise", **options)


ACTIVATIONS = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}


def numbers(given, count: int) -> list[int]:
    """One number for all directions, or all of them."""
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    return given * (count // len(given))


def is_weight(name: str) -> bool:
    return name.endswith("weight") and name != "bn_weight"


def lay_out(t: Tensor, layout: str) -> Tensor:
    """t's values in other strides ("expanded": those of its first row)."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":  # dense, but aligned to one element only
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)
    if layout == "cropped":  # out of a larger channels_last image, or of a wider matrix
        if t.dim() == 2:
            return F.pad(t, (1, 1))[:, 1:-1]
        return F.pad(t, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 1:-1]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    raise ValueError(layout)


def _pointwise(op, **options):
    shapes = [
        ((2, 16, 14, 14), 96),  # expand
        ((2, 96, 7, 9), 24),  # project
        ((1, 320, 3, 3), 144),
        ((2, 7, 3, 5), 13),
        ((1, 1, 1, 1), 1),
        ((3, 1, 1, 1), 5),
        ((2, 5, 1, 17), 1),
        ((0, 8, 4, 4), 16),
    ]
    return [Case(op, x, out, **options) for x, out in shapes]


def _windows(op, **options):
    def same(channels, *args):
        return ((2, channels, *args[0]), channels, *args[1:])

    k3, k5 = (3, 3), (5, 5)
    table = [
        same(32, (12, 12), k3, (1, 1), (1, 1, 1, 1)),
        same(24, (13, 11), k3, (2, 2), (1, 1, 1, 1)),
        same(16, (14, 14), k3, (2, 2), (0, 1, 0, 1)),  # TensorFlow's SAME padding
        same(16, (14, 14), k5, (2, 2), (1, 2, 1, 2)),
        same(40, (7, 7), k5, (1, 1), (2, 2, 2, 2)),
        same(7, (5, 9), k3, (1, 2), (2, 0, 3, 1)),
        same(1, (3, 3), k3, (1, 1), (0, 0, 0, 0)),
        same(3, (1, 1), k3, (2, 1), (1, 1, 1, 1)),
        same(5, (1, 1), k5, (1, 1), (4, 4, 4, 4)),
    ]
    table.append(((0, 8, 6, 6), 8, k3, (1, 1), (1, 1, 1, 1)))
    return [Case(op, *row, **options) for row in table]


def _convs(op, **options):
    table = [
        ((2, 3, 16, 16), 32, (3, 3), (2, 2), (1, 1, 1, 1)),  # stem
        ((2, 3, 17, 15), 32, (3, 3), (2, 2), (0, 1, 0, 1)),
        ((1, 3, 9, 9), 13, (3, 3), (1, 1), (1, 1, 1, 1)),
        ((2, 1, 5, 7), 3, (5, 5), (2, 1), (2, 2, 2, 2)),
        ((2, 4, 8, 8), 6, (1, 3), (1, 2), (1, 0, 0, 2)),
        ((1, 7, 1, 1), 1, (1, 1), (1, 1), (0, 0, 0, 0)),
        ((2, 3, 4, 4), 5, (2, 2), (3, 3), (0, 0, 0, 0)),
        ((0, 3, 8, 8), 8, (3, 3), (2, 2), (1, 1, 1, 1)),
    ]
    return [Case(op, *row, **options) for row in table]


def _linears(op, **options):
    shapes = [((10, 320), 100), ((1, 7), 3), ((17, 33), 5), ((3, 1), 1), ((1, 1), 1), ((0, 16), 8)]
    return [Case(op, x, out, **options) for x, out in shapes]


def _mbconvs():
    table = [
        ((2, 16, 12, 12), 96, 24, 3, (2, 2), (1, 1, 1, 1)),
        ((2, 24, 7, 9), 144, 24, 3, (1, 1), (1, 1, 1, 1)),
        ((2, 16, 14, 14), 48, 12, 5, (2, 2), (1, 2, 1, 2)),
        ((1, 8, 9, 9), 16, 40, 5, (1, 1), (2, 2, 2, 2)),
        ((2, 32, 10, 10), None, 16, 3, (1, 1), (1, 1, 1, 1)),
        ((2, 8, 9, 7), None, 8, 3, (2, 2), (0, 1, 0, 1)),
        ((2, 3, 5, 9), 7, 5, 3, (1, 2), (2, 0, 3, 1)),
        ((3, 5, 1, 1), 10, 3, 3, (1, 1), (1, 1, 1, 1)),
        ((2, 1, 3, 3), 1, 1, 3, (1, 1), (0, 0, 0, 0)),
        ((0, 8, 6, 6), 16, 8, 3, (1, 1), (1, 1, 1, 1)),
    ]
    return [MbconvCase(*row) for row in table]


CASES = [
    *_pointwise("pointwise_bn_relu6"),
    Case("pointwise_bn_relu6", (2, 16, 5, 5), 24, matrix_weight=True, wide_vectors=True),
    *_pointwise("pointwise_bn"),
    *_pointwise("pointwise_bn", residual=True, wide_vectors=True),
    *_pointwise("pointwise_bn_relu"),
    *_pointwise("pointwise", activation="relu6"),
    *_pointwise("pointwise", residual=True, wide_vectors=True),
    Case("pointwise", (2, 16, 5, 5), 24, bias=False, activation="relu", matrix_weight=True),
    Case("pointwise", (2, 16, 5, 5), 16, bias=False, residual=True, activation="relu6"),
    *_pointwise("pointwise_bn_relu_pool"),
    Case("pointwise_bn_relu_pool", (2, 16, 5, 5), 24, matrix_weight=True, wide_vectors=True),
    *_pointwise("pointwise_pool", activation="relu"),
    Case("pointwise_pool", (2, 16, 5, 5), 24, bias=False, activation="none", matrix_weight=True),
    Case("pointwise_pool", (2, 16, 7, 7), 24, activation="relu6", wide_vectors=True),
    *_windows("depthwise_bn_relu6"),
    Case("depthwise_bn_relu6", (2, 6, 5, 5), 6, (3, 3), (1, 1), (1, 1, 1, 1), wide_vectors=True),
    *_windows("depthwise", activation="relu6"),
    Case("depthwise", (2, 6, 5, 5), 6, (5, 5), (2, 2), (2, 2, 2, 2), activation="relu", wide_vectors=True),
    Case("depthwise", (2, 6, 5, 5), 6, (3, 3), (1, 1), (1, 1, 1, 1), bias=False),
    *_convs("conv_bn_relu"),
    *_convs("conv", activation="relu", wide_vectors=True),
    Case("conv", (2, 3, 9, 9), 8, (3, 3), (2, 2), (1, 1, 1, 1), bias=False, memory_format=torch.channels_last),
    Case("conv", (2, 3, 9, 9), 8, (3, 3), (2, 2), (1, 1, 1, 1), activation="relu6", memory_format=torch.contiguous_format),
    *_linears("linear_bias"),
    *_linears("linear", wide_vectors=True),
    Case("linear", (4, 24), 10, bias=False),
    *(beginning(c.x, c.hidden, c.kernel, c.stride, c.padding) for c in _mbconvs() if c.hidden),
    beginning((2, 16, 8, 8), 64, wide_vectors=True, taps_first=True),
    beginning((1, 24, 20, 20), 40, activation="relu", wide_vectors=True, taps_first=True),  # of more pixels than a kernel's band
    beginning((2, 8, 7, 7), 24, 5, (1, 1), (2, 2, 2, 2), activation="none", bias=False, matrix_weight=True),
    *_mbconvs(),
    MbconvCase((2, 16, 8, 8), 64, 16, residual=True, wide_vectors=True, taps_first=True),
    MbconvCase((2, 16, 8, 8), None, 16, residual=True, activation="relu", matrix_weight=True),
    MbconvCase((2, 8, 7, 7), 24, 8, 5, (1, 1), (2, 2, 2, 2), activation="none", bias=False, taps_first=True),
]
CASES += [
    StemMbconvCase((2, 3, 33, 34), 32, 16, wide_vectors=True, taps_first=True, memory_format=torch.channels_last),
    StemMbconvCase((1, 3, 30, 62), 32, 24, stem_padding=(0, 1, 0, 1), stem_activation="relu6", activation="relu", wide_vectors=True, taps_first=True, memory_format=torch.channels_last),
    StemMbconvCase((2, 2, 9, 11), 32, 8, padding=(2, 1, 0, 1), wide_vectors=True, taps_first=True, memory_format=torch.channels_last),
    StemMbconvCase((2, 3, 12, 10), 16, 8, memory_format=torch.contiguous_format),
    StemMbconvCase((2, 4, 9, 9), 7, 5, (5, 2), (1, 3), (2, 0, 1, 1), 5, (2, 1), (2, 2, 2, 2), "none", "relu", matrix_weight=True),
    StemMbconvCase((2, 3, 3, 3), 8, 8, stem_padding=(0, 0, 0, 0), bias=False),
    StemMbconvCase((0, 3, 8, 8), 32, 16),
]
OPS = sorted({case.op for case in CASES})

# One call of every kind, small: for gradients, tracing and export.
SMALL = [
    Case("pointwise_bn", (2, 3, 4, 3), 5),
    Case("pointwise_bn", (2, 3, 4, 3), 5, residual=True, wide_vectors=True),
    Case("pointwise_bn_relu", (2, 3, 4, 3), 5),
    Case("pointwise_bn_relu6", (2, 3, 4, 3), 5, matrix_weight=True),
    Case("depthwise_bn_relu6", (2, 3, 5, 6), 3, (3, 3), (2, 2), (0, 1, 0, 1)),
    Case("conv_bn_relu", (2, 3, 5, 5), 4, (3, 3), (2, 2), (1, 1, 1, 1)),
    Case("linear_bias", (3, 4), 5),
    Case("pointwise", (2, 3, 4, 3), 5, activation="relu6", residual=True, wide_vectors=True),
    Case("pointwise", (2, 3, 4, 3), 5, bias=False, matrix_weight=True),
    Case("depthwise", (2, 3, 6, 5), 3, (5, 5), (1, 2), (2, 2, 2, 2), activation="relu"),
    Case("conv", (2, 3, 5, 5), 4, (3, 3), (2, 2), (1, 0, 1, 0), activation="relu6", wide_vectors=True),
    Case("conv", (2, 3, 5, 5), 4, (3, 3), (2, 2), (1, 1, 1, 1), bias=False, memory_format=torch.channels_last),
    Case("pointwise_bn_relu_pool", (2, 3, 4, 3), 5),
    Case("pointwise_pool", (2, 3, 4, 3), 5, activation="relu"),
    Case("pointwise_pool", (2, 3, 4, 3), 5, bias=False),
    Case("linear", (3, 4), 5, wide_vectors=True),
    Case("linear", (3, 4), 5, bias=False),
    beginning((2, 3, 5, 6), 4, 3, (2, 2), (0, 1, 0, 1), wide_vectors=True, taps_first=True),
    beginning((2, 3, 5, 6), 4, 3, (1, 2), activation="none", bias=False, matrix_weight=True),
    MbconvCase((2, 3, 5, 6), 4, 3, 3, (1, 1), (1, 1, 1, 1), residual=True, wide_vectors=True),
    MbconvCase((2, 3, 5, 6), 4, 2, 3, (2, 2), (0, 1, 0, 1), activation="relu", matrix_weight=True, taps_first=True),
    MbconvCase((2, 3, 5, 6), None, 2, 3, (1, 2), activation="none", bias=False),
    StemMbconvCase((2, 3, 7, 6), 4, 3, wide_vectors=True, memory_format=torch.channels_last),
    StemMbconvCase((2, 2, 5, 6), 3, 2, (3, 2), (1, 2), (1, 0, 1, 0), 3, (1, 2), (0, 1, 0, 1), "relu6", "none", bias=False, matrix_weight=True),
]


def cases(*ops: str) -> list[Case | MbconvCase | StemMbconvCase]:
    return [case for case in CASES if case.op in ops]


def expected_format(case: Case, x: Tensor) -> torch.memory_format:
    """The format of the output, as the ops' documentation has it."""
    if case.memory_format:
        return case.memory_format
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) or (x.shape[1] > 1 and x.stride(1) == 1):
        return torch.channels_last
    return torch.contiguous_format


def error(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Root mean square and largest error, relative to the truth's."""
    difference, truth = actual.double() - truth, truth.double()
    rms = difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-30)
    largest = difference.abs().max() / truth.abs().max().clamp(min=1e-30)
    return rms.item(), largest.item()


def check_accuracy(case: Case, device: str, dtype: torch.dtype, layout: str) -> None:
    """Shape, dtype, strides, and an error against float64 that is at most 1.25 times eager's in the same dtype; a correctly
    rounded result (error eps / 2) always passes; and single elements may be off by a few times what eager's worst is,
    which a wrong tile never is."""
    args = case.arguments(dtype, device, layout)
    before = {name: a.clone() for name, a in args.items() if isinstance(a, Tensor)}
    out = case.call(args)
    assert all(torch.equal(args[name], a) for name, a in before.items()), "an input was written to"
    assert out.shape == case.out_shape() and out.dtype == dtype and out.device.type == device
    if out.dim() == 4:
        fresh = torch.empty(case.out_shape(), memory_format=expected_format(case, args["x"]), device="meta")
    else:
        fresh = torch.empty(case.out_shape(), device="meta")
    assert out.stride() == fresh.stride()
    if out.numel() == 0:
        return
    # On few elements eager may be lucky, or we: there the errors of several draws count together. (The CPU implementation is eager's.)
    seeds = range(min(1 + 4096 // out.numel(), 128) if device == "cuda" else 1)
    draws = [case.arguments(dtype, device, layout, seed) for seed in seeds]
    truth = torch.stack([case.reference(args, torch.float64) for args in draws])
    rms, largest = error(torch.stack([case.call(args) for args in draws]), truth)
    eager_rms, eager_largest = error(torch.stack([case.reference(args) for args in draws]), truth)
    eps = torch.finfo(dtype).eps
    assert rms <= max(1.25 * eager_rms, eps / 2), f"error {rms:.2e}, eager's {eager_rms:.2e}"
    assert largest <= 4 * max(eager_largest, eps), f"largest error {largest:.2e}, eager's {eager_largest:.2e}"


def check_special_values(case: Case, device: str, dtype: torch.dtype, layout: str) -> None:
    """NaN, inf and -inf in x come out where they do in PyTorch: in this dtype or, in bfloat16 on a CPU, in float64. There eager's own
    ways differ: torch 2.10's convolutions on some CPUs, with padding or of a padded image."""
    for special in (float("nan"), float("inf"), float("-inf")):
        args = case.arguments(dtype, device)
        x = args["x"].flatten()
        x[:: max(1, x.numel() // 3)] = special
        args["x"] = lay_out(x.view(case.x), layout)
        out, eager, exact = case.call(args), case.reference(args), case.reference(args, torch.float64)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            allowed = [eager, exact] if device == "cpu" and dtype == torch.bfloat16 else [eager]
            assert any(torch.equal(kind(out), kind(expected)) for expected in allowed)
        assert not special != special or out.isnan().any()
