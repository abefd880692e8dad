"""Layers that follow one another become one call: a program whose steps are the layers, and MBConv blocks where three of them
are one.

    expand (1x1, activation) -> depthwise (the same activation) -> project (1x1, none) [+ residual]  =  mbconv
                                depthwise (activation) -> project (1x1, none) [+ residual]           =  mbconv without expand
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
        block = block_at(matches)
        steps, matches = (block, matches[len(block) :]) if block else (matches[:1], matches[1:])
        last, fields = steps[-1], {}
        for m in steps:
            prefix = block_prefix(m, steps) if block else ""
            for name, tensor in m.layer.fields().items():
                if name in ("weight", "bias"):
                    fields[prefix + name] = len(weights)
                    weights[f"{m.name}_{name}"] = tensor.detach()
                elif not block or m.op == "depthwise":
                    fields[name] = tensor
        if last.residual is not None:
            fields["residual"] = numbers[last.residual]
        numbers[last.chain[-1]] = program.add("mbconv" if block else last.op, numbers[steps[0].x], **fields)
    return Chain(program, weights)


def block_at(matches: list[Match]) -> list[Match]:
    """The matches at the start of the list that are an MBConv block: two, three or none."""
    for count, ops in ((3, ["pointwise", "depthwise", "pointwise"]), (2, ["depthwise", "pointwise"])):
        block = matches[:count]
        if [m.op for m in block] == ops and is_block(block):
            return block
    return []


def is_block(block: list[Match]) -> bool:
    *hidden, project = block
    connected = all(b.x is a.chain[-1] and b.residual is not a.chain[-1] and read_only_by(a.chain[-1], [b]) for a, b in zip(block, block[1:]))
    one_activation = len({m.layer.activation for m in hidden}) == 1 and project.layer.activation == "none"
    bias_dtypes = {m.layer.bias.dtype for m in block if m.layer.bias is not None}
    return connected and one_activation and all(m.residual is None for m in hidden) and len(bias_dtypes) <= 1


def block_prefix(m: Match, block: list[Match]) -> str:
    return "depthwise_" if m.op == "depthwise" else "project_" if m is block[-1] else "expand_"
