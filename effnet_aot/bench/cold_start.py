"""A fresh process for each way: from `import torch` done to the first result, and the first call beside the second.

Caches of compilers are empty, the file cache is warm. The peers get the network's definition for nothing: importing it is
counted for ours alone.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .children import InductorBuilds, environment, why_ended
from .ways import WAYS

NAMES = ["ours", "eager", "compile", "aoti", "single-file"]
TITLES = {
    "ours": "effnet_aot", "eager": "torch eager", "compile": "torch.compile, freezing",
    "aoti": "AOTInductor, package built before", "single-file": "the kernels through Triton's JIT",
}  # fmt: skip
TIMEOUT = 180


def run(workloads, point, names, advance=lambda text: None):
    """Yields a dictionary for every way: "total_s" to the first result, "first_s" and "second_s" of the calls, or "error"."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        state = folder / "state.pt"
        torch.save({"state": workloads.network(point.dtype).state_dict(), "x": workloads(point).x}, state)
        for name in names:
            advance(f"cold start: {TITLES[name]}")
            row = {**point._asdict(), "way": name, "title": TITLES[name], "role": WAYS[name].role}
            missing = WAYS[name].missing(workloads.device)
            yield row | ({"missing": missing} if missing else start(workloads, point, name, state, folder / name))


def start(workloads, point, name, state, folder):
    if name != "aoti":
        return child(name, state, workloads.device, folder)
    try:
        with InductorBuilds(workloads, [point]) as builds:
            builds.wait()
            _, seconds = builds.load(point)
            return {"build_s": seconds} | child(name, state, workloads.device, folder, builds.package(point))
    except RuntimeError as error:
        return {"error": str(error)}


def child(name, state, device, folder, *more):
    folder.mkdir()
    # The first process reads the files from the disk and is thrown away, but for compilers: their caches must be empty. It also
    # finds out for AOTInductor's loader, by compiling and starting torch some ten times, which vector instructions the CPU has.
    caches = {"TRITON_CACHE_DIR": folder / "triton", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "CUDA_CACHE_DISABLE": 1}
    for _ in range(1 if name in ("compile", "single-file") else 2):
        command = [sys.executable, Path(__file__).with_name("cold_start_child.py"), name, state, device, *more]
        with open(folder / "errors", "w") as errors:
            try:
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=TIMEOUT, env=environment(PYTHONSAFEPATH=1, **caches)
                )
            except subprocess.TimeoutExpired:
                return {"error": f"no result within {TIMEOUT} s"}
        if done.returncode:
            return {"error": why_ended(done.returncode, folder / "errors", TIMEOUT)}
    return json.loads(done.stdout.splitlines()[-1])
