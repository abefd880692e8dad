"""Random calls of every op: PyTorch's result, or an error that names the op. Never a crash, never a wrong number.

On the CPU hypothesis makes them up, and finds the smallest call that fails; on a GPU a range of seeds does.
"""

import random

import pytest
import torch
from exact import assert_exact, exact_call
from fuzz_calls import FuzzCall, fuzz_call
from op_cases import OPS, expected_format
from torch._subclasses.fake_tensor import FakeTensorMode

try:
    from hypothesis import HealthCheck, Phase, given, note, settings
    from hypothesis import strategies as st
except ImportError:  # the GPU's half needs none
    settings = None


def fake(call: FuzzCall):
    """The outcome of the fake kernel: (shape, strides, dtype), or its error."""
    with FakeTensorMode():
        fakes = {name: torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for name, a in call.tensors.items()}
        try:
            out = getattr(torch.ops.effnet, call.op)(**(call.args | fakes))
        except RuntimeError as error:
            return str(error)
    return tuple(out.shape), out.stride(), out.dtype


def outcome(call: FuzzCall):
    """The op's result, after what must hold of every result or error was checked."""
    try:
        out = call()
    except RuntimeError as error:
        assert str(error).startswith(f"effnet::{call.op}: "), f"an error that is not ours: {error}"
        assert call.faults, f"a good call was refused: {error}"
        assert fake(call) == str(error)
        return None
    assert fake(call) == (tuple(out.shape), out.stride(), out.dtype)
    case = call.case()
    assert tuple(out.shape) == case.out_shape() and out.dtype == call.args["x"].dtype and out.device == call.args["x"].device
    if out.dim() == 4:
        assert out.stride() == torch.empty(out.shape, device="meta", memory_format=expected_format(case, call.args["x"])).stride()
    return out


def check_on_cpu(call: FuzzCall):
    out = outcome(call)
    if out is None or out.is_meta or out.numel() == 0:
        return
    if out.dtype == torch.bfloat16 and "conv" in call.op:
        # torch's own, oneDNN on AMX: columns of one pixel at stride 2 are summed with uninitialised memory, and NaN spreads.
        if (call.case().stride[1] > 1 and out.shape[3] == 1) or not all(t.isfinite().all() for t in call.tensors.values()):
            return
    # The same computations in a different order: a few ulps of what the terms add up to. float16's own sums are coarse.
    eager, expected = call.case().reference(call.args), exact_call(call.op, call.args)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(eager)), kind.__name__
    difference, slack = (out.double() - eager.double()).abs(), 8 * torch.finfo(out.dtype).eps * expected.magnitude.nan_to_num(nan=torch.inf)
    assert (difference <= slack)[eager.isfinite()].all(), f"off by up to {difference[eager.isfinite()].max():.2e}"


def check_on_gpu(call: FuzzCall):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = call.tf32
    out = outcome(call)
    if out is None or out.is_meta or out.numel() == 0:
        torch.cuda.synchronize()
        return
    assert_exact(out, exact_call(call.op, call.args), call.tf32 and out.dtype == torch.float32)


@pytest.mark.skipif(settings is None, reason="needs hypothesis")
@pytest.mark.parametrize("op", OPS)
def test_random_calls(op, request):
    @settings(
        max_examples=request.config.getoption("--fuzz-examples"), derandomize=True, database=None, deadline=None,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def check(r):
        call = fuzz_call(r, op)
        note(str(call))
        check_on_cpu(call)

    check()


SHARDS = 8  # tests that share the cases, so that as many workers can


@pytest.mark.gpu
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_calls_on_a_gpu(request, record_property, shard):
    """--fuzz-cases calls in all; --fuzz-seed SEED --fuzz-cases 1 repeats the one that failed."""
    first, count = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-cases")
    seeds = range(first + shard, first + count, SHARDS)
    failures, results, refused = [], 0, 0
    for seed in seeds:
        call = fuzz_call(random.Random(seed), device="cuda")
        try:
            check_on_gpu(call)
        except Exception as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error}\n{call}")
            if "CUDA error" in str(error) or "CUDA_ERROR" in str(error):
                break  # a broken context fails all that follows
        results, refused = results + (not call.faults), refused + bool(call.faults)
    for name, value in {"cases": len(seeds), "good": results, "with_faults": refused, "failed": len(failures)}.items():
        record_property(name, value)
    assert not failures, f"{len(failures)} of {len(seeds)} calls failed, among them\n\n" + "\n\n".join(failures[:5])
    if len(seeds) >= 50:
        assert results > len(seeds) / 3 and refused > len(seeds) / 10  # both halves of the claim were tested
