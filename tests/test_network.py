"""The op `network` against the single ops: numbers, gradients, tracing, errors, and what it launches on CUDA (a stub's)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import IMAGE_LAYOUTS, lay_out
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from effnet_aot import ops
from effnet_aot.ops import Network, Program
from effnet_aot.ops.network import KINDS, decomposed


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def weights_and_program(dtype=torch.float32, device="cpu", wide_vectors=True, activation="relu6"):
    """Every kind of step, a residual over several, a result that two steps read, and one that nobody reads."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape):
        fan_in = shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5).to(device, dtype)

    def bias(length):
        return torch.randn(length, generator=generator, dtype=torch.float64).to(device, torch.float32 if wide_vectors else dtype)

    n = Network()
    stem = n.add("conv", weight=weight(8, 3, 3, 3), bias=bias(8), activation=activation, stride=(2, 2), padding=(0, 1, 0, 1), memory_format=torch.channels_last)
    y = n.add("pointwise", stem, weight=weight(16, 8), bias=bias(16), activation=activation)
    y = n.add("depthwise", y, weight=ops.taps_first(weight(16, 1, 5, 5)), activation=activation, padding=(2, 2, 2, 2))
    y = n.add("pointwise", y, residual=stem, weight=weight(8, 16, 1, 1), bias=bias(8))
    n.add("pointwise", stem, weight=weight(4, 8))
    block = {"expand_weight": weight(24, 8), "expand_bias": bias(24), "depthwise_weight": weight(24, 1, 3, 3), "depthwise_bias": bias(24)}
    y = n.add("mbconv", y, residual=y, **block, project_weight=weight(8, 24), project_bias=bias(8), activation=activation, padding=(1, 1, 1, 1))
    block = {"depthwise_weight": ops.taps_first(weight(8, 1, 3, 3)), "project_weight": weight(12, 8)}
    y = n.add("mbconv", y, **block, activation=activation, stride=(2, 1), padding=(1, 1, 0, 1))
    block = {"depthwise_weight": ops.taps_first(weight(8, 1, 3, 3)), "depthwise_bias": bias(8), "project_weight": weight(12, 8), "project_bias": bias(12)}
    y = n.add("stem_mbconv", y, stem_weight=weight(8, 12, 3, 3), stem_bias=bias(8), **block, stem_padding=(1, 1, 1, 1), stem_activation="relu", activation=activation, padding=(1, 1, 1, 1))
    y = n.add("pointwise_pool", y, weight=weight(10, 12), bias=bias(10), activation=activation)
    n.add("linear", y, weight=weight(5, 10), bias=bias(5))
    return n.weights, n.numbers


def image(batch=2, dtype=torch.float32, device="cpu", layout="contiguous"):
    return lay_out(torch.randn(batch, 3, 13, 11, generator=torch.Generator().manual_seed(1)).to(device, dtype), layout)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("wide_vectors", [False, True])
