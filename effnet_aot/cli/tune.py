"""Find the fastest variant for every shape: build the candidates anywhere, measure them on a GPU, ship what won.

  python -m effnet_aot tune build --out bundle --archs 9.0 --shapes modelnew mobilenetv2_100
  python -m effnet_aot tune measure --bundle bundle               # on the GPU; again with --image ptx for the 8.9 table
  python -m effnet_aot tune sequence --bundle bundle              # there, too: among the near ones, by the time of whole networks
  python -m effnet_aot tune weigh --bundle bundle                 # there, too: what of the 8.9 table an RTX 4090 would gain by
  pip install .                                                   # compiles the tables' variants and choices into the library

`build` needs a checkout and Triton, and no GPU. `measure` and `sequence` need torch and a driver, `weigh` Nsight Compute besides. The tables are triton_src/tuned/sm_90.json
and so on, one for the images of a capability; a choice in them is replaced by one that is at least 2% faster.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Printed

from ..aot.architectures import SUPPORTED
from ..aot.errors import BuildError
from ..aot.tables import Table, path_of, read_table, read_tables, write_table
from ..bench.projection import GPUS
from ..tune.bundle import CHECKOUT, FILES, PRECISIONS, build, package
from ..tune.calls import MODELNEW, load, network_calls
from . import positive

TABLES = CHECKOUT / "triton_src" / "tuned"


def add_arguments(parser):
    commands = parser.add_subparsers(dest="action", metavar="action", required=True)
    command = commands.add_parser("build", help="compile every candidate into a bundle")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the bundle")
    command.add_argument("--ops", nargs="+", metavar="OP", help="whose candidates (default: of every op)")
    command.add_argument("--archs", nargs="+", choices=SUPPORTED, default=["9.0"], metavar="ARCH", help="of the GPU that measures (default: 9.0); the PTX of 8.9 is always added")
    command.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["float16", "float32"], help="default: float16 float32, which is TF32")
    command.add_argument("--shapes", nargs="+", default=[MODELNEW], metavar="NET", help="networks whose calls go along: modelnew, or models of timm or torchvision")
    command.add_argument("--size", type=positive, help="height and width of their images (default: the network's own)")

    command = commands.add_parser("measure", help="check and time the candidates of a bundle on this GPU")
    add_measuring(command, seconds="stop after so long; the same command goes on from there")
    command.add_argument("--ops", nargs="+", metavar="OP", help="default: every op")

    command = commands.add_parser("sequence", help="choose again among what `measure` found near the fastest, by the time of whole networks")
    add_measuring(command, seconds="stop after so long; what was decided until then is written")

    command = commands.add_parser("weigh", help="take back the choices by which the GPU that a table is for would lose, by projection from counters")
    command.add_argument("--bundle", type=Path, required=True, metavar="FOLDER", help="the one that was measured")
    command.add_argument("--project", choices=GPUS, default="8.9", metavar="ARCH", help="the GPU, and its table: 8.9 is an RTX 4090 (default)")
    command.add_argument("--out", type=Path, default=TABLES, metavar="FOLDER", help="where the table is (default: triton_src/tuned)")
    command.add_argument("--in-bundle", action="store_true", help=argparse.SUPPRESS)

    command = commands.add_parser("show", help="print the tables")
    command.add_argument("tables", type=Path, nargs="*", help="default: those of this checkout")
    command.add_argument("--ops", nargs="+", metavar="OP")


def add_measuring(command, seconds):
    command.add_argument("--bundle", type=Path, required=True, metavar="FOLDER")
    command.add_argument("--shapes", nargs="+", metavar="NET", help="default: those of the bundle")
    command.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16", "float32"], default=["float16", "float32"], help="default: float16 float32")
    command.add_argument("--no-tf32", action="store_true", help="float32 in true float32, not on the tensor cores")
    command.add_argument("--batches", type=positive, nargs="+", default=[1, 10, 32, 128], metavar="N", help="default: 1 10 32 128")
    command.add_argument("--image", choices=["auto", "cubin", "ptx"], default="auto", help="ptx measures the table of GPUs that the PTX was made for")
    command.add_argument("--out", type=Path, default=TABLES, metavar="FOLDER", help="where the table goes (default: triton_src/tuned)")
    command.add_argument("--seconds", type=positive, help=seconds)
    command.add_argument("--in-bundle", action="store_true", help=argparse.SUPPRESS)  # the process that measures


def run(arguments):
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    try:
        return {"build": run_build, "measure": run_measure, "sequence": run_sequence, "weigh": run_weigh, "show": run_show}[arguments.action](arguments, console)
    except (RuntimeError, BuildError) as error:
        console.print(str(error), markup=False)
        return 1


def run_build(arguments, console):
    begin = time.perf_counter()
    build(arguments.out, arguments.shapes, arguments.ops, arguments.archs, arguments.dtypes, arguments.size)
    size = sum((arguments.out / name).stat().st_size for name in FILES) / 1e6
    console.print(f"{arguments.out}: {size:.1f} MB in {time.perf_counter() - begin:.0f} s", markup=False)
    return 0


def run_measure(arguments, console):
    if not arguments.in_bundle:
        for table in TABLES.glob("sm_*.json"):  # what is not measured now stays as it is
            if not (arguments.out / table.name).exists():
                arguments.out.mkdir(parents=True, exist_ok=True)
                shutil.copy(table, arguments.out)
        return in_bundle(arguments, "measure", *options_of(arguments), image=arguments.image)
    return Measurement(arguments, console).run()


def run_sequence(arguments, console):
    if not arguments.in_bundle:
        return in_bundle(arguments, "sequence", *options_of(arguments), image=arguments.image)
    return Sequence(arguments, console).run()


def options_of(arguments):
    names = ("shapes", "ops", "dtypes", "batches", "image", "seconds")
    options = [word for name in names if (value := getattr(arguments, name, None)) for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]
    return [*options, *(["--no-tf32"] if arguments.no_tf32 else [])]


def in_bundle(arguments, action, *options, image):
    """A process of its own, whose effnet_aot has the bundle's library."""
    missing = [name for name in FILES if not (arguments.bundle / name).exists()]
    if missing:
        raise RuntimeError(f"{arguments.bundle} is no bundle: it lacks {', '.join(missing)}")
    with package(arguments.bundle) as folder:
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "EFFNET_AOT_IMAGE": image}
        command = [sys.executable, "-m", "effnet_aot", "tune", action, "--in-bundle", "--bundle", arguments.bundle.resolve(), "--out", arguments.out.resolve(), *map(str, options)]
        return subprocess.run(command, env=environment).returncode


