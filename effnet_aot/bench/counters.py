"""What a kernel did, by the GPU's own counters: Nsight Compute (ncu) on a process that makes one forward pass.

ncu repeats every kernel until it has read all counters, each time with flushed caches and whatever clock the GPU runs at, so
DRAM bytes are those of a cold cache and durations are not those of the timings. Tables say so.
"""

import csv
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .children import environment, last_line

TIMEOUT = 400

# Our name: ncu's. "|" separates what the same counter is called on different GPUs or by different versions.
METRICS = {
    "ns": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "tensor_instructions": "sm__inst_executed_pipe_tensor_op_hmma.sum|sm__inst_executed_pipe_tensor.sum|smsp__inst_executed_pipe_tensor.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_hit_pct": "lts__t_sector_hit_rate.pct",
    "sm_pct": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_pct": "smsp__inst_executed.avg.pct_of_peak_sustained_elapsed|smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_pct": "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_elapsed|sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed|dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_pct": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_active_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "cycles_per_s": "sm__cycles_elapsed.avg.per_second|smsp__cycles_elapsed.avg.per_second",
    "registers": "launch__registers_per_thread",
    "grid": "launch__grid_size",
    "block": "launch__block_size",
}
SCALES = {
    "": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9,
    "hz": 1, "Hz": 1, "Khz": 1e3, "KHz": 1e3, "Mhz": 1e6, "MHz": 1e6, "Ghz": 1e9, "GHz": 1e9, "cycle/second": 1, "cycle/nsecond": 1e9, "cycle/usecond": 1e6,
    "Kcycle/second": 1e3, "Mcycle/second": 1e6, "Gcycle/second": 1e9,
}  # fmt: skip


def find_ncu():
    """Where ncu is, or None: on the path, or where the installers of CUDA and of Nsight Compute put it."""
    places = [*Path("/usr/local").glob("cuda*/bin/ncu"), *Path("/opt/nvidia/nsight-compute").glob("*/ncu")]
    return shutil.which("ncu") or next((str(place) for place in sorted(places, reverse=True)), None)


@functools.cache
def available(ncu):
    """The counters that this GPU has, without their suffixes; None where ncu does not say."""
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=120)
    names = set(re.findall(r"^(\w+__\w+)", done.stdout, re.MULTILINE))
    return names or None


def chosen(names):
    """{our name: ncu's} of what there is; launch__ figures are no counters and always there."""
    found = {}
    for own, spellings in METRICS.items():
        for metric in spellings.split("|"):
            if names is None or metric.split(".")[0] in names or metric.startswith("launch__"):
                found[own] = metric
                break
    return found


CHILD = Path(__file__).with_name("counters_child.py")


def collect(*arguments, script=CHILD, ncu=None, image=None, keep=None):
    """A dictionary for every kernel that `script` launches between the profiler's marks, in that order. `image` is what
    EFFNET_AOT_IMAGE is set to, `keep` a file for ncu's own output. RuntimeError with ncu's words where it fails."""
    ncu = ncu or find_ncu()
    if ncu is None:
        raise RuntimeError("ncu (Nsight Compute) is not installed")
    metrics = chosen(available(ncu))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off", "--replay-mode", "kernel",
            "--target-processes", "application-only", "--log-file", log, "--metrics", ",".join(metrics.values()),
            sys.executable, script, *map(str, arguments),
        ]  # fmt: skip
        settings = {"PYTHONSAFEPATH": 1, **({"EFFNET_AOT_IMAGE": image} if image else {})}
        output = Path(folder, "output")
        with open(output, "w") as file:
            try:
                code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(**settings), timeout=TIMEOUT).returncode
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"ncu did not end within {TIMEOUT} s") from None
        text = log.read_text(errors="replace") if log.exists() else ""
        if keep:
            Path(keep).parent.mkdir(parents=True, exist_ok=True)
            Path(keep).write_text(text)
        if "ERR_NVGPUCTRPERM" in text:
            raise RuntimeError("ncu may not read the GPU's counters here (ERR_NVGPUCTRPERM): the driver allows it to administrators alone")
        rows = parse(text, metrics)
        if code or not rows:
            errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
            raise RuntimeError(f"ncu failed: {errors[0] if errors else last_line(output)}")
        return rows


def parse(text, metrics=None):
    """The rows of `ncu --csv --page raw`: a header, a line of units, a line a kernel, among lines of ncu's own."""
    metrics = metrics or {own: spelling for own, spellings in METRICS.items() for spelling in spellings.split("|")[:1]}
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if not rows:
        return []
    header = rows[0]
    units = dict(zip(header, rows[1])) if len(rows) > 1 and not rows[1][0] else {}
    found = []
    for row in rows[2 if units else 1 :]:
        values = dict(zip(header, row))
        kernel = {"kernel": values["Kernel Name"].split("(")[0].strip()}
        for own, metric in metrics.items():
            value = number(values.get(metric), units.get(metric, ""))
            if value is not None:
                kernel[own] = value
        found.append(kernel)
    return found


def number(text, unit):
    if text is None or not re.fullmatch(r"[\d.,eE+-]+", text):
        return None  # "n/a", or nothing
    value = float(text.replace(",", "")) * SCALES.get(unit, 1)
    return int(value) if value.is_integer() else value

