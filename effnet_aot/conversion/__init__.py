"""From a stock nn.Module in eval mode to an inference module on this package's ops.

    trace       torch.export, and the graph tidied: no writes in place, no identities, constants evaluated
    vocabulary  what one node means: a convolution, an activation, a global average, ... in any of ATen's spellings
    matching    chains of nodes -> layers: pad, convolution, batch norm, residual, activation, pool
    layers      the modules that the layers become
    chains      layers in a row -> one call of the op `network`
    account     what became of every node: the report

Nothing here knows a library or a model by name: only the graph is read.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .account import account
from .chains import chain, segments
from .matching import Match, match
from .report import ConversionError, Report
from .trace import Trace, trace

__all__ = ["ConversionError", "Converted", "Report", "convert", "explain"]

aten = torch.ops.aten


class Converted(nn.Module):
    """What convert() returns: `network`, a graph of this package's layers, each named after the module of its convolution
    ("features.1.conv" becomes features_1_conv). Those in a row are one call, a Chain with their weights as parameters.

    Weights are frozen (requires_grad is False) and batch norm is part of them, so .train() changes nothing. Images have the
    height and width of the example; the batch is free.
    """

    def __init__(self, network: fx.GraphModule, report: Report, size: Sequence[int]):
        super().__init__()
        self.network = network
        self.report = report
        self.size = tuple(size)
        self._complete = report.complete

    def forward(self, x: Tensor):
        if tuple(x.shape[2:]) != self.size:
            expected = " x ".join(map(str, self.size))
            raise RuntimeError(
                f"this network was converted for images (N, C, H, W) of {expected} pixels, got {tuple(x.shape)}: "
                "convert the model again with an example of that size"
            )
        if not self._complete or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.network(x)
        with torch._C._AutoDispatchBelowAutograd():  # past the ops' autograd kernels, which are Python: 12 us a call
            return self.network(x)


def convert(model: nn.Module, example_input: Tensor, *, partial: bool = False) -> nn.Module:
    """An inference module that computes what `model` does in eval mode, on this package's ops.

    model:          any nn.Module of images that torch.export can trace; it is not changed, and shares no memory with the result.
    example_input:  (N, C, H, W) with the model's dtype and device. The result takes any N, but this H and W: padding may
                    have been computed from them.
    partial:        what does not map runs through ATen, and `result.report.share` says how much of the work does map.
                    Otherwise such a model is a ConversionError, which lists each node that does not map and why.

    The result is an nn.Module with `report` (see explain): .to, .half, state_dict, deepcopy, pickle, torch.compile and
    torch.export work on it. Weights have the model's dtype and biases float32; maps are channels_last inside. For half precision
    call .half() on the result, so that the folded weights are rounded once.
    """
    network, found = _convert(model, example_input)
    if not found.complete and not partial:
        raise ConversionError(found)
    return Converted(network, found, example_input.shape[2:]).eval()


def explain(model: nn.Module, example_input: Tensor) -> Report:
    """Prints what convert() would make of each node of `model` as a table, and returns it."""
    _, found = _convert(model, example_input)
    found.print()
    return found


def _convert(model, example_input):
    with torch.inference_mode(False), torch.no_grad():
        traced = trace(model, example_input)
        matches, reasons = match(traced)
        network, rest = build(traced, matches, type(model).__name__)
    return network, account(traced, matches, rest, reasons)


def build(traced: Trace, matches: list[Match], name: str) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The network, and the nodes of the original graph that it kept as they are."""
    runs = segments(matches)
    last = {segment.out: segment for segment in runs}
    absorbed = {node for m in matches for node in m.chain}
    absorbed |= {node for segment in runs for m in segment.matches if m.x is not segment.x for node in m.padding}
    graph, root, new, origin = fx.Graph(), nn.Module(), {}, {}

    def lookup(node: fx.Node) -> fx.Node:
        if node not in new:  # a parameter, at its first use
            name = node.name if node.op != "call_function" else f"constant_{node.name}"  # the node of x.to(...) is named "to"
            setattr(root, name, own(traced.constants[node]) if node in traced.constants else getattr(traced.module, node.target))
            new[node] = graph.get_attr(name)
        return new[node]

    for node in traced.graph.nodes:
        if node is traced.image:
            new[node] = graph.placeholder("x")
            if matches and not all(m.op == "conv" for m in matches if m.x is node):
                new[node] = graph.call_function(aten.contiguous.default, (new[node],), {"memory_format": torch.channels_last})
        elif node in last:
            segment = last[node]
            if len(segment.matches) > 1:
                name = unused("chain", {m.name for m in matches}, root)
                setattr(root, name, chain(segment))
                out = graph.call_module(name, (lookup(segment.x),))
            else:
                (m,) = segment.matches
                setattr(root, m.name, m.layer)
                out = graph.call_module(m.name, tuple(lookup(n) for n in (m.x, m.residual) if n is not None))
            if segment.returns_pixels:
                out = graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.unsqueeze.default, (out, -1)), -1))
            new[node] = out
        elif node.op == "output":
            graph.output(fx.map_arg(traced.outputs, lookup))
        elif node.op == "call_function" and node not in absorbed and node not in traced.constants:
            new[node] = graph.node_copy(node, lookup)
            new[node].meta = {}
            if node.target in (aten.view.default, aten._unsafe_view.default):
                new[node].target = aten.reshape.default  # a view of what was NCHW; here it is channels_last
            origin[new[node]] = node
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # layers have no side effects
    graph.lint()
    network = fx.GraphModule(root, graph, class_name=name)
    return network, [origin[node] for node in graph.nodes if node in origin]


def unused(stem: str, taken: set[str], root: nn.Module) -> str:
    names = (stem if count == 1 else f"{stem}_{count}" for count in itertools.count(1))
    return next(name for name in names if name not in taken and not hasattr(root, name))


def own(t: Tensor) -> Tensor:
    """A copy, frozen."""
    return nn.Parameter(t.clone(), requires_grad=False) if t.is_floating_point() else nn.Buffer(t.clone())

