"""One binary, many torches: installs the wheel of `make wheel` beside each torch and runs its CPU tests there.

    python tools/matrix.py torch==2.10.0 torch==2.13.0 torch      # pip requirements; `torch` is the newest release
    python tools/matrix.py torch python3.12:torch==2.11.0         # the second with another Python, whose wheel is there, too

The wheel is installed without an index, Triton is removed and PATH holds no compiler: what passes needs neither. Each torch
has a virtual environment of its own, which is kept: build/matrix/<requirement>. Prints a row for each and writes them to
results/matrix.json."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Every op, its gradients and error messages, tracing and export, the network.
TESTS = ["test_pointwise", "test_depthwise", "test_conv", "test_linear", "test_pointwise_pool", "test_expand_depthwise", "test_mbconv", "test_stem_mbconv", "test_fold_batch_norm", "test_errors", "test_autograd", "test_export", "test_model", "test_import"]
TOOLS = ["pytest>=8,<9.2", "pytest-xdist", "hypothesis", "expecttest", "numpy", "rich"]

PROBE = """
import hashlib, importlib.util, json, sys, torch, effnet_aot
assert importlib.util.find_spec("triton") is None
library = effnet_aot._library.PATH.read_bytes()
print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, "images": len(effnet_aot.kernels()),
                  "library": hashlib.sha256(library).hexdigest(), "folder": effnet_aot.cmake_prefix_path}))
"""


def wheel_for(python):
    version = subprocess.run([python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    wheels = sorted(ROOT.glob(f"dist/*-{version}-*.whl"), key=os.path.getmtime)
    if not wheels:
        sys.exit(f"dist/ has no wheel for {python} ({version}); make wheel builds it, with PYTHON={python} and a VENV of its own")
    return wheels[-1]


def library_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return hashlib.sha256(archive.read("effnet_aot/lib/libeffnet_aot.so")).hexdigest()


def run(interpreter, requirement, wheel):
    folder = ROOT / "build/matrix" / f"{Path(interpreter).name}-{requirement.replace('==', '-')}"
    python, path = folder / "bin/python", str(folder / "bin")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    subprocess.run([*pip, "install", "--quiet", "--upgrade", requirement, *TOOLS], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "triton"], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", wheel], check=True)

    # Away from the checkout, whose effnet_aot would be imported instead.
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    probe = subprocess.run([python, "-c", PROBE], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(probe.stdout)
    assert Path(row.pop("folder")).is_relative_to(folder)
    start = time.monotonic()
    tests = [ROOT / "tests" / f"{name}.py" for name in TESTS]
    pytest = [folder / "bin/pytest", "-q", "-n", "auto", "--dist", "loadgroup", "-m", "not gpu", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(pytest, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    row["tests"] = done.stdout.strip().splitlines()[-1].strip("= ")
    row["passed"] = done.returncode == 0
    if done.returncode:
        print(done.stdout)
    print(f"torch {row['torch']}, Python {row['python']}: {row['tests']} ({time.monotonic() - start:.0f} s)", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="+", help="pip requirements, each with a Python and a colon in front or for this one")
    cases = []
    for case in parser.parse_args().torch:
        interpreter, _, requirement = case.rpartition(":")
        cases.append((interpreter or sys.executable, requirement, wheel_for(interpreter or sys.executable)))
    libraries = {library_of(wheel) for *_, wheel in cases}
    if len(libraries) != 1:
        sys.exit("the wheels of these Pythons hold different libraries: build them from one checkout")
    rows = [run(*case) for case in cases]
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results/matrix.json").write_text(json.dumps(rows, indent=1) + "\n")
    assert {row["library"] for row in rows} == libraries, "the same bytes everywhere"
    print(f"the library, sha256 {min(libraries)[:16]}, served {len(rows)} torches")
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
