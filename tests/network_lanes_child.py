"""Runs the network of test_network.py on the stub's CUDA tensors, for a batch that its GPU takes in two lanes and for one image more:
three times each, with results that are dropped at once, so that addresses come back and the calls become a graph. Prints the
errors against float64, PyTorch's last."""

import json
import sys

import torch
from test_model import error
from test_network import image, weights_and_program

import effnet_aot  # noqa: F401
from effnet_aot.ops.network import decomposed


def main():
    torch.ops.load_library(sys.argv[1])
    to_device, to_host = torch.ops.stub_cuda.to_device, torch.ops.stub_cuda.to_host
    weights, program = weights_and_program(torch.float16)
    given = [to_device(w, 0) for w in weights]
    errors = []
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        for batch, layout in ((96, "contiguous"), (96, "channels_last"), (97, "contiguous")):
            images = image(batch, torch.float16, layout=layout)
            exact, x = decomposed(images.double(), [w.double() for w in weights], program), to_device(images, 0)
            ours = [error(to_host(torch.ops.effnet.network(x, given, program)), exact) for _ in range(3)]
            errors.append([*ours, error(decomposed(images, weights, program), exact)])
    print(json.dumps(errors))


main()
