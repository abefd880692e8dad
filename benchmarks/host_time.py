"""How long a call of ModelNew without a CUDA graph keeps the host, and how long the caller waits for its result:

    python benchmarks/host_time.py [--batch 1 10 128] [--dtype float16 float32] [--processes 3] [--json FILE]

"host" is four calls at a time, the GPU idle at the first of them; "call" is from an idle GPU to the result on it. On a machine that
others use, too, one such figure says little: fresh processes run one after the other, and each takes --medians medians of either at
every point. Shown are their median, the least and the largest.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks")]

from effnet_aot import ModelNew
from effnet_aot.bench import environment
from effnet_aot.bench.timing import Timer
from effnet_aot.bench.workload import Point, Workloads

TIMES = ("host", "call")


@torch.no_grad()
def measure(points, device, medians):
    """Of every point, microseconds: the medians of either time."""
    workloads, timer, rows = Workloads(device), Timer(device), []
    for point in points:
        workload = workloads(point)
        call = functools.partial(ModelNew.from_reference(workload.network), workload.x)
        for _ in range(20):
            call()
        rows.append(
            {
                "host_us": [round(1e6 * timer.host(call), 2) for _ in range(medians)],
                "call_us": [round(1e6 * timer.median(call, ahead=False, budget=0.05), 2) for _ in range(medians)],
            }
        )
    return rows


def in_a_process(arguments):
    """What measure returns, from a process of its own."""
    options = [f"--{name}={value}" for name, value in (("device", arguments.device), ("medians", arguments.medians), ("size", arguments.size))]
    command = [sys.executable, __file__, "--child", *options, "--dtype", *arguments.dtype, "--batch", *map(str, arguments.batch)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def table(rows, title):
    from rich.table import Table

    made = Table(title=title)
    for column in ("dtype", "batch", "process"):
        made.add_column(column)
    for name in TIMES:
        made.add_column(f"{name}, us", justify="right")
        made.add_column("least to largest", justify="right")
    for row in rows:
        cells = []
        for name in TIMES:
            us = row[f"{name}_us"]
            cells += [f"{statistics.median(us):.1f}", f"{min(us):.1f} to {max(us):.1f}"]
        made.add_row(row["dtype"], str(row["batch"]), str(row["process"]), *cells)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 10, 128])
    parser.add_argument("--dtype", nargs="+", choices=["float16", "bfloat16", "float32"], default=["float16", "float32"])
    parser.add_argument("--size", type=int, default=240)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--medians", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    points = [Point(dtype, batch, arguments.size) for dtype in arguments.dtype for batch in arguments.batch]
    if arguments.child:
        return print(json.dumps(measure(points, arguments.device, arguments.medians)))

    from rich.console import Console

    runs = [in_a_process(arguments) for _ in range(arguments.processes)]
    rows = [point._asdict() | {"process": i} | run[k] for k, point in enumerate(points) for i, run in enumerate(runs, 1)]
    results = {"environment": environment.describe(arguments.device), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rows": rows}
    where = results["environment"]
    title = f"{where['device']}, torch {where['torch']}, {arguments.size} x {arguments.size}, commit {where['commit']}: medians"
    Console(width=max(120, Console().width)).print(table(rows, title))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
