"""Whole networks, as the op `network` runs them: recorded once, on the CPU, and made again with any batch and dtype.

A converted model calls that op once, or several times with other layers in between; each such call is a chain of its own.
"""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from ..bench.kernels import stepwise
from ..ops.network import hold
from .calls import Operand, Recorder, describe, guarded, models_of, scale
from .exact import SUMS


@dataclass(frozen=True, eq=False)
class Arguments:
    """Of the op, to be unpacked; and the number of the network, which the library holds for as long as this object lives."""

    x: torch.Tensor
    weights: list
    program: list

    def __iter__(self):
        return iter((self.x, self.weights, self.program))

    @cached_property
    def number(self):
        return hold(self, self.weights, self.program)


@dataclass(frozen=True)
class Chain:
    """torch.ops.effnet.network(x, weights, program); the sizes of x are without the batch."""

    x: Operand
    weights: tuple[Operand, ...]
    program: tuple[int, ...]

    def make(self, batch, dtype, device, seed=0):
        """Arguments, drawn from `seed`."""
        generator = torch.Generator(device).manual_seed(seed)
        x = guarded((batch, *self.x.shape), self.x.order, dtype, 1, generator, device)
        kept = (torch.float32 if len(w.shape) == 1 else dtype for w in self.weights)  # biases
        return Arguments(x, [guarded(w.shape, w.order, dtype, scale(w.shape), generator, device) for w, dtype in zip(self.weights, kept)], list(self.program))

    @staticmethod
    def run(arguments):
        """As a model calls it that is called often."""
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.effnet._held_network.default(arguments.x, arguments.number)

    @cache
    def calls(self):
        """A Call for every step."""
        with Recorder() as recorder, torch.no_grad():
            stepwise(*self.make(2, torch.float32, "cpu"))
        return recorder.calls


def exact(x, weights, program):
    """The result in float64; None where a step's float64 form is not known."""
    wide = [None if w is None else w.double() for w in weights]
    try:
        return stepwise(x.double(), wide, program, lambda kind, fields: SUMS[kind](fields))
    except KeyError:
        return None


class ChainRecorder(Recorder):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "effnet" and function._schema.name == "effnet::network":
            x, weights, program = args
            call = describe("network", {"x": x, **{str(index): weight for index, weight in enumerate(weights)}})
            operands = dict(call.arguments)
            self.calls.append(Chain(operands.pop("x"), tuple(operands.values()), tuple(program)))
        return function(*args, **(kwargs or {}))


def chains(name, size=None):
    """The different chains of a network, in order: of "modelnew", or of a model of timm or torchvision by its name there."""
    size, models = models_of(name, size)
    found = []
    for model in models:
        model, x = model.eval().requires_grad_(False), torch.zeros(2, 3, size, size)
        with torch.no_grad():
            model(x)  # folds, which is no part of a forward pass
            with ChainRecorder() as recorder:
                model(x)
        found += recorder.calls
    return list(dict.fromkeys(found))


def save(path, networks):
    """{name: chains} as JSON."""
    def plain(operand):
        return {"shape": operand.shape, "order": operand.order}

    content = {name: [{"x": plain(c.x), "weights": list(map(plain, c.weights)), "program": c.program} for c in found] for name, found in networks.items()}
    Path(path).write_text(json.dumps(content) + "\n")


def load(path):
    def operand(value):
        return Operand(tuple(value["shape"]), tuple(value["order"]))

    content = json.loads(Path(path).read_text())
    return {name: [Chain(operand(c["x"]), tuple(map(operand, c["weights"])), tuple(c["program"])) for c in found] for name, found in content.items()}
