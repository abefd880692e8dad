"""A whole network in one op: a program of steps over a list of weights. csrc/program.h describes the flat encoding."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .gradients import convolution_backward, linear_backward, mbconv_backward, pool_backward, stem_mbconv_backward
from .registration import call, register
from .rules import (
    ACTIVATIONS, Convolution, Mbconv, StemMbconv, check_conv, check_depthwise, check_linear, check_mbconv, check_pointwise, check_stem_mbconv, check_window,
    empty_image, fail,
)  # fmt: skip

FORMATS = {-1: None, 0: torch.contiguous_format, 1: torch.channels_last}
WINDOW = ("activation", "stride", "padding")
BLOCK = tuple(f"{step}_{part}" for step in ("expand", "depthwise", "project") for part in ("weight", "bias"))
# The fields of every kind of step, in the order of the encoding, which gives the kinds their numbers, too.
FIELDS = {
    "conv": ("input", "weight", "bias", *WINDOW, "memory_format"),
    "pointwise": ("input", "residual", "weight", "bias", "activation"),
    "depthwise": ("input", "weight", "bias", *WINDOW),
    "mbconv": ("input", "residual", *BLOCK, *WINDOW),
    "pointwise_pool": ("input", "weight", "bias", "activation"),
    "linear": ("input", "weight", "bias"),
    "stem_mbconv": ("input", "stem_weight", "stem_bias", *BLOCK[2:], *(f"stem_{name}" for name in WINDOW), *WINDOW, "memory_format"),
}
KINDS = tuple(FIELDS)
WIDTH = {"stride": 2, "padding": 4, "stem_stride": 2, "stem_padding": 4}  # numbers that a field takes, where it is not one
OPTIONAL_WEIGHTS = ("bias", "stem_bias", "expand_weight", "expand_bias", "depthwise_bias", "project_bias")


def network(x: Tensor, weights: Sequence[Tensor], program: Sequence[int]) -> Tensor:
    """The result of the last step of a program, in one call: on CUDA with one allocation besides the result.

    x: what the first steps take, (N, C, H, W) or (rows, features). weights: what the program's indices name, each as the
    op of its step takes it. program: the numbers of a Program. Wrong arguments raise RuntimeError "effnet::network: step
    <number> (<kind>): <what was expected>, got <what came>". Dtypes and layouts: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.network, x, weights, program)


@dataclass(frozen=True)
class Step:
    """One step of a program. `fields` maps the names of FIELDS[kind] to: numbers of results (0 is x) for input and residual,
    indices of weights, a name for activation, tuples for stride and padding, a torch.memory_format; None where there is
    none."""

    kind: str
    fields: dict

    def numbers(self) -> list[int]:
        return [n for name in FIELDS[self.kind] for n in encoded(name, self.fields[name])]

    def weights(self) -> dict[str, int]:
        """{field: index} of the weights that the step takes."""
        return {name: index for name, index in self.fields.items() if name.endswith(("weight", "bias")) and index is not None}

    def __str__(self):
        def text(name, value):
            if name in ("input", "residual"):
                return "x" if value == 0 else f"#{value}"
            return f"w{value}" if name.endswith(("weight", "bias")) else str(value).removeprefix("torch.")

        first, *others = ((name, text(name, value)) for name, value in self.fields.items() if value is not None)
        return f"{self.kind}({', '.join([first[1], *(f'{name}={value}' for name, value in others)])})"


def encoded(name: str, value) -> list[int]:
    if name.endswith("activation"):
        return [ACTIVATIONS.index(value)]
    if name == "memory_format":
        return [next(number for number, memory_format in FORMATS.items() if memory_format == value)]
    if name in WIDTH:
        return list(value)
    return [-1 if value is None else value]


class Program:
    """Builds and shows what the op `network` runs.

        program = Program()
        y = program.add("conv", weight=0, bias=1, activation="relu", stride=(2, 2), padding=(1, 1, 1, 1))
        y = program.add("pointwise_pool", y, weight=2)
        effnet_aot.ops.network(x, [stem_weight, stem_bias, head_weight], program.numbers)
    """

    def __init__(self, steps: Sequence[Step] = ()):
        self.steps = list(steps)

    def add(self, kind: str, input: int = 0, **fields) -> int:
        """Appends a step and returns the number of its result. Fields left out are none, "none", 1 (stride) or 0 (padding)."""
        unknown = fields.keys() - set(FIELDS[kind])
        if unknown:
            raise TypeError(f"a {kind} step takes {', '.join(FIELDS[kind])}, got {', '.join(sorted(unknown))}")
        defaults = {"activation": "none", "stride": (1, 1), "padding": (0, 0, 0, 0)}
        defaults |= {f"stem_{name}": value for name, value in defaults.items()}
        given = {"input": input} | fields
        self.steps.append(Step(kind, {name: given.get(name, defaults.get(name)) for name in FIELDS[kind]}))
        return len(self.steps)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The flat encoding."""
        return tuple(n for step in self.steps for n in (KINDS.index(step.kind), *step.numbers()))

    @classmethod
    def parse(cls, numbers: Sequence[int], weights: int) -> "Program":
        """The program that `numbers` encode, for so many weights; RuntimeError where they encode none."""
        return cls(_parse(tuple(numbers), weights))

    def __str__(self):
        return "\n".join(f"#{number} = {step}" for number, step in enumerate(self.steps, 1))

    def __repr__(self):
        return f"<Program of {len(self.steps)} steps>\n{self}"


class Network(Program):
    """A program and the weights that it names: add() takes tensors in the fields of weights."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def add(self, kind: str, input: int = 0, **fields) -> int:
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = len(self.weights)
                self.weights.append(value)
        return super().add(kind, input, **fields)


