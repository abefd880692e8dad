"""A float32 block with many pixels on CUDA tensors in host memory, on a driver that executes PTX: called, then held and called twice. Prints
the kernels that each launched, and whether the results are the same."""

import json
import os
import sys
from pathlib import Path

import torch

from effnet_aot import ops
from effnet_aot.ops import Network


def launched():
    lines = map(json.loads, Path(os.environ["STUB_CUDA_LOG"]).read_text().splitlines())
    return [record["kernel"] for record in lines if record["call"] == "cuLaunchKernelEx"]


def main():
    torch.ops.load_library(sys.argv[1])
    torch.backends.cudnn.allow_tf32 = True
    to_device, to_host = torch.ops.stub_cuda.to_device, torch.ops.stub_cuda.to_host
    torch.manual_seed(0)
    network, hidden, channels = Network(), 48, 8
    weights = {"expand_weight": torch.randn(hidden, channels), "expand_bias": torch.randn(hidden), "depthwise_weight": ops.taps_first(torch.randn(hidden, 1, 3, 3)),
               "depthwise_bias": torch.randn(hidden), "project_weight": torch.randn(16, hidden), "project_bias": torch.randn(16)}  # fmt: skip
    network.add("mbconv", **weights, activation="relu6", padding=(1, 1, 1, 1))
    x = to_device(torch.randn(64, channels, 8, 8).to(memory_format=torch.channels_last), 0)
    given, seen, outs = [to_device(w, 0) for w in network.weights], [], []

    def run(function, *arguments):
        before = len(launched()) if seen else 0
        result = function(*arguments)
        seen.append(launched()[before:])
        return result

    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        outs.append(to_host(run(torch.ops.effnet.network, x, given, network.numbers)).clone())
        number = run(torch.ops.effnet._hold_network, given, network.numbers)
        outs += [to_host(run(torch.ops.effnet._held_network, x, number)).clone() for _ in range(2)]
    print(json.dumps([seen, [torch.equal(out, outs[0]) for out in outs], outs[0].abs().max().item()]))


main()
