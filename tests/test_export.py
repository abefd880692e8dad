"""Tracing: fake kernels tell the truth, and opcheck, torch.compile and torch.export get eager's results."""

import pytest
import torch
from op_cases import CASES, IMAGE_LAYOUTS, MATRIX_LAYOUTS, OPS, SMALL, Case
from torch._subclasses.fake_tensor import FakeTensorMode

import effnet_aot

ONE_OF_EACH = [next(case for case in SMALL if case.op == op) for op in OPS]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def layouts_of(case: Case) -> list[str]:
    return MATRIX_LAYOUTS if case.is_linear else IMAGE_LAYOUTS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_kernels_give_the_real_strides(case, device):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in layouts_of(case):
            args = case.arguments(dtype, device, layout)
            real = case.call(args)
            with FakeTensorMode() as mode:
                fake = case.call({name: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for name, a in args.items()})
            assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_opcheck(case, layout, device, dtype):
    if case.is_linear and layout == "channels_last":
        pytest.skip("a matrix has no channels_last")
    args = case.arguments(dtype, device, layout)
    args = {name: a.requires_grad_(a.dtype == dtype) if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    torch.library.opcheck(getattr(torch.ops.effnet, case.op).default, (), args)


class Calls(torch.nn.Module):
    """Every op once, on one image or one matrix."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.calls, self.tensors = [], torch.nn.ParameterDict()
        for case in ONE_OF_EACH:
            op, args = case.op, case.arguments(dtype, device)
            self.calls.append((op, case.is_linear, {name: a for name, a in args.items() if not isinstance(a, torch.Tensor)}))
            self.tensors[op] = torch.nn.ParameterDict(
                {name: a.to(dtype) for name, a in args.items() if isinstance(a, torch.Tensor) and name not in ("x", "residual")}
            )

    def forward(self, image, matrix):
        return tuple(
            getattr(effnet_aot.ops, op)(matrix if is_linear else image, **dict(self.tensors[op].items()), **options)
            for op, is_linear, options in self.calls
        )

    def inputs(self, batch, dtype=torch.float32, device="cpu", layout="contiguous"):
        generator = torch.Generator().manual_seed(batch)
        image = torch.randn(batch, 3, 5, 6, generator=generator).to(device, dtype)
        if layout == "channels_last":
            image = image.contiguous(memory_format=torch.channels_last)
        return image, torch.randn(batch, 4, generator=generator).to(device, dtype)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(layout, device, dtype):
    module = Calls(dtype, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = module.inputs(batch, dtype, device, layout)
        for i in inputs:
            torch._dynamo.mark_dynamic(i, 0)
        with torch.no_grad(), torch.compiler.set_stance("default" if batch == 2 else "fail_on_recompile"):
            assert_same(compiled(*inputs), module(*inputs))


def gradients(function, module, inputs):
    inputs = [i.detach().clone().requires_grad_() for i in inputs]
    sum(y.square().sum() for y in function(*inputs)).backward()
    grads = [p.grad for p in (*inputs, *module.parameters())]
    module.zero_grad()
    return grads


def test_compile_with_gradients(device):
    module = Calls(device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = module.inputs(2, device=device)
    for actual, expected in zip(gradients(compiled, module, inputs), gradients(module, module, inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor(layout, device):
    module = Calls(device=device)
    compiled = torch.compile(module, fullgraph=True)
    inputs = module.inputs(2, device=device, layout=layout)
    with torch.no_grad():
        assert_same(compiled(*inputs), module(*inputs))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_export_with_a_dynamic_batch(layout, strict, device):
    module = Calls(device=device).eval()
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(module, module.inputs(2, device=device, layout=layout), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("effnet.")}
    assert called == set(OPS)
    for size in (1, 2, 5):
        inputs = module.inputs(size, device=device, layout=layout)
        with torch.no_grad():
            assert_same(program.module()(*inputs), module(*inputs))


def test_export_with_dynamic_height_and_width():
    class Block(torch.nn.Module):
        def forward(self, x, expand, depth, project):
            y = effnet_aot.ops.pointwise(x, expand, None, None, "relu6")
            y = effnet_aot.ops.depthwise(y, depth, None, 2, (0, 1, 0, 1), "relu6")
            return effnet_aot.ops.pointwise_pool(y, project)

    weights = torch.randn(8, 3), torch.randn(8, 1, 3, 3), torch.randn(4, 8)
    auto = torch.export.Dim.DYNAMIC
    program = torch.export.export(Block(), (torch.randn(2, 3, 8, 9), *weights), dynamic_shapes=({0: auto, 2: auto, 3: auto}, None, None, None))
    for shape in ((2, 3, 8, 9), (3, 3, 12, 7)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x, *weights), Block()(x, *weights))


def test_compile_under_autocast(device):
    module = Calls(device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = module.inputs(2, device=device)
    with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
        assert_same(compiled(*inputs), module(*inputs))