@lru_cache(maxsize=64)
def _parse(numbers: tuple[int, ...], weights: int) -> tuple[Step, ...]:
    """The same checks and words as csrc/program.cpp."""
    if not numbers:
        fail("network", "program must have at least one step", "none")
    at, steps = 0, []

    def take(op: str, field: str, least: int | None = None, most: int | None = None, meaning: str = "") -> int:
        nonlocal at
        if at == len(numbers):
            fail(op, f"program must go on with its {field}", f"an end after {at} numbers")
        n = numbers[at]
        at += 1
        if least is not None and not least <= n <= most:
            fail(op, f"{field} must be {meaning}", n)
        return n

    while at < len(numbers):
        name = f"network: step {len(steps) + 1}"
        kind = KINDS[take(name, "kind", 0, len(KINDS) - 1, f"from 0 ({KINDS[0]}) to {len(KINDS) - 1} ({KINDS[-1]})")]
        op, fields = f"{name} ({kind})", {}
        for field in FIELDS[kind]:
            optional = field in OPTIONAL_WEIGHTS or field == "residual"
            if field in ("input", "residual"):
                n = take(op, field, -1 if optional else 0, len(steps), ("-1 (none), " if optional else "") + "0 (x) or the number of an earlier step")
                fields[field] = None if n < 0 else n
            elif field.endswith(("weight", "bias")):
                n = take(op, field, -1 if optional else 0, weights - 1, ("-1 (none) or " if optional else "") + f"an index into the {weights} weights")
                fields[field] = None if n < 0 else n
            elif field.endswith("activation"):
                fields[field] = ACTIVATIONS[take(op, field, 0, 2, "0 (none), 1 (relu) or 2 (relu6)")]
            elif field == "memory_format":
                fields[field] = FORMATS[take(op, field, -1, 1, "-1 (its input's), 0 (contiguous_format) or 1 (channels_last)")]
            else:
                fields[field] = tuple(take(op, field) for _ in range(WIDTH[field]))
                if field.endswith("padding"):
                    prefix = field.removesuffix("padding")
                    check_window(op, fields[f"{prefix}stride"], fields[field], prefix)
        steps.append(Step(kind, fields))
    return tuple(steps)


class Call(NamedTuple):
    """A step with its tensors: a Convolution, an Mbconv, a StemMbconv or, of a linear step, (x, weight, bias)."""

    number: int
    step: Step
    arguments: Convolution | Mbconv | StemMbconv | tuple[Tensor, Tensor, Tensor | None]

    @property
    def op(self) -> str:
        return f"network: step {self.number} ({self.step.kind})"

    def check(self) -> Tensor:
        """The step's result as an uninitialised tensor."""
        kind, c = self.step.kind, self.arguments
        if kind == "linear":
            rows, columns = check_linear(self.op, *c)
            return c[0].new_empty_strided((rows, columns), (columns, 1))
        if kind in ("mbconv", "stem_mbconv"):
            project = check_mbconv(c) if kind == "mbconv" else check_stem_mbconv(c)
            return empty_image(project, check_pointwise(project))
        if kind == "pointwise_pool":
            rows, columns, *_ = check_pointwise(c, pooled=True)
            return c.x.new_empty_strided((rows, columns), (columns, 1))
        return empty_image(c, {"conv": check_conv, "depthwise": check_depthwise, "pointwise": check_pointwise}[kind](c))

    def run(self) -> Tensor:
        """The step's result from its own op."""
        ops, kind, c = torch.ops.effnet, self.step.kind, self.arguments
        if kind == "linear":
            return ops.linear(*c)
        if kind == "mbconv":
            return ops.mbconv(*c[1:9], c.stride, c.padding, c.activation)
        if kind == "stem_mbconv":
            return ops.stem_mbconv(*c[1:])
        if kind == "pointwise":
            return ops.pointwise(c.x, c.weight, c.bias, c.residual, c.activation)
        if kind == "pointwise_pool":
            return ops.pointwise_pool(c.x, c.weight, c.bias, c.activation)
        if kind == "depthwise":
            return ops.depthwise(c.x, c.weight, c.bias, c.stride, c.padding, c.activation)
        return ops.conv(c.x, c.weight, c.bias, c.stride, c.padding, c.activation, c.memory_format)

    def backward(self, grad: Tensor, out: Tensor, wanted: set[str]) -> dict[str, Tensor]:
        """Gradients of the fields in `wanted`, of which "input" is x."""
        kind, c = self.step.kind, self.arguments
        wanted = {"x" if name == "input" else name for name in wanted}
        if kind == "linear":
            found = linear_backward(*c, grad, wanted)
        elif kind == "mbconv":
            found = mbconv_backward(c, grad, wanted)
        elif kind == "stem_mbconv":
            found = stem_mbconv_backward(c, grad, wanted)
        else:
            if kind == "pointwise_pool":
                out = None if c.activation == "none" else torch.ops.effnet.pointwise(c.x, c.weight, c.bias, None, c.activation)
                grad = pool_backward(grad, *c.x.shape[2:])
            found = convolution_backward(c, grad, None if c.activation == "none" else out, wanted)
        return {"input" if name == "x" else name: value for name, value in found.items()}


