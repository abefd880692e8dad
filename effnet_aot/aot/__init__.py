"""The ahead-of-time compiler: every variant of every kernel, for every architecture, into one table of images.

Runs at build time only, from setup.py, which imports this package by itself: nothing here needs effnet_aot, torch's
CUDA, a GPU or a CUDA toolkit. Triton brings the compiler, the assembler and the driver's headers.
"""

from .architectures import Target, default_archs, parse_archs
from .build import BuildResult, build_kernels
from .errors import BuildError

__all__ = ["BuildError", "BuildResult", "Target", "build_kernels", "default_archs", "parse_archs"]
