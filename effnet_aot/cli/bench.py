"""Time the network beside its peers, check each against float64, and say how far our kernels are from the machine's limits.

All ways compute the same weights and images, with batch norms that do something. Times are medians: of CUDA-graph replays for
the ways that say so, with a warm and with a flushed L2 cache. Errors are against torch.nn in float64, relative to the root
mean square of its logits. Peers that are not installed are named, those that fail say why.
"""

import importlib.util
import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import effnet_aot

from ..bench import projection
from ..bench.ways import OURS, PEERS, QUICK
from . import open_console, positive


def add_arguments(parser):
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 10, 128], metavar="N", help="images in a batch (default: 1 10 128)")
    parser.add_argument("--dtype", nargs="+", choices=["float16", "bfloat16", "float32"], default=["float16", "float32"], help="default: float16 float32")
    parser.add_argument("--size", type=positive, default=240, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU if there is one")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER", help=f"which, none after --peers alone (default: all: {', '.join(PEERS)})")
    parser.add_argument("--skip-slow", action="store_true", help="leave out AOTInductor, which takes a minute or two to build")
    parser.add_argument("--quick", action="store_true", help="few samples, and by default no peer that compiles")
    parser.add_argument("--no-tf32", action="store_true", help="float32 in true float32, not on the tensor cores")
    parser.add_argument("--cold-start", action="store_true", help="also fresh processes, up to their first result")
    parser.add_argument("--scaling", action="store_true", help="also batches from 1 to 512 and images from 128 to 512; peers: those of --peers, or two quick ones")
    parser.add_argument("--counters", action="store_true", help="also the GPU's counters: of the kernels that the project began with and of ours in their place, and of the network kernel by kernel; needs ncu")
    parser.add_argument("--project", choices=projection.GPUS, metavar="ARCH", help="also project the time of ours onto another GPU, from counters of its PTX: 8.9 is an RTX 4090; needs ncu")
    parser.add_argument("--image", choices=["auto", "cubin", "ptx"], help="which images of ours serve (default: $EFFNET_AOT_IMAGE or auto)")
    parser.add_argument("--skip-comparison", action="store_true", help="only what --cold-start, --scaling, --counters and --project add")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, after every batch and dtype")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the results as PNG files; needs matplotlib")


def run(arguments):
    console = open_console()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        arguments.parser.error("--device cuda: torch finds no usable GPU here")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        console.print("--plot needs matplotlib: pip install 'effnet_aot\\[bench]'")
        return 1
    try:
        effnet_aot.kernels()  # fails here when the package was not built
    except RuntimeError as error:
        console.print(str(error), markup=False)
        return 1
    if arguments.image:
        os.environ["EFFNET_AOT_IMAGE"] = arguments.image  # read at the first launch, and by the processes that this one starts
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not arguments.no_tf32
    try:
        return Bench(arguments, console).run()
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches


