"""The report: what became of every node, and how much work it is."""

from operator import itemgetter

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .matching import Match, module_stack
from .report import Report, Row
from .trace import Trace
from .vocabulary import reshape, size, value


def account(traced: Trace, matches: list[Match], rest: list[fx.Node], reasons: dict[fx.Node, str]) -> Report:
    """`matches` became layers, the nodes of `rest` are as they were."""
    order = {node: i for i, node in enumerate(traced.order)}
    rows = []

    def add(op, nodes, x, out, multiply_adds, reason="", at=None):
        path, kind = module_stack(at or nodes[0])
        shapes = tuple(shape(value(n)) for n in (x, out))
        row = Row(op, path, kind, tuple(n.name for n in nodes), tuple(map(target, nodes)), shapes, multiply_adds, reason)
        rows.append((order[nodes[0]], row))

    for m in matches:
        add(m.op, m.nodes, m.x, m.chain[-1], m.multiply_adds, at=m.chain[0])
    for node in traced.dropped:
        add("identity", [node], node, node, 0)
    for node in rest:
        if isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            continue  # arithmetic on sizes
        x = next((n for n in node.all_input_nodes if n not in traced.constants), node)
        if reshape(node):
            add("reshape", [node], x, node, 0)
        else:
            add("aten", [node], x, node, multiply_adds(node, traced), reasons[node])
    return Report(traced.name, tuple(row for _, row in sorted(rows, key=itemgetter(0))))


def target(node: fx.Node) -> str:
    name = getattr(node.target, "_schema", None)
    return name.name.removeprefix("aten::") if name else getattr(node.target, "__name__", str(node.target))


def shape(t) -> str:
    if not isinstance(t, Tensor):
        return ""
    return " x ".join(str(s) if isinstance(s, int) else "N" if s.node.expr.is_symbol else str(s) for s in t.shape)


def multiply_adds(node: fx.Node, traced: Trace) -> int | None:
    """For one image, as torch counts floating-point operations; None where it cannot."""

    def example(n):
        if n.op == "get_attr":
            return getattr(traced.module, n.target)
        return tree_map(lambda v: on_meta(v) if isinstance(v, Tensor) else v if isinstance(v, bool) else size(v), value(n))

    try:
        args, kwargs = tree_map_only(fx.Node, example, (node.args, dict(node.kwargs)))
        with FlopCounterMode(display=False) as counter:
            node.target(*args, **kwargs)
        return counter.get_total_flops() // 2 // traced.batch
    except Exception:  # what an operator may raise that has no meta kernel, or gets tensors of two devices, is open-ended
        return None


def on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided([*map(size, t.shape)], [*map(size, t.stride())], dtype=t.dtype, device="meta")
