"""Everything that is measured or tested on a GPU, one step after the other, within a time that is known beforehand:

    python tools/gpu_report.py test run bench --seconds 540

Nothing needs to be installed but torch, triton, pytest and rich; pytest-xdist is used where it is. The package is built
first, in place. A step that fails or lasts too long does not keep the others from running; one that does not fit into the
time that is left is skipped. A name stands for all steps that begin with it and a dash. Results go where --results says,
outputs to --logs. $GIT_COMMIT names the commit in the results where git cannot.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10  # seconds between the interrupt, at which pytest and bench write what they have, and the kill


# ---- the figures that matter, from what a step wrote: a list of lines ----


def us(value):
    return f"{value:.1f} us" if value < 1000 else f"{value / 1e3:.2f} ms"


def point(row):
    return f"{row['dtype']}, batch {row['batch']}"


def build(manifest):
    return [f"{len(manifest['images'])} images, triton {manifest['triton']}"]


def tests(report):
    total = ", ".join(f"{report['total'].get(outcome, 0)} {outcome}" for outcome in ("passed", "failed", "error", "skipped"))
    return [f"{total} on {', '.join(dict.fromkeys(report['serving_images']))}"]


def stress(report):
    def total(key):
        return sum(test.get(key, 0) for test in report["measured"].values())

    return tests(report) + [f"{total('cases')} random cases, {total('failed')} failed; {total('calls')} calls, {total('wrong_results')} wrong results"]


def sanitizer(text):
    summaries = re.findall(r"SUMMARY: (.*)", text) or ["no summary"]
    counts = Counter()  # of all processes
    for line in re.findall(r"^=* ?(\d+ (?:passed|failed|error|skipped|deselected).*?) ?=*$", text, re.MULTILINE):
        for count, outcome in re.findall(r"(\d+) (passed|failed|error|skipped)", line):
            counts[outcome] += int(count)
    return [*dict.fromkeys(summaries), ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or text.strip().splitlines()[-1]]


def run(results):
    ours, *peers = results["comparison"]
    peer = min(peers, key=lambda row: row["us"])
    return [
        f"{us(ours['us'])}; {peer['title']} {us(peer['us'])}, ratio {peer['us'] / ours['us']:.2f}",
        f"error {ours['rms_error']:.2e}; {peers[0]['title']} {peers[0]['rms_error']:.2e}",
    ]


def bench(results):
    failed = [f"{point(row)}: {row['title']} FAILED" for row in results["comparison"] if row["role"] == "ours" and "error" in row]
    return failed + [f"{point(row)}: {us(row['ours_us'])}; {row['peer_title']} {us(row['peer_us'])}, ratio {row['ratio']:.2f}" for row in results["ratios"]]


def counters(results):
    lines = []
    for dtype, found in results["counters"].items():
        sums = {what: us(sum(kernel["ns"] for kernel in found[what]) / 1e3) for what in ("ours", "baseline") if what in found}
        lines.append(f"{dtype}: " + (found.get("error") or f"{sums['ours']}, the kernels of the beginning {sums['baseline']}, cold cache"))
    return lines


def projection(results):
    return [
        f"{point(row)}: " + (row.get("error") or f"{us(row['sums']['ours']['expected_us'])} expected on {row['onto']}, unfused / ours {row['ratios']['expected_us']:.2f}")
        for row in results["projection"]
    ]


def cold_start(results):
    return [f"{row['title']}: " + (f"{row['total_s']:.2f} s" if "total_s" in row else row.get("missing") or row["error"]) for row in results["cold_start"]]


def scaling(results):
    rows = results["scaling_summary"]
    ratios = [row["ratio"] for row in rows]
    return [f"{len(rows)} points, ratio {min(ratios):.2f} to {max(ratios):.2f}, {sum(ratio < 1 for ratio in ratios)} of them below 1"] if rows else []


def tune(text):
    # Printed at the end, which a run that failed did not reach.
    counted = re.search(r"(\d+) shapes, .*?; (\d+ of \d+) calls\s+done", text, re.DOTALL)
    lines = re.search(r":\s+(\d+)\s+lines\s*$", text)
    if not counted or not lines:
        return []
    return [f"{counted[1]} shapes, {counted[2]} calls done; {lines[1]} lines", f"{len(re.findall(r'^WRONG ', text, re.MULTILINE))} wrong candidates"]


def sequence(text):
    done = re.search(r"(\d+ of \d+ networks done), (\d+ choices changed), (\d+ wrong)", text)
    lines = re.search(r":\s+(\d+)\s+lines\s*$", text)
    return [f"{done[1]}, {done[2]}; {lines[1]} lines", f"{done[3]} networks"] if done and lines else []


def weigh(text):
    found = re.search(r"(\d+ of \d+ choices stand)", text)
    return [f"{found[1]} (projection)"] if found else []


def networks(results):
    """The fastest of the other ways / ours, for every batch of a model."""
    points = {}
    for row in results["networks"]:
        points.setdefault(row["network"], {}).setdefault(row["batch"], {})[row["way"]] = row
    lines = []
    for name, batches in points.items():
        texts = []
        for batch, ways in batches.items():
            peers = [row["us"] for way, row in ways.items() if way != "ours" and "us" in row]
            ours = ways.get("ours", {}).get("us")
            texts.append(f"batch {batch} " + ("FAILED" if ours is None else f"ratio {min(peers) / ours:.2f}" if peers else us(ours)))
        lines.append(f"{name}: {', '.join(texts)}")
    return lines


def host_time(results):
    medians = {}
    for row in results["rows"]:
        medians.setdefault(point(row), []).append(statistics.median(row["host_us"]))
    return [f"{where}: host {us(min(found))} to {us(max(found))}" for where, found in medians.items()]


def op_times(text):
    return [f"{where}: sum {us(float(measured))}, floor {us(float(floor))}" for where, measured, floor in re.findall(r"^(\S.*): sum ([\d.]+) \(([\d.]+)\)", text, re.MULTILINE)]


# ---- the steps ----


@dataclass(frozen=True)
class Step:
    """`command` is words with {results} and the like, see Report.command. `needs` are the seconds below which a start is
    pointless, `limit` those after which it is stopped. The figures are taken from `file` in the folder of results, or, where
    `prints`, that is where its output goes."""

    name: str
    does: str
    command: str
    needs: int
    limit: int
    file: str
    figures: Callable
    prints: str | None = None


MAKE = "make -o gpu-build PYTHON={python} RESULTS={results}"  # -o: the first step has built
BENCH = "{python} -m effnet_aot bench --device cuda --json {results}/%s.json {plot}"


def steps_of_bench(name, does, needs, limit, figures, options="", file=None):
    file = file or f"bench-{name}"
    return Step(name, does, f"{BENCH % file} {options}", needs, limit, f"{file}.json", figures, prints=f"{file}.txt")


BUILD = Step("build", "the package, in place, as all others need it", "make gpu-build PYTHON={python}", 0, 400, str(ROOT / "effnet_aot/manifest.json"), build)
STEPS = [
    *(
        Step(f"test-{image}", f"the GPU tests with the {image} images", f"{MAKE} gpu-test IMAGES={image}", 100, 400, f"gpu-tests-{image}.json", tests)
        for image in ("cubin", "ptx")
    ),
    *(
        Step(f"run-{dtype}", f"ten photographs through the network in {dtype}", f"{{python}} -m effnet_aot run --device cuda --dtype {dtype} --json {{results}}/run-{dtype}.json",
             10, 120, f"run-{dtype}.json", run, prints=f"run-{dtype}.txt")
        for dtype in ("float16", "float32")
    ),
    steps_of_bench("bench", "the network beside all peers", 100, 540, bench, file="bench"),
    steps_of_bench("counters", "counters of our kernels and of those of the beginning, by ncu", 40, 300, counters, "--skip-comparison --counters"),
    steps_of_bench("project", "projection onto an RTX 4090, by ncu", 60, 400, projection, "--skip-comparison --project 8.9"),
    steps_of_bench("cold-start", "fresh processes up to their first result", 40, 300, cold_start, "--skip-comparison --cold-start"),
    steps_of_bench("scaling", "batches from 1 to 512, images from 128 to 512", 60, 400, scaling, "--skip-comparison --scaling"),
    Step("stress", "the load of a service, 10,000 random calls", f"{MAKE} gpu-stress", 60, 540, "gpu-stress.json", stress),
    *(
        Step(f"sanitize-{tool}", f"{'the suite' if tool == 'memcheck' else 'every kernel'} under compute-sanitizer's {tool}", f"{MAKE} gpu-sanitize TOOLS={tool}", 60, 540, f"sanitizer-{tool}{'-cached' if tool == 'memcheck' else ''}.txt", sanitizer)
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ),
    *(
        Step(f"tune-{image}", f"measure the candidates of --bundle for the table of the {image} images",
             f"{{python}} -m effnet_aot tune measure --bundle {{bundle}} --out {{results}}/tuned --image {image} --seconds {{most}}",
             60, 540, f"tune-{image}.txt", tune, prints=f"tune-{image}.txt")
        for image in ("cubin", "ptx")
    ),
    *(
        Step(f"tune-sequence-{image}", f"choose again for the table of the {image} images, by the time of whole networks",
             f"{{python}} -m effnet_aot tune sequence --bundle {{bundle}} --out {{results}}/tuned --image {image} --seconds {{most}}",
             30, 540, f"tune-sequence-{image}.txt", sequence, prints=f"tune-sequence-{image}.txt")
        for image in ("cubin", "ptx")
    ),
    Step("weigh", "take back what of the ptx images' table an RTX 4090 would lose by, by ncu", "{python} -m effnet_aot tune weigh --bundle {bundle} --out {results}/tuned",
         30, 400, "tune-weigh.txt", weigh, prints="tune-weigh.txt"),
    Step("networks", "stock networks beside torch.compile", "{python} benchmarks/networks.py --device cuda --json {results}/networks.json", 60, 540, "networks.json", networks, prints="networks.txt"),
    Step("host-time", "a call without a graph, in three processes", "{python} benchmarks/host_time.py --device cuda --json {results}/host-time.json", 30, 240, "host-time.json", host_time, prints="host-time.txt"),
    Step("op-times", "every op of the network alone", "{python} benchmarks/op_times.py {results}/op-times.txt", 15, 120, "op-times.txt", op_times),
]  # fmt: skip


@dataclass
class Outcome:
    step: Step
    text: str
    seconds: float = 0.0
    lines: tuple = ()

    @property
    def failed(self):
        return not self.text.startswith(("passed", "skipped"))


class Report:
    def __init__(self, arguments):
        self.results, self.logs, self.bundle = arguments.results.resolve(), arguments.logs.resolve(), arguments.bundle.resolve()
        self.deadline = time.monotonic() + arguments.seconds
        for folder in (self.results, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def step(self, step):
        seconds = min(step.limit, self.deadline - time.monotonic() - GRACE)
        if seconds < max(step.needs, 1):
            return Outcome(step, f"skipped: it needs {max(step.needs, 1)} s, {max(0, seconds):.0f} s are left")
        file, log = self.results / step.file, self.logs / f"gpu-report-{step.name}.log"
        before, begin = stamp(file), time.monotonic()
        with open(log, "w") as errors, open(self.results / step.prints, "w") if step.prints else contextlib.nullcontext(errors) as output:
            command = self.command(step, seconds)
            print(shlex.join(command), file=errors, flush=True)
            try:
                text = execute(command, output, errors, seconds)
            except OSError as error:
                text = f"FAILED: {error}"
        # What an earlier run left is no result of this one; but a build that has nothing to do leaves the manifest as it is.
        lines = figures(step, file) if stamp(file) != before or (step is BUILD and text == "passed") else []
        if text != "passed" and not lines:
            lines = [last_line(*([self.results / step.prints] if step.prints else []), log)]
        return Outcome(step, text, time.monotonic() - begin, tuple(lines))

    def command(self, step, seconds):
        values = {
            "python": sys.executable, "results": self.results, "bundle": self.bundle,
            "most": max(1, int(seconds) - 20),  # of tuning, which stops after a measurement and then writes its table
            "plot": f"--plot={self.results}/plots" if importlib.util.find_spec("matplotlib") else "",
        }  # fmt: skip
        return [word for template in step.command.split() if (word := template.format_map(values))]


def stamp(file):
    return file.stat().st_mtime_ns if file.exists() else None


def execute(command, output, errors, seconds):
    """The outcome in words. Whatever the command started ends with it: a process left behind would disturb the next step."""
    # Nothing is installed, and a script in benchmarks/ does not look into the folder above.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)
    try:
        status = process.wait(seconds)
        return "passed" if status == 0 else f"FAILED: exit status {status}"
    except subprocess.TimeoutExpired:
        end = time.monotonic() + GRACE
        deliver(process, signal.SIGINT)
        while time.monotonic() < end and deliver(process, 0):  # make may end before pytest does
            time.sleep(0.1)
        return f"STOPPED after {seconds:.0f} s"
    finally:
        deliver(process, signal.SIGKILL)
        process.wait()


def deliver(process, number):
    """Signals all that a process started and returns whether there is any left; 0 only asks."""
    process.poll()  # a dead one counts until somebody asks
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def figures(step, file):
    try:
        text = file.read_text()
        return step.figures(json.loads(text) if file.suffix == ".json" else text)
    except Exception as error:  # the other steps' figures count all the more
        return [f"{file.name}: {type(error).__name__}: {error}"]


def last_line(*files):
    """What the last of them that has something says last. Of make only that something failed would be heard, of a log its command."""
    lines = [line.strip() for file in files for line in file.read_text(errors="replace").splitlines()[file.suffix == ".log" :]]
    lines = [line for line in lines if line and not re.match(r"make(\[\d+\])?: (\*\*\*|Entering|Leaving)", line)]
    return lines[-1][:200] if lines else "no output"


def table(outcomes):
    made = Table("step", "seconds", "outcome", "figures", show_lines=True)
    for outcome in outcomes:
        style = "red" if outcome.failed else "yellow" if outcome.text.startswith("skipped") else "green"
        # Texts may hold brackets, which are markup to rich otherwise.
        made.add_row(outcome.step.name, f"{outcome.seconds:.0f}", f"[{style}]{escape(outcome.text)}[/]", escape("\n".join(outcome.lines)))
    return made


def listed(steps):
    made = Table("step", "at least", "at most", "does", title="seconds are those of one H200 with 16 cores, most of them estimated")
    for step in steps:
        made.add_row(step.name, f"{step.needs} s", f"{step.limit} s", step.does)
    return made


def main(argv=None, known=STEPS, first=BUILD):
    def select(name):
        found = [step for step in known if step.name == name or step.name.startswith(f"{name}-")]
        if not found:
            raise argparse.ArgumentTypeError(f"there is no step {name}; --list prints those that there are")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", type=select, metavar="STEP", help="in this order (default: test run bench)")
    parser.add_argument("--list", action="store_true", help="print the steps and what they do")
    parser.add_argument("--seconds", type=float, default=1800, help="for all of them (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER", help="default: results")
    parser.add_argument("--logs", type=Path, default=ROOT / "build", metavar="FOLDER", help="default: build")
    parser.add_argument("--bundle", type=Path, default=ROOT / "build/bundle", metavar="FOLDER", help="what `effnet_aot tune build` made (default: build/bundle)")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    if arguments.list:
        console.print(listed(known))
        return 0
    steps = dict.fromkeys(step for found in arguments.steps or map(select, ("test", "run", "bench")) for step in found)
    report, outcomes = Report(arguments), []
    try:
        for step in [first, *steps]:
            outcomes.append(outcome := report.step(step))
            console.print(f"{step.name}: {outcome.text}, {outcome.seconds:.0f} s", markup=False)
    except KeyboardInterrupt:
        outcomes.append(Outcome(step, "INTERRUPTED"))
    console.print(table(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def signals():
    """SIGTERM, by which `timeout` ends it, becomes an interrupt. And a shell starts what runs in its background with interrupts
    ignored, which the steps would inherit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    signals()
    sys.exit(main())
