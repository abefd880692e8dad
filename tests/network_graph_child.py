"""Calls the network of test_network.py again and again on the stub's CUDA tensors: four times with results that are dropped at
once, so that addresses come back, and four times with results that are kept. Prints whether all were equal."""

import json
import sys

import torch
from test_network import image, weights_and_program

import effnet_aot  # noqa: F401


def main():
    torch.ops.load_library(sys.argv[1])
    to_device, to_host = torch.ops.stub_cuda.to_device, torch.ops.stub_cuda.to_host
    weights, program = weights_and_program(torch.float16)
    weights, x = [to_device(w, 0) for w in weights], to_device(image(dtype=torch.float16), 0)
    results, kept = [], []
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        for keep in 4 * [False] + 4 * [True]:
            out = torch.ops.effnet.network(x, weights, program)
            results.append(to_host(out).clone())
            if keep:
                kept.append(out)
            del out
    print(json.dumps({"equal": [torch.equal(r, results[0]) for r in results], "nonzero": bool(results[0].abs().sum() > 0)}))


main()
