"""One binary, many torches: installs the wheel of `make wheel` beside each torch and runs its CPU tests there.

    python tools/matrix.py torch==2.10.0 torch==2.13.0 torch      # pip requirements; `torch` is the newest release
    python tools/matrix.py installed                              # the torch that this Python has, on its GPU, too

The wheel is installed without an index, Triton is removed and PATH holds no compiler: what passes needs neither. Each torch
has a virtual environment of its own, which is kept: build/matrix/<requirement>. Prints a row for each and writes them to
results/matrix.json. What is installed stays as it is: the wheel goes into a folder beside it, the tests may be those of a GPU,
and the row goes to results/matrix-installed.json."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Every op, its gradients and error messages, tracing and export, the network.
TESTS = ["test_pointwise", "test_depthwise", "test_conv", "test_linear", "test_pointwise_pool", "test_expand_depthwise", "test_mbconv", "test_stem_mbconv", "test_fold_batch_norm", "test_errors", "test_autograd", "test_export", "test_model", "test_import"]
TOOLS = ["pytest>=8,<9.2", "pytest-xdist", "hypothesis", "expecttest", "numpy", "rich"]

INSTALLED = "installed"
PROBE = """
import hashlib, importlib.util, json, sys, torch, effnet_aot
library = effnet_aot._library.PATH.read_bytes()
print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, "images": len(effnet_aot.kernels()),
                  "library": hashlib.sha256(library).hexdigest(), "folder": effnet_aot.cmake_prefix_path,
                  "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}))
"""


def run(requirement, wheel):
    folder = ROOT / "build/matrix" / requirement.replace("==", "-")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if requirement == INSTALLED:
        python = sys.executable
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, wheel], check=True)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        return test(folder, python, environment, [])
    environment |= {"PATH": str(folder / "bin"), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([*pip, "install", "--quiet", "--upgrade", requirement, *TOOLS], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "triton"], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", wheel], check=True)
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is not None)"
    subprocess.run([python, "-c", absent], cwd=folder, env=environment, check=True)
    return test(folder, python, environment, ["-m", "not gpu"])


def test(folder, python, environment, selection):
    """The row of the package that is installed in `folder`: run there, away from the checkout, whose effnet_aot would be imported instead."""
    probe = subprocess.run([python, "-c", PROBE], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(probe.stdout)
    assert Path(row.pop("folder")).is_relative_to(folder)
    start = time.monotonic()
    tests = [ROOT / "tests" / f"{name}.py" for name in TESTS]
    workers = str(min(30, os.cpu_count()))
    pytest = [python, "-m", "pytest", "-q", "-n", workers, "--dist", "loadgroup", *selection, "-p", "no:cacheprovider", *tests]
    done = subprocess.run(pytest, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    row["tests"] = done.stdout.strip().splitlines()[-1].strip("= ")
    row["passed"] = done.returncode == 0
    if done.returncode:
        print(done.stdout)
    print(f"torch {row['torch']}, Python {row['python']}: {row['tests']} ({time.monotonic() - start:.0f} s)", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="+", help=f"pip requirements, or {INSTALLED}")
    requirements = parser.parse_args().torch
    wheels = sorted(ROOT.glob(f"dist/*-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"), key=os.path.getmtime)
    if not wheels:
        sys.exit("dist/ has no wheel for this Python; make wheel builds it")
    with zipfile.ZipFile(wheels[-1]) as archive:
        library = hashlib.sha256(archive.read("effnet_aot/lib/libeffnet_aot.so")).hexdigest()
    rows = [run(requirement, wheels[-1]) for requirement in requirements]
    (ROOT / "results").mkdir(exist_ok=True)
    name = "matrix-installed" if requirements == [INSTALLED] else "matrix"
    (ROOT / f"results/{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    assert {row["library"] for row in rows} == {library}, "the same bytes everywhere"
    print(f"{wheels[-1].name}: the library, sha256 {library[:16]}, served {len(rows)} torches")
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
