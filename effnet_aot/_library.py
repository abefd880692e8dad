"""Loads libeffnet_aot.so, which registers torch.ops.effnet. A library that fails to load does not fail the import: the
error is remembered, and explained where the library is first used."""

from pathlib import Path
from typing import NoReturn

import torch

PATH = Path(__file__).parent / "lib" / "libeffnet_aot.so"

error: Exception | None = None


def explain(cause: Exception) -> NoReturn:
    checkout = PATH.parents[2]
    if not PATH.exists() and (checkout / "setup.py").exists():
        # What `pip install .` installed lies elsewhere, but Python looks into its current folder first.
        raise RuntimeError(
            f"effnet_aot is not usable: {cause.__cause__ or cause}\n"
            f"Python imported the sources in {checkout}, where nothing is built. After pip install . run it from another folder;\n"
            f"or build in place, in that folder: pip install --no-build-isolation -e ."
        ) from cause
    raise RuntimeError(
        f"effnet_aot is not usable: {cause.__cause__ or cause}\n"  # torch wraps what the loader said
        f"Its library {PATH} must be built for this machine and load with torch {torch.__version__} (torch >= 2.10 is needed).\n"
        "To rebuild it, run in a checkout of the sources: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from cause


def require() -> None:
    """Raises when the library did not load."""
    if error is not None:
        explain(error)


class _Unavailable:
    """Stands in for torch.ops.effnet when there is nothing behind it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        require()


try:
    torch.ops.load_library(PATH)
except Exception as e:  # OSError of the loader, RuntimeError of a registration
    error = e
    torch.ops.effnet = _Unavailable()
