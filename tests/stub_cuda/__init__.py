"""Runs the library against a CUDA driver made of nothing (libcuda.cpp), and reads what it asked of it."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from effnet_aot import _library
from effnet_aot.aot.discover import discover

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBTORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
CXX = os.environ.get("CXX", "g++")


def manifest():
    return json.loads(_library.PATH.parents[1].joinpath("manifest.json").read_text())


@cache
def kernel_parameters():
    """{kernel: {parameter: type}}, in the kernel's own order; also of those that only candidates have."""
    source = ROOT / "triton_src"
    variants = {v.kernel.__name__: v for v in discover(source, candidates=True) + discover(source)}
    return {kernel: {name: v.parameters[name] for name in v.kernel.arg_names if name in v.parameters} for kernel, v in variants.items()}


def decode(kernel, values):
    """{parameter: value} of a recorded launch; what follows the kernel's own parameters is called "trailing"."""
    raw = [bytes.fromhex(v) for v in values]
    parameters = kernel_parameters()[kernel]
    formats = {"i32": "<i", "fp32": "<f"}
    decoded = {name: struct.unpack(formats.get(kind, "<Q"), data)[0] for (name, kind), data in zip(parameters.items(), raw)}
    return decoded | {"trailing": [int.from_bytes(data, "little") for data in raw[len(parameters) :]]}


@dataclass
class Run:
    results: list  # per call: {"status", "error", "value"}, or a list of such
    records: list  # calls of the driver, in order
    kernels: dict  # what the library holds, by address of the image
    stderr: str

    def of(self, call):
        return [r for r in self.records if r["call"] == call]

    @property
    def launches(self):
        return self.of("cuLaunchKernelEx")

    @property
    def loads(self):
        return self.of("cuLibraryLoadData")

    def assert_ok(self):
        assert [r["error"] for r in self.results if r["status"]] == []
        return self


def torch_free_library(folder, registry):
    """The part of the library that knows no torch, over a registry of images other than the one that ships: {"library",
    "dependencies"} for StubDriver.run. `registry` is its source; what that includes as data lies in `folder`."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        pytest.skip("cuda.h comes with triton")
    csrc, headers = ROOT / "csrc", Path(spec.submodule_search_locations[0], "backends", "nvidia", "include")
    stems = ("c_api", "launcher", "introspection", "pointwise", "pointwise_pool", "depthwise", "conv", "linear", "expand_depthwise", "mbconv", "merge_weights", "merged_depthwise", "merged_pool", "narrow_weight", "stem_mbconv", "fold_batch_norm", "tuning")
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", f"-I{csrc}", f"-I{csrc / 'include'}", f"-I{headers}", f"-Wa,-I{folder}"]

    def compile(source):
        target = folder / f"{source.stem}.o"
        subprocess.run([CXX, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, [*(csrc / f"{stem}.cpp" for stem in stems), registry]))
    library = folder / "libtorch_free.so"
    subprocess.run([CXX, "-shared", "-Wl,-z,defs", *objects, "-ldl", "-pthread", "-o", library], check=True)
    return {"library": library, "dependencies": ()}


class StubDriver:
    """A folder with libcuda.so.1 in it. `lacking` is a symbol that this driver does not have."""

    def __init__(self, folder, lacking=None):
        self.folder = Path(folder)
        self.parameters = self.folder / "parameters"
        sizes = {kernel: [4 if kind in ("i32", "fp32") else 8 for kind in kinds.values()] + [8, 8] for kernel, kinds in kernel_parameters().items()}
        self.parameters.write_text("".join(f"{kernel} {' '.join(map(str, s))}\n" for kernel, s in sizes.items()))
        flags = [f"-D{lacking}=not_{lacking}"] if lacking else []
        compile = [CXX, "-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-pthread", "-Wl,-soname,libcuda.so.1", *flags]
        subprocess.run([*compile, HERE / "libcuda.cpp", HERE / "ptx.cpp", "-o", self.folder / "libcuda.so.1"], check=True)
        self.count = 0

    def environment(self, log, devices="8.9", **settings):
        """`settings` are the stub's own (reject="ptx" is STUB_CUDA_REJECT) or, in capitals, any variable."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("STUB_CUDA_", "EFFNET_AOT_"))}
        own = {k if k.isupper() else f"STUB_CUDA_{k.upper()}": v for k, v in settings.items()}
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("LD_LIBRARY_PATH")]))
        return inherited | {"LD_LIBRARY_PATH": path, "STUB_CUDA_DEVICES": devices, "STUB_CUDA_LOG": str(log), "STUB_CUDA_PARAMETERS": str(self.parameters)} | own

    def executing(self, log, **settings):
        """The same, and what is launched is computed."""
        return self.environment(log, EFFNET_AOT_IMAGE="ptx", OMP_NUM_THREADS="1", PYTHONPATH=self.python_path(), execute="1", **settings)

    @staticmethod
    def python_path():
        """For child processes to find the package where it is not installed, and the tests."""
        return os.pathsep.join(filter(None, [str(_library.PATH.parents[2]), str(HERE.parent), os.environ.get("PYTHONPATH")]))

    def read(self, log):
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for record in records:
            if "parameters" in record:
                record["parameters"] = decode(record["kernel"], record["parameters"])
        return records

    def new_log(self):
        self.count += 1
        return self.folder / f"log{self.count}"

    def run(self, *calls, library=_library.PATH, dependencies=(LIBTORCH,), hash=False, **settings):
        """Makes calls (see child.py) in a new process."""
        log = self.new_log()
        job = {"library": str(library), "dependencies": [str(d) for d in dependencies], "calls": calls, "hash": hash}
        done = subprocess.run(
            [sys.executable, HERE / "child.py"], input=json.dumps(job), env=self.environment(log, **settings), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        output = json.loads(done.stdout)
        kernels = {int(address): kernel for address, kernel in output["kernels"].items()}
        records = self.read(log)
        for record in records:
            if "image" in record:
                record["image"] = kernels[record["image"]]
        return Run(output["results"], records, kernels, done.stderr)
