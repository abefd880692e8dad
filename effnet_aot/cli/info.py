"""Report versions, embedded kernels, GPUs and load errors, to paste into a bug report."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch
from rich.console import Console

import effnet_aot

from .images import counts

ENVIRONMENT = ("EFFNET_AOT_", "CUDA_VISIBLE_DEVICES", "CUDA_MODULE_LOADING", "LD_LIBRARY_PATH", "LD_PRELOAD")


def add_arguments(parser):
    parser.add_argument("--verify", action="store_true", help="recompute the sha256 of every embedded image and compare it with the manifest")


def run(arguments):
    report = Report()
    report.line("effnet_aot", effnet_aot.__version__)
    report.line("python", f"{platform.python_version()} on {platform.platform()}")
    report.line("torch", f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'built without CUDA'}")
    report.line("triton", installed_version("triton") or "not installed (not needed to run)")
    usable = report.attempt("library", library) and report.attempt("built by", built_by) and report.attempt("embedded", embedded)
    if arguments.verify:
        report.attempt("verified", verified)
    report.line("driver", driver())
    for index in range(torch.cuda.device_count()):
        report.attempt(f"GPU {index}", lambda: gpu(index, usable))
    if not torch.cuda.device_count():
        report.line("GPU", "none that torch can use: the CPU implementation serves")
    for name, value in sorted(os.environ.items()):
        if name.startswith(ENVIRONMENT):
            report.line("environment", f"{name}={value}")
    return 1 if report.failed else 0


class Report:
    """Prints "name  value" lines; a value that cannot be had is printed as its error."""

    def __init__(self):
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.failed = False

    def line(self, name, value):
        first, *others = str(value).splitlines() or [""]
        self.console.print(f"{name:<12}{first}")
        for other in others:
            self.console.print(f"{'':<12}{other}")

    def attempt(self, name, function):
        try:
            self.line(name, function())
            return True
        except Exception as error:
            self.failed = True
            self.line(name, f"ERROR: {error}")
            return False


def library():
    effnet_aot._library.require()
    return effnet_aot._library.PATH


def built_by():
    info = effnet_aot.build_info()
    return f"triton {info['triton']}, ptxas {info['ptxas']}, g++ {info['compiler']}, torch {info['torch']}; runs with torch >= {info['torch_target']}"


def embedded():
    kernels = effnet_aot.kernels()
    if not kernels:
        raise RuntimeError("no kernel is embedded")
    return f"{len({(k['op'], k['variant']) for k in kernels})} kernels: " + ", ".join(f"{count} {name}" for name, count in sorted(counts(kernels).items()))


def verified():
    effnet_aot._library.require()
    from effnet_aot import _C

    expected = json.loads((effnet_aot._library.PATH.parents[1] / "manifest.json").read_text())["images"]
    count = len(effnet_aot.kernels())
    if count != len(expected):
        raise RuntimeError(f"the library holds {count} images, the manifest lists {len(expected)}")
    wrong = [image for index, image in enumerate(expected) if hashlib.sha256(_C.image(index)).hexdigest() != image["sha256"]]
    if wrong:
        names = ", ".join(f"{image['op']}/{image['variant']} for {image['arch']} ({image['kind']})" for image in wrong[:3])
        raise RuntimeError(f"{len(wrong)} of {count} images are not what the manifest lists, among them {names}")
    return f"the sha256 of all {count} images is that of the manifest"


def gpu(index, usable):
    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, compute capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    if usable:
        from effnet_aot import _C

        image = _C.images(index)["image"]
        text += ", no embedded image serves it" if image == "none" else f", served by {image}"
    return text


def driver():
    """The NVIDIA driver's version, from its own tool: torch knows only the newest CUDA that it supports."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi found"
    try:
        done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return ", ".join(dict.fromkeys(done.stdout.split())) if done.returncode == 0 else f"nvidia-smi: {(done.stdout or done.stderr).strip()}"


def installed_version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
