"""Launches any variant in the library by name, on raw pointers, and compares with float64: on a GPU, or on a driver that
executes PTX on the CPU.

Every tensor lies between NaNs of one bit pattern: reading outside shows in the result, writing outside in the pattern. Data
moves by copies between host and GPU only and the truth is computed on the host, so no kernel runs here but those under test.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from exact import exact, exact_chain
from narrow_maps import SCALE, narrow, narrow_weight
from op_cases import ACTIVATIONS as FUNCTIONS
from op_cases import lay_out
from stub_cuda import c_api

import effnet_aot
from effnet_aot import _C
from effnet_aot.cli.images import image_name

# Of weights, and of maps that are not narrow; in the order of the C API's numbers.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, **dict.fromkeys(("tf32", "fp32", "narrowing", "narrow", "widening", "widening16"), torch.float32)}
NARROW_X, NARROW_OUT = ("narrow", "widening", "widening16"), ("narrowing", "narrow")
ACTIVATIONS = ("none", "relu", "relu6")  # in the order of the C API's numbers
POISON = 0x7FA5  # 16 bits that are a NaN in fp16 and bf16 and, twice, in fp32
GUARD = 1024  # elements of it before and after a tensor
EPS = 2.0**-10  # the same number in float32 and float64


def serves(kernel):
    """Whether an image is of the kind that runs here: what the library chooses for a GPU, and the PTX without one."""
    return image_name(kernel) == _C.images(0)["image"] if torch.cuda.is_available() else kernel["kind"] == "ptx"


# What only the table of another GPU names has no image here.
EMBEDDED = sorted({(kernel["op"], kernel["variant"]) for kernel in effnet_aot.kernels() if serves(kernel)})


class Target(NamedTuple):
    library: c_api.Library
    device: str  # where its kernels find their memory: "cuda", or "cpu"


# ---- problems that a variant takes ----


class Variant:
    """What a variant's name says of it: "fp16_k3_s1_rows_4x32x32"."""

    def __init__(self, op, name):
        self.op, self.name, tokens = op, name, name.split("_")
        self.precision = tokens[0]
        self.layout = "nchw" if "nchw" in tokens else "nhwc"
        self.resident = any(token.startswith("resident") for token in tokens)  # the weights, at their whole depth
        self.images = max(int(token.removeprefix("images")) if token.startswith("images") else 1 for token in tokens)  # of a program
        self.depth = max(int(token.removeprefix("deep")) if token.startswith("deep") else 0 for token in tokens)  # that it has places for
        self.merged = op in ("merged_depthwise", "merged_pool")
        self.narrow_between = op == "mbconv" and self.precision == "narrow"  # its steps: a problem of TF32
        self.narrow_x = (self.precision in NARROW_X and not self.narrow_between) or (self.merged and self.precision == "tf32")
        self.narrow_out = (self.precision in NARROW_OUT and not self.narrow_between) or (op == "merged_depthwise" and self.precision == "tf32")
        self.taps_first = "taps" in tokens
        self.aligned, self.folded, self.expands = "generic" not in tokens, "folded" in tokens or self.resident, "unexpanded" not in tokens and op == "mbconv"
        self.paired = "paired" in tokens  # two columns of the picture are one load
        numbers = {token[0]: int(token[1:]) for token in tokens if token[0] in "ksc" and token[1:].isdigit()}
        self.kernel, self.stride, self.in_channels = (numbers.get(letter) for letter in "ksc")
        self.tile = [int(number) for number in next(token for token in tokens if token[0].isdigit()).split("x")]
        self.columns = self.tile[1]

    @property
    def out_dtype(self):
        """What results are rounded to."""
        return torch.float16 if self.narrow_out else DTYPES[self.precision]

    @property
    def multiplies_tf32(self):
        return self.precision in ("tf32", "narrowing", "widening", "widening16") or self.narrow_between

    @property
    def number(self):
        """Of a problem's precision in the C API."""
        return list(DTYPES).index("tf32" if self.narrow_between else self.precision)

    @property
    def promised(self):
        """What lies on 16-byte boundaries. Everything else never does here."""
        return (PROMISED[self.op] if self.aligned else ()) + ({"conv": ("bias",), "depthwise": ("weight",)}.get(self.op, ()) if self.folded else ())

    def tails(self):
        if self.op == "mbconv":
            return [Tail("bias", "relu6", wide=True, residual=self.stride == 1), Tail("bias", "relu6", wide=True)]
        if self.op == "stem_mbconv":  # of the stem and of the block
            return [Tail("bias", "relu6", wide=True), Tail("bias", "relu", wide=True)]
        if self.narrow_out:  # nothing else fits into it
            return [Tail("bias", "relu6", wide=True), *([] if self.op in FIRST_TWO else [Tail("nothing", "relu6")])]
        if self.op in FIRST_TWO or self.merged:
            return [Tail("bias", activation, wide=True) for activation in ("relu6", "none")]
        if self.folded and self.op in ("conv", "depthwise"):
            return [Tail("bias", "relu6", wide=True), Tail("bias", "none", wide=True), Tail("nothing", "relu")]
        return [tail for tail in TAILS if tail.kind != "batch norm" or not self.folded]


