"""What surrounds a kernel: streams, CUDA graphs, threads, processes, several GPUs, and many calls at once."""

import gc
import os
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_calls
import pytest
import torch
from gpu_calls import LARGE, Call, random_calls, small_calls
from op_cases import SMALL, Case
from variants import EMBEDDED

import effnet_aot

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("concurrency")]

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
in_children = pytest.mark.xdist_group  # a worker each: they take seconds, which other processes spend
NAN = float("nan")


def start(function, *arguments, **environment):
    """A new process that runs a function of gpu_calls.py."""
    path = os.pathsep.join([str(Path(effnet_aot.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, gpu_calls.__file__, function, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path} | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Its stderr, once it has ended well. PTX for all kernels takes the driver a while to compile."""
    try:
        out, errors = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0 and out.endswith("done\n"), errors[-4000:]
    return errors


def choices(log):
    """What EFFNET_AOT_LOG=1 said: (op, variant, image) of each line."""
    lines = [line for line in log.splitlines() if line.startswith("effnet_aot: ")]
    found = [re.fullmatch(r"effnet_aot: (\w+)/(\w+) on device 0 \(.+\): (.+), \d+ registers, \d+ bytes of shared memory", line) for line in lines]
    assert all(found), lines
    return [match.groups() for match in found]


# ---- streams ----


@pytest.mark.undisturbed
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_side_stream(case):
    """The kernel waits for what comes before it on the current stream, and for nothing else is waited."""
    call, stream = Call(case, torch.float16, "contiguous", 7), torch.cuda.Stream()
    x = torch.full_like(call.args["x"], NAN)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call.check(call())  # loads the kernel, and leaves memory for the next output: allocating may wait for the GPU
        torch.cuda._sleep(100_000_000)  # about 50 ms: a kernel on another stream would see NaN
        x.copy_(call.args["x"])
        out = call(x=x)
        done = stream.record_event()
    assert not done.query(), "the call waited for the stream"
    done.synchronize()
    call.check(out)


def test_streams_that_wait_for_each_other():
    """Two ops in a row on two streams, with an event between them and no wait on the host."""
    first = Call(Case("pointwise_bn_relu6", (4, 24, 30, 30), 144), torch.float16, "channels_last", 1)
    second = Call(Case("depthwise_bn_relu6", (4, 144, 30, 30), 144, (3, 3), (1, 1), (1, 1, 1, 1)), torch.float16, "channels_last", 2)
    want = second(x=first())
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(one):
            torch.cuda._sleep(1_000_000)
            between = first()
            event = one.record_event()
        with torch.cuda.stream(two):
            two.wait_event(event)
            out = second(x=between)
        two.synchronize()
        assert torch.equal(out, want)


# ---- the first call ----


@in_children("capture")
def test_capture_is_the_first_call():
    finish(start("capture"))


@in_children("preload")
def test_capture_after_preload():
    log = finish(start("capture_after_preload", EFFNET_AOT_LOG="1"))
    before, after = log.split("preloaded\n")
    loaded = [(op, variant) for op, variant, _ in choices(before)]
    assert sorted(loaded) == EMBEDDED
    assert choices(after) == []  # nothing was left to load


@in_children("preload_during_capture")
def test_preload_during_capture():
    finish(start("preload_during_capture"))


@pytest.mark.parametrize("count", [pytest.param(count, marks=in_children(f"{count}_threads")) for count in (2, 8)])
def test_threads_make_the_first_call(count):
    finish(start("threads", count))


@in_children("log")
def test_log_explains_each_choice_once():
    from effnet_aot import _C

    silent, talking = start("threads", 1, EFFNET_AOT_LOG="0"), start("two_threads_twice", EFFNET_AOT_LOG="1")
    assert choices(finish(silent)) == []
    said = choices(finish(talking))
    assert len(said) == len(set(said)) > 0
    assert {(op, variant) for op, variant, _ in said} <= {(kernel["op"], kernel["variant"]) for kernel in effnet_aot.kernels()}
    assert {op for op, _, _ in said} >= {"conv", "depthwise", "linear", "pointwise", "pointwise_pool"}
    assert {image for _, _, image in said} == {_C.images(0)["image"]}


@in_children("fork")
def test_fork_after_use():
    finish(start("fork"))


@in_children("two_processes")
def test_two_processes_on_one_gpu(request, record_property):
    calls = max(500, request.config.getoption("--stress-calls"))
    record_property("calls_of_each_process", calls)
    for process in [start("work", calls, seed) for seed in (1, 2)]:
        finish(process)


# ---- graphs ----


class Chain:
    """Ops of every kind in a row, from a picture to scores."""

    def __init__(self):
        self.calls = [
            Call(Case("conv_bn_relu", (2, 3, 40, 40), 32, (3, 3), (2, 2), (1, 1, 1, 1)), torch.float16, "channels_last", 1),
            Call(Case("depthwise_bn_relu6", (2, 32, 20, 20), 32, (3, 3), (1, 1), (1, 1, 1, 1)), torch.float16, "channels_last", 2),
            Call(Case("pointwise_bn", (2, 32, 20, 20), 24), torch.float16, "channels_last", 3),
            Call(Case("pointwise_pool", (2, 24, 20, 20), 96, activation="relu"), torch.float16, "channels_last", 4),
            Call(Case("linear_bias", (2, 96), 10), torch.float16, "contiguous", 5),
        ]

    def __call__(self, x):
        for call in self.calls:
            x = call(x=x)
        return x


def pictures(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 40, 40, generator=generator).to("cuda", torch.float16).contiguous(memory_format=torch.channels_last) for _ in range(count)]


def captured(chain, x):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    return graph, out


def test_eager_calls_between_replays():
    chain, images = Chain(), pictures(8)
    x = images[0].clone()
    graph, out = captured(chain, x)
    results = []
    for image in images:
        x.copy_(image)
        graph.replay()
        eager = chain(image)
        assert torch.equal(out, eager)
        results.append(eager)
        out.fill_(NAN)
    assert not any(torch.equal(results[0], result) for result in results[1:])


def test_replays_beside_eager_calls(request, record_property):
    chain, images, side = Chain(), pictures(8), torch.cuda.Stream()
    want = [chain(image) for image in images]
    x = images[0].clone()
    graph, out = captured(chain, x)
    torch.cuda.synchronize()
    replayed, eager = [], []
    rounds = max(10, request.config.getoption("--stress-calls") // 25)
    record_property("replays", rounds * len(images))
    for i, image in enumerate(images * rounds):
        with torch.cuda.stream(side):
            x.copy_(image)
            graph.replay()
            replayed.append((i % len(images), out.clone()))
        other = (i + 3) % len(images)
        eager.append((other, chain(images[other])))
    torch.cuda.synchronize()
    assert all(torch.equal(got, want[i]) for i, got in replayed)
    assert all(torch.equal(got, want[i]) for i, got in eager)


# ---- several GPUs ----


@two_gpus
def test_two_gpus_in_turns():
    for ours, theirs in zip(small_calls("cuda:0"), small_calls("cuda:1")):
        for call in (theirs, ours, theirs):
            out = call()
            assert out.device == call.args["x"].device
            call.check(out)
        assert torch.cuda.current_device() == 0


@two_gpus
def test_two_gpus_at_once(request, record_property):
    """Tensors of both in every thread, on the current streams of both."""
    count = max(300, request.config.getoption("--stress-calls"))
    record_property("calls_of_each_of_4_threads", count)
    calls = {device: [call.remember() for call in random_calls(64, device, f"cuda:{device}")] for device in (0, 1)}

    def work(seed):
        r = random.Random(seed)
        for _ in range(count):
            call = r.choice(calls[r.randrange(2)])  # both GPUs from every thread
            assert torch.equal(call(), call.result), str(call)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@two_gpus
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_arguments_on_another_gpu(case):
    args, others = Call(case, torch.float16, "contiguous", 7, "cuda:1").args, Call(case, torch.float16, "contiguous", 7, "cuda:0").args
    for name in [name for name, a in args.items() if isinstance(a, torch.Tensor) and name != "x"]:
        with pytest.raises(RuntimeError) as info:
            case.call(args | {name: others[name]})
        assert str(info.value) == f"effnet::{case.op}: {name} must be on cuda:1 like x, got cuda:0"


@two_gpus
def test_capture_is_the_first_call_on_each_gpu():
    finish(start("capture_on_each_device"))


# ---- load ----

THREADS = STREAMS = 8


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.undisturbed
@pytest.mark.xdist_group("stress")  # minutes with thousands of calls, beside the rest of this file
def test_stress(request, record_property):
    """8 threads, 8 streams each, --stress-calls calls on every one: every result has the right bits, and memory in use does
    not grow between the middle and the end."""
    half = max(1, request.config.getoption("--stress-calls") // 2)
    calls = [call.remember() for call in random_calls(256, 0)]
    torch.cuda.synchronize()
    measured = []

    def measure():
        torch.cuda.synchronize()
        gc.collect()
        measured.append((torch.cuda.memory_allocated(), resident_bytes()))

    barrier = threading.Barrier(THREADS, action=measure)

    def run(r, streams, mismatches):
        for _ in range(half):
            for stream, mismatch in zip(streams, mismatches):
                index = r.randrange(len(calls))
                with torch.cuda.stream(stream):
                    mismatch[index] += (calls[index]() != calls[index].result).any()

    def work(seed):
        r, streams = random.Random(seed), [torch.cuda.Stream() for _ in range(STREAMS)]
        mismatches = [torch.zeros(len(calls), dtype=torch.int64, device="cuda") for _ in streams]
        torch.cuda.synchronize()
        try:
            for _ in range(2):
                run(r, streams, mismatches)
                barrier.wait()
        except BaseException:
            barrier.abort()  # or the others would wait for ever
            raise
        return torch.stack(mismatches).sum(0).cpu()

    with ThreadPoolExecutor(THREADS) as pool:
        mismatches = torch.stack(list(pool.map(work, range(THREADS)))).sum(0)
    wrong = {str(calls[i]): int(mismatches[i]) for i in mismatches.nonzero().flatten()}
    (allocated, resident), (allocated_later, resident_later) = measured
    record_property("threads", THREADS)
    record_property("streams", THREADS * STREAMS)
    record_property("calls", THREADS * STREAMS * 2 * half)
    record_property("wrong_results", int(mismatches.sum()))
    record_property("gpu_bytes_more_at_the_end_than_halfway", allocated_later - allocated)
    record_property("host_bytes_more_at_the_end_than_halfway", resident_later - resident)
    assert not wrong, f"wrong results of {THREADS * STREAMS * 2 * half} calls: {wrong}"
    assert allocated_later <= allocated
    assert resident_later - resident < 16 << 20, f"{(resident_later - resident) >> 20} MiB more"