class OnGpu:
    """What measuring starts from: the library, the clock, the table, the bundle's calls, and what the times are times of."""

    def __init__(self, arguments, console):
        from ..tune.library import Library
        from ..tune.measure import Clock, problems

        if not torch.cuda.is_available():
            raise RuntimeError(f"tune {arguments.action}: torch finds no usable GPU here")
        self.arguments, self.console = arguments, console
        self.library, self.clock = Library(), Clock()
        self.begin = time.perf_counter()
        image = self.library.image()
        self.capability = int(image.split("_")[1])
        self.path = path_of(arguments.out, self.capability)
        self.table = read_table(self.path) if self.path.exists() else Table(self.capability, {}, [])
        self.environment = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "image": image,
            "triton": json.loads((arguments.bundle / "manifest.json").read_text())["triton"],
        }  # fmt: skip
        self.recorded = recorded = load(arguments.bundle / "calls.json")
        self.networks = {name: recorded[name] if name in recorded else network_calls(name) for name in arguments.shapes or recorded}
        self.problems = problems(self.networks, arguments.dtypes, arguments.batches)
        bundle = hashlib.sha256((arguments.bundle / "manifest.json").read_bytes()).hexdigest()
        self.identity = {**self.environment, "bundle": bundle, "tf32": not arguments.no_tf32}
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not arguments.no_tf32

    @property
    def times(self):
        """Where `measure` leaves all times, which `sequence` needs."""
        return self.path.with_suffix(".times")

    @property
    def seconds(self):
        return time.perf_counter() - self.begin

    def expired(self):
        return self.arguments.seconds is not None and self.seconds > self.arguments.seconds

    @contextmanager
    def progress(self, total):
        """(told(what), advance())"""
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress, torch.no_grad():
            task = progress.add_task("", total=total)
            yield lambda what: progress.update(task, description=what), lambda: progress.advance(task)


