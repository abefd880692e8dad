"""The PEP 517 backend: setuptools', made to build against the torch and triton that are already installed.

Build isolation hides the environment that the package is going to be installed into, and a `torch` among the build
requirements would be downloaded, gigabytes of it, only to be thrown away. So the environment's packages are appended to
sys.path (those of the isolated build come first), and torch and triton are asked for only where they are missing or too
old. Under tools that build in a fresh interpreter (uv, python -m build) both are missing and get downloaded; the library
uses the stable ABI, so the result runs on any torch >= 2.10 all the same.
"""

import shutil
import site
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

# TORCH_TARGET_VERSION is 2.10; triton's compiler interface is checked for 3.6 to 3.9.
TORCH, TRITON = "torch>=2.10", "triton>=3.6,<3.10"
# Beside a torch that brought none: 3.8 and 3.9 take half as long again for the same kernels.
FAST_TRITON = "triton>=3.6,<3.8"

_installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
if site.ENABLE_USER_SITE:
    _installed.append(site.getusersitepackages())
sys.path += [path for path in dict.fromkeys(_installed) if path not in sys.path]


def missing():
    def present(requirement):
        try:
            return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            return False

    absent = [requirement for requirement in (TORCH, TRITON) if not present(Requirement(requirement))]
    return [FAST_TRITON] if absent == [TRITON] else absent


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + missing()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + missing()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs whatever build/lib* holds, modules that have since been renamed or removed too.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
