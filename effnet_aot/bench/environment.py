"""Where the numbers come from."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import effnet_aot

from ..cli.info import driver, installed_version


def describe(device):
    found = {
        "effnet_aot": effnet_aot.__version__, "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": installed_version("triton"), "jax": installed_version("jax"),
        "device": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
    }  # fmt: skip
    if torch.device(device).type == "cuda":
        from effnet_aot import _C

        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        found |= {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size, "driver": driver(), "image": _C.images(index)["image"],
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def commit():
    """The source tree's commit, with "+changes" where it was changed, or None outside of a checkout. $GIT_COMMIT names it where
    a copy of the sources is without its repository, or with an older state of it."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    folder = Path(effnet_aot.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if status else "")
