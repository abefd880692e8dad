"""Run photographs through ModelNew and compare it with plain torch.nn, then name what three of them show.

The network has random weights and batch-norm statistics calibrated on the photographs. Printed are which images serve the
device, the error against plain torch.nn in float64 beside the error of plain torch.nn in the same dtype, the time of both,
and the kernels with their registers, spills and shared memory. Last, a pretrained EfficientNet-Lite names what is in three
of the photographs. The exit status is 1 when the error is more than 1.25 times that of torch.nn.
"""

import copy
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

import effnet_aot

from . import open_console, positive
from .classify import samples
from .images import image_name, span

RESOURCES = ("registers", "spills", "shared")


def add_arguments(parser):
    parser.add_argument("--batch", type=positive, default=10, help="photographs in the batch (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=240, help="their height and width in pixels (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of weights and activations (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write errors and times")


def run(arguments):
    console = open_console()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        arguments.parser.error("--device cuda: torch finds no usable GPU here")
    try:
        effnet_aot.kernels()  # fails here when the package was not built
        from .photographs import photographs

        images = photographs(arguments.batch, arguments.size)
    except RuntimeError as error:
        console.print(str(error), markup=False)
        return 1
    except ImportError as error:
        console.print(f"{error}. The photographs come with scikit-image: pip install 'effnet_aot\\[photos]'")
        return 1

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    x, model, eager, exact = networks(images, getattr(torch, arguments.dtype), device)
    console.print(f"[bold]ModelNew[/], {arguments.batch} photographs of {arguments.size} x {arguments.size}, {arguments.dtype}{tf32(x)}")
    console.print(f"on {where(device)}\n")
    with torch.inference_mode():
        ok, rows = print_comparison(console, x, model, eager, exact)
        if arguments.json:
            save(arguments, device, rows)
        console.print()
        console.print(kernels_used(lambda: model(x)) if device == "cuda" else kernels_embedded())
    console.print()
    ok &= samples(console, device, x.dtype)
    return 0 if ok else 1


def networks(images, dtype, device):
    """The images, ModelNew, and plain torch.nn in the same dtype and in float64, all with the same parameters."""
    from effnet_aot.model import ModelNew, calibrate_batch_norm, reference_network

    torch.manual_seed(0)
    eager = calibrate_batch_norm(reference_network(), images).eval().to(device, dtype)
    x = images.to(device, dtype)
    return x, ModelNew.from_reference(eager), eager, copy.deepcopy(eager).double()


def tf32(x):
    return ", TF32 convolutions" if x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else ""


def where(device):
    if device == "cpu":
        return "the CPU: the CPU implementation serves, which calls PyTorch's own operators"
    from effnet_aot import _C

    info = _C.images(torch.cuda.current_device())
    return f"{info['name']}, compute capability {info['capability']}: {info['image']} serves"


def print_comparison(console, x, model, eager, exact):
    """Errors relative to the root mean square of the logits, and median times. Returns whether the error is no worse, and the rows."""
    want = exact(x.double())
    scale = want.square().mean().sqrt()
    rows = {"effnet_aot": (model, x), "torch.nn": (eager, x), "torch.nn, channels_last": (eager, x.to(memory_format=torch.channels_last))}
    table = Table("", "rms error", "max error", "median time", "min time")
    found = []
    for name, (network, images) in rows.items():
        # cuDNN and oneDNN choose kernels by the weights' layout too.
        eager.to(memory_format=torch.channels_last if "channels_last" in name else torch.contiguous_format)
        error = (network(images).double() - want) / scale
        rms, largest = error.square().mean().sqrt().item(), error.abs().max().item()
        times = timings(lambda: network(images), images.is_cuda)
        median, least = statistics.median(times), min(times)
        table.add_row(name, f"{rms:.2e}", f"{largest:.2e}", duration(median), duration(least))
        found.append({"title": name, "rms_error": rms, "max_error": largest, "us": 1e6 * median, "min_us": 1e6 * least})
    console.print(table)
    ok = found[0]["rms_error"] <= 1.25 * found[1]["rms_error"]  # also false for NaN
    console.print(f"errors are against torch.nn in float64, relative to the rms of its logits, {scale.item():.3f}")
    if not ok:
        console.print("[red bold]the error is more than 1.25 times that of torch.nn[/]")
    return ok, found


def save(arguments, device, rows):
    from ..bench import environment

    results = {
        "environment": environment.describe(device),
        "settings": {**{name: getattr(arguments, name) for name in ("batch", "size", "dtype")}, "tf32": torch.backends.cudnn.allow_tf32},
        "comparison": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def timings(function, cuda, warmup=3):
    """Seconds of each of several calls."""
    for _ in range(warmup):
        function()
    if not cuda:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(50)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def duration(seconds):
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def kernels_used(function):
    """What a profiler sees of one call on the GPU, with what the build recorded about each kernel."""
    from effnet_aot import _C

    from ..tune.library import Library

    serving = _C.images(torch.cuda.current_device())["image"]
    with Library().taking() as library:
        function()
        chosen = {(choice.op, choice.variant) for choice in library.choices()}
    built = defaultdict(list)
    for kernel in effnet_aot.kernels():
        if image_name(kernel) == serving and (kernel["op"], kernel["variant"]) in chosen:
            built[kernel["kernel"], kernel["threads"]].append(kernel)
    table = Table("kernel", "variant", "calls", "time", "registers", "spilled B", "shared B", title="kernels of one forward pass")
    for launch, times in traced(function).items():
        # Several of the chosen may agree in these. The registers differ too, except for PTX, which the driver compiles anew. Of
        # shared memory a launch may have asked for more, see spread() in csrc/launcher.cpp.
        variants = [kernel for kernel in built[launch.kernel, launch.threads] if kernel["shared"] <= launch.shared]
        variants = [kernel for kernel in variants if kernel["registers"] == launch.registers] or variants
        names = " or ".join(kernel["variant"] for kernel in variants) or "not of this package"
        resources = [span([kernel[key] for kernel in variants]) if variants else "" for key in ("registers", "spills")]
        table.add_row(launch.kernel, names, str(len(times)), f"{sum(times):.1f} us", *resources, str(launch.shared))
    return table


class Launch(NamedTuple):
    kernel: str
    threads: int
    shared: int
    registers: int


def traced(function):
    """{Launch: [microseconds, ...]} of the kernels that function() runs, in the order of their first launch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    launches = defaultdict(list)
    for event in sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"]):
        what = event["args"]
        launch = Launch(event["name"], math.prod(what["block"]), what["shared memory"], what["registers per thread"])
        launches[launch].append(event["dur"])
    return launches


def kernels_embedded():
    """Where no GPU ran: what the library carries, one line per op and image."""
    groups = defaultdict(list)
    for kernel in effnet_aot.kernels():
        groups[kernel["op"], image_name(kernel)].append(kernel)
    table = Table("op", "image", "kernels", "registers", "spilled B", "shared B", title="kernels embedded for GPUs (none ran)")
    for (op, image), kernels in groups.items():
        table.add_row(op, image, str(len(kernels)), *(span([kernel[key] for kernel in kernels]) for key in RESOURCES))
    return table