def test_is_its_steps(wide_vectors, layout, device, dtype):
    weights, program = weights_and_program(dtype, device, wide_vectors)
    for batch in (2, 1, 0):
        x = image(batch, dtype, device, layout)
        out = ops.network(x, weights, program)
        assert out.shape == (batch, 5) and out.dtype == dtype
        assert torch.equal(out, decomposed(x, weights, program))


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_image_to_image(layout, device, dtype):
    """A part of a network: the output's strides are the last step's. Residuals of another format are copied."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator).to(device, dtype)
    taps = torch.randn(8, 1, 3, 3, generator=generator).to(device, dtype)
    for shape in ((2, 8, 6, 5), (2, 8, 1, 1), (0, 8, 6, 5)):
        x = lay_out(torch.randn(shape, generator=generator).to(device, dtype), layout)
        for memory_format in (None, torch.contiguous_format, torch.channels_last):
            n = Network()
            y = n.add("conv", weight=weight[:, :, None, None].contiguous(), memory_format=memory_format)
            y = n.add("depthwise", y, weight=taps, padding=(1, 1, 1, 1))
            n.add("pointwise", y, residual=0, weight=weight.t(), activation="relu")
            out, want = ops.network(x, n.weights, n.numbers), decomposed(x, n.weights, n.numbers)
            assert torch.equal(out, want) and out.stride() == want.stride()
            with FakeTensorMode() as mode:
                fake = torch.ops.effnet.network(mode.from_tensor(x), [mode.from_tensor(w) for w in n.weights], n.numbers)
            assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)


def test_held_network(device, dtype):
    """The same result by a number, which also names the error; released, it keeps nothing alive."""
    weights, program = weights_and_program(dtype, device)
    hold, run, release = torch.ops.effnet._hold_network, torch.ops.effnet._held_network, torch.ops.effnet._release_network
    number, other = hold(weights, program), hold(weights, program)
    assert number != other
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        for batch in (2, 0):
            for layout in IMAGE_LAYOUTS:
                x = image(batch, dtype, device, layout)
                assert torch.equal(run(x, number), ops.network(x, weights, program))
        with pytest.raises(RuntimeError, match=r"effnet::network: step 1 \(conv\): "):
            run(image(2, dtype, device)[:, :2], number)
        for _ in range(2):
            release(number)
        with pytest.raises(RuntimeError, match=rf"effnet::_held_network: network must be a number that .*, got {number}"):
            run(x, number)
        assert torch.equal(run(x, other), ops.network(x, weights, program))
    release(other)


def test_matrix():
    weights = [torch.randn(6, 4), torch.randn(3, 6)]
    program = Program()
    program.add("linear", program.add("linear", weight=0), weight=1)
    x = torch.randn(5, 4)
    torch.testing.assert_close(ops.network(x, weights, program.numbers), x @ weights[0].t() @ weights[1].t())


def test_tf32_switches_are_looked_at_in_every_call(device):
    weights, program = weights_and_program(device=device)
    x = image(device=device)
    for tf32 in (False, True, False):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        assert torch.equal(ops.network(x, weights, program), decomposed(x, weights, program))


# ---- gradients and tracing ----


def test_gradcheck():
    weights, program = weights_and_program(torch.float64, wide_vectors=False, activation="none")
    inputs = [image(1, torch.float64).requires_grad_(), *(w.requires_grad_() for w in weights)]
    assert gradcheck(lambda x, *weights: ops.network(x, weights, program), inputs)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_gradients_are_those_of_the_steps(activation):
    weights, program = weights_and_program(torch.float64, wide_vectors=False, activation=activation)
    for wanted in ([0], [1], [3, 5], [len(weights)], list(range(len(weights) + 1))):  # 0 is the image
        grads = []
        for function in (ops.network, decomposed):
            tensors = [image(2, torch.float64), *(w.detach().clone() for w in weights)]
            leaves = [tensors[i].requires_grad_() for i in wanted]
            function(tensors[0], tensors[1:], program).square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for actual, expected in zip(*grads):
            torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, device):
    weights, program = weights_and_program(device=device)
    with torch.autocast(device, dtype=low):
        out = ops.network(image(device=device), weights, program)
    by_hand = ops.network(image(dtype=low, device=device), [w.to(low) if w.dim() > 1 else w for w in weights], program)
    assert out.dtype == low and torch.equal(out, by_hand)


def test_opcheck(device, dtype):
    weights, program = weights_and_program(dtype, device, wide_vectors=False)
    torch.library.opcheck(torch.ops.effnet.network.default, (image(2, dtype, device).requires_grad_(), [w.requires_grad_() for w in weights], program))


class Module(torch.nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        weights, self.program = weights_and_program(device=device)
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x):
        return ops.network(x, list(self.weights), self.program)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_and_export(layout, device):
    module, x = Module(device), image(2, device=device, layout=layout)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["effnet.network.default"]
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = image(batch, device=device, layout=layout)
            torch.testing.assert_close(program.module()(x), module(x))
            torch.testing.assert_close(compiled(x), module(x))


# ---- programs ----


def test_program():
    weights, numbers = weights_and_program()
    program = Program.parse(numbers, len(weights))
    assert program.numbers == numbers and {step.kind for step in program.steps} == set(KINDS)
    lines = str(program).splitlines()
    assert lines[0] == "#1 = conv(x, weight=w0, bias=w1, activation=relu6, stride=(2, 2), padding=(0, 1, 0, 1), memory_format=channels_last)"
    assert lines[3] == "#4 = pointwise(#3, residual=#1, weight=w5, bias=w6, activation=none)"
    assert repr(program).startswith("<Program of 10 steps>\n#1 = conv(x, ")
    with pytest.raises(TypeError, match="a linear step takes input, weight, bias, got stride"):
        program.add("linear", stride=(1, 1))


GOOD = (1, 0, -1, 0, 1, 0)  # pointwise(x, weight=w0, bias=w1)
PROGRAMS = [
    ((), "program must have at least one step, got none"),
    ((7,), "step 1: kind must be from 0 (conv) to 6 (stem_mbconv), got 7"),
    ((-1,), "step 1: kind must be from 0 (conv) to 6 (stem_mbconv), got -1"),
    (GOOD[:-1], "step 1 (pointwise): program must go on with its activation, got an end after 5 numbers"),
    ((*GOOD, 1), "step 2 (pointwise): program must go on with its input, got an end after 7 numbers"),
    ((1, 1, -1, 0, 1, 0), "step 1 (pointwise): input must be 0 (x) or the number of an earlier step, got 1"),
    ((*GOOD, 1, 1, 2, 0, 1, 0), "step 2 (pointwise): residual must be -1 (none), 0 (x) or the number of an earlier step, got 2"),
    ((1, -1, -1, 0, 1, 0), "step 1 (pointwise): input must be 0 (x) or the number of an earlier step, got -1"),
    ((1, 0, -1, 2, 1, 0), "step 1 (pointwise): weight must be an index into the 2 weights, got 2"),
    ((1, 0, -1, -1, 1, 0), "step 1 (pointwise): weight must be an index into the 2 weights, got -1"),
    ((1, 0, -1, 0, -2, 0), "step 1 (pointwise): bias must be -1 (none) or an index into the 2 weights, got -2"),
    ((1, 0, -1, 0, 2**62, 0), f"step 1 (pointwise): bias must be -1 (none) or an index into the 2 weights, got {2**62}"),
    ((1, 0, -1, 0, 1, 3), "step 1 (pointwise): activation must be 0 (none), 1 (relu) or 2 (relu6), got 3"),
    ((2, 0, 0, -1, 0, 0, 1, 0, 0, 0, 0), "step 1 (depthwise): stride must be two numbers from 1 to 2147483647, got (0, 1)"),
    ((2, 0, 0, -1, 0, 1, 1, 0, 0, 0, -1), "step 1 (depthwise): padding must be four numbers (left, right, top, bottom) from 0 to 2147483647, got (0, 0, 0, -1)"),
    ((6, 0, 0, -1, 0, -1, 0, -1, 5), "step 1 (stem_mbconv): stem_activation must be 0 (none), 1 (relu) or 2 (relu6), got 5"),
    ((6, 0, 0, -1, 0, -1, 0, -1, 0, 2, 0, 0, 0, 0, 0), "step 1 (stem_mbconv): stem_stride must be two numbers from 1 to 2147483647, got (2, 0)"),
    ((0, 0, 0, -1, 0, 1, 1, 0, 0, 0, 0, 2), "step 1 (conv): memory_format must be -1 (its input's), 0 (contiguous_format) or 1 (channels_last), got 2"),
    # What is well formed, but does not fit.
    ((*GOOD, 1, 1, -1, 0, 1, 0), "step 2 (pointwise): weight must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = 6, got (6, 8)"),
    ((*GOOD, 5, 1, 0, 1), "step 2 (linear): x must be (rows, in_features) with in_features at least 1, got (2, 6, 4, 5)"),
    ((4, 0, 0, 1, 0, 1, 1, -1, 0, 1, 0), "step 2 (pointwise): x must be (N, C, H, W) with C, H and W at least 1, got (2, 6)"),
    ((*GOOD, 2, 1, 0, -1, 0, 1, 1, 1, 1, 1, 1), "step 2 (depthwise): weight must be (C, 1, k, k) with C = 6 and k = 3 or 5, got (6, 8)"),
    ((1, 0, 0, 0, 1, 0), "step 1 (pointwise): residual must be (2, 6, 4, 5) like the output, got (2, 8, 4, 5)"),
    ((3, 0, -1, 0, 0, 0, -1, 0, -1, 0, 1, 1, 0, 0, 0, 0), "step 1 (mbconv): expand_bias must be (C_out,) with C_out = 6, got (6, 8)"),
    ((6, 0, 0, -1, 0, -1, 0, -1, 0, 2, 2, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, -1), "step 1 (stem_mbconv): stem_weight must be (C_out, C_in, k_h, k_w) with C_in = 8, got (6, 8)"),
]  # fmt: skip


@pytest.mark.parametrize("program, expected", PROGRAMS, ids=[expected for _, expected in PROGRAMS])
def test_faults(program, expected, device):
    def tensors(device):
        return torch.zeros(2, 8, 4, 5, device=device), [torch.zeros(6, 8, device=device), torch.zeros(6, device=device)]

    for context, where in ((torch.no_grad(), device), (FakeTensorMode(), "cpu"), (FakeTensorMode(), "cuda"), (FakeTensorMode(), "meta")):
        with context, pytest.raises(RuntimeError) as info:
            torch.ops.effnet.network(*tensors(where), program)
        assert str(info.value) == f"effnet::network: {expected}"


# ---- what is launched ----


@pytest.fixture(scope="module")
def torch_cuda(tmp_path_factory):
    """CUDA tensors in host memory."""
    from stub_cuda import CXX, HERE

    if torch.version.cuda:
        pytest.skip("this torch has CUDA tensors of its own")
    library, folder = tmp_path_factory.mktemp("torch_cuda") / "libtorch_cuda.so", Path(torch.__file__).parent
    headers = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-Wl,-soname,{library.name}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    subprocess.run([CXX, *flags, *headers, HERE / "torch_cuda.cpp", f"-L{folder}/lib", "-ltorch_cpu", "-lc10", "-o", library], check=True)
    return library


@pytest.mark.xdist_group("stub_cuda")
def test_launches(stub, torch_cuda):
    """The kernels of the single ops with their numbers, on two allocations; maps lie apart for as long as they are read."""
    log = stub.new_log()
    child = Path(__file__).with_name("network_child.py")
    environment = stub.environment(log, PYTHONPATH=stub.python_path())
    done = subprocess.run([sys.executable, child, torch_cuda], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, launches = json.loads(done.stdout), [r for r in stub.read(log) if r["call"] == "cuLaunchKernelEx"]
    first, second, steps = (launches[a:b] for a, b in result["launches"])
    addresses = ("x", "weight", "out", "residual", "p0")

    def kinds(some):
        return [(r["kernel"], r["grid"], {k: v for k, v in r["parameters"].items() if k not in addresses}) for r in some]

    assert kinds(first) == kinds(second) == kinds(steps) and len(first) > 8
    assert [len(a) for a in result["allocations"][:2]] == [2, 2] and len(result["allocations"][2]) > 8
    (out, _), (workspace, size) = result["allocations"][0]
    assert size < sum(bytes for _, bytes in result["allocations"][2][:-1])  # some map took another's place

    # Every kernel reads what the one of the single op reads: a map by the place of the launch that wrote it.
    def dataflow(some):
        writer, flow = {}, []
        for i, r in enumerate(some):
            p = r["parameters"]
            flow.append([writer.get(p.get(name)) for name in ("x", "residual")])
            writer[p["out"]] = i
        return flow

    assert dataflow(first) == dataflow(steps) == dataflow(second)
    assert first[-1]["parameters"]["out"] == out
    assert all(workspace <= r["parameters"]["out"] < workspace + size and (r["parameters"]["out"] - workspace) % 256 == 0 for r in first[:-1])
    assert {r["stream"] for r in first} == {0x5EED}


@pytest.mark.xdist_group("stub_cuda")
@pytest.mark.parametrize("fail", ["", "cuStreamCreate=2", "cuStreamBeginCapture_v2=1", "cuStreamEndCapture=1", "cuGraphInstantiateWithFlags=2"])
def test_repeated_addresses_become_a_graph(stub, torch_cuda, fail):
    """From their second time on; and where the driver does not do it, kernels are launched one by one as before."""
    child, log = Path(__file__).with_name("network_graph_child.py"), stub.new_log()
    environment = stub.environment(log, fail=fail, PYTHONPATH=stub.python_path()) if fail else stub.executing(log)
    done = subprocess.run([sys.executable, child, torch_cuda], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, records = json.loads(done.stdout), stub.read(log)
    assert fail or (result["nonzero"] and all(result["equal"]))
    graphs = [r for r in records if r["call"] == "cuGraphLaunch"]
    launched = [r for r in records if r["call"] == "cuLaunchKernelEx" and r["stream"] == 0x5EED]
    count = len(launched) // (8 - len(graphs))
    assert len(launched) == count * (8 - len(graphs)) and count > 8
    if fail:
        assert not graphs
    else:
        assert 3 <= len(graphs) <= 4  # the first of those kept may have the addresses of those dropped
        assert {(r["kernels"], r["stream"]) for r in graphs} == {(count, 0x5EED)}
        assert len([r for r in records if r["call"] == "cuStreamBeginCapture"]) == 1


def branches(after):
    """The launches of a graph, from 1, by branch: each after the one in front of it. `after` are those that each waits for."""
    found = []
    for number, before in enumerate(after, 1):
        if not before:
            found.append([number])
        else:
            (branch,) = (branch for branch in found if branch[-1:] == before)
            branch.append(number)
    return found


@pytest.mark.xdist_group("stub_cuda")
@pytest.mark.parametrize("fail", ["", "cuStreamGetCaptureInfo_v2=1", "cuStreamUpdateCaptureDependencies=1"])
def test_large_batches_run_in_lanes(stub, torch_cuda, fail):
    """Side by side in a graph, where the driver does it. Half of the batch each; an odd one stays together."""
    child, log = Path(__file__).with_name("network_lanes_child.py"), stub.new_log()
    environment = stub.environment(log, multiprocessors="1", fail=fail, PYTHONPATH=stub.python_path()) if fail else stub.executing(log, multiprocessors="1")
    done = subprocess.run([sys.executable, child, torch_cuda], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for *ours, eager in json.loads(done.stdout):
        assert fail or (ours[1:] == ours[:-1] and ours[0] <= 1.25 * eager)
    *large, one, other = [[len(branch) for branch in branches(r["after"])] for r in stub.read(log) if r["call"] == "cuGraphLaunch"]
    assert one == other and len(one) == 1 and one[0] > 8
    assert large == 4 * ([[2 * one[0]]] if fail else [2 * one])


@pytest.mark.gpu
@pytest.mark.parametrize("kind, tf32", [(torch.float16, True), (torch.float32, True), (torch.float32, False)])
def test_lanes_are_as_right_as_small_batches(kind, tf32, monkeypatch):
    """One by one, as the graph that the library makes of calls with known addresses, and in the caller's graph."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    weights, program = weights_and_program(kind, "cuda")
    pixels = 14_000 * torch.cuda.get_device_properties(0).multi_processor_count
    x = torch.randn(2 * -(-pixels // (2 * 128 * 128)), 3, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = decomposed(x, [w.cpu().double() for w in weights], program)
    x = x.to("cuda", kind)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        network = lambda x: torch.ops.effnet.network(x, weights, program)  # noqa: E731
        small = torch.cat([network(part) for part in x.split(8)])
        out, again = network(x), [network(x).clone() for _ in range(3)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = network(x)
        replayed.fill_(float("nan"))
        graph.replay()
    rms = lambda result: (result.cpu().double() - exact).square().mean().sqrt()  # noqa: E731
    assert rms(out) <= 1.25 * rms(small)
    assert all(torch.equal(other, out) for other in (*again, replayed))


@pytest.mark.xdist_group("stub_cuda")
def test_graph_that_fails(stub, torch_cuda):
    child = Path(__file__).with_name("network_graph_child.py")
    done = subprocess.run([sys.executable, child, torch_cuda], env=stub.environment(stub.new_log(), fail="cuGraphLaunch=719", PYTHONPATH=stub.python_path()), capture_output=True, text=True, timeout=300)
    assert done.returncode and re.search(r"effnet::network: launching \d+ kernels on device 0 as a graph failed: CUDA_ERROR_LAUNCH_FAILED", done.stderr)


@pytest.mark.xdist_group("stub_cuda")
def test_numbers_on_a_device(stub, torch_cuda):
    """The whole way without a GPU: ops, plans, workspace, launches, and the PTX that ships. TF32 rounds as float16 does."""
    child = Path(__file__).with_name("network_numbers_child.py")
    done = subprocess.run([sys.executable, child, torch_cuda], env=stub.executing(stub.new_log()), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 2 * 4 * 2
    for name, (ours, _) in errors.items():
        eager = errors[name.replace("tf32", "fp16")][1]
        assert ours <= 1.25 * eager, f"{name}: the error against float64 is {ours}, eager's is {eager}"


@pytest.mark.xdist_group("stub_cuda")
def test_a_held_weight_is_narrow_once(stub, torch_cuda):
    """That of a projection behind many pixels: made narrow in every call of a network that is not held, and else when it is; as is the
    depthwise step's, which kernels for whole blocks may take."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("held_child.py"), torch_cuda], env=stub.executing(stub.new_log()), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (plain, holding, *held), same, largest = json.loads(done.stdout)
    assert plain[0] == "effnet_narrow_weight" and holding == ["effnet_narrow_weight"] * 2 and held == [plain[1:], plain[1:]], (plain, holding, held)
    assert all(same) and largest > 1


NARROW = "narrow_c16_s2_16x24x32_w1"
# Of both strides and all depths that ModelNew has.
MERGED = ["k3_s1_deep256_w4x1s3_64x16_rows1", "k3_s2_deep256_w4x1s4_64x32_rows1", "k3_s2_deep512_w4x1s3_64x16_rows2", "k3_s1_deep768_w4x1s4_64x32_rows2_images2", "deep1152_w4x1s3_64x32_images2"]


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """PYTHONPATH for this package with a library that has kernels for merged products and for whole blocks with narrow maps."""
    from effnet_aot.tune.bundle import package

    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("merging")
    if not (root / "setup.py").exists():
        pytest.skip("needs a checkout")
    names = ",".join([NARROW, *(f"{precision}_{name}" for precision in ("fp16", "tf32") for name in MERGED)])
    candidates = f"--candidates=merged_depthwise,merged_pool,mbconv:fp16,tf32,narrow:{names}"
    command = [sys.executable, "setup.py", "-q", "build_ext", candidates, f"--build-temp={folder / 'temp'}", f"--build-lib={folder / 'lib'}"]
    done = subprocess.run(command, cwd=root, env={**os.environ, "EFFNET_AOT_ARCHS": "8.9"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with package(folder / "lib" / "effnet_aot" / "lib") as path:
        yield path


@pytest.mark.xdist_group("stub_cuda")
def test_merged_products(stub, torch_cuda, merging):
    """A projection and what follows it as one product, in a held network, and a whole block with narrow maps: as exact as without."""
    child, environment = Path(__file__).with_name("merged_child.py"), stub.executing(stub.new_log())
    environment["PYTHONPATH"] = os.pathsep.join([str(merging), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, child, torch_cuda], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 6
    for where, (own, merged, launched) in said.items():
        if "bfloat16" in where:
            assert not launched and merged == own, where
            continue
        assert launched == [*(["mbconv"] if "float32" in where else []), *["merged_depthwise"] * 4, "merged_pool"], where
        assert merged <= 1.25 * own and merged != own, (where, own, merged)