class Measurement(OnGpu):
    def __init__(self, arguments, console):
        from ..tune.measure import Journal

        super().__init__(arguments, console)
        self.problems = [p for p in self.problems if not arguments.ops or p.call.op in arguments.ops]
        self.journal = Journal(self.path.with_suffix(".journal"), self.identity)

    def run(self):
        from ..tune.measure import measure

        standing = {line.key: line.variant for line in self.table.lines}
        with self.progress(len(self.problems)) as (told, advance):
            for problem in self.problems:
                told(str(problem))
                if self.expired():
                    break
                if str(problem) not in self.journal.done:
                    fastest = None if problem.inner else functools.partial(self.fastest, problem)
                    inner = [m for p in replace(problem, inner=None).inside() if (m := self.journal.done.get(str(p)))]
                    self.journal.add(problem, measure(self.library, self.clock, problem, standing, not self.arguments.no_tf32, fastest, inner))
                advance()
        return self.finish(self.seconds)

    def fastest(self, problem, call):
        """The variant for a part of the problem, by what was measured so far."""
        measured = self.journal.done.get(str(replace(problem, call=call)))
        return min(measured.times, key=measured.times.get, default=None) if measured else None

    def finish(self, seconds):
        from ..tune.choose import needed, update
        from ..tune.measure import Journal

        wanted = {str(p) for p in self.problems}
        done = {name: measured for name, measured in self.journal.done.items() if name in wanted}
        measured = list({m.key: m for m in done.values() if m}.values())
        pairs = sum(len(m.times) + len(m.wrong) for m in measured)
        self.console.print(f"{len(measured)} shapes, {pairs} candidates of them, {seconds:.0f} s; {len(done)} of {len(wanted)} calls done")
        for m in measured:
            for variant, why in m.wrong.items():
                self.console.print(f"WRONG {m.op}/{variant} on {words(m.shape)}, batch {m.batch}: {why}", markup=False)
        table = update(self.table, measured, self.capability)
        table.lines = needed(table.lines, self.problems, {p: m for p in self.problems if (m := done.get(str(p)))})
        table.measured = self.environment
        write_table(self.path, table)
        keys = {m.key for m in measured}
        print_table(self.console, table, [line for line in table.lines if line.key in keys])
        self.console.print(f"{self.path}: {len(table.lines)} lines", markup=False)
        times = Journal(self.times, self.identity)
        for name, m in done.items():
            if name not in times.done or times.done[name] != m:
                times.add(name, m)
        if len(done) == len(wanted):
            self.journal.remove()
        return 0


class Sequence(OnGpu):
    def __init__(self, arguments, console):
        from ..tune.measure import Journal
        from ..tune.networks import chains, load

        super().__init__(arguments, console)
        self.done = Journal.read(self.times, self.identity)
        if not self.done:
            raise RuntimeError(f"no times of this bundle on this GPU in {self.times}: `tune measure` leaves them there")
        path = arguments.bundle / "networks.json"
        recorded = load(path) if path.exists() else {}
        self.chains = {name: recorded[name] if name in recorded else chains(name) for name in self.networks}
        self.lines = {line.key: line for line in self.table.lines}
        self.fixed, self.points, self.changes, self.wrong = set(), [], [], 0

    def run(self):
        points = [(name, dtype, batch) for name in self.chains for dtype in self.arguments.dtypes for batch in self.arguments.batches]
        with self.progress(len(points)) as (told, advance):
            for name, dtype, batch in points:
                for chain in self.chains[name]:
                    if self.expired():
                        break
                    self.settle(name, chain, dtype, batch, told)
                advance()
        return self.finish()

    def settle(self, name, chain, dtype, batch, told):
        from ..tune import sequence

        where, calls = f"{name}, {dtype}, batch {batch}", chain.calls()
        told(where)
        keys = sequence.keys_of(calls, dtype, batch, self.done)
        measured = {m.key: m for m in self.done.values() if m}
        measured = {key: measured[key] for found in keys.values() for key in found if key}
        if not measured:
            self.console.print(f"{where}: not measured yet", markup=False)
            return
        arguments = chain.make(batch, getattr(torch, dtype), self.clock.device)
        variants = sequence.starting(measured, measured, self.lines)
        trials = sequence.Trials(self.library, self.clock, lambda: chain.run(arguments))
        settled = sequence.settle(
            trials, measured, variants, self.fixed, sequence.ships(self.lines), self.expired, lambda key: told(f"{where}: {key[0]} {words(key[2])}")
        )  # fmt: skip
        why = sequence.check(self.library, chain, arguments, settled.variants) if settled.changes else None
        if why:
            self.wrong += 1
            self.console.print(f"WRONG {where}: {why}; its choices stay as they were", markup=False)
            return
        counts = sequence.places(calls, keys, settled.variants)
        for line in sequence.lines_of(settled, measured, self.lines, counts, self.capability):
            self.lines[line.key] = line
        # What networks share is decided in the first of them.
        self.fixed |= settled.reached
        self.points.append((name, dtype, batch, settled))
        self.changes += settled.changes
        self.write()  # whatever becomes of the next one

    def write(self):
        from ..tune.choose import needed
        from ..tune.measure import problems

        every = problems(self.recorded | self.networks, self.arguments.dtypes, self.arguments.batches)
        self.table.lines = needed(list(self.lines.values()), every, {p: m for p in every if (m := self.done.get(str(p)))})
        names = dict.fromkeys(name for name, *_ in self.points)
        self.table.measured["sequence"] = f"{len(self.changes)} choices by the times of whole networks ({', '.join(names)})"
        write_table(self.path, self.table)

    def finish(self):
        changed = Printed("op", "precision", "shape", "batch", "before", "after", "us gained", title="Choices that changed", title_justify="left")
        for change in self.changes:
            op, precision, shape, batch = change.key
            changed.add_row(op, precision, words(shape), str(batch), change.before, change.after, f"{1e6 * change.seconds:.2f}")
        printed = Printed("network", "dtype", "batch", "us before", "us after", "gain", "changed", title="Whole networks", title_justify="left")
        for name, dtype, batch, s in self.points:
            done = "" if s.complete else ", not all tried"
            printed.add_row(name, dtype, str(batch), f"{1e6 * s.before:.1f}", f"{1e6 * s.after:.1f}", f"{s.before / s.after:.3f}", f"{len(s.changes)}{done}")
        self.console.print(changed)
        self.console.print(printed)
        expected = len(self.arguments.dtypes) * len(self.arguments.batches) * sum(map(len, self.chains.values()))
        self.console.print(f"{len(self.points)} of {expected} networks done, {len(self.changes)} choices changed, {self.wrong} wrong, {self.seconds:.0f} s", markup=False)
        self.console.print(f"{self.path}: {len(self.table.lines)} lines", markup=False)
        return 0


