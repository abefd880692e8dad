"""A folder that measures anywhere: libeffnet_aot.so with every candidate in it, its manifest, and the calls of the networks.

    bundle/libeffnet_aot.so   bundle/manifest.json   bundle/calls.json   bundle/networks.json

Building needs a checkout and Triton; measuring needs torch, a driver and these Python files, not a built package.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from . import calls, networks

PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parent
FILES = ("libeffnet_aot.so", "manifest.json", "calls.json")  # and, for `tune sequence`, networks.json
PRECISIONS = {"float16": ["fp16"], "bfloat16": ["bf16"], "float32": ["tf32", "narrowing", "narrow", "widening", "widening16"], "float32-ieee": ["fp32"]}


def build(out, names, ops, archs, dtypes, size=None):
    """Writes the bundle; RuntimeError with the reason where it cannot be built."""
    if not (CHECKOUT / "setup.py").exists():
        raise RuntimeError(f"{CHECKOUT} is no checkout of the sources, which building the candidates needs")
    recorded = {name: (calls.network_calls(name, size), networks.chains(name, size)) for name in names}
    tried = f"{','.join(ops or [])}:{','.join(precision for dtype in dtypes for precision in PRECISIONS[dtype])}"
    folder = CHECKOUT / "build" / "tune"
    environment = {**os.environ, "EFFNET_AOT_ARCHS": " ".join(archs)}
    command = [sys.executable, "setup.py", "build_ext", f"--candidates={tried}", f"--build-temp={folder / 'temp'}", f"--build-lib={folder / 'lib'}"]
    if subprocess.run(command, cwd=CHECKOUT, env=environment).returncode:
        raise RuntimeError("the candidates did not build; the reason is above")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for source in ("lib/libeffnet_aot.so", "manifest.json"):
        shutil.copy2(folder / "lib" / "effnet_aot" / source, out)
    calls.save(out / "calls.json", {name: found for name, (found, _) in recorded.items()})
    networks.save(out / "networks.json", {name: found for name, (_, found) in recorded.items()})
    return out


@contextmanager
def package(bundle):
    """A folder to put on PYTHONPATH, in which effnet_aot is this package with the bundle's library."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "effnet_aot"
        (root / "lib").mkdir(parents=True)
        for path in PACKAGE.iterdir():
            if path.name not in ("lib", "manifest.json", "__pycache__") and not path.name.startswith("_C."):
                (root / path.name).symlink_to(path)
        (root / "lib" / "libeffnet_aot.so").symlink_to(Path(bundle, "libeffnet_aot.so").resolve())
        yield folder
