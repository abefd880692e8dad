"""Work in other processes: what torch.compile and AOTInductor build side by side, and JAX, which keeps out of torch's way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from .workload import save_arrays

PACKAGE = Path(__file__).parents[2]
TIMEOUT = 300  # seconds for one build or one measurement


def environment(**more):
    """This process's, with this package importable."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in more.items()}}


def last_line(path):
    lines = [line for line in Path(path).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def why_ended(code, log, seconds):
    """For a process with an exit code that is not 0, which was killed after so many seconds."""
    if code == -signal.SIGKILL:
        return f"not done within {seconds:.0f} s"
    return last_line(log) if code >= 0 else f"{signal.Signals(-code).name} after: {last_line(log)}"


class InductorBuilds:
    """A context: one process a point compiles the network to a package, as many at once as there are cores for."""

    def __init__(self, workloads, points):
        self._workloads, self._points = workloads, points
        self._jobs = {}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(self._stop)
            threads = max(1, (os.cpu_count() or 1) // max(1, len(self._points)))
            for dtype in {point.dtype for point in self._points}:
                torch.save(self._workloads.network(dtype).state_dict(), folder / f"{dtype}.pt")
            for point in self._points:
                name = f"{point.dtype}-{point.batch}-{point.size}"
                command = [sys.executable, "-m", "effnet_aot.bench.inductor_child", folder / f"{point.dtype}.pt", point.dtype,
                           str(point.batch), str(point.size), self._workloads.device, folder / f"{name}.pt2", str(int(torch.backends.cudnn.allow_tf32))]  # fmt: skip
                with open(folder / f"{name}.log", "w") as log:
                    process = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment(TORCHINDUCTOR_COMPILE_THREADS=threads, OMP_NUM_THREADS=threads)
                    )
                self._jobs[point] = process, folder / name, time.monotonic()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _stop(self):
        for process, *_ in self._jobs.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait(self):
        """Until the last build has ended; those that last too long are stopped."""
        for process, _, start in self._jobs.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1, start + TIMEOUT - time.monotonic()))
        self._stop()

    def load(self, point):
        """(function of the images, seconds that the build took)"""
        process, name, _ = self._jobs[point]
        log = name.with_name(name.name + ".log")
        if process.returncode:
            raise RuntimeError(f"AOTInductor: {why_ended(process.returncode, log, TIMEOUT)}")
        return load_package(self.package(point)), float(last_line(log))

    def package(self, point):
        name = self._jobs[point][1]
        return name.with_name(name.name + ".pt2")


class Compiled:
    """A context: one process a point compiles the network with torch.compile, all at once and through one cache of kernels,
    and is asked for its times then."""

    def __init__(self, workloads, timer, points):
        self._workloads, self._timer, self._points = workloads, timer, points
        self._children, self._ready = {}, {}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(self._stop)
            at_once = max(1, min(len(self._points), os.cpu_count() or 1))
            threads = max(1, (os.cpu_count() or 1) // at_once)
            self._settings = {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": self._folder / "cache"}
            for dtype in {point.dtype for point in self._points}:
                torch.save(self._workloads.network(dtype).state_dict(), self._folder / f"{dtype}.pt")
            self._waiting = list(self._points)
            for _ in range(at_once):
                self._start(self._waiting.pop(0))
            self._stack = stack.pop_all()
        return self

    def _start(self, point):
        path = self._folder / f"{point.dtype}-{point.batch}-{point.size}.log"
        command = [sys.executable, "-m", "effnet_aot.bench.compile_child", self._folder / f"{point.dtype}.pt", *map(str, point),
                   self._workloads.device, str(int(torch.backends.cudnn.allow_tf32)), str(int(self._timer.quick))]  # fmt: skip
        with open(path, "w") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(**self._settings))
        self._children[point] = process, path

    def __exit__(self, *exception):
        self._stack.close()

    def _stop(self):
        for process, _ in self._children.values():
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()

    def wait(self):
        """Until the last has compiled; those that last too long are stopped."""
        for point in self._points:
            self._ready[point] = answer(*self._children[point], TIMEOUT)
            if self._waiting:
                self._start(self._waiting.pop(0))

    def measure(self, point):
        """The row of comparison.measure(), and "build_s"; RuntimeError with the child's own words."""
        process, log = self._children[point]
        row = self._ready[point]
        if "error" not in row:
            with contextlib.suppress(OSError):
                process.stdin.write("measure\n")
                process.stdin.flush()
            row |= answer(process, log, TIMEOUT)
            process.stdin.close()  # it ends, and frees its memory
        if "error" in row:
            raise RuntimeError(row["error"])
        return row


def answer(process, log, seconds):
    """The next line that the process prints, as JSON; {"error"} where it ends instead, or takes longer."""
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
    finally:
        watchdog.cancel()
    if line:
        return json.loads(line)
    process.wait()
    return {"error": why_ended(process.returncode, log, seconds)}


def load_package(path):
    # Without the events between threads that a CUDA graph cannot hold.
    return torch._inductor.aoti_load_package(str(path), run_single_threaded=True)


class Jax:
    """A context: a process that compiles for every point first and is asked for times and logits then."""

    def __init__(self, timer):
        self._timer = timer
        self._failed = {}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._log = stack.enter_context(open(self._folder / "log", "w"))
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("jax_child.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                env=environment(XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONSAFEPATH=1),
            )  # fmt: skip
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _stop(self):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def prepare(self, workload):
        """Compiles for the workload; what fails is told by measure()."""
        arrays = self._folder / "workload.npz"
        request = {
            "point": str(workload.point), "arrays": str(arrays), "layers": save_arrays(workload, arrays), "dtype": workload.point.dtype,
            "cuda": self._timer.cuda, "tf32": torch.backends.cudnn.allow_tf32,
        }  # fmt: skip
        self._failed[workload.point] = self._ask(request).get("error")

    def measure(self, point):
        """{"seconds", "first_call_s", "logits"} of the jitted network; RuntimeError with JAX's own words."""
        answer = {"error": self._failed[point]} if self._failed[point] else self._ask({"point": str(point), "budget": self._timer.budget})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _ask(self, request):
        watchdog = threading.Timer(TIMEOUT, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            watchdog.cancel()
        return json.loads(line) if line else {"error": f"JAX's process ended: {last_line(self._folder / 'log')}"}
