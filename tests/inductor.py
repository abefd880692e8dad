"""Whether AOTInductor works here at all: there are machines on which every package crashes while it is loaded."""

import signal
import subprocess
import sys

import pytest

PROBE = """
import sys, torch
device, package = sys.argv[1:]
x = torch.ones(4, device=device)
torch._inductor.aoti_compile_and_package(torch.export.export(torch.nn.ReLU(), (x,)), package_path=package)
print("packaged", flush=True)
torch._inductor.aoti_load_package(package)(x)
"""


def skip_if_every_package_crashes(device, folder):
    """For a test whose child process was ended by a signal: a package of torch's own ops, in a child too, tells whose fault it is."""
    probe = subprocess.run([sys.executable, "-c", PROBE, device, str(folder / "probe.pt2")], capture_output=True, text=True, timeout=600)
    if probe.returncode < 0 and "packaged" in probe.stdout:
        pytest.skip(f"AOTInductor's packages for {device} crash here while they are loaded ({signal.Signals(-probe.returncode).name}), one of a ReLU alone, too")
