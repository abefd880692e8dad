"""Random calls of the ops, good and bad: shapes, strides, dtypes, numbers, devices. random.Random decides everything, so
that a seed is a call; hypothesis brings a Random of its own."""

import math
from dataclasses import dataclass, field

import torch
from op_cases import OPS, Case, MbconvCase, StemMbconvCase, beginning, numbers
from torch import Tensor

DTYPES = {"cpu": [torch.float32, torch.float16, torch.bfloat16, torch.float64], "cuda": [torch.float32, torch.float16, torch.bfloat16]}
CHANNELS = [1, 2, 3, 5, 7, 8, 13, 16, 24, 33, 40, 64, 72]


@dataclass
class FuzzCall:
    op: str
    args: dict
    faults: list = field(default_factory=list)  # what was made wrong; without any, the op must take the call
    tf32: bool = False

    def __call__(self):
        return getattr(torch.ops.effnet, self.op)(**self.args)

    def __str__(self):
        def text(a):
            if not isinstance(a, Tensor):
                return repr(a)
            return f"{str(a.dtype).removeprefix('torch.')} {tuple(a.shape)} strides {a.stride()} offset {a.storage_offset()} {a.device}"

        lines = [f"{name}: {text(a)}" for name, a in self.args.items()]
        return "\n  ".join([f"effnet::{self.op}, faults: {self.faults or 'none'}{', TF32' * self.tf32}", *lines])

    @property
    def tensors(self):
        return {name: a for name, a in self.args.items() if isinstance(a, Tensor)}

    def case(self):
        """The call as a Case, for PyTorch's answer; only of calls that an op took."""
        args = self.args
        stride, padding = tuple(numbers(args.get("stride", 1), 2)), tuple(numbers(args.get("padding", 0), 4))
        if self.op == "expand_depthwise":
            return beginning(tuple(args["x"].shape), args["expand_weight"].shape[0], args["depthwise_weight"].shape[2], stride, padding)
        if self.op == "mbconv":
            return MbconvCase(tuple(args["x"].shape), None, args["project_weight"].shape[0], args["depthwise_weight"].shape[2], stride, padding)
        if self.op == "stem_mbconv":
            stem_stride, stem_padding, weight = tuple(numbers(args["stem_stride"], 2)), tuple(numbers(args["stem_padding"], 4)), args["stem_weight"]
            return StemMbconvCase(tuple(args["x"].shape), weight.shape[0], args["project_weight"].shape[0], tuple(weight.shape[2:]), stem_stride, stem_padding,
                                  args["depthwise_weight"].shape[2], stride, padding, memory_format=args.get("memory_format"))  # fmt: skip
        weight = args["weight"]
        return Case(
            self.op, tuple(args["x"].shape), weight.shape[0], tuple(weight.shape[2:]) or (1, 1), stride, padding,
            args.get("activation", "none"), bias=args.get("bias") is not None, residual=args.get("residual") is not None,
            matrix_weight=weight.dim() == 2, memory_format=args.get("memory_format"),
        )  # fmt: skip


def fuzz_call(r, op=None, device="cpu") -> FuzzCall:
    op = op or r.choice(OPS)
    case, dtype = random_case(r, op), r.choice(DTYPES[device])
    call = FuzzCall(op, case.arguments(dtype, seed=r.randrange(2**31)), tf32=device == "cuda" and r.random() < 0.3)
    if r.random() < 0.2:
        add_special_values(r, call, case)
    for name, t in call.tensors.items():
        call.args[name] = to_device(strided(r, t), device)
    if r.random() < 0.35:
        for _ in range(r.choice([1, 1, 2])):
            spoil(r, call, device)
    return call


def random_case(r, op):
    batch, channels, out = r.choice([0, 1, 1, 2, 3]), r.choice(CHANNELS), r.choice(CHANNELS)
    options = {"wide_vectors": r.random() < 0.5}
    if "_bn" not in op:
        options["bias"] = op == "linear_bias" or r.random() < 0.7
    if op.startswith("linear"):
        return Case(op, (r.choice([0, 1, 2, 17]), channels), out, **options)
    if "_bn" not in op:
        options["activation"] = r.choice(["none", "relu", "relu6"])
    if op in ("pointwise", "pointwise_bn"):
        options["residual"] = r.random() < 0.5
    if op == "stem_mbconv":
        return random_stem(r, batch, out, options)
    if op.startswith("pointwise"):
        return Case(op, (batch, channels, r.randint(1, 9), r.randint(1, 9)), out, matrix_weight=r.random() < 0.3, **options)

    depthwise = op.startswith(("depthwise", "expand_depthwise", "mbconv"))
    kernel = (r.choice([3, 5]),) * 2 if depthwise else (r.randint(1, 5), r.randint(1, 5))
    left, right, top, bottom = (r.choice([0, 0, 1, 1, 2, 4]) for _ in range(4))
    height, width = (max(r.randint(1, 11), size - before - after) for size, before, after in zip(kernel, (top, left), (bottom, right)))
    stride = (r.randint(1, 2), r.randint(1, 2)) if depthwise else (r.randint(1, 3), r.randint(1, 3))
    if op == "expand_depthwise":
        options |= {"matrix_weight": r.random() < 0.3, "taps_first": r.random() < 0.5}
        return beginning((batch, channels, height, width), r.choice(CHANNELS), kernel[0], stride, (left, right, top, bottom), **options)
    if op == "mbconv":
        options |= {"residual": r.random() < 0.5, "matrix_weight": r.random() < 0.3, "taps_first": r.random() < 0.5}
        return MbconvCase((batch, channels, height, width), r.choice([None, *CHANNELS]), out, kernel[0], stride, (left, right, top, bottom), **options)
    if op == "conv":
        channels = r.choice([1, 3, 4, 7])
        options["memory_format"] = r.choice([None, None, torch.contiguous_format, torch.channels_last])
    return Case(op, (batch, channels, height, width), channels if depthwise else out, kernel, stride, (left, right, top, bottom), **options)


