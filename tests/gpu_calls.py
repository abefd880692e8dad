"""Calls of every op on a GPU for tests of what surrounds a kernel (streams, graphs, threads, processes), each with what it
should give. Run with the name of a function, in a process where nothing was used yet, it makes them as that function says."""

import json
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from exact import assert_exact, exact_call
from op_cases import CASES, IMAGE_LAYOUTS, MATRIX_LAYOUTS, SMALL, Case

import effnet_aot

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = [
    Case("pointwise_bn_relu6", (4, 24, 30, 30), 144, wide_vectors=True),
    Case("depthwise", (4, 144, 30, 30), 144, (3, 3), (2, 2), (0, 1, 0, 1), activation="relu6"),
    Case("pointwise", (4, 144, 15, 15), 40, residual=True),
    Case("pointwise_pool", (4, 320, 8, 8), 1280, activation="relu"),
    Case("conv", (4, 3, 60, 60), 32, (3, 3), (2, 2), (1, 1, 1, 1), activation="relu"),
    Case("linear", (10, 1280), 1000),
]


class Call:
    def __init__(self, case, dtype, layout, seed, device="cuda"):
        self.case, self.dtype, self.layout = case, dtype, layout
        self.args = case.arguments(dtype, device, layout, seed)
        self.expected = exact_call(case.op, self.args)
        self.result = None

    def __str__(self):
        return f"{self.case} {self.dtype} {self.layout}"

    def __call__(self, **changes):
        return self.case.call(self.args | changes)

    def check(self, out):
        try:
            assert_exact(out, self.expected)
        except AssertionError as error:
            raise AssertionError(f"{self}: {error}") from None

    def remember(self):
        """What the call gives, now that it is known to be right: kernels are deterministic, so later calls give the same bits."""
        self.result = self()
        self.check(self.result)
        return self


def small_calls(device="cuda", dtypes=DTYPES):
    kinds = list(zip(dtypes, ("channels_last", "contiguous", "channels_last")))
    return [Call(case, dtype, "contiguous" if case.is_linear else layout, 7, device) for case in SMALL for dtype, layout in kinds]


def random_calls(count, seed, device="cuda"):
    r, cases = random.Random(seed), [case for case in CASES if case.x[0] > 0] + 5 * LARGE
    chosen = [(r.choice(cases), r.choice(DTYPES)) for _ in range(count)]
    return [Call(case, dtype, r.choice(MATRIX_LAYOUTS if case.is_linear else IMAGE_LAYOUTS), r.randrange(2**31), device) for case, dtype in chosen]


def float32_is_exact():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


# ---- what a new process does ----


def capture(device=0):
    """CUDA-graph capture is the first thing that happens to the library on this device."""
    calls = small_calls(f"cuda:{device}")
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            outs = [call() for call in calls]
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    for call, out in zip(calls, outs):
        call.check(out)


def capture_after_preload():
    effnet_aot.preload(0)
    print("preloaded", file=sys.stderr, flush=True)
    capture()


def capture_on_each_device():
    for device in range(torch.cuda.device_count()):
        capture(device)


def preload_during_capture():
    """Another thread loads everything while this one captures, which the default capture mode forbids to other threads."""
    call, graph, errors = Call(SMALL[0], torch.float16, "channels_last", 7), torch.cuda.CUDAGraph(), []

    def preload():
        try:
            effnet_aot.preload(0)
        except Exception as error:
            errors.append(error)

    with torch.cuda.graph(graph):
        thread = threading.Thread(target=preload)
        thread.start()
        thread.join()
        out = call()
    assert not errors, errors
    graph.replay()
    torch.cuda.synchronize()
    call.check(out)


def threads(count):
    """All threads make the first calls together, each on a stream of its own."""
    calls, barrier = small_calls(), threading.Barrier(count)
    torch.cuda.synchronize()

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait(timeout=60)
            outs = [call() for call in calls]
            torch.cuda.current_stream().synchronize()
            return [out.cpu() for out in outs]

    with ThreadPoolExecutor(count) as pool:
        for outs in pool.map(work, range(count)):
            for call, out in zip(calls, outs):
                call.check(out)


def fork():
    """A child of a process that used CUDA gets an error, not a crash, and the parent goes on."""
    call = Call(SMALL[0], torch.float16, "channels_last", 7)
    call.check(call())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for function in (lambda: effnet_aot.preload(0), call):
            try:
                function()
                message = ""
            except RuntimeError as error:
                message = str(error)
            os.write(write, json.dumps(message).encode() + b"\n")
        os._exit(0)
    os.close(write)
    messages = [json.loads(line) for line in os.fdopen(read)]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0 and len(messages) == 2, f"the child ended with {status} after {messages}"
    assert messages[0] == "effnet_aot: CUDA was used before this process was forked and cannot be used in the child; start it with the 'spawn' method"
    # Torch's own error, where it is asked for the output first.
    assert "fork" in messages[1] or "initialization error" in messages[1], messages[1]
    call.check(call())


def two_threads_twice():
    threads(2)
    threads(2)


def work(count, seed):
    """Calls in a loop, beside another process that does the same."""
    calls, r = [call.remember() for call in random_calls(64, seed)], random.Random(seed)
    for _ in range(count):
        call = r.choice(calls)
        assert torch.equal(call(), call.result), str(call)


if __name__ == "__main__":
    float32_is_exact()
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
    print("done")
