"""Checks and times every candidate of every call, on a GPU.

A candidate counts once its result lies within rounding of the float64 result. Its time is that of a CUDA graph of several
launches, warm: the operands lie in the L2 cache where they fit. All are timed once; those near the fastest are timed again,
in turns, so that a drift of the clock meets all of them, and it is their medians that are compared.
"""

import json
import math
import statistics
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..aot.tables import NONE
from .calls import INNER, Call, all_parts, run_parts
from .choose import Measured
from .exact import exact

NEAR = 1.15  # of the fastest first time
FINALISTS = 8
ROUNDS = 9
GRAPH_SECONDS = 400e-6
MOST_LAUNCHES = 20
HOST_SECONDS = 60e-6  # of a launch by the host, at most: a single one that took less says nothing of the device's time
SEQUENCE_SECONDS, SAMPLE_SECONDS = 200e-6, 1e-3  # of a graph of whole networks, and of its replays in a row
FAR = 3  # times the fastest so far: not worth a second sample
AHEAD = 60_000  # GPU cycles in which the host queues what is timed next


@dataclass(frozen=True)
class Problem:
    """The choice of a call, or one of the INNER ones that it makes on the way."""

    call: Call
    dtype: str  # "float16"
    batch: int
    inner: tuple[str, str] | None = None

    def __str__(self):
        return f"{self.call}, {self.dtype}, batch {self.batch}" + (f": {' '.join(self.inner)}" if self.inner else "")

    def inside(self):
        """The INNER choices of a block."""
        return [replace(self, inner=inner) for inner in INNER] if self.call.op == "mbconv" and self.dtype == "float32" and not self.inner else []


def problems(networks, dtypes, batches):
    """Every call of the networks once, small batches first: what is found early is worth most if the time runs out. Blocks
    and their beginnings come last, as they compete with their parts."""
    calls = sorted(dict.fromkeys(call for found in networks.values() for call in found), key=lambda call: len(all_parts(call)))
    every = (Problem(call, dtype, batch) for batch in batches for dtype in dtypes for call in calls)
    return [one for problem in every for one in (*problem.inside(), problem)]


