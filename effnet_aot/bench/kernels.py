"""Our ops one by one: the time of each, and the least that the machine could take for it.

    floor = max(bytes / copy bandwidth, operations / matrix product rate)

bytes: every tensor that the op reads or writes, once. An op is timed alone, ten calls in a CUDA graph, so that its operands
come from the L2 cache where they fit: a small map can be quicker than the floor, which charges them to the memory.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CALLS = 10


class Recorder(TorchDispatchMode):
    """The calls of this package's ops, with their arguments and result. A network in one op is taken step by step."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "effnet" and function._schema.name == "effnet::network":
            with self:
                return stepwise(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        if function.namespace == "effnet":
            self.calls.append((function, args, kwargs or {}, out))
        return out


def stepwise(x, weights, program, run=lambda kind, fields: getattr(torch.ops.effnet, kind).default(**fields)):
    """What torch.ops.effnet.network computes, an op a step; or whatever `run` makes of a step's kind and arguments."""
    from ..ops.network import Program

    values = [x]
    for step in Program.parse(program, len(weights)).steps:
        fields = {}
        for name, value in step.fields.items():
            source = values if name in ("input", "residual") else weights if name.endswith(("weight", "bias")) else None
            fields["x" if name == "input" else name] = value if source is None or value is None else source[value]
        values.append(run(step.kind, fields))
    return values[-1]


def operations(function, out, args, kwargs):
    """Floating-point operations, two a multiplication, or None for an op that is not known here."""
    name = function._schema.name.removeprefix("effnet::")
    if name not in COUNTS:
        return None
    given = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | kwargs
    return 2 * COUNTS[name](out, *(given.get(argument.name) for argument in function._schema.arguments))


def map_pixels(x, weight, stride, padding):
    """Of one image's convolution."""
    left, right, top, bottom = padding
    (height, width), (kernel_y, kernel_x) = x.shape[2:], weight.shape[2:]
    return ((height + top + bottom - kernel_y) // stride[0] + 1) * ((width + left + right - kernel_x) // stride[1] + 1)


COUNTS = {
    "conv": lambda out, x, weight, *_: out.numel() * weight[0].numel(),
    "depthwise": lambda out, x, weight, *_: out.numel() * weight[0].numel(),
    "pointwise": lambda out, x, weight, *_: out.numel() * weight.shape[1],
    "pointwise_pool": lambda out, x, weight, *_: x.numel() * weight.shape[0],
    "linear": lambda out, x, weight, *_: x.numel() * weight.shape[0],
    "stem_mbconv": lambda out, x, stem, _, depthwise, __, project, ___, stride, padding, *____: (
        stem.numel() * x.shape[0] * map_pixels(x, stem, stride or (2, 2), padding or (1, 1, 1, 1))
        + out.numel() // out.shape[1] * (depthwise.numel() + project.numel())
    ),
    "expand_depthwise": lambda out, x, expand, _, depthwise, *__: x.numel() * expand.shape[0] + out.numel() * depthwise[0].numel(),
    "mbconv": lambda out, x, expand, _, depthwise, __, project, *___: (
        (0 if expand is None else x.numel() * expand.shape[0])
        + out.numel() // out.shape[1] * (depthwise.numel() + project.numel())
    ),
}


def moved(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors if isinstance(t, torch.Tensor)}.values())


def shape(tensor):
    return "x".join(map(str, tensor.shape))


class Machine:
    """The two numbers that bound a kernel, measured once: bytes per second, and operations per second by dtype."""

    def __init__(self, timer):
        self._timer = timer
        self.bandwidth = timer.copy_bandwidth()
        self.rates = {}

    def rate(self, dtype):
        if dtype not in self.rates:
            self.rates[dtype] = self._timer.matmul_rate(dtype)
        return self.rates[dtype]

    def floor(self, size, count, dtype):
        return max(size / self.bandwidth, (count or 0) / self.rate(dtype))


def measure(timer, machine, workload, model):
    """A dictionary for every op that a forward pass of `model` calls."""
    dtype = workload.point.dtype
    model(workload.x)  # folds, which is no part of a forward pass
    with Recorder() as recorder:
        model(workload.x)
    rows = []
    for index, (function, args, kwargs, out) in enumerate(recorder.calls):
        size = moved([*tree_leaves((args, kwargs)), *tree_leaves(out)])
        count = operations(function, out, args, kwargs)
        seconds = alone(timer, function, args, kwargs)
        x = args[0] if args else kwargs["x"]
        floor = machine.floor(size, count, dtype)
        rows.append({
            **workload.point._asdict(), "index": index, "op": function._schema.name.removeprefix("effnet::"),
            "input": shape(x), "output": shape(out), "us": 1e6 * seconds, "bytes": size, "flops": count,
            "bytes_per_s": size / seconds, "floor_us": 1e6 * floor, "bound": bound(size, count, machine, dtype), "share": floor / seconds,
        })  # fmt: skip
    return rows


def bound(size, count, machine, dtype):
    return "memory" if size / machine.bandwidth >= (count or 0) / machine.rate(dtype) else "arithmetic"


def alone(timer, function, args, kwargs):
    """Seconds of one call."""
    x, *rest = args or [kwargs["x"]]
    others = {name: value for name, value in kwargs.items() if name != "x"}
    calls = CALLS if timer.cuda else 1

    def several(x):
        with torch._C._AutoDispatchBelowAutograd():
            for _ in range(calls):
                out = function(x, *rest, **others)
        return out

    return timer.median(timer.capture(several, x), budget=timer.budget / 5) / calls


def profiled(function, rounds=5):
    """Every kernel of a call in the order of launching, by torch's profiler: [{"kernel", "us"}, ...]; medians of some rounds."""
    from torch.profiler import ProfilerActivity, profile

    rounds_seen = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            function()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        rounds_seen.append([(event.name, event.time_range.elapsed_us()) for event in events])
    names = [name for name, _ in rounds_seen[-1]]
    same = [seen for seen in rounds_seen if [name for name, _ in seen] == names]
    return [{"kernel": name, "us": sorted(seen[i][1] for seen in same)[math.ceil(len(same) / 2) - 1]} for i, name in enumerate(names)]
