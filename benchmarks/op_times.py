"""Times each op of ModelNew alone: python benchmarks/op_times.py [FILE]

Every figure is the median of seven replays of a CUDA graph of ten calls, in microseconds a call, beside the floor: the
bytes that the op must move (each input and output once) over the bandwidth of a large copy, measured first.
"""

import subprocess
import sys

import torch

import effnet_aot
from effnet_aot.bench import environment

ops = effnet_aot.ops
BLOCKS = [(120, 32, 16, 1, 1), (120, 16, 24, 2, 6), (60, 24, 40, 2, 6), (30, 40, 80, 2, 6), (15, 80, 112, 1, 6), (15, 112, 192, 2, 6), (8, 192, 320, 1, 6)]


def median_time(call, calls=10):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[3]


def bytes_a_microsecond():
    source, target = torch.randn(2, 2**29, device="cuda")
    return 2 * source.numel() * 4 / median_time(lambda: target.copy_(source), calls=3)


def workload(batch, dtype):
    """(name, call, tensors read and written) of every op of the network, weights left out of the bytes."""

    def random(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    def image(channels, side):
        return random(batch, channels, side, side).contiguous(memory_format=torch.channels_last)

    picture, stem, bias = random(batch, 3, 240, 240), random(32, 3, 3, 3), random(32).float()
    yield "stem", lambda: ops.conv(picture, stem, bias, 2, 1, "relu", torch.channels_last), [picture, image(32, 120)]
    for i, (side, inputs, outputs, stride, ratio) in enumerate(BLOCKS, 1):
        hidden, small = inputs * ratio, (side - 1) // stride + 1
        x, wide, narrow, out = image(inputs, side), image(hidden, side), image(hidden, small), image(outputs, small)
        expand, depthwise, project = random(hidden, inputs), random(hidden, 1, 3, 3), random(outputs, hidden)
        b, c = random(hidden).float(), random(outputs).float()
        if ratio > 1:
            yield f"expand {i}", lambda: ops.pointwise(x, expand, b, None, "relu6"), [x, wide]
        yield f"depthwise {i}", lambda: ops.depthwise(wide, depthwise, b, stride, 1, "relu6"), [wide, narrow]
        yield f"project {i}", lambda: ops.pointwise(narrow, project, c), [narrow, out]
    x, head, b = image(320, 8), random(1280, 320), random(1280).float()
    yield "head and pool", lambda: ops.pointwise_pool(x, head, b, "relu"), [x]
    rows, fc, d = random(batch, 1280), random(1000, 1280), random(1000).float()
    yield "linear", lambda: ops.linear(rows, fc, d), [rows, fc]


def main():
    lines = []

    def put(line):
        print(line, flush=True)
        lines.append(line)

    def shell(*command):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"

    bandwidth = bytes_a_microsecond()
    put(f"{torch.cuda.get_device_name()}, driver {shell('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')}, torch {torch.__version__}, "
        f"triton {effnet_aot.build_info()['triton']}, commit {environment.commit()}, copy {bandwidth / 1e6:.2f} TB/s")
    put("microseconds a call: measured (floor)")
    with torch.inference_mode():
        for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32, TF32 convolutions")):
            for batch in (1, 10, 128):
                rows = [(op, median_time(call), sum(t.numel() * t.element_size() for t in tensors) / bandwidth) for op, call, tensors in workload(batch, dtype)]
                put(f"{name}, batch {batch}: sum {sum(t for _, t, _ in rows):.1f} ({sum(f for _, _, f in rows):.1f})")
                for op, measured, floor in rows:
                    put(f"  {op:<14} {measured:8.1f} ({floor:.1f})")
    if sys.argv[1:]:
        with open(sys.argv[1], "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
