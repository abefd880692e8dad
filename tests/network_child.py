"""Runs the network of test_network.py on the stub's CUDA tensors: twice in one call, then step by step. Prints which launches
and which allocations each made."""

import json
import os
import sys
from pathlib import Path

import torch
from test_network import image, weights_and_program

import effnet_aot  # noqa: F401
from effnet_aot.ops.network import decomposed


def launches():
    return sum('"cuLaunchKernelEx"' in line for line in Path(os.environ["STUB_CUDA_LOG"]).read_text().splitlines())


def main():
    torch.ops.load_library(sys.argv[1])
    to_device, take = torch.ops.stub_cuda.to_device, torch.ops.stub_cuda.take_allocations
    weights, program = weights_and_program(torch.float16)
    weights, x = [to_device(w, 0) for w in weights], to_device(image(dtype=torch.float16), 0)
    spans, allocations = [], []
    take()
    for function in (torch.ops.effnet.network, torch.ops.effnet.network, decomposed):
        before = launches() if spans else 0
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            function(x, weights, program)
        flat = take()
        spans.append([before, launches()])
        allocations.append(list(zip(flat[0::3], flat[1::3])))
    print(json.dumps({"launches": spans, "allocations": allocations}))


main()
