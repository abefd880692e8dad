"""python -m effnet_aot.bench.inductor_child STATE DTYPE BATCH SIZE DEVICE PACKAGE TF32: AOTInductor's package of the plain network."""

import sys
import time

import torch

from ..model import reference_network
from .children import load_package


def main(state, dtype, batch, size, device, package, tf32):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = bool(int(tf32))
    tensors = torch.load(state, map_location=device, weights_only=True)
    with torch.device("meta"):
        network = reference_network(tensors["fc.bias"].numel())
    network.load_state_dict(tensors, assign=True)
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.zeros(int(batch), 3, int(size), int(size), device=device, dtype=getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs={"freezing": True})
    seconds = time.perf_counter() - start
    print("loading the package", flush=True)
    load_package(package)  # what crashes here does not take the benchmark along
    print(f"{seconds:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
