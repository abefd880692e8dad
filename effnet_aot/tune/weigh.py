"""What a GPU gains by the choices that were measured on another one: a projection from counters (bench/projection.py).

A table of PTX variants is measured on the GPU at hand, which may be no judge of the one that the table is for: it may have
the bandwidth or the tensor cores to spare that the other has not. So each choice is run once more under Nsight Compute,
and the default that it replaces; where the projection says that the other GPU would lose by it, the default is put back.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from ..aot.tables import Line
from ..bench.counters import collect
from ..bench.projection import project

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # the others are float32


@dataclass(frozen=True)
class Weighed:
    """The projected microseconds of a line's variant and of its default."""

    line: Line
    us: float
    default_us: float

    @property
    def stands(self):
        return self.us <= self.default_us


def weigh(table, calls, gpu):
    """A Weighed for every line of the table's file that is not the default and belongs to one of the calls of that file.
    RuntimeError where there are no counters."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "launches.json")
        kernels = collect(table, calls, said, script=Path(__file__).with_name("weigh_child.py"), image="ptx")
        launches = json.loads(said.read_text())
    kernels = iter([kernel for kernel in kernels if kernel["kernel"].startswith("effnet_")])
    found = []
    for entry in launches:
        line = Line(**{**entry["line"], "shape": tuple(map(tuple, entry["line"]["shape"]))})
        default_us, us = (sum(project(next(kernels), gpu, DTYPES.get(line.precision, "float32"))["expected_us"] for _ in range(count)) for count in entry["launches"])
        found.append(Weighed(line, us, default_us))
    if next(kernels, None):
        raise RuntimeError("ncu saw more kernels than were launched")
    return found


def settle(lines, weighed):
    """The lines, with the default's variant where that is what the projection prefers."""
    lost = {w.line.key for w in weighed if not w.stands}
    return [replace(line, variant=line.default, us=line.default_us) if line.key in lost else line for line in lines]
