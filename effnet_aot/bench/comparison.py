"""All ways on all workloads.

What compiles, compiles first, all points side by side in processes of their own: torch.compile, which stays there and is
timed there, and AOTInductor. When they are done JAX compiles, which chooses some of its algorithms by their times. The timing
has the machine for itself. A way that is missing or fails becomes a row that says so, and the rest go on.
"""

import contextlib
import gc

import torch

from .children import Compiled, InductorBuilds, Jax
from .ways import WAYS

MOST_ERROR = 0.1  # root mean square, relative; bfloat16 and the JIT baseline's truncated TF32 stay below 0.05


class Comparison:
    """rows: a dictionary for every (point, way), with its times in microseconds, its errors, or why there are none."""

    def __init__(self, workloads, timer, points, names, advance=lambda text: None):
        self.workloads, self.timer, self.points = workloads, timer, points
        self.ways = [WAYS[name] for name in names]
        self.advance = advance
        self.rows = []
        self._lost = None

    @staticmethod
    def steps(points, names):
        """How often `advance` is called."""
        return len(points) * (len(names) + ("jax" in names)) + any(name in ("compile", "aoti") for name in names)

    def run(self):
        """Yields a workload and its rows, point by point."""
        present = [way for way in self.ways if not way.missing(self.workloads.device)]
        with contextlib.ExitStack() as stack:
            self._inductor = stack.enter_context(InductorBuilds(self.workloads, self.points)) if WAYS["aoti"] in present else None
            self._compiled = stack.enter_context(Compiled(self.workloads, self.timer, self.points)) if WAYS["compile"] in present else None
            if self._inductor or self._compiled:
                self.advance("torch.compile and AOTInductor: compiling for all points side by side")
            if self._compiled:
                self._compiled.wait()
            if self._inductor:
                self._inductor.wait()
            self._jax = stack.enter_context(Jax(self.timer)) if WAYS["jax"] in present else None
            for point in self.points if self._jax else []:
                self.advance(f"{WAYS['jax'].title}: compiling for {point}")
                self._jax.prepare(self.workloads(point))
            for point in self.points:
                gc.collect()
                workload = self.workloads(point)
                yield workload, [self._row(way, workload) for way in self.ways]

    def _row(self, way, workload):
        self.advance(f"{way.title}: {workload.point}")
        row = {**workload.point._asdict(), "way": way.name, "title": way.title, "role": way.role}
        if missing := way.missing(self.workloads.device):
            row["missing"] = missing
        elif self._lost:
            row["error"] = self._lost
        else:
            with attempt() as result:
                result |= self._jax_row(workload) if way.name == "jax" else self._torch_row(way, workload)
            row |= result
            row["title"] += ", graph" if row.get("graph") else ""
            self._check(way)
        self.rows.append(row)
        return row

    def _torch_row(self, way, workload):
        if way.name == "aoti":
            function, seconds = self._inductor.load(workload.point)
            return {"build_s": seconds, **measure(self.timer, way, workload, function)}
        if way.name == "compile":
            return self._compiled.measure(workload.point)
        return measure(self.timer, way, workload, way.build(workload))

    def _jax_row(self, workload):
        answer = self._jax.measure(workload.point)
        rms, largest = workload.errors(torch.tensor(answer["logits"]))
        return {
            "us": 1e6 * answer["seconds"], "graph": False, "rms_error": rms, "max_error": largest, "first_call_s": answer["first_call_s"],
        }  # fmt: skip

    def _check(self, way):
        """A kernel that read where it must not takes the process's GPU with it: nothing after it can run."""
        if self._lost is None:
            try:
                self.timer.synchronize()
            except RuntimeError as error:
                self._lost = f"not run: the GPU failed under {way.title} ({str(error).splitlines()[0]})"


@contextlib.contextmanager
def attempt():
    """A dictionary to fill; an exception becomes its "error"."""
    result = {}
    try:
        with torch.no_grad():
            yield result
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}".strip()


def measure(timer, way, workload, function):
    """Times, errors and memory of a function of the images."""
    x = way.images(workload)
    row = {"graph": way.graph and timer.cuda}
    _, row["first_call_s"] = timer.once(lambda: function(x))
    row["peak_bytes"] = timer.memory(lambda: function(x))
    call = None
    if row["graph"]:
        try:
            call = timer.capture(function, x)
        except RuntimeError as error:  # timed without it, then
            timer.synchronize()
            row |= {"graph": False, "note": f"no CUDA graph: {str(error).splitlines()[0]}"}
    call = call or (lambda: function(x))
    row["rms_error"], row["max_error"] = workload.errors(call())
    row["host_us"] = 1e6 * timer.host(call) if timer.cuda else None
    row["us"] = 1e6 * timer.median(call, ahead=row["graph"])
    row["flushed_us"] = 1e6 * timer.median(call, ahead=row["graph"], flush=True) if timer.cuda else None
    return row


def is_wrong(row):
    """Whether the logits are others than the network's, and no rounding explains it: its time is then no time of this network."""
    return not row.get("rms_error", 0) < MOST_ERROR


def ratios(rows):
    """For every point, how many times the fastest peer's time ours is shorter. What is wrong is not compared."""
    points = dict.fromkeys((row["dtype"], row["batch"], row["size"]) for row in rows)
    found = []
    for point in points:
        timed = [row for row in rows if (row["dtype"], row["batch"], row["size"]) == point and "us" in row and not is_wrong(row)]
        us = min((row for row in timed if row["role"] == "ours"), key=lambda row: row["us"], default=None)
        peer = min((row for row in timed if row["role"] == "peer"), key=lambda row: row["us"], default=None)
        if us and peer:
            found.append({
                "dtype": point[0], "batch": point[1], "size": point[2], "ours": us["way"], "ours_us": us["us"],
                "peer": peer["way"], "peer_title": peer["title"], "peer_us": peer["us"], "ratio": peer["us"] / us["us"],
            })  # fmt: skip
    return found
