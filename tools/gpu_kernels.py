"""Compiles what a build would compile into a folder that is small enough to be carried to another machine:

    EFFNET_AOT_ARCHS="8.9 9.0" python tools/gpu_kernels.py build/gpu-kernels
    EFFNET_AOT_CACHE=build/gpu-kernels pip install .           # there, with the same triton: compiles nothing

Needs triton and rich alone, no torch and no GPU. What earlier calls left in the folder serves again or is removed.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def fill(folder, archs=None, source_dir=ROOT / "triton_src", quiet=False):
    """(entries of the cache, how many of them were compiled just now)"""
    from aot import build_kernels

    with tempfile.TemporaryDirectory() as scratch:
        result = build_kernels(scratch, folder, archs, quiet=quiet, source_dir=source_dir)
    names = {entry.name for entry in result.entries}
    for path in folder.iterdir():
        # Nothing but the cache's own files: the folder may be any.
        if re.fullmatch(r"[0-9a-f]{32}\.(cubin|ptx|json)", path.name) and path.stem not in names:
            path.unlink()
    return len(names), result.compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the cache")
    folder = parser.parse_args().folder
    # As setup.py does it: importing effnet_aot would need the library.
    sys.path.insert(0, str(ROOT / "effnet_aot"))
    from aot import BuildError

    try:
        count, compiled = fill(folder)
    except BuildError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {count} kernels, {size:.1f} MB; {compiled} compiled now")


if __name__ == "__main__":  # the compilers are spawned processes, which import this file again
    main()