class Clock:
    """Times on a GPU, by graphs of launches on a stream of their own."""

    device = "cuda"

    def __init__(self):
        self._stream = torch.cuda.Stream()

    def synchronize(self):
        torch.cuda.synchronize()  # fails when a kernel read where it must not

    def pool(self):
        """Memory that graphs share, as only one of them runs at a time. Those of a large batch would not fit side by side."""
        return torch.cuda.graph_pool_handle()

    def prepare(self, function, pool, most=math.inf):
        """A function that gives the seconds of one launch, each time that it is called; of what surely takes more than `most`, an
        estimate."""
        with self._on_stream():
            estimate = min(self._seconds(function) for _ in range(2))
            if estimate >= HOST_SECONDS:  # perhaps the host's, of several launches
                graph = self._capture(function, 1, pool)
                estimate = min(self._seconds(graph.replay) for _ in range(2))
                if estimate - HOST_SECONDS > most:  # or the machine was busy: what is given up here is not timed again
                    estimate = min(estimate, *(self._seconds(graph.replay) for _ in range(4)))
                if estimate - HOST_SECONDS > most:
                    return lambda: estimate
            launches = MOST_LAUNCHES if estimate < HOST_SECONDS else int(min(max(GRAPH_SECONDS / estimate, 1), MOST_LAUNCHES))
            graph = self._capture(function, launches, pool)

        def once():
            with self._on_stream():
                return self._seconds(graph.replay) / launches

        return once

    @staticmethod
    def passes(seconds):
        """How many whole networks of so many seconds make a graph: enough that the host keeps ahead, few as all are captured."""
        return int(min(max(SEQUENCE_SECONDS / seconds, 1), MOST_LAUNCHES))

    def sequence(self, function, passes, pool):
        """A function that gives the seconds of one pass of a whole network, each time that it is called."""
        with self._on_stream():
            function()  # loads what it launches, and holds its network
            graph = self._capture(function, passes, pool)
            replays = max(1, round(SAMPLE_SECONDS / self._seconds(graph.replay)))

        def several():
            for _ in range(replays):
                graph.replay()

        def once():
            with self._on_stream():
                return self._seconds(several) / (passes * replays)

        return once

    @contextmanager
    def _on_stream(self):
        """The stream of its own that graphs are captured on, once what the caller's has to do is done."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    @staticmethod
    def _capture(function, times, pool):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool, capture_error_mode="relaxed")
        try:
            for _ in range(times):
                function()
        finally:
            graph.capture_end()
        graph.replay()
        return graph

    def _seconds(self, function):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def own_choice(library, run, op, inner=None):
    """(the choice that a call of `op` makes for itself, or for its kernel `inner`; what is to be assigned for it to be made). None where
    it makes none, or several."""
    without = dict.fromkeys(INNER[inner] if inner else (), NONE)
    with library.assigned(without):
        run()
        found = {c.key: c for c in library.choices() if ((c.op, c.precision) == inner if inner else c.op == op)}
    return next(iter(found.values())) if len(found) == 1 else None, without


def measure(library, clock, problem, standing=None, tf32=True, fastest=None, inner=None):
    """Measured, or None for a call that has no candidates of its own. `standing` maps keys to the variants of the table so far;
    `fastest` gives the variant to take for one of the calls that a block can be computed by, or None where that is not known, and
    `inner` are the Measured of its INNER choices. Times of such a choice are those of the whole block."""
    dtype = getattr(torch, problem.dtype)
    arguments = problem.call.make(problem.batch, dtype, clock.device)
    run = lambda: problem.call.run(arguments)  # noqa: E731
    choice, without = own_choice(library, run, problem.call.op, problem.inner)
    if not choice or len(choice.fitting) < 2:
        return None
    truth = exact(problem.call.op, arguments, tf32 and dtype == torch.float32)
    if truth is None:
        return None
    found = Measured(*choice.key, choice.variant, {})
    first, pool = {}, clock.pool()
    best = {m.key: min(m.times, key=m.times.get) for m in inner or () if m.times and m.key != choice.key}
    for variant in choice.fitting:
        # What competes with a block's own kernels are the others' best ones.
        parted = variant == NONE and fastest and not best
        way = (lambda: in_parts(library, problem.call, arguments, fastest)) if parted else run
        with nullcontext() if parted else library.assigned(best | without | {choice.key: variant}):
            try:
                out = way()
            except RuntimeError as error:  # not launched
                found.wrong[variant] = str(error).splitlines()[0]
                continue
            if not parted:
                (taken,) = {c.variant for c in library.choices() if c.key == choice.key}
                assert taken == variant, f"{variant} was asked for and {taken} came"
            try:
                excess = truth.excess(out)
                clock.synchronize()
            except RuntimeError as error:
                raise RuntimeError(f"{choice.op}/{variant} took the GPU with it on {problem}: leave it out of the candidates ({error})") from error
            del out
            if not excess <= 1:
                found.wrong[variant] = f"off by {excess:.1f} times what rounding explains"
                continue
            fewest = min(found.times.values(), default=math.inf) / 1e6
            first[variant] = clock.prepare(way, pool, FAR * fewest)
            seconds = first[variant]()
            found.times[variant] = 1e6 * (seconds if seconds > FAR * fewest else min(seconds, first[variant]()))
    if not first:
        return found
    least = min(found.times.values())
    kept = sorted((v for v in first if found.times[v] <= NEAR * least), key=found.times.get)[:FINALISTS]
    kept += [v for v in {choice.variant, (standing or {}).get(choice.key)} if v in first and v not in kept]
    samples = {v: [] for v in kept}
    for _ in range(ROUNDS):
        for v in kept:
            samples[v].append(first[v]())
    for v in kept:
        found.times[v] = 1e6 * statistics.median(samples[v])
    # What was not timed again must not win by the luck of a single sample.
    slowest = max(found.times[v] for v in kept)
    for v in found.times.keys() - samples.keys():
        found.times[v] = max(found.times[v], slowest)
    return found


def in_parts(library, call, arguments, fastest):
    """A chain's result without a kernel for all of it: by its parts' fastest kernels, or by theirs."""

    def run(part, arguments):
        variant = fastest(part)
        if variant == NONE:
            return in_parts(library, part, arguments, fastest)
        with library.taking(part.op, variant):
            return part.run(arguments)

    return run_parts(call, arguments, run)


class Journal:
    """What was measured so far, a line a problem, so that an interrupted run goes on where it stopped; and, in a file that is
    kept, the times for `tune sequence`. `run` says where the times are from: others are not read."""

    def __init__(self, path, run):
        self.path = Path(path)
        self.done = self.read(path, run)
        if not self.done:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(run) + "\n")

    @staticmethod
    def read(path, run):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        return {line["problem"]: restore(line["measured"]) for line in lines[1:]} if lines and lines[0] == run else {}

    def add(self, problem, measured):
        self.done[str(problem)] = measured
        line = {"problem": str(problem), "measured": measured and {**asdict(measured), "shape": dict(measured.shape)}}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def remove(self):
        self.path.unlink(missing_ok=True)


def restore(measured):
    return measured and Measured(**{**measured, "shape": tuple(measured["shape"].items())})
