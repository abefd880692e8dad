"""torch.export, and its graph made easy to read: pure functions of the image, with all that depends on parameters only
already evaluated."""

import contextlib
import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from ..ops.expand_depthwise import decomposed as decomposed_expand_depthwise
from ..ops.mbconv import decomposed as decomposed_mbconv
from ..ops.network import decomposed as decomposed_network
from ..ops.stem_mbconv import decomposed as decomposed_stem_mbconv
from . import vocabulary
from .report import ConversionError


# This package's ops that are several layers, as those.
WHOLE = {
    torch.ops.effnet.network.default: decomposed_network,
    torch.ops.effnet.stem_mbconv.default: decomposed_stem_mbconv,
    torch.ops.effnet.mbconv.default: decomposed_mbconv,
    torch.ops.effnet.expand_depthwise.default: decomposed_expand_depthwise,
}


@dataclass
class Trace:
    name: str  # of the model's class
    graph: fx.Graph
    module: nn.Module  # owns what the graph's get_attr nodes name
    image: fx.Node
    outputs: object  # nodes in the structure that the model returns
    constants: dict[fx.Node, Tensor]  # value of every node that does not depend on the image
    batch: int  # of the example; symbolic in the graph
    order: list[fx.Node]  # all nodes
    dropped: list[fx.Node] = field(default_factory=list)  # identities: dropout, contiguous, ...


def trace(model: nn.Module, example_input: Tensor) -> Trace:
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        got = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ConversionError(f"example_input must be a tensor (N, C, H, W), got {got}")
    if model.training and not isinstance(model, fx.GraphModule):  # an exported program's module has no modes; its graph tells
        raise ConversionError(f"{type(model).__name__} is in training mode: only what it does in eval mode can be converted, call model.eval() first")
    batch = max(2, example_input.shape[0])  # torch.export takes sizes 0 and 1 as fixed
    program = export(model, example_input.new_zeros(batch, *example_input.shape[1:]))
    whole = {op: function for op, function in WHOLE.items() if any(node.target is op for node in program.graph.nodes)}
    if whole:
        program = program.run_decompositions(whole)
    if writes_through_aliases(program.graph):
        program = program.run_decompositions({})  # pure functions; takes three times as long as the export
    check_function(program)

    graph, signature = program.graph, program.graph_signature
    values = {**program.state_dict, **program.constants}
    nodes = {node.name: node for node in graph.nodes}
    inputs = {nodes[spec.arg.name]: spec for spec in signature.input_specs if spec.arg.name in nodes}
    image = next(node for node, spec in inputs.items() if spec.kind == InputKind.USER_INPUT)
    stored = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    constants = {node: values[spec.target].detach() for node, spec in inputs.items() if spec.kind in stored}
    results = [spec.arg for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    results = [nodes[arg.name] if arg.name in nodes else arg.value for arg in results]

    remove_writes(graph)
    join_batch_norms(graph)
    evaluate_constants(graph, constants)
    traced = Trace(type(model).__name__, graph, program.graph_module, image, None, constants, batch, list(graph.nodes))
    replaced = remove_identities(traced)
    traced.outputs = pytree.tree_unflatten([replaced.get(node, node) for node in results], program.call_spec.out_spec)
    graph.eliminate_dead_code()
    return traced


def export(model, example_input):
    program = exported(model, example_input)
    limits = batch_limits(program)
    if limits and example_input.device.type != "cpu":
        # A library among which ATen chooses at each call may have limits, such as the 65,535 images of cuDNN's batch norm;
        # they bound the choice, not the graph. The model's own are found on the CPU, too.
        with contextlib.suppress(ConversionError):
            limits = batch_limits(exported(copy.deepcopy(model).cpu(), example_input.cpu()))
    if limits:
        raise ConversionError(f"{type(model).__name__} computes something else for batches outside of {limits.lower} to {limits.upper}")
    return program


def exported(model, example_input):
    try:
        return torch.export.export(model, (example_input,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    except Exception as e:  # of many kinds, the model's own included
        raise ConversionError(f"torch.export cannot trace {type(model).__name__} with a dynamic batch: {e}") from e


def batch_limits(program):
    """The batches for which a graph was traced, where those are not all."""
    return next((bounds for bounds in program.range_constraints.values() if bounds.lower > 2 or bounds.upper < 2**31), None)


def check_function(program):
    """A model that writes to its own state, or looks at strides, is no function of its input's values."""
    nodes = {node.name: node for node in program.graph.nodes}
    signature = program.graph_signature
    state = {nodes[spec.arg.name]: spec.target for spec in signature.input_specs if spec.kind != InputKind.USER_INPUT and spec.arg.name in nodes}
    changed = [spec.target for spec in signature.output_specs if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)]
    changed += [state[node] for call in program.graph.nodes for node in written(call) if node in state]
    if any(node.target is torch.ops.aten.as_strided.default for node in program.graph.nodes):
        raise ConversionError("the model calls as_strided, whose result depends on the memory layout: converted networks have another")
    if changed:
        raise ConversionError(f"the model changes {', '.join(changed)} when it runs: is a part of it in training mode? Call model.eval() first")


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or vocabulary.identity(node) is not None:
        return []
    arguments = vocabulary.arguments(node)
    values = [arguments[a.name] for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for value in pytree.tree_leaves(values) if isinstance(value, fx.Node)]


def functional(target):
    """relu_ -> relu; None where there is no such thing."""
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if target.namespace == "aten" and name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def writes_through_aliases(graph: fx.Graph) -> bool:
    """Whether a tensor is changed in place that something else may see. (Later uses of the tensor itself refer to the
    call that changed it.)"""

    def is_alias(node):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return node.op == "call_function"  # getitem of who knows what
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in node.target._schema.returns)
        return views or vocabulary.identity(node) is not None

    return any(
        functional(node.target) is None or any(is_alias(t) or any(is_alias(user) for user in t.users if user is not node) for t in targets)
        for node in graph.nodes if (targets := written(node))
    )  # fmt: skip


def remove_writes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if written(node):
            node.target = functional(node.target)


def join_batch_norms(graph: fx.Graph) -> None:
    """The decomposed form returns a tuple, of which only the first item is used in eval mode."""
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        users = list(node.users)
        if node.target is not torch.ops.aten._native_batch_norm_legit_no_training.default or [u.args[1:] for u in users] != [(0,)]:
            continue
        *tensors, momentum, eps = node.args
        node.target, node.args = torch.ops.aten.batch_norm.default, (*tensors, False, momentum, eps, False)
        node.meta["val"] = users[0].meta["val"]
        users[0].replace_all_uses_with(node)
        graph.erase_node(users[0])


def evaluate_constants(graph: fx.Graph, constants: dict[fx.Node, Tensor]) -> None:
    """Weights that are computed (weight norm, standardised or transposed ones) become plain ones."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags or not all(n in constants for n in node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: constants[n])
        constants[node] = node.target(*args, **kwargs)


def remove_identities(traced: Trace) -> dict[fx.Node, fx.Node]:
    """Returns what took the place of each."""
    replaced = {}
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            traced.graph.erase_node(node)  # would hold .half() back
        elif node not in traced.constants and (source := vocabulary.identity(node)) is not None:
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
            replaced[node] = source
            traced.dropped.append(node)
    return replaced