class Problem(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    stem: tuple[int, ...] = ()  # the weight of a stem in front, and its padding; the rest is the block's, but for x
    stem_padding: tuple[int, int, int, int] = (0, 0, 0, 0)


def width(r, large, aligned):
    """A number of channels: more than a tile has, or few; a multiple of 8, or odd."""
    number = r.randint(140, 280) if large else r.randint(1, 40)
    return math.ceil(number / 8) * 8 if aligned else number | 1


def pointwise(v, r, large):
    rows = v.layout == "nhwc"
    batch, height, columns = (r.randint(2, 3), r.randint(9, 13), r.randint(9, 21)) if large else (r.randint(1, 3), r.randint(1, 5), r.randint(1, 7))
    if not rows:  # loads run along the pixels, and a single one would be served by the NHWC variants
        columns = math.ceil(columns / 8) * 8 if v.aligned else columns + 1
    in_channels = width(r, large, v.aligned)
    if v.resident:
        in_channels = r.randrange(v.tile[2] // 2 + 8, v.tile[2] + 1, 8)
    if v.images > 1 and not v.merged:
        batch, height, columns = batch + 2, r.randint(1, 8), r.randint(1, v.tile[0] // v.images // 8)
    if v.merged:  # all of an image's pixels at once, and several images one after the other
        batch, height, columns = batch + v.images, r.randint(1, 8), r.randint(1, v.tile[0] // 8)
        in_channels = r.randrange(v.depth // 2 + 8, v.depth + 1, 8)
    return Problem((batch, in_channels, height, columns), (width(r, large, v.aligned and rows and v.op == "pointwise"), in_channels, 1, 1))


def image_and_padding(r, large, kernel, padding=None):
    """A height or width with the padding before and after it, `padding` at most: at least the kernel's size together."""
    most = kernel if padding is None else padding
    size, before, after = r.randint(14, 42) if large else r.randint(1, 6), r.randint(0, most), r.randint(0, most)
    return max(size, kernel - before - after), before, after


def depthwise(v, r, large):
    height, top, bottom = image_and_padding(r, large, v.kernel)
    columns, left, right = image_and_padding(r, large, v.kernel)
    channels = math.ceil(width(r, large, v.aligned) / 2 / 8) * 8 if v.aligned else width(r, large, False) // 2 | 1
    stride = (v.stride, v.stride) if v.stride else (r.randint(1, 2), r.randint(1, 2))
    return Problem((r.randint(1, 3), channels, height, columns), (channels, 1, v.kernel, v.kernel), stride, (left, right, top, bottom))


def conv(v, r, large):
    kernel = (v.kernel, v.kernel) if v.kernel else (r.randint(1, 7), r.randint(1, 5))
    height, top, bottom = image_and_padding(r, large, kernel[0])
    columns, left, right = image_and_padding(r, large, kernel[1])
    in_channels, out_channels = r.randint(1, 3 if v.folded else 9), width(r, False, v.aligned) + 32 * large
    x, stride = (r.randint(1, 3), in_channels, height, columns), (r.randint(1, 3), r.randint(1, 3))
    return Problem(x, (out_channels, in_channels, *kernel), stride, (left, right, top, bottom))


def linear(v, r, large):
    in_features = width(r, large, v.aligned) * (2 if v.aligned else 1) + (256 if large else 0)
    return Problem((r.randint(65, 150) if large else r.randint(1, 20), in_features), (width(r, large, v.aligned), in_features))


def block(v, r, large):
    """Its weight is the projection's. The first has all channels that the variant can have; others fewer, or a single pixel."""
    shape = (r.randint(1, 3), v.in_channels)
    hidden, out_channels = v.in_channels * (6 if v.expands else 1), v.columns if large else r.randrange(8, v.columns + 1, 8)
    kind = "large" if large else r.choice(["pixel", "one side", "any"])
    if kind == "pixel":
        sides = [(1, 1, 1), (1, 1, 1)]
    elif kind == "one side":  # as TensorFlow pads for stride 2
        sides = [(r.randint(2, 17), 0, 1), (r.randint(2, 17), 0, 1)]
    else:  # every window of a fused block reaches into the image
        sides = [image_and_padding(r, large, 3, 2), image_and_padding(r, large, 3, 2)]
    (height, top, bottom), (columns, left, right) = sides
    if large:
        height, columns = r.choice([(61, 33), (33, 61)])
    return Problem((*shape, height, columns), (out_channels, hidden, 1, 1), (v.stride, v.stride), (left, right, top, bottom))


def stem_and_block(v, r, large):
    """Pictures of several strips and segments, or small ones, padded on both sides, on one side as TensorFlow does, or not."""
    in_channels, out_channels = (3, v.columns) if large else (r.randint(1, 3), r.randrange(8, v.columns + 1, 8))
    height, columns = r.choice([(75, 66), (34, 118)]) if large else (r.randint(3, 12), r.randint(3, 12))
    columns += columns % 2 if v.paired else 0
    stem_padding = r.choice([(1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), (1, 0, 0, 2) if v.paired else (2, 3, 0, 1)])
    padding = r.choice([(1, 1, 1, 1), (2, 1, 1, 2), (1, 1, 2, 0)])
    return Problem((r.randint(1, 3), in_channels, height, columns), (out_channels, 32, 1, 1), (1, 1), padding, (32, in_channels, 3, 3), stem_padding)


def narrowing_a_weight(v, r, large):
    """Rows of more than the kernel takes at a time, or few."""
    rows, depth = (r.randint(90, 150), r.randint(35, 150)) if large else (r.randint(1, 20), r.randint(1, 40))
    return Problem((1,), (8 * rows, r.choice([9, 25, depth])) if v.taps_first else (rows, 8 * depth))


def merging(v, r, large):
    """Its weight's sizes are rows, depth and columns: of several tiles, or few."""
    most = (80, 80, 150) if large else (40, 40, 70)
    return Problem((1,), tuple(r.randint(size // 2 if large else 1, size) for size in most))


def folding(v, r, large):
    """There is no x. Many a small weight is a depthwise one."""
    if large:
        return Problem((1,), (r.randint(17, 70), r.randint(8, 30), r.randint(1, 5), r.randint(1, 5)))
    return Problem((1,), (r.randint(1, 40), r.choice([1, r.randint(1, 20)]), r.randint(1, 5), r.randint(1, 5)))


def beginning(v, r, large):
    """Its weight is the expansion's. The first is cut into bands and has more channels than the kernel takes at a time; others fill
    a block's pixels, or are smaller in everything."""
    (pixels, chunk, *parts), kind = v.tile, "bands" if large else r.choice(["full", "any"])
    depth = 64 // DTYPES[v.precision].itemsize
    if v.depth:
        in_channels = r.randrange(v.depth // 2 + 8, v.depth + 1, 8)
    else:
        in_channels = parts[0] * depth + r.randrange(8, depth + 1, 8) if large else r.randrange(8, 2 * depth + 1, 8)
    hidden = r.randrange(8, 2 * chunk + 1, 8) + (chunk if large else 0)
    if kind == "full":
        height = r.randint(3, 16)
        sides = [(height, 1, 1), (pixels // height, 1, 1)]
    else:
        sides = [image_and_padding(r, False, v.kernel), image_and_padding(r, False, v.kernel)]
    (height, top, bottom), (columns, left, right) = sides
    if large:
        columns = r.randint(v.kernel, pixels // v.kernel)
        height = pixels // columns * 2 + r.randint(0, 3)
    return Problem((r.randint(1, 2) + 2 * (v.images - 1), in_channels, height, columns), (hidden, in_channels, 1, 1), (v.stride, v.stride), (left, right, top, bottom))


PROBLEMS = {
    "pointwise": pointwise, "pointwise_pool": pointwise, "depthwise": depthwise, "conv": conv, "linear": linear, "fold_batch_norm": folding, "narrow_weight": narrowing_a_weight, "merge_weights": merging,
    "expand_depthwise": beginning, "mbconv": block, "stem_mbconv": stem_and_block, "merged_depthwise": beginning, "merged_pool": pointwise,
}  # fmt: skip
FIRST_TWO = ("expand_depthwise", "merged_depthwise")  # of a block
CHAINS = (*FIRST_TWO, "mbconv", "stem_mbconv")  # of several convolutions
WEIGHTS = ("expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias")  # of a block
# What an aligned variant was promised to lie on 16-byte boundaries.
PROMISED = {
    "pointwise": ("x", "weight", "residual", "out"),
    "pointwise_pool": ("x", "weight"),
    "depthwise": ("x", "out"),
    "conv": ("out",),
    "linear": ("x", "weight", "out"),
    "fold_batch_norm": (),
    "narrow_weight": ("weight", "out"),
    "expand_depthwise": ("x", *WEIGHTS, "out"),
    "merged_depthwise": ("x", *WEIGHTS, "expand_scale", "out"),
    "merged_pool": ("x", "weight"),
    "merge_weights": (),
    "mbconv": ("x", *WEIGHTS, "residual", "out"),
    "stem_mbconv": ("stem_bias", *WEIGHTS, "out"),
}


class Tail(NamedTuple):
    kind: str  # "batch norm", "bias" or "nothing"
    activation: str
    wide: bool = False  # float32 vectors
    residual: bool = False  # for the op that takes one


TAILS = [
    Tail("batch norm", "relu6", residual=True),
    Tail("batch norm", "none", wide=True),
    Tail("bias", "relu", residual=True),
    Tail("bias", "relu6", wide=True, residual=True),
    Tail("nothing", "none"),
]


def draw(v, problem, tail, r):
    """All tensors of a launch by their names in exact(), in torch's order of dimensions."""
    generator = torch.Generator().manual_seed(r.randrange(2**31))
    dtype = DTYPES[v.precision]

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def scaled(*shape):
        return (normal(*shape, dtype=torch.float64) / math.prod(shape[1:]) ** 0.5).to(dtype)

    tensors = {"x": normal(*problem.x)}
    if v.narrow_x:
        tensors["x"] = narrow(tensors["x"].abs().clamp(max=6))
    if v.op in FIRST_TWO:
        hidden = problem.weight[0]
        for step, shape in {"expand": problem.weight, "depthwise": (hidden, 1, v.kernel, v.kernel)}.items():
            tensors |= {f"{step}_weight": scaled(*shape), f"{step}_bias": normal(hidden, dtype=torch.float32)}
        return tensors
    if v.op in ("mbconv", "stem_mbconv"):
        (batch, in_channels, *_), (out_channels, hidden, *_) = problem.x, problem.weight
        steps = {"stem": problem.stem, "expand": (hidden, in_channels, 1, 1), "depthwise": (hidden, 1, 3, 3), "project": problem.weight}
        for step in [*(["stem"] if problem.stem else []), *(["expand"] if v.expands else []), "depthwise", "project"]:
            tensors |= {f"{step}_weight": scaled(*steps[step]), f"{step}_bias": normal(steps[step][0], dtype=torch.float32)}
        if tail.residual:
            tensors["residual"] = normal(batch, out_channels, *out_pixels(problem))
        return tensors
    tensors["weight"] = scaled(*problem.weight)
    out_channels, vector = problem.weight[0], torch.float32 if tail.wide else dtype
    if tail.kind == "batch norm":
        tensors["batch_norm"] = [normal(out_channels).abs() + 0.5, normal(out_channels), normal(out_channels) / 2, normal(out_channels).abs() + 0.25]
        tensors["batch_norm"] = [t.to(vector) for t in tensors["batch_norm"]]
    if tail.kind == "bias":
        tensors["bias"] = normal(out_channels, dtype=vector)
    if tail.residual and v.op == "pointwise":
        tensors["residual"] = normal(problem.x[0], out_channels, *problem.x[2:])
    return tensors


def out_pixels(problem, kernel=3):
    (left, right, top, bottom), (height, columns) = problem.padding, problem.x[2:]
    return [(size - kernel) // stride + 1 for size, stride in zip((height + top + bottom, columns + left + right), problem.stride)]


def stem_pixels(problem):
    (left, right, top, bottom), (height, columns) = problem.stem_padding, problem.x[2:]
    return [(size - 3) // 2 + 1 for size in (height + top + bottom, columns + left + right)]


# ---- launching ----


class Buffer:
    """Numbers on the device, `shift` elements off a 16-byte boundary, with poison around them."""

    def __init__(self, t, device, shift, guard):
        self.first, self.count, self.dtype = guard + shift, t.numel(), t.dtype
        words = (self.first + self.count + guard) * t.element_size() // 2
        self.host = torch.full((words,), POISON, dtype=torch.int16).view(t.dtype)
        self.host[self.first : self.first + self.count] = t
        self.there = self.host.to(device, copy=True)
        self.address = self.there.data_ptr() + self.first * t.element_size()

    def read(self):
        """(the numbers, whether everything around them is as it was)."""
        now = self.there.cpu()
        numbers = now[self.first : self.first + self.count].clone()
        now[self.first : self.first + self.count] = self.host[self.first : self.first + self.count]
        return numbers, torch.equal(now.view(torch.int16), self.host.view(torch.int16))

    def is_unchanged(self):
        return torch.equal(self.there.cpu().view(torch.int16), self.host.view(torch.int16))


def poison(count, dtype):
    return torch.full((count * dtype.itemsize // 2,), POISON, dtype=torch.int16).view(dtype)


def in_memory(t, layout):
    """t's numbers in the order in which they lie in memory; "taps": a depthwise weight tap by tap."""
    if layout == "taps":
        return t.permute(2, 3, 0, 1).reshape(-1)
    return (t.permute(0, 2, 3, 1) if t.dim() == 4 and layout == "nhwc" else t).reshape(-1)


def strides_in_memory(t, layout):
    return lay_out(t, "channels_last" if layout == "nhwc" else "contiguous").stride()


def launch(target, v, problem, tail, tensors, out_shape, guard, r):
    """Launches the variant and returns what it wrote, in torch's order of dimensions."""
    options = {}
    x_layout = v.layout
    if v.op == "stem_mbconv":
        return launch_stem_and_block(target, v, problem, tail, tensors, out_shape, guard, r)
    if v.op == "conv":  # reads any strides, whatever the output's layout is
        x_layout, weight_layout = r.choice(["nchw", "nhwc"]), r.choice(["nchw", "nhwc"])
        options["x_strides"] = None if x_layout == v.layout else list(strides_in_memory(tensors["x"], x_layout))
        options["weight_strides"] = None if weight_layout == "nchw" else list(strides_in_memory(tensors["weight"], weight_layout))
    orders = {"x": x_layout, "weight": weight_layout if v.op == "conv" else "nchw", "residual": v.layout}
    if v.op in CHAINS:
        orders |= dict.fromkeys(WEIGHTS, v.layout) | {"depthwise_weight": "taps"}

    def buffer(name, t):
        return Buffer(t, target.device, 0 if name in v.promised else 1, guard)

    stored = tensors | ({"x": (tensors["x"] * SCALE).half()} if v.narrow_x else {})
    scale, (weight_name, scale_name) = None, ("expand_weight", "expand_scale") if v.op in CHAINS else ("weight", "weight_scale")
    if v.precision == "widening16" or v.merged:
        stored[weight_name], scale = narrow_weight(tensors[weight_name].flatten(1).float())
    inputs = {name: buffer(name, in_memory(stored[name], order)) for name, order in orders.items() if name in tensors}
    inputs |= {name: buffer(name, t) for name, t in zip(("bn_weight", "bn_bias", "bn_mean", "bn_var"), tensors.get("batch_norm", []))}
    if "bias" in tensors:
        inputs["bias"] = buffer("bias", tensors["bias"])
    if scale is not None:
        inputs[scale_name] = buffer(scale_name, scale)
    inputs |= narrow_weights(target, v, tensors, guard)
    out = buffer("out", poison(math.prod(out_shape), v.out_dtype))

    addresses = {name: b.address for name, b in inputs.items()}
    epilogue = {name: address for name, address in addresses.items() if name == "bias" or name.startswith("bn_")}
    epilogue |= {"bn_eps": EPS, "vectors_are_fp32": int(tail.wide), "activation": ACTIVATIONS.index(tail.activation)}
    members = options | {name: addresses[name] for name in (*orders, scale_name, *NARROW_WEIGHTS) if name in addresses}
    members |= {"precision": v.number, "out": out.address, "variant": v.name}
    if v.op in CHAINS:
        members |= dict(activation=epilogue["activation"], biases_are_fp32=1, depthwise_taps_first=1, hidden=problem.weight[1 if v.op == "mbconv" else 0])
    else:
        members["epilogue"] = epilogue
    if v.op == "linear":
        members |= dict(rows=problem.x[0], in_features=problem.x[1], out_features=problem.weight[0])
    else:
        batch, channels, height, columns = problem.x
        members |= dict(layout=["nchw", "nhwc"].index(v.layout), batch=batch, height=height, width=columns)
        members |= {"channels": channels} if v.op == "depthwise" else {"in_channels": channels}
        members |= {"out_channels": problem.weight[0]} if v.op not in ("depthwise", *FIRST_TWO) else {}
    if v.op in ("depthwise", "conv", *CHAINS):
        members |= dict(zip(("stride_y", "stride_x"), problem.stride)) | dict(zip(("left", "right", "top", "bottom"), problem.padding))
        members |= {"kernel": v.kernel or 3} if v.op != "conv" else dict(zip(("kernel_y", "kernel_x"), problem.weight[2:]))

    return result_of(target, v, members, inputs, out, out_shape)


NARROW_WEIGHTS = [f"narrow_{step}_{part}" for step in ("depthwise", "project") for part in ("weight", "scale")]


def narrow_weights(target, v, tensors, guard):
    """What a kernel with narrow maps between the block's steps reads besides."""
    made = {}
    for step in ("depthwise", "project") if v.narrow_between else ():
        weight, scale = narrow_weight(tensors[f"{step}_weight"].flatten(1))
        made |= {f"narrow_{step}_weight": weight.T.reshape(-1) if step == "depthwise" else weight.reshape(-1), f"narrow_{step}_scale": scale}
    return {name: Buffer(t, target.device, 0, guard) for name, t in made.items()}


def launch_stem_and_block(target, v, problem, tail, tensors, out_shape, guard, r):
    x_layout, weight_layout = "nchw" if v.paired else r.choice(["nchw", "nhwc"]), r.choice(["nchw", "nhwc"])
    orders = dict.fromkeys(tensors, "nhwc") | {"x": x_layout, "stem_weight": weight_layout, "depthwise_weight": "taps"}
    # A pair of columns is aligned, and no more.
    inputs = {name: Buffer(in_memory(t, orders[name]), target.device, 0 if name in v.promised else 2 if name == "x" and v.paired else 1, guard) for name, t in tensors.items()}
    out = Buffer(poison(math.prod(out_shape), DTYPES[v.precision]), target.device, 0, guard)
    addresses = {name: b.address for name, b in inputs.items()}
    (batch, in_channels, height, columns), (out_channels, channels, *_) = problem.x, problem.weight
    common = {"precision": list(DTYPES).index(v.precision), "layout": c_api.NHWC, "batch": batch}
    sides = ("left", "right", "top", "bottom")
    stem = common | dict(x=addresses["x"], weight=addresses["stem_weight"], in_channels=in_channels, height=height, width=columns, out_channels=channels, kernel_y=3, kernel_x=3, stride_y=2, stride_x=2)
    stem |= dict(zip(sides, problem.stem_padding)) | {"x_strides": list(strides_in_memory(tensors["x"], x_layout)), "weight_strides": list(strides_in_memory(tensors["stem_weight"], weight_layout))}
    stem["epilogue"] = {"bias": addresses["stem_bias"], "vectors_are_fp32": 1, "activation": ACTIVATIONS.index(tail.activation)}
    map_height, map_width = stem_pixels(problem)
    block = common | {name: address for name, address in addresses.items() if name in WEIGHTS} | {"out": out.address} | dict(zip(sides, problem.padding))
    block |= dict(in_channels=channels, hidden=channels, out_channels=out_channels, height=map_height, width=map_width, kernel=3, stride_y=1, stride_x=1)
    block |= {"biases_are_fp32": 1, "depthwise_taps_first": 1, "activation": ACTIVATIONS.index(tail.activation)}
    return result_of(target, v, {"stem": stem, "block": block, "variant": v.name}, inputs, out, out_shape)


def result_of(target, v, members, inputs, out, out_shape):
    result = target.library.launch(v.op, members)
    assert result["status"] == c_api.OK, result["error"]
    numbers, guards_are_intact = out.read()
    assert guards_are_intact, "written outside the output"
    for name, b in inputs.items():
        assert b.is_unchanged(), f"{name} was written to"
    numbers = numbers.float() / SCALE if v.narrow_out else numbers
    if len(out_shape) == 4 and v.layout == "nhwc":
        batch, channels, height, columns = out_shape
        return numbers.view(batch, height, columns, channels).permute(0, 3, 1, 2)
    return numbers.view(out_shape)


# ---- what is right ----


def rms_bound(v, terms):
    """Root mean square error, relative to the results'."""
    if v.narrow_out:
        return (2.0**-10 if v.multiplies_tf32 else 0.0) + 0.55 * torch.finfo(torch.float16).eps
    if v.multiplies_tf32:
        return 2.0**-10  # both factors of a product are rounded by at most 2^-11
    if v.precision == "fp32":
        return (4 + terms**0.5) * 2.0**-24  # as many roundings as terms, up as often as down, and those of what follows the sum
    return 0.55 * torch.finfo(DTYPES[v.precision]).eps  # the result is rounded once, by at most half of eps; the sum is float32's


def truth_of(v, problem, tail, tensors):
    window = {"stride": problem.stride, "padding": problem.padding}
    if v.op in CHAINS:
        stem = {"stem_activation": tail.activation, "stem_padding": problem.stem_padding} if v.op == "stem_mbconv" else {}
        return exact_chain(tensors | window | stem | {"activation": tail.activation})
    return exact(**tensors, eps=EPS, activation=tail.activation, pool=v.op.endswith("_pool"), depthwise=v.op == "depthwise", **window)


def in_steps(v, problem, tail, tensors):
    """A chain in float64, but with every map rounded to the type of the tensors, as three kernels write and read it, and the
    factors of its 1x1 convolutions to TF32, as the tensor cores read them."""

    def step(name, x, **options):
        weight = tensors[f"{name}_weight"]
        if v.multiplies_tf32 and name in ("expand", "project"):
            x, weight = to_tf32(x), to_tf32(weight)
        return F.conv2d(x.double(), weight.double(), tensors[f"{name}_bias"].double(), **options)

    x, activate = tensors["x"], FUNCTIONS[tail.activation]
    rounded = narrow if v.narrow_out or v.narrow_between else lambda t: t.to(tensors["x"].dtype)
    if "stem_weight" in tensors:
        x = rounded(activate(step("stem", F.pad(x, problem.stem_padding), stride=2)))
    if "expand_weight" in tensors:
        x = rounded(activate(step("expand", x)))
    x = rounded(activate(step("depthwise", F.pad(x, problem.padding), groups=x.shape[1], stride=problem.stride)))
    return x if v.op in FIRST_TWO else (step("project", x) + tensors.get("residual", torch.zeros(())).double()).to(tensors["x"].dtype)


def to_tf32(t):
    """Rounded to ten bits of mantissa, ties away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def check_variant(target, op, variant, guards):
    """Problems large and small, with every epilogue; `guards` are the numbers of elements of poison around tensors."""
    v, r = Variant(op, variant), random.Random(f"{op}/{variant}")
    if op == "fold_batch_norm":
        return check_folding(target, v, r, guards)
    if op == "narrow_weight":
        return check_narrow_weight(target, v, r, guards)
    if op == "merge_weights":
        return check_merged_weights(target, v, r, guards)
    squared_error = squared_truth = squared_in_steps = terms = 0
    for large in (True, False, False, False):
        problem = PROBLEMS[op](v, r, large)
        for tail in v.tails():
            tensors = draw(v, problem, tail, r)
            truth = truth_of(v, problem, tail, tensors)
            for guard in guards:
                out = launch(target, v, problem, tail, tensors, truth.value.shape, guard, r)
                where = f"{problem}, {tail}, {'alone' if guard == 0 else 'between NaNs'}"
                assert not out.isnan().any(), f"{int(out.isnan().sum())} of {out.numel()} elements are NaN: not written, or read outside. {where}"
                difference = (out.double() - truth.value).abs()
                excess = (difference / truth.bound(v.out_dtype, v.multiplies_tf32)).max()
                assert excess <= 1, f"an element is off by {excess:.1f} times what rounding explains. {where}"
                squared_error += difference.square().sum().item()
                squared_truth += truth.value.square().sum().item()
                terms = max(terms, truth.terms)
                if op in CHAINS:
                    squared_in_steps += (in_steps(v, problem, tail, tensors).double() - truth.value).square().sum().item()
    if op in CHAINS:
        assert squared_error**0.5 <= 1.25 * squared_in_steps**0.5, "the kernel is less accurate than one for each of its steps"
    else:
        assert (squared_error / squared_truth) ** 0.5 <= rms_bound(v, terms)


def check_folding(target, v, r, guards):
    """Weights in any strides, vectors of both types, both orders of the result; rounded once. And NaN and infinity."""
    names, out_type = ("bn_weight", "bn_bias", "bn_mean", "bn_var"), v.name.split("_")[2]
    for large, special in ((True, False), *[(False, False)] * 4, *[(False, True)] * 3):
        shape = PROBLEMS["fold_batch_norm"](v, r, large).weight
        for wide in (False, True):
            tail, layout, taps_first = Tail("batch norm", "none", wide=wide), r.choice(["nchw", "nhwc"]), shape[1] == 1 and r.random() < 0.7
            tensors = draw(v, Problem((1,), shape), tail, r)
            weight, vectors = tensors["weight"], tensors["batch_norm"]
            if special:
                for t, count in ((weight, 4), *((vector, 2) for vector in vectors)):
                    for _ in range(count):
                        t.view(-1)[r.randrange(t.numel())] = r.choice([math.nan, math.inf, -math.inf, 0.0])
            mean_scaled, truth, truth_bias = folded(weight, vectors)
            for guard in guards:
                inputs = {"weight": Buffer(in_memory(weight, layout), target.device, 1, guard)}
                inputs |= {name: Buffer(t, target.device, 1, guard) for name, t in zip(names, vectors)}
                outs = [Buffer(poison(t.numel(), dtype), target.device, 1, guard) for t, dtype in ((truth, DTYPES[out_type]), (truth_bias, torch.float32))]
                epilogue = {name: inputs[name].address for name in names} | {"bn_eps": EPS, "vectors_are_fp32": int(wide)}
                members = dict(zip(("out_channels", "in_channels", "kernel_y", "kernel_x"), shape)) | dict(zip(("out", "out_bias"), (b.address for b in outs)))
                members |= dict(precision=list(DTYPES).index(v.precision), out_precision=list(DTYPES).index(out_type), weight=inputs["weight"].address, epilogue=epilogue)
                members |= dict(weight_strides=list(strides_in_memory(weight, layout)), taps_first=int(taps_first), variant=v.name)
                result = target.library.launch("fold_batch_norm", members)
                assert result["status"] == c_api.OK, result["error"]
                where = f"{shape}, {layout}, wide={wide}, taps_first={taps_first}, special={special}"
                assert all(b.is_unchanged() for b in inputs.values()), f"an input was written to. {where}"
                (out, out_is_intact), (bias, bias_is_intact) = (b.read() for b in outs)
                assert out_is_intact and bias_is_intact, f"written outside the output. {where}"
                for actual, expected, slack in ((out, in_memory(truth, "taps" if taps_first else "nchw"), 0.0), (bias, truth_bias, 2.0**-40 * mean_scaled.abs())):
                    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                        assert torch.equal(kind(actual), kind(expected.to(actual.dtype))), f"{kind.__name__}. {where}"
                    excess = ((actual.double() - expected).abs() / (half_an_ulp(expected, actual.dtype) * 1.001 + slack))[expected.to(actual.dtype).isfinite()]
                    assert (excess <= 1).all(), f"an element is off by {excess.max() / 2:.3f} ulp. {where}"


def numbers_in_order(v, t):
    """Of rows, or a number a row, as they lie in memory."""
    return (t.T if v.taps_first and t.dim() == 2 else t).reshape(-1)


def check_narrow_weight(target, v, r, guards):
    """Bit by bit; of rows of all magnitudes that float32 has, of zeros, with NaN and infinity."""
    for large in (True, False, False, False):
        rows, depth = PROBLEMS["narrow_weight"](v, r, large).weight
        generator = torch.Generator().manual_seed(r.randrange(2**31))
        weight = torch.randn(rows, depth, generator=generator) * torch.logspace(-37, 37, rows)[:, None]
        weight[0] = 0
        for special in (math.nan, math.inf, -math.inf, 0.0):
            weight[r.randrange(rows), r.randrange(depth)] = special
        expected = narrow_weight(weight)
        for guard in guards:
            source = Buffer(numbers_in_order(v, weight), target.device, 0, guard)
            outs = [Buffer(poison(t.numel(), t.dtype), target.device, shift, guard) for shift, t in enumerate(expected)]
            members = dict(weight=source.address, out=outs[0].address, scale=outs[1].address, rows=rows, depth=depth, taps_first=int(v.taps_first), variant=v.name)
            result = target.library.launch("narrow_weight", members)
            assert result["status"] == c_api.OK, result["error"]
            assert source.is_unchanged(), "an input was written to"
            for out, truth in zip(outs, expected):
                numbers, is_intact = out.read()
                assert is_intact, "written outside the output"
                assert torch.equal(numbers.nan_to_num(nan=12345.0), numbers_in_order(v, truth).nan_to_num(nan=12345.0)), (rows, depth)


def check_merged_weights(target, v, r, guards):
    for large in (True, False, False, False):
        rows, depth, columns = PROBLEMS["merge_weights"](v, r, large).weight
        generator = torch.Generator().manual_seed(r.randrange(2**31))
        tensors = {"first": torch.randn(depth, columns, generator=generator), "second": torch.randn(rows, depth, generator=generator)}
        tensors = {name: t.to(DTYPES[v.precision]) for name, t in tensors.items()}
        tensors |= {"first_bias": torch.randn(depth, generator=generator), "second_bias": torch.randn(rows, generator=generator)}
        first, first_bias, second, second_bias = (tensors[name].double() for name in ("first", "first_bias", "second", "second_bias"))
        truths = {"out": (second @ first, second.abs() @ first.abs()), "out_bias": (second @ first_bias + second_bias, second.abs() @ first_bias.abs() + second_bias.abs())}
        for guard in guards:
            inputs = {name: Buffer(t.reshape(-1), target.device, 1, guard) for name, t in tensors.items()}
            outs = {name: Buffer(poison(value.numel(), torch.float32), target.device, 1, guard) for name, (value, _) in truths.items()}
            members = {name: b.address for name, b in (inputs | outs).items()} | dict(precision=list(DTYPES).index(v.precision), rows=rows, depth=depth, columns=columns, variant=v.name)
            result = target.library.launch("merge_weights", members)
            assert result["status"] == c_api.OK, result["error"]
            assert all(b.is_unchanged() for b in inputs.values()), "an input was written to"
            for name, (value, magnitude) in truths.items():
                numbers, is_intact = outs[name].read()
                assert is_intact, "written outside the output"
                excess = ((numbers.double() - value.reshape(-1)).abs() / ((depth + 2) * 2.0**-24 * magnitude.reshape(-1))).max()
                assert excess <= 1, f"an element of {name} is off by {excess:.1f} times what rounding explains. {rows}, {depth}, {columns}"


def folded(weight, batch_norm):
    """(mean * scale, folded weight, folded bias) in float64."""
    gamma, beta, mean, var = (t.double() for t in batch_norm)
    scale = gamma / (var + EPS).sqrt()
    return mean * scale, weight.double() * scale.view(-1, 1, 1, 1), beta - mean * scale


def half_an_ulp(t, dtype):
    """Of a number of that type, for each element."""
    info = torch.finfo(dtype)
    return torch.ldexp(torch.full_like(t, info.eps / 2), torch.frexp(t).exponent - 1).clamp(min=info.smallest_normal * info.eps / 2)


def check_nan_and_infinity_in_a_block(target, variant, padding):
    """They come out where PyTorch lets them out. Without expansion an infinity acts as the largest finite number."""
    v, r = Variant("mbconv", variant), random.Random(variant)
    problem, tail = Problem((3, v.in_channels, 9, 7), (8, v.in_channels * (6 if v.expands else 1), 1, 1), (v.stride, v.stride), padding), v.tails()[0]
    tensors, largest = draw(v, problem, tail, r), torch.finfo(DTYPES[v.precision]).max
    for image, special in enumerate((math.nan, math.inf, -math.inf)):
        for y, z in ((0, 0), (4, 3), (8, 6)):
            tensors["x"][image, r.randrange(v.in_channels), y, z] = special
    shown = tensors if v.expands else tensors | {"x": tensors["x"].clamp(-largest, largest)}
    truth = truth_of(v, problem, tail, shown).value
    out = launch(target, v, problem, tail, tensors, truth.shape, GUARD, r).double()
    assert torch.equal(out.isnan(), truth.isnan()) and out.isnan()[0].any() and not out.isnan()[1:].any()
    finite = ~truth.isnan()
    eps = 2.0**-10 if v.multiplies_tf32 else torch.finfo(DTYPES[v.precision]).eps
    assert (out - truth)[finite].abs().max() <= 16 * eps * truth[finite].square().mean().sqrt()


def check_nan_and_infinity_in_a_stem(target, variant, padding):
    """They come out of a picture where PyTorch lets them out. In half precision an infinite value of the stem's map acts as the
    largest finite number."""
    v, r = Variant("stem_mbconv", variant), random.Random(variant)
    problem, block_tail = Problem((3, 3, 17, 14), (8, 32, 1, 1), (1, 1), (1, 1, 1, 1), (32, 3, 3, 3), padding), v.tails()[0]
    tensors = draw(v, problem, block_tail, r)
    for image, special in enumerate((math.nan, math.inf, -math.inf)):
        for y, z in ((0, 0), (8, 7), (16, 13)):
            tensors["x"][image, r.randrange(3), y, z] = special
    stem = exact(tensors["x"], tensors["stem_weight"], bias=tensors["stem_bias"], activation="relu6", stride=(2, 2), padding=padding).value
    truth = exact_chain({name: t for name, t in tensors.items() if name not in ("x", "stem_weight", "stem_bias")} | {"x": stem, "padding": problem.padding}).value
    out = launch(target, v, problem, block_tail, tensors, truth.shape, GUARD, r).double()
    assert torch.equal(out.isnan(), truth.isnan()) and out.isnan()[0].any() and not out.isnan().all()
    finite = ~truth.isnan()
    eps = 2.0**-10 if v.multiplies_tf32 else torch.finfo(DTYPES[v.precision]).eps
    assert (out - truth)[finite].abs().max() <= 16 * eps * truth[finite].square().mean().sqrt()


def check_nan_and_infinity_in_a_beginning(target, op, variant, padding):
    """The same of a block's beginning, whose hidden channels keep apart what a weight or bias of theirs brings in."""
    v, r = Variant(op, variant), random.Random(variant)
    channels = v.depth or 24
    problem = Problem((3, channels, 8, 8), (64, channels, 1, 1), (v.stride, v.stride), padding)
    for tail in v.tails():
        tensors, largest = draw(v, problem, tail, r), torch.finfo(v.out_dtype).max
        for image, special in enumerate((math.nan, math.inf, -math.inf)):
            tensors["x"][image, r.randrange(channels), r.randrange(8), r.randrange(8)] = special
        for channel, special in zip(r.sample(range(64), 3), (math.nan, math.inf, -math.inf)):
            tensors[r.choice(["expand_weight", "expand_bias", "depthwise_bias"])][channel] = special
        truth = truth_of(v, problem, tail, tensors).value
        out = launch(target, v, problem, tail, tensors, truth.shape, GUARD, r).double()
        assert torch.equal(out.isnan(), truth.isnan()) and out.isnan().any() and not out.isnan().all()
        assert torch.equal(out.isinf(), truth.isinf()) or largest < 1e5  # of float16 also what is too large
        finite = truth.isfinite() & out.isfinite()
        eps = 2.0**-10 if v.multiplies_tf32 else torch.finfo(v.out_dtype).eps
        assert (out - truth)[finite].abs().max() <= 16 * eps * truth[finite].square().mean().sqrt()


def check_infinity_in_a_convolution(target, variant):
    """It reaches the outputs of its window and no others, and is no NaN there, of however many products one is made."""
    v, r = Variant("conv", variant), random.Random(variant)
    problem, tail = PROBLEMS["conv"](v, r, False), v.tails()[0]._replace(activation="none")
    tensors = draw(v, problem, tail, r)
    for image, special in ((0, math.inf), (-1, -math.inf)):
        tensors["x"][image, r.randrange(problem.x[1]), r.randrange(problem.x[2]), r.randrange(problem.x[3])] = special
    truth = truth_of(v, problem, tail, tensors).value
    out = launch(target, v, problem, tail, tensors, truth.shape, GUARD, r).double()
    assert torch.equal(out.isnan(), truth.isnan()) and torch.equal(out.isinf(), truth.isinf())


def check_weight_tap_by_tap(target, variant):
    """As a block whose projection, or expansion, changes nothing hands it to the depthwise convolution. The weight's order does not show."""
    v, r = Variant("depthwise", variant), random.Random(variant)
    problem, tail = Problem((2, 24, 11, 9), (24, 1, v.kernel, v.kernel), (v.stride, v.stride), (2, 1, 2, 3)), Tail("bias", "relu6", wide=True)
    tensors = draw(v, problem, tail, r)
    shape = truth_of(v, problem, tail, tensors).value.shape
    expected = launch(target, v, problem, tail, tensors, shape, GUARD, r)
    around = Variant("expand_depthwise", "narrowing_16x24") if v.precision == "narrow" else Variant("mbconv", f"{v.precision}_unexpanded_c24_16x24")
    identity = torch.eye(24, dtype=tensors["x"].dtype).reshape(-1)
    inputs = {"x": in_memory(tensors["x"], "nhwc"), "depthwise_weight": in_memory(tensors["weight"], "taps"), "depthwise_bias": tensors["bias"]}
    inputs |= {"project_weight": identity} if around.op == "mbconv" else {"expand_weight": identity, "expand_bias": torch.zeros(24)}
    inputs = {name: Buffer(t, target.device, 0, GUARD) for name, t in inputs.items()}
    workspace, out = (Buffer(torch.full((count,), math.nan, dtype=v.out_dtype), target.device, 0, GUARD) for count in (tensors["x"].numel(), shape.numel()))
    members = {name: b.address for name, b in inputs.items()} | {"workspace": workspace.address, "out": out.address}
    members |= dict(precision=list(DTYPES).index(around.precision), layout=c_api.NHWC, batch=2, in_channels=24, hidden=24, height=11, width=9)
    members |= {"out_channels": 24} if around.op == "mbconv" else {}
    members |= dict(kernel=v.kernel, stride_y=v.stride, stride_x=v.stride, left=2, right=1, top=2, bottom=3)
    members |= dict(biases_are_fp32=1, depthwise_taps_first=1, activation=ACTIVATIONS.index("relu6"))
    assert torch.equal(result_of(target, around, members, inputs, out, shape), expected)


def check_infinity_in_a_walk(target, variant):
    """Of the input it reaches the outputs of its window and no others; a tap outside the image counts as 0 times its weight. A narrow
    map has none, and NaN alone shows in it."""
    v, r = Variant("depthwise", variant), random.Random(variant)
    is_narrow = v.precision == "narrow"
    problem, tail = Problem((2, 16, 19, 8), (16, 1, v.kernel, v.kernel), (v.stride, v.stride), (3, 2, 2, 4)), Tail("bias", "relu6" if is_narrow else "none", wide=True)
    tensors = draw(v, problem, tail, r)
    for image, channel, y, z, special in ((0, 3, 0, 0, math.inf), (0, 4, 9, 5, -math.inf), (1, 5, 18, 7, math.nan), (1, 6, 4, 4, math.inf)):
        tensors["x"][image, channel, y, z] = math.nan if is_narrow else special
    for channel, y, z, special in ((8, 0, 2, math.inf), (9, v.kernel - 1, 0, -math.inf), (10, 1, 1, math.nan), (11, 2, v.kernel - 1, math.inf)):
        tensors["weight"][channel, 0, y, z] = special
    windows = F.pad(tensors["x"].double(), problem.padding).unfold(2, v.kernel, v.stride).unfold(3, v.kernel, v.stride)
    truth = FUNCTIONS[tail.activation]((windows * tensors["weight"].double()[:, 0, None, None]).sum((4, 5)) + tensors["bias"].double()[:, None, None])
    out = launch(target, v, problem, tail, tensors, truth.shape, GUARD, r)
    for kind in (torch.isnan,) if is_narrow else (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(truth)) and kind(out).any()


BLOCK_PADDINGS = [(1, 1, 1, 1), (0, 1, 0, 1)]
STEMS = [variant for op, variant in EMBEDDED if op == "stem_mbconv"]
BLOCKS = [variant for op, variant in EMBEDDED if op == "mbconv"]
BEGINNINGS = [(op, variant) for op, variant in EMBEDDED if op in FIRST_TWO]
CONVOLUTIONS = [variant for op, variant in EMBEDDED if op == "conv"]
WALKED = [variant for op, variant in EMBEDDED if op == "depthwise" and "_k5_" in variant and "_folded_" in variant]  # a block of 3x3 taps has kernels of its own