def random_stem(r, batch, out, options):
    """Often what one kernel computes."""
    options |= {"stem_activation": r.choice(["relu", "relu6", "none"]), "matrix_weight": r.random() < 0.3, "taps_first": r.random() < 0.7}
    options["memory_format"] = r.choice([None, torch.contiguous_format, torch.channels_last, torch.channels_last])
    x, padding = (batch, r.choice([1, 3, 3, 4]), r.randint(3, 40), r.randint(3, 40)), (1, 1, 1, 1)
    if r.random() < 0.5:
        return StemMbconvCase(x, 32, r.choice([8, 16, 24, 32]), stem_padding=r.choice([padding, (0, 1, 0, 1)]), **options)
    stem_kernel, kernel = (r.randint(1, 3), r.randint(1, 3)), r.choice([3, 5])
    stem_padding, padding = (tuple(r.choice([0, 1, 2]) for _ in range(4)), (2, r.randint(2, 3), 2, 2))
    return StemMbconvCase(x, r.choice(CHANNELS), out, stem_kernel, (r.randint(1, 3), r.randint(1, 3)), stem_padding, kernel, (r.randint(1, 2), r.randint(1, 2)), padding, **options)


def add_special_values(r, call, case):
    """NaN and infinities, where PyTorch's answer does not depend on which of its algorithms runs: a weight meets the zeros of
    the padding in some, and the statistics of batch norm are multiplied out in different orders."""
    names = [name for name in ("x", "residual", "bias", "bn_bias", "project_bias") if call.args.get(name) is not None]
    if "weight" in call.args and not any(case.padding):
        names.append("weight")
    t = call.args[r.choice(names)].view(-1)
    # An infinite pixel is under several windows of the block, and a kernel for both takes it for the largest number there.
    specials = [math.nan] if call.op == "stem_mbconv" else [math.nan, math.inf, -math.inf]
    for _ in range(r.randint(1, 3) if t.numel() else 0):
        t[r.randrange(t.numel())] = r.choice(specials)


def strided(r, t):
    """t in other strides: its dimensions in any order in memory, with NaN between its elements and before them, so that it
    may lie off a 16-byte boundary; or expanded, which makes it another tensor."""
    kind = r.choice(["dense", "dense", "channels_last", "strided", "strided", "expanded"])
    if kind == "dense" or t.dim() == 0:
        return t
    if kind == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "expanded" and t.numel():
        for d in range(t.dim()):
            if r.random() < 0.5:
                t = t.narrow(d, 0, 1).expand(t.shape)
        return t
    order, steps, offset = list(range(t.dim())), [r.choice([1, 1, 1, 2]) for _ in range(t.dim())], r.choice([0, 1, 2, 7, 8])
    r.shuffle(order)
    memory = [t.shape[d] * steps[d] for d in order]
    storage = torch.full((offset + math.prod(memory),), math.nan, dtype=t.dtype)
    view = storage[offset:].view(memory).permute([order.index(d) for d in range(t.dim())])
    return view[tuple(slice(None, None, step) for step in steps)].copy_(t)


def to_device(t, device):
    """With the strides and the storage offset, which t.to() would not keep."""
    length = t.storage_offset() + (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0)
    return t.as_strided((length,), (1,), 0).to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def spoil(r, call, device):
    """Changes something that may no longer be allowed."""
    name = r.choice(list(call.tensors))
    t = call.args[name]
    kinds = ["rank", "dtype", "size", "device"] + [n for n in ("eps", "stride", "padding", "activation", "memory_format") if n in call.args]
    kind = r.choice(kinds)
    if kind == "rank":
        choices = [t.unsqueeze(r.randint(0, t.dim())), t.reshape(-1), t.sum()] + ([t[0]] if t.dim() and t.shape[0] else [])
        call.args[name] = r.choice(choices)
    elif kind == "dtype":
        dtype = r.choice([torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64, torch.float16, torch.bfloat16, torch.float32])
        call.args[name] = (t.nan_to_num(0, 0, 0) if t.is_floating_point() else t).to(dtype)  # not the largest numbers: their sums overflow
    elif kind == "size" and t.dim():
        d = r.randrange(t.dim())
        shape = [*t.shape[:d], r.choice([0, 1, t.shape[d] + 1, max(t.shape[d] - 1, 0), 2 * t.shape[d]]), *t.shape[d + 1 :]]
        call.args[name] = torch.ones(shape, dtype=t.dtype, device=t.device)
    elif kind == "device":
        other = "meta" if device == "cpu" or r.random() < 0.3 else "cpu"
        call.args[name] = t if t.is_meta else t.to(other)  # it may have been spoilt before
    elif kind == "eps":
        call.args["eps"] = r.choice([-1e-5, -1.0, math.nan, -math.inf])
    elif kind == "stride":
        call.args["stride"] = r.choice([0, -1, 3, 2**31, -(2**40), [1, 2, 1], [], [0, 1], [2, -2]])
    elif kind == "padding":
        call.args["padding"] = r.choice([-1, 2**31, [1, 1, 1], [], [0, 0, 0, -2], [2**33, 0, 0, 0], 3])
    elif kind == "activation":
        call.args["activation"] = r.choice(["gelu", "", "RELU", "none ", "relu6\0", "tanh"])
    elif kind == "memory_format":
        call.args["memory_format"] = r.choice([torch.preserve_format, torch.channels_last_3d])
    call.faults.append(kind if kind in call.args else f"{kind} of {name}")