def run_weigh(arguments, console):
    path = path_of(arguments.out, int(arguments.project.replace(".", "")))
    if not path.exists():
        raise RuntimeError(f"no table {path}: `tune measure` writes it")
    if not arguments.in_bundle:
        return in_bundle(arguments, "weigh", "--project", arguments.project, image="ptx")
    from ..tune.weigh import settle, weigh

    table, gpu = read_table(path), GPUS[arguments.project]
    weighed = weigh(path, arguments.bundle / "calls.json", gpu)
    printed = Printed("op", "shape", "batch", "variant", "us", "default's us", "choice", title=f"{table.name}: projection onto {gpu.name}, not measured there", title_justify="left")
    for w in sorted(weighed, key=lambda w: w.line.key):
        printed.add_row(w.line.op, words(w.line.shape), str(w.line.batch), w.line.variant, f"{w.us:.2f}", f"{w.default_us:.2f}", "stands" if w.stands else "the default's")
    console.print(printed)
    table.lines = settle(table.lines, weighed)
    table.measured["weighed"] = f"projection onto {gpu.name}"
    write_table(path, table)
    console.print(f"{path}: {sum(w.stands for w in weighed)} of {len(weighed)} choices stand", markup=False)
    return 0


def run_show(arguments, console):
    tables = [read_table(path) for path in arguments.tables] or read_tables(TABLES)
    if not tables:
        console.print(f"no tables in {TABLES}", markup=False)
    for table in tables:
        print_table(console, table, [line for line in table.lines if not arguments.ops or line.op in arguments.ops])
    return 0


def words(shape):
    return " ".join(f"{name}={value}" for name, value in shape)


def print_table(console, table, lines):
    title = f"{table.name}: " + ", ".join(f"{name} {value}" for name, value in table.measured.items())
    printed = Printed("op", "shape", "batch", "variant", "us", "default's us", "gain", title=title, title_justify="left")
    for line in sorted(lines, key=lambda line: line.key):
        gain = "" if line.variant == line.default else f"{line.default_us / line.us:.2f}"
        printed.add_row(line.op, words(line.shape), str(line.batch), line.variant, f"{line.us:.2f}", f"{line.default_us:.2f}", gain)
    console.print(printed)
    total, default = sum(line.us for line in lines), sum(line.default_us for line in lines)
    if total:
        changed = sum(line.variant != line.default for line in lines)
        console.print(f"{changed} of {len(lines)} choices are not the default's; sum {total:.0f} us, by default {default:.0f} us\n")
