"""python -m effnet_aot.bench.compile_child STATE DTYPE BATCH SIZE DEVICE TF32 QUICK: torch.compile's network. Compiles and prints
a line of JSON; for every line that it reads it measures and prints another."""

import json
import sys

import torch

from .comparison import attempt, measure
from .timing import Timer
from .ways import WAYS
from .workload import Point, load_workload


def main(state, dtype, batch, size, device, tf32, quick):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = bool(int(tf32))
    workload = load_workload(state, Point(dtype, int(batch), int(size)), device)
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
