"""Layers that follow one another become one call: a program whose steps are the layers, and MBConv blocks where three of them
are one, the stem included where a block without expand follows it.

    expand (1x1, activation) -> depthwise (the same activation) -> project (1x1, none) [+ residual]  =  mbconv
                                depthwise (activation) -> project (1x1, none) [+ residual]           =  mbconv without expand
    conv                     -> depthwise (activation) -> project (1x1, none)                        =  stem_mbconv
"""

from dataclasses import dataclass

from torch import fx

from ..ops import Program
from .layers import Chain
from .matching import Match
from .vocabulary import value


@dataclass
class Segment:
    """Matches in a row that read nothing but one input and each other, and of which only the last is read elsewhere."""

    matches: list[Match]

    @property
    def x(self) -> fx.Node:
        return self.matches[0].x

    @property
    def out(self) -> fx.Node:
        return self.matches[-1].chain[-1]

    @property
    def returns_pixels(self) -> bool:
        """Whether a pooled (N, C) result stands for (N, C, 1, 1)."""
        last = self.matches[-1]
        return last.op == "pointwise_pool" and value(last.chain[-1]).dim() == 4


def segments(matches: list[Match]) -> list[Segment]:
    """All matches in order, in runs as long as they can be."""
    found, first = [], 0
    while first < len(matches):
        results, best = {matches[first].x}, first + 1
        for end in range(first + 1, len(matches) + 1):
            m = matches[end - 1]
            if not {m.x, m.residual or m.x} <= results:
                break  # a second input, which only a layer of its own has
            results.add(m.chain[-1])
            inside = matches[first:end]
            if all(read_only_by(inner.chain[-1], inside) for inner in inside[:-1]):
                best = end
            if Segment([m]).returns_pixels:
                break
        found.append(Segment(matches[first:best]))
        first = best
    return found


def read_only_by(node: fx.Node, readers: list[Match]) -> bool:
    chains = {n for m in readers for n in m.chain}
    padding = {n for m in readers for n in m.padding}
    return all(user in chains or (user in padding and read_only_by(user, readers)) for user in node.users)


def chain(segment: Segment) -> Chain:
    """The layers of a segment as one."""
    program, weights, numbers = Program(), {}, {segment.x: 0}
    matches = list(segment.matches)
    while matches:
        kind, steps = next_step(matches)
        matches = matches[len(steps) :]
        last, fields = steps[-1], {}
        for m in steps:
            prefix = "" if kind == m.op else field_prefix(m, steps)
            for name, tensor in m.layer.fields().items():
                if name in ("weight", "bias"):
                    fields[prefix + name] = len(weights)
                    weights[f"{m.name}_{name}"] = tensor.detach()
                elif name == "memory_format" or prefix in ("", "depthwise_"):
                    fields[name] = tensor
                elif prefix == "stem_":
                    fields[prefix + name] = tensor
        if last.residual is not None:
            fields["residual"] = numbers[last.residual]
        numbers[last.chain[-1]] = program.add(kind, numbers[steps[0].x], **fields)
    return Chain(program, weights)


def next_step(matches: list[Match]) -> tuple[str, list[Match]]:
    """The kind of the program's next step, and the matches at the start of the list that it stands for."""
    for kind, ops in (("stem_mbconv", ["conv", "depthwise", "pointwise"]), ("mbconv", ["pointwise", "depthwise", "pointwise"]), ("mbconv", ["depthwise", "pointwise"])):
        steps = matches[: len(ops)]
        if [m.op for m in steps] != ops:
            continue
        block = steps[1:] if kind == "stem_mbconv" else steps
        if is_block(block) and (block is steps or (feeds(steps[0], block[0]) and steps[0].residual is None and block[-1].residual is None)):
            return kind, steps
    return matches[0].op, matches[:1]


def feeds(a: Match, b: Match) -> bool:
    """Whether a's result is what b convolves, and nothing else reads it."""
    return b.x is a.chain[-1] and b.residual is not a.chain[-1] and read_only_by(a.chain[-1], [b])


def is_block(block: list[Match]) -> bool:
    *hidden, project = block
    connected = all(feeds(a, b) for a, b in zip(block, block[1:]))
    one_activation = len({m.layer.activation for m in hidden}) == 1 and project.layer.activation == "none"
    bias_dtypes = {m.layer.bias.dtype for m in block if m.layer.bias is not None}
    return connected and one_activation and all(m.residual is None for m in hidden) and len(bias_dtypes) <= 1


def field_prefix(m: Match, steps: list[Match]) -> str:
    return {"conv": "stem_", "depthwise": "depthwise_"}.get(m.op) or ("project_" if m is steps[-1] else "expand_")
