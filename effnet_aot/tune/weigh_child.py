"""weigh_child.py TABLE CALLS OUT: launches the default and then the variant of every line of TABLE in which they differ,
between the profiler's marks, and writes to OUT how many kernels each of them was. Run as a file, under ncu."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from effnet_aot.aot.tables import NONE, read_table
from effnet_aot.tune import calls
from effnet_aot.tune.calls import INNER
from effnet_aot.tune.library import Library
from effnet_aot.tune.measure import own_choice

# A dtype, whether TF32 is allowed, and the precisions of the lines that may then be taken: kernels without products have no TF32.
DTYPES = (("float16", True, {"fp16"}), ("bfloat16", True, {"bf16"}), ("float32", True, {"tf32", "fp32"}), ("float32", False, {"fp32"}))


def main(table, recorded, out):
    lines = {line.key: line for line in read_table(table).lines if line.variant != line.default}
    library, written = Library(), []
    every = dict.fromkeys(call for found in calls.load(recorded).values() for call in found)
    for call in every:
        for dtype, tf32, precisions in DTYPES:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            for inner in (None, *(INNER if call.op == "mbconv" and "tf32" in precisions else ())):
                for batch in sorted({line.batch for line in lines.values() if (line.op, line.precision) == inner or (not inner and line.op == call.op and line.precision in precisions)}):
                    arguments = call.make(batch, getattr(torch, dtype), "cuda")
                    choice, without = own_choice(library, lambda: call.run(arguments), call.op, inner)
                    line = lines.pop(choice.key, None) if choice else None
                    if line:
                        counts = [launch(library, call, arguments, without | {line.key: variant}) for variant in (line.default, line.variant)]
                        written.append({"line": asdict(line), "launches": counts})
    Path(out).write_text(json.dumps(written))


def launch(library, call, arguments, variants):
    """The number of kernels."""
    with library.assigned(variants):
        call.run(arguments)  # loads what is profiled below
        library.choices()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call.run(arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        # A block asks twice: for its workspace, and when it is launched.
        return len({choice for choice in library.choices() if choice.variant != NONE})


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
