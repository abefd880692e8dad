"""python -m effnet_aot.bench.compile_child STATE DTYPE BATCH SIZE DEVICE TF32 QUICK: torch.compile's network. Compiles and prints
a line of JSON; for every line that it reads it measures and prints another."""

import json
import sys

import torch

from ..model import reference_network
from .comparison import attempt, measure
from .timing import Timer
from .ways import WAYS
from .workload import Point, Workload, Workloads


def main(state, dtype, batch, size, device, tf32, quick):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = bool(int(tf32))
    point = Point(dtype, int(batch), int(size))
    tensors = torch.load(state, map_location=device, weights_only=True)
    with torch.device("meta"):
        network = reference_network(tensors["fc.bias"].numel())
    network.load_state_dict(tensors, assign=True)
    images = Workloads(device).images(point.batch, point.size)
    workload = Workload(point, network.eval().requires_grad_(False), images.to(getattr(torch, dtype)))
    timer, way, answers = Timer(device, bool(int(quick))), WAYS["compile"], sys.stdout
    sys.stdout = sys.stderr  # the compiler may print
    with attempt() as built:
        function, built["build_s"] = timer.once(lambda: way.build(workload))
    print(json.dumps(built), file=answers, flush=True)
    for _ in sys.stdin:
        with attempt() as row:
            row |= measure(timer, way, workload, function)
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