def evaluate(x: Tensor, weights: Sequence[Tensor], program: Sequence[int], evaluate_step: Callable[[Call], Tensor]) -> tuple[list[Call], list[Tensor]]:
    """Every step's call, and all results, x the first."""
    values, calls = [x], []
    for number, step in enumerate(_parse(tuple(program), len(weights)), 1):
        op = f"network: step {number} ({step.kind})"
        fields = {name: None if value is None else values[value] for name, value in step.fields.items() if name in ("input", "residual")}
        fields |= {name: weights[index] for name, index in step.weights().items()}
        options = {name: value for name, value in step.fields.items() if name.removeprefix("stem_") in (*WINDOW, "memory_format")}
        tensors = {name: fields.get(name) for name in FIELDS[step.kind] if name not in options}
        image = tensors.pop("input")
        if step.kind == "linear":
            arguments = (image, tensors["weight"], tensors["bias"])
        else:
            arguments = {"mbconv": Mbconv, "stem_mbconv": StemMbconv}.get(step.kind, Convolution)(op=op, x=image, **tensors, **options)
        calls.append(Call(number, step, arguments))
        values.append(evaluate_step(calls[-1]))
    return calls, values


def hold(owner: object, weights: Sequence[Tensor], program: Sequence[int]) -> int:
    """The number by which torch.ops.effnet._held_network knows these weights and program, for as long as their owner lives."""
    number = torch.ops.effnet._hold_network(weights, program)
    weakref.finalize(owner, torch.ops.effnet._release_network, number)
    return number


def decomposed(x: Tensor, weights: Sequence[Tensor], program: Sequence[int]) -> Tensor:
    """The same by the ops of the single steps."""
    return evaluate(x, weights, program, Call.run)[1][-1]


def _fake(x, weights, program):
    return evaluate(x, weights, program, Call.check)[1][-1]


def _setup_context(ctx, inputs, output):
    x, weights, program = inputs
    ctx.save_for_backward(x, *weights)
    ctx.program = tuple(program)


def _backward(ctx, grad, wanted):
    """The results of the steps are not kept: they are computed again."""
    x, *weights = ctx.saved_tensors
    wanted_weights = ctx.needs_input_grad[1] if "weights" in wanted else [False] * len(weights)
    calls, values = evaluate(x, weights, ctx.program, Call.run)

    needed = ["x" in wanted]  # of each result, whether it depends on something that wants a gradient
    for call_ in calls:
        fields = call_.step.fields
        inputs = [fields[name] for name in ("input", "residual") if fields.get(name) is not None]
        needed.append(any(needed[n] for n in inputs) or any(wanted_weights[n] for n in call_.step.weights().values()))

    grads: list = [None] * len(values)
    weight_grads: list = [None] * len(weights)
    grads[-1] = grad

    def accumulate(into, index, value):
        into[index] = value if into[index] is None else into[index] + value

    for call_ in reversed(calls):
        if grads[call_.number] is None or not needed[call_.number]:
            continue
        fields, own = call_.step.fields, call_.step.weights()
        wanted_fields = {name for name in ("input", "residual") if fields.get(name) is not None and needed[fields[name]]}
        wanted_fields |= {name for name, index in own.items() if wanted_weights[index]}
        found = call_.backward(grads[call_.number], values[call_.number], wanted_fields)
        for name in wanted_fields:
            accumulate(*((weight_grads, own[name]) if name in own else (grads, fields[name])), found[name])
        grads[call_.number] = None
    zeros = [torch.zeros_like(w) if wants and g is None else g for w, g, wants in zip(weights, weight_grads, wanted_weights)]
    return {"x": torch.zeros_like(x) if grads[0] is None else grads[0], "weights": zeros}


register("network", fake=_fake, setup_context=_setup_context, backward=_backward)
