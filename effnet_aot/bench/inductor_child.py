"""python -m effnet_aot.bench.inductor_child STATE DTYPE BATCH SIZE DEVICE PACKAGE TF32: AOTInductor's package of the network."""

import sys
import time

import torch

from .children import load_package
from .ways import WAYS
from .workload import Point, load_workload


def main(state, dtype, batch, size, device, package, tf32):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = bool(int(tf32))
    workload = load_workload(state, Point(dtype, int(batch), int(size)), device)
    # What freezing would do is done before: with it, torch 2.11's packages of a channels_last network compute other logits on GPUs.
    way = WAYS["folded-channels-last"]
    network, x = way.build(workload), way.images(workload)
    start = time.perf_counter()
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    seconds = time.perf_counter() - start
    print("loading the package", flush=True)
    load_package(package)  # what crashes here does not take the benchmark along
    print(f"{seconds:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
