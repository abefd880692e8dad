"""Stock networks, converted, against torch.compile and against eager with batch norm folded:

    python benchmarks/networks.py [--models NAME ...] [--batch 1 32] [--size 224] [--dtype float16] [--json FILE] [--ways ours compile folded]

Every network and batch has a process of its own, which makes all three ways and captures each as a CUDA graph. The
processes prepare side by side, since torch.compile takes most of a minute a network, and are timed one after the other
once all of them are ready: nothing else runs then. Errors are those of the first images against the float32 network in
float64, relative to the root mean square of its outputs.

The networks are those of tests/networks.py, with 1000 classes, random weights and batch norms that do something;
reference_network stands for ModelNew, which runs on this package's ops whoever compiles it.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path = [str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks")]

import networks  # tests/networks.py, not this file

from effnet_aot import convert
from effnet_aot.bench import environment
from effnet_aot.bench.timing import Timer
from effnet_aot.bench.workload import Point, Workload, Workloads

WAYS = {"ours": "effnet_aot", "compile": "torch.compile, freezing, channels_last", "folded": "torch, BN folded, channels_last"}
aten = torch.ops.aten


# ---- the ways: each takes a Workload with the float32 network, and returns a function of its images ----


def ours(workload):
    network = convert(workload.network, workload.x[:1].float())
    if not network.report.complete:
        raise RuntimeError("not fully converted")
    return network.to(workload.x.dtype)


def compiled(workload):
    import torch._inductor.config

    torch._inductor.config.freezing = True
    function = torch.compile(copy.deepcopy(workload.network).to(workload.x.dtype, memory_format=torch.channels_last), dynamic=False)
    function(channels_last(workload.x))
    return function


def folded(workload):
    """The exported graph with each batch norm multiplied into the convolution before it."""
    module = torch.export.export(workload.network, (workload.x.float(),), strict=False).module()
    graph = module.graph
    for norm in list(graph.nodes):
        conv = norm.args[0] if norm.target is aten.batch_norm.default else None
        if conv is None or conv.target not in (aten.conv2d.default, aten.conv2d.padding) or len(conv.users) > 1:
            continue
        x, weight, bias, *rest = [*conv.args, None][: max(3, len(conv.args))]
        gamma, beta, mean, var = (attrgetter(node.target)(module).double() for node in norm.args[1:5])
        scale = gamma * (var + norm.args[7]).rsqrt()
        shift = beta - (mean if bias is None else mean - attrgetter(bias.target)(module).double()) * scale
        values = {"weight": attrgetter(weight.target)(module).double() * scale.view(-1, 1, 1, 1), "bias": shift}
        with graph.inserting_before(conv):
            for name, value in values.items():
                setattr(module, f"{conv.name}_{name}", torch.nn.Parameter(value.float(), requires_grad=False))
            conv.args = (x, *(graph.get_attr(f"{conv.name}_{name}") for name in values), *rest)
        norm.replace_all_uses_with(conv)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    module.recompile()
    for part in module.modules():
        part.training = False  # as it was exported; eval() is refused
    return module.to(workload.x.dtype, memory_format=torch.channels_last)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


# ---- one network and batch: a process that prepares, says so, and is timed when it is told to ----


@torch.no_grad()
def prepare(name, point, ways, device, quick):
    networks.CLASSES = 1000
    x = Workloads(device).images(point.batch, point.size).to(getattr(torch, point.dtype))
    workload, timer = Workload(point, networks.stock(name).to(device).requires_grad_(False), x), Timer(device, quick)
    rows, calls = {}, {}
    for way in ways:
        try:
            start = time.perf_counter()
            function = {"ours": ours, "compile": compiled, "folded": folded}[way](workload)
            images = x if way == "ours" else channels_last(x)
            rms, largest = workload.errors(function(images))
            calls[way] = timer.capture(function, images)
            rows[way] = {"rms_error": rms, "max_error": largest, "build_s": time.perf_counter() - start}
        except Exception as error:
            rows[way] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    return timer, rows, calls


@torch.no_grad()
def child(name, point, ways, device, quick):
    timer, rows, calls = prepare(name, point, ways, device, quick)
    print("ready", flush=True)
    sys.stdin.readline()
    for way, call in calls.items():
        rows[way] |= {"us": timer.median(call) * 1e6, "flushed_us": timer.median(call, flush=True) * 1e6}
    print(json.dumps(rows), flush=True)


class Child:
    def __init__(self, arguments, name, point):
        self.name, self.point = name, point
        self.ways = arguments.ways
        options = ["--ways", *self.ways, "--device", arguments.device, *(["--quick"] if arguments.quick else [])]
        command = [sys.executable, __file__, "--child", name, *map(str, point), *options]
        one = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # the processes share the cores
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | one)
        self.wait_for("ready")

    def wait_for(self, beginning):
        """The first line that begins so, or None at the end of the output; others may print there, too."""
        return next((line for line in self.process.stdout if line.startswith(beginning)), None)

    def time(self):
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            rows = json.loads(self.wait_for("{") or "{}")
        except OSError:
            rows = {}
        self.stop()
        failed = {"error": f"the process ended with {self.process.returncode}; its messages are above"}
        where = {"network": self.name, "dtype": self.point.dtype, "batch": self.point.batch, "size": self.point.size}
        return [where | {"way": way} | rows.get(way, failed) for way in self.ways]

    def stop(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def table(rows, ways, title):
    from rich.table import Table

    made = Table(title=title)
    made.add_column("network", no_wrap=True)
    peers = [way for way in ways if way != "ours"]
    for column in ("batch", *(f"{way} us" for way in ways), *(f"{way} / ours" for way in peers), *(f"{way} error" for way in ways)):
        made.add_column(column, justify="right")
    for i in range(0, len(rows), len(ways)):
        of = {row["way"]: row for row in rows[i : i + len(ways)]}
        us = {way: of[way].get("us", math.nan) for way in ways}
        ratios = [f"{us[way] / us.get('ours', math.nan):.2f}" for way in peers]
        errors = [f"{of[way]['rms_error']:.1e}" if "rms_error" in of[way] else "failed" for way in ways]
        made.add_row(rows[i]["network"], str(rows[i]["batch"]), *(f"{us[way]:.1f}" for way in ways), *ratios, *errors)
    return made


def main():
    names = [name for name in networks.STOCK if name != "ModelNew" and networks.is_installed(name)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="of " + ", ".join(WAYS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that prepare at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="few samples")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, dtype, batch, size = arguments.child
        return child(name, Point(dtype, int(batch), int(size)), arguments.ways, arguments.device, arguments.quick)

    from rich.console import Console

    start = time.perf_counter()
    points = [(name, Point(arguments.dtype, batch, arguments.size)) for name in arguments.models for batch in arguments.batch]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        children = list(pool.map(lambda point: Child(arguments, *point), points))
    prepared = time.perf_counter() - start
    rows = [row for one in children for row in one.time()]
    results = {
        "environment": environment.describe(arguments.device),
        "settings": {"ways": {way: WAYS[way] for way in arguments.ways}, "prepared_s": prepared, "seconds": time.perf_counter() - start, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        "networks": rows,
    }
    where = results["environment"]
    title = f"{where['device']}, torch {where['torch']}, {arguments.dtype}, {arguments.size} x {arguments.size}, microseconds a call (on a GPU a CUDA graph's replay)"
    Console(width=max(120, Console().width)).print(table(rows, arguments.ways, title))
    for row in rows:
        if "error" in row:
            print(f"{row['network']}, batch {row['batch']}, {row['way']}: {row['error']}", file=sys.stderr)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