class Bench:
    def __init__(self, arguments, console):
        from ..bench import environment
        from ..bench.scaling import BATCH
        from ..bench.timing import Timer
        from ..bench.workload import Point, Workloads

        self.arguments, self.console = arguments, console
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.workloads, self.timer = Workloads(device), Timer(device, arguments.quick)
        self.points = [Point(dtype, batch, arguments.size) for dtype in arguments.dtype for batch in arguments.batch]
        self.peers = arguments.peers if arguments.peers is not None else QUICK if arguments.quick else PEERS
        if arguments.skip_slow:
            self.peers = [name for name in self.peers if name != "aoti"]
        self.results = {
            "environment": environment.describe(device),
            "settings": {
                "batch": arguments.batch, "dtype": arguments.dtype, "size": arguments.size, "peers": self.peers, "quick": arguments.quick,
                "tf32": not arguments.no_tf32, "scaling_batch": BATCH, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
            "comparison": [], "ratios": [], "machine": {}, "kernels": [], "profile": [], "cold_start": [], "scaling": [], "scaling_summary": [],
            "counters": {}, "network_counters": [], "projection": [],
        }  # fmt: skip

    def run(self):
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        where = self.results["environment"]
        self.console.print(f"[bold]{where['device']}[/], torch {where['torch']}, commit {where['commit'] or 'unknown'}, {where.get('image', 'CPU implementation')}\n")
        begin = time.perf_counter()
        with Progress(*columns, console=Console(stderr=True), transient=True) as self.progress:
            self.task = self.progress.add_task("", total=0)
            if not self.arguments.skip_comparison:
                self.comparison()
                self.kernels()
            if self.arguments.cold_start:
                self.cold_start()
            if self.arguments.scaling:
                self.scaling()
            if self.timer.cuda and not self.arguments.skip_comparison:
                self.profile()
            if self.arguments.counters:
                self.counters()
            if self.arguments.project:
                self.project()
        self.results["settings"]["seconds"] = time.perf_counter() - begin
        self.save()
        if self.arguments.plot:
            from ..bench.plots import draw

            for path in draw(self.results, self.arguments.plot):
                self.console.print(f"drawn: {path}", markup=False)
        from ..bench.comparison import is_wrong

        failed = [row for part in ("comparison", "cold_start", "scaling") for row in self.results[part] if row["role"] == "ours" and "error" in row]
        for row in failed:
            self.console.print(row["error"], markup=False)
        wrong = [row for part in ("comparison", "scaling") for row in self.results[part] if row["role"] == "ours" and "us" in row and is_wrong(row)]
        return 1 if failed or wrong else 0

    def comparison(self):
        from ..bench import comparison, report

        points = self.points
        names = [*OURS, *self.peers]
        self.more(comparison.Comparison.steps(points, names))
        for _, rows in comparison.Comparison(self.workloads, self.timer, points, names, self.advance).run():
            self.results["comparison"] += rows
            self.results["ratios"] = comparison.ratios(self.results["comparison"])
            self.save()
            self.print(*report.comparison(rows))
        if self.results["ratios"]:
            self.print(report.ratios(self.results["ratios"]))

    def kernels(self):
        from ..bench import kernels, report
        from ..bench.ways import ours

        self.more(len(self.points) + 1)
        self.advance("copy bandwidth and matrix product rate")
        machine = kernels.Machine(self.timer)
        network_us = {(row["dtype"], row["batch"]): row.get("us") for row in self.results["comparison"] if row["way"] == "ours"}
        for point in self.points:
            self.advance(f"our ops one by one: {point}")
            workload = self.workloads(point)
            with torch.no_grad():
                rows = kernels.measure(self.timer, machine, workload, ours(workload))
            self.results["kernels"] += rows
            self.results["machine"] = {"copy_bytes_per_s": machine.bandwidth, "flops_per_s": machine.rates}
            self.print(report.kernels(rows, network_us.get((point.dtype, point.batch))))
        self.save()

    def profile(self):
        """Our kernels as they follow each other in a forward pass. Last of all: a profiler slows what comes after it."""
        from ..bench import kernels
        from ..bench.ways import ours

        self.more(len(self.points))
        for point in self.points:
            self.advance(f"profile: {point}")
            workload = self.workloads(point)
            model = ours(workload)
            with torch.no_grad():
                model(workload.x)
                self.results["profile"].append({**point._asdict(), "kernels": kernels.profiled(lambda: model(workload.x))})

    def cold_start(self):
        from ..bench import cold_start, report
        from ..bench.workload import Point

        names = [name for name in cold_start.NAMES if name == "ours" or name in self.peers]
        batch = 10 if 10 in self.arguments.batch else self.arguments.batch[0]
        point = Point(self.arguments.dtype[0], batch, self.arguments.size)
        self.more(len(names))
        for row in cold_start.run(self.workloads, point, names, self.advance):
            self.results["cold_start"].append(row)
            self.save()
        self.print(*report.cold_start(self.results["cold_start"]))

    def scaling(self):
        from ..bench import report, scaling
        from ..bench.timing import Timer

        points = scaling.points(self.arguments.dtype, self.arguments.size)
        names = [*OURS, *self.arguments.peers] if self.arguments.peers is not None else scaling.QUICK
        self.more(scaling.steps(points, names))
        for rows in scaling.run(self.workloads, Timer(self.workloads.device, quick=True), points, names, self.advance):
            self.results["scaling"] += rows
            self.results["scaling_summary"] = scaling.summary(self.results["scaling"])
            self.save()
        self.print(report.scaling(self.results["scaling_summary"]), [
            f"{row['title']}, {report.heading(row)}: {report.why_not(row)}" for row in self.results["scaling"] if "us" not in row
        ])  # fmt: skip

    def collect(self, what, point, image=None):
        from ..bench.counters import collect

        self.advance(f"counters of {what}: {point}")
        keep = self.arguments.json and self.arguments.json.with_name(f"ncu-{what}-{point.dtype}-{point.batch}.csv")
        return collect(what, *point, int(not self.arguments.no_tf32), image=image, keep=keep)

    def counters(self):
        """The two kernels that the project began with, and ours in their place, at batch 10 as they were first looked at. Then
        the whole network."""
        from ..bench import report
        from ..bench.workload import Point

        points = [Point(dtype, 10, self.arguments.size) for dtype in self.arguments.dtype]
        self.more(2 * len(points) + len(self.points))
        for point in points:
            try:
                rows = {what: self.collect(what, point) for what in ("baseline", "ours")}
            except RuntimeError as error:
                self.results["counters"][point.dtype] = {"error": str(error)}
                self.console.print(f"counters, {point}: {error}", markup=False)
                continue
            self.results["counters"][point.dtype] = {**point._asdict(), **rows}
            self.save()
            self.print(report.counters(point._asdict(), rows))
        for point in self.points:
            try:
                rows = self.collect("network", point)
            except RuntimeError as error:
                self.results["network_counters"].append({**point._asdict(), "error": str(error)})
                self.console.print(f"counters of the network, {point}: {error}", markup=False)
                continue
            self.results["network_counters"].append({**point._asdict(), "kernels": rows})
            self.save()
            self.print(report.network_counters(point._asdict(), rows))

    def project(self):
        from ..bench import report

        gpu = projection.GPUS[self.arguments.project]
        self.more(2 * len(self.points))
        for point in self.points:
            try:
                found = [self.collect(what, point, image="ptx") for what in ("network", "unfused")]
            except RuntimeError as error:
                self.results["projection"].append({**point._asdict(), "error": str(error)})
                self.console.print(f"projection, {point}: {error}", markup=False)
                continue
            result = {**point._asdict(), **projection.network(*found, gpu, point.dtype)}
            self.results["projection"].append(result)
            self.save()
            self.print(*report.projection(result))

    def more(self, steps):
        self.progress.update(self.task, total=self.progress.tasks[0].total + steps)

    def advance(self, text):
        """Names what begins now; what was named before is done."""
        first = self.progress.tasks[0].description == ""
        self.progress.update(self.task, description=text, advance=0 if first else 1, refresh=True)

    def print(self, table, lines=()):
        self.console.print(table)
        for line in lines:
            self.console.print(line, markup=False)
        self.console.print()

    def save(self):
        if self.arguments.json:
            self.arguments.json.parent.mkdir(parents=True, exist_ok=True)
            partial = self.arguments.json.with_name(self.arguments.json.name + ".part")
            partial.write_text(json.dumps(self.results, indent=1) + "\n")
            os.replace(partial, self.arguments.json)
