"""The op calls that networks make: recorded once, on the CPU, and made again with any batch and dtype."""

import functools
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..bench.kernels import stepwise

MODELNEW = "modelnew"
BATCHED = ("x", "residual")  # the arguments whose first size is the batch
GUARD = 64  # elements of NaN before and after an operand, which keep it on a 16-byte boundary
# The ops of several convolutions, with their weights.
BEGINNING = ("expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias")
CHAINS = {"expand_depthwise": BEGINNING, "mbconv": (*BEGINNING, "project_weight", "project_bias")}
# The kernels with narrow maps (triton_src/_narrow.py), which a block in float32 has and no call of its own: op and precision, and
# the ops that have to do without a kernel of their own to come to them.
INNER = {
    ("pointwise", "narrowing"): ("mbconv", "expand_depthwise"),
    ("depthwise", "narrow"): ("mbconv", "expand_depthwise"),
    ("expand_depthwise", "narrowing"): ("mbconv",),
    ("pointwise", "widening"): ("mbconv",),
    ("pointwise", "widening16"): ("mbconv",),
}
FORMATS = {"contiguous_format": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its sizes (without the batch where it has one), and its dimensions from the outermost in memory to
    the innermost one (with the batch)."""

    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """torch.ops.effnet.<op>(**arguments): operands and constants, by the schema's names."""

    op: str
    arguments: tuple[tuple[str, object], ...]

    def __str__(self):
        operands = {name: value for name, value in self.arguments if isinstance(value, Operand)}
        weights = [value.shape for name, value in operands.items() if name.endswith("weight")]
        words = [self.op, "x".join(map(str, operands["x"].shape)), "by", *("x".join(map(str, shape)) for shape in weights)]
        words += [f"s{dict(self.arguments)['stride'][0]}"] if "stride" in dict(self.arguments) else []
        words += ["residual"] if "residual" in operands else []
        return " ".join(words)

    def make(self, batch, dtype, device, seed=0):
        """The arguments by name, drawn from `seed`: weights that keep the variance of what they are applied to."""
        generator = torch.Generator(device).manual_seed(seed)
        made = {}
        for name, value in self.arguments:
            if isinstance(value, Operand):
                shape = (batch, *value.shape) if name in BATCHED else value.shape
                kept = torch.float32 if len(shape) == 1 else dtype  # biases
                made[name] = guarded(shape, value.order, kept, 1 if name in BATCHED else scale(shape), generator, device)
            else:
                made[name] = FORMATS.get(value, value) if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
        return made

    def run(self, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.effnet, self.op).default(**arguments)


def scale(shape):
    """Of a weight, so that it keeps the variance of what it is applied to; biases are as large as that."""
    return math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 1


def guarded(shape, order, dtype, scale, generator, device):
    """Normal numbers between NaNs, so that reading outside shows in the result."""
    count = math.prod(shape)
    buffer = torch.full((count + 2 * GUARD,), math.nan, dtype=dtype, device=device)
    inner = buffer[GUARD : GUARD + count]
    inner.normal_(0, scale, generator=generator)
    return inner.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "effnet" and function._schema.name == "effnet::network":
            with self:
                return stepwise(*args, **kwargs)
        if function.namespace == "effnet":
            names = [argument.name for argument in function._schema.arguments]
            self.calls.append(describe(function._schema.name.removeprefix("effnet::"), {**dict(zip(names, args)), **kwargs}))
        return function(*args, **kwargs)


def describe(op, arguments):
    described = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            shape = tuple(value.shape[1:] if name in BATCHED else value.shape)
            order = range(value.dim()) if value.is_contiguous() else sorted(range(value.dim()), key=lambda d: (-value.stride(d), d))
            value = Operand(shape, tuple(order))
        elif isinstance(value, torch.memory_format):
            value = str(value).removeprefix("torch.")
        elif isinstance(value, (list, tuple)):
            value = tuple(value)
        described.append((name, value))
    return Call(op, tuple(described))


def record(model, size):
    """The different calls of a model's forward pass, in order."""
    model = model.eval().requires_grad_(False)
    with torch.no_grad():
        model(torch.zeros(2, 3, size, size))  # folds, which is no part of a forward pass
        with Recorder() as recorder:
            model(torch.zeros(2, 3, size, size))
    return list(dict.fromkeys(part for call in recorder.calls for part in (call, *all_parts(call))))


def parts(call):
    """The calls that do what a block or its beginning does, where its own kernel is not used: expand_depthwise (without expand step
    depthwise) and the projection, or the two steps of expand_depthwise, or a stem and the block on its map. They may have parts
    themselves."""
    if call.op == "stem_mbconv":
        return stem_parts(call)
    if call.op not in CHAINS:
        return []
    a = dict(call.arguments)
    (rows, columns), (sy, sx), (left, right, top, bottom) = a["x"].shape[1:], pair(a.get("stride", 1)), four(a.get("padding", 1))
    weight = a["depthwise_weight"].shape
    out = (rows + top + bottom - weight[2]) // sy + 1, (columns + left + right - weight[3]) // sx + 1
    order, activation, x, found = a["x"].order, a.get("activation", "relu6"), a["x"], []
    window = {"stride": (sy, sx), "padding": (left, right, top, bottom), "activation": activation}

    def add(op, **given):
        found.append(Call(op, tuple(given.items())))

    if call.op == "mbconv" and a.get("expand_weight") is not None:
        add("expand_depthwise", x=x, **{name: a[name] for name in CHAINS["expand_depthwise"]}, **window)
    else:
        if call.op == "expand_depthwise":
            add("pointwise", x=x, weight=a["expand_weight"], bias=a["expand_bias"], residual=None, activation=activation)
            x = Operand((weight[0], rows, columns), order)
        add("depthwise", x=x, weight=a["depthwise_weight"], bias=a["depthwise_bias"], **window)
    if call.op == "mbconv":
        x = Operand((weight[0], *out), order)
        add("pointwise", x=x, weight=a["project_weight"], bias=a["project_bias"], residual=a.get("residual"), activation="none")
    return found


def stem_parts(call):
    """The stem, and the block on its map."""
    a = dict(call.arguments)
    stem = {"x": a["x"], "weight": a["stem_weight"], "bias": a.get("stem_bias"), "stride": a.get("stem_stride", 2), "padding": a.get("stem_padding", 1), "activation": a.get("stem_activation", "relu")}
    (sy, sx), (left, right, top, bottom) = pair(stem["stride"]), four(stem["padding"])
    stem |= {"stride": (sy, sx), "padding": (left, right, top, bottom), "memory_format": a.get("memory_format")}
    channels, _, ky, kx = a["stem_weight"].shape
    rows, columns = a["x"].shape[1:]
    order = (0, 2, 3, 1) if a.get("memory_format") == "channels_last" or (a.get("memory_format") is None and a["x"].order == (0, 2, 3, 1)) else (0, 1, 2, 3)
    block = {"x": Operand((channels, (rows + top + bottom - ky) // sy + 1, (columns + left + right - kx) // sx + 1), order), "expand_weight": None, "expand_bias": None}
    block |= {name: a.get(name) for name in ("depthwise_weight", "depthwise_bias", "project_weight", "project_bias")}
    block |= {"residual": None, "stride": pair(a.get("stride", 1)), "padding": four(a.get("padding", 1)), "activation": a.get("activation", "relu6")}
    return [Call("conv", tuple(stem.items())), Call("mbconv", tuple(block.items()))]


def all_parts(call):
    """... and theirs."""
    return [found for part in parts(call) for found in (part, *all_parts(part))]


def run_parts(call, arguments, run):
    """The result of a call by its parts, each of them by run(part, arguments)."""
    x, steps = arguments["x"], parts(call)
    for step in steps:
        constants = {name: list(value) if isinstance(value, tuple) else FORMATS.get(value, value) for name, value in step.arguments}
        if step.op in CHAINS:
            tensors = {name: arguments.get(name) for name in CHAINS[step.op]}
        else:
            role = {"depthwise": "depthwise", "conv": "stem"}.get(step.op) or ("project" if call.op == "mbconv" else "expand")
            tensors = {"weight": arguments[f"{role}_weight"], "bias": arguments[f"{role}_bias"]}
            tensors |= {"residual": arguments.get("residual")} if role == "project" else {}
        x = run(step, {**constants, "x": x, **tensors})
    return x


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def four(value):
    return (value,) * 4 if isinstance(value, int) else tuple(value) * (4 // len(value))


def network_calls(name, size=None):
    """Of "modelnew", or of any model of timm or torchvision by its name there, converted to this package's ops."""
    size, models = models_of(name, size)
    return list(dict.fromkeys(call for model in models for call in record(model, size)))


@functools.lru_cache(maxsize=1)
def models_of(name, size=None):
    """(size, the converted models)."""
    from ..conversion import convert
    from ..model import ModelNew, reference_network

    if name == MODELNEW:
        size = size or 240
        return size, [ModelNew(), convert(reference_network().eval(), torch.zeros(2, 3, size, size))]
    size, model = stock_model(name, size)
    return size, [convert(model.eval(), torch.zeros(2, 3, size, size), partial=True)]


def stock_model(name, size):
    """(size, model); RuntimeError where no installed library has it."""
    import_torchvision()
    if importlib.util.find_spec("timm"):
        import timm

        if timm.is_model(name):
            model = timm.create_model(name)
            return size or model.default_cfg["input_size"][-1], model
    if importlib.util.find_spec("torchvision"):
        from torchvision import models

        if name in models.list_models():
            return size or 224, models.get_model(name)
    raise RuntimeError(f"no network '{name}': expected {MODELNEW} or the name of a model of timm or torchvision, where they are installed")


def import_torchvision():
    """Also where it was built for another torch, whose operators its definitions then miss."""
    if not importlib.util.find_spec("torchvision"):
        return
    try:
        torch.ops.load_library(Path(importlib.util.find_spec("torchvision").origin).with_name("_C.so"))
    except OSError:
        fragment = import_torchvision.fragment = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


def save(path, networks):
    """{name: calls} as JSON."""
    def plain(value):
        return {"shape": value.shape, "order": value.order} if isinstance(value, Operand) else value

    content = {name: [{"op": call.op, "arguments": {key: plain(value) for key, value in call.arguments}} for call in calls] for name, calls in networks.items()}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def load(path):
    def value_of(value):
        if isinstance(value, dict):
            return Operand(tuple(value["shape"]), tuple(value["order"]))
        return tuple(value) if isinstance(value, list) else value

    content = json.loads(Path(path).read_text())
    return {name: [Call(c["op"], tuple((key, value_of(value)) for key, value in c["arguments"].items())) for c in calls] for name, calls in content.items()}
