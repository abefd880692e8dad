"""Runs the Triton files that go through the JIT, through Triton's interpreter instead.

A process of its own: triton reads TRITON_INTERPRET when it is imported. Prints their errors, as JSON.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from interpreter import complete_interpreter

from effnet_aot.bench import ways
from effnet_aot.bench.workload import Point, Workloads

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
complete_interpreter()
workloads = Workloads("cpu", num_classes=10)  # a thousand columns take the interpreter minutes
errors = {}
with torch.no_grad():
    for name, point, layout in [
        ("single-file", Point("float32", 1, 21), torch.contiguous_format),
        ("baseline", Point("float16", 2, 17), torch.channels_last),
    ]:
        workload = workloads(point)
        errors[name] = workload.errors(ways.WAYS[name].build(workload)(workload.x.contiguous(memory_format=layout)))[0]
print(json.dumps(errors))
