"""counters_child.py WHAT DTYPE BATCH SIZE TF32: makes one forward pass between the profiler's marks. Run as a file, under ncu.

WHAT is one of
    network     ModelNew, as it computes
    unfused     the same network, one launch an op: conv, then expand, depthwise, project of every block, head and pool, linear
    baseline    benchmarks/baseline.py's two JIT kernels on the shapes of block 7's expand convolution and of the linear layer
    ours        this package's ops on those two shapes
"""

import sys

import torch

from effnet_aot.bench import ways
from effnet_aot.bench.workload import Point, Workloads, fold_batch_norm, layers
from effnet_aot.ops.mbconv import taps_first


def main(what, dtype, batch, size, tf32):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = bool(int(tf32))
    workload = Workloads("cuda")(Point(dtype, int(batch), int(size)))
    with torch.no_grad():
        function = {"network": network, "unfused": unfused, "baseline": baseline, "ours": ours}[what](workload)
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        function()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def network(workload):
    model = ways.ours(workload)
    return lambda: model(workload.x)


def unfused(workload):
    folded = [(conv, *fold_batch_norm(conv, bn), activation) for conv, bn, activation in layers(workload.network)]
    folded = [(conv, taps_first(weight) if conv.groups > 1 else weight, bias, activation) for conv, weight, bias, activation in folded]
    fc = workload.network.fc

    def function():
        ops, x = torch.ops.effnet, workload.x
        for index, (conv, weight, bias, activation) in enumerate(folded):
            stride, (vertical, horizontal) = list(conv.stride), conv.padding
            padding = [horizontal, horizontal, vertical, vertical]
            if index == 0:
                x = ops.conv(x, weight, bias, stride, padding, activation, torch.channels_last)
            elif index == len(folded) - 1:
                x = ops.pointwise_pool(x, weight, bias, activation)
            elif conv.groups > 1:
                x = ops.depthwise(x, weight, bias, stride, padding, activation)
            else:
                x = ops.pointwise(x, weight, bias, None, activation)
        return ops.linear(x, fc.weight, fc.bias)

    return function


def operands(workload):
    """Of the two shapes: an image of block 7's input, its expand convolution and batch norm, and the linear layer's rows."""
    conv, bn, _ = list(workload.network.mbconv7)[:3]
    side = -(-workload.point.size // 32)
    generator = torch.Generator(workload.x.device).manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=workload.x.device).to(workload.x.dtype)

    x = draw(workload.point.batch, conv.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    return x, conv, bn, draw(workload.point.batch, workload.network.fc.in_features), workload.network.fc


def baseline(workload):
    x, conv, bn, rows, fc = operands(workload)
    module = ways.load("benchmarks/baseline.py")
    return lambda: (module.pointwise_bn_relu6(x, conv, bn), module.linear_bias(rows, fc.weight, fc.bias))


def ours(workload):
    x, conv, bn, rows, fc = operands(workload)
    weight, bias = fold_batch_norm(conv, bn)
    ops = torch.ops.effnet
    return lambda: (ops.pointwise(x, weight, bias, None, "relu6"), ops.linear(rows, fc.weight, fc.bias))


if __name__ == "__main__":
    main(*sys.argv[1:])
