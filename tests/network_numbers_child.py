"""Runs networks on CUDA tensors in host memory, with a driver that executes PTX. Prints, for each, the error against float64, the larger one
of the network as it is and held, and that of eager PyTorch on the CPU, relative to the result."""

import json
import sys

import torch
from op_cases import lay_out
from test_model import error, images, pair
from test_network import image, weights_and_program

import effnet_aot  # noqa: F401
from effnet_aot.ops.network import decomposed


def error_on_device(x, weights, program, exact):
    to_device, to_host = torch.ops.stub_cuda.to_device, torch.ops.stub_cuda.to_host
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        x, weights = to_device(x, 0), [to_device(w, 0) for w in weights]
        out = to_host(torch.ops.effnet.network(x, weights, program)).clone()
        number = torch.ops.effnet._hold_network(weights, program)
        held = to_host(torch.ops.effnet._held_network(x, number)).clone()
        torch.ops.effnet._release_network(number)
        return max(error(out, exact), error(held, exact))


def every_step(dtype, layout):
    weights, program = weights_and_program(dtype)
    x = image(16, dtype=dtype, layout=layout)
    exact, eager = decomposed(x.double(), [w.double() for w in weights], program), decomposed(x, weights, program)
    return error_on_device(x, weights, program, exact), error(eager, exact)


def model(dtype, layout):
    ours, reference = pair(dtype=dtype)
    x = lay_out(images(4, dtype=dtype), layout)
    with torch.no_grad():
        eager, exact = reference(x), reference.double()(x.double())
    folded = ours.fold()
    return error_on_device(x, folded.weights, folded.program, exact), error(eager, exact)


def main():
    torch.ops.load_library(sys.argv[1])
    errors = {}
    for build in (every_step, model):
        for precision, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}.items():
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            for layout in ("contiguous", "channels_last"):
                errors[f"{build.__name__}-{precision}-{layout}"] = build(dtype, layout)
    print(json.dumps(errors))


main()
