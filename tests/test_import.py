"""`import effnet_aot` is cheap, needs no GPU, and survives a library that does not load. Each in a process of its own."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import effnet_aot

PACKAGE = Path(effnet_aot.__file__).parent


def output(code: str, *paths: Path, **env: str) -> str:
    """What Python prints in an empty environment but for `paths` and `env`."""
    path = ":".join(map(str, [*paths, PACKAGE.parent, *sys.path[1:]]))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path, **env}, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_cheap():
    """At most 0.2 s of processor time beyond torch's, the best of three."""
    code = "import time, torch; t = time.process_time(); import effnet_aot; print(time.process_time() - t)"
    assert min(float(output(code)) for _ in range(3)) < 0.2


def test_import_loads_nothing_that_is_not_needed():
    code = "import json, sys, torch; before = set(sys.modules); import effnet_aot; print(json.dumps(sorted(set(sys.modules) - before)))"
    modules = json.loads(output(code))
    assert all(name.split(".")[0] == "effnet_aot" for name in modules)
    assert not {"effnet_aot.model", "effnet_aot._C", "effnet_aot.cli", "effnet_aot.aot"} & set(modules)


def test_no_gpu_is_needed():
    code = "import torch, effnet_aot; print(torch.ops.effnet.linear(torch.ones(1, 2), torch.ones(1, 2)).item())"
    assert output(code, CUDA_VISIBLE_DEVICES="") == "2.0"


@pytest.mark.parametrize("name", effnet_aot.__all__)
def test_public_names(name):
    assert getattr(effnet_aot, name) is not None and name in dir(effnet_aot)


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'effnet_aot' has no attribute 'nonsense'"):
        effnet_aot.nonsense


def test_version():
    assert effnet_aot.__version__ == importlib.metadata.version("effnet_aot")


USES = [
    "effnet_aot.fused_linear_bias(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1))",
    "effnet_aot.ops.pointwise(torch.ones(1, 1, 1, 1), torch.ones(1, 1))",
    "torch.ops.effnet.pointwise_bn",
    "effnet_aot.kernels()",
    "effnet_aot.build_info()",
    "effnet_aot.preload(0)",
    "effnet_aot.ModelNew().eval()(torch.ones(1, 3, 32, 32))",
]
PROBE = f"""
import json, torch, effnet_aot
errors = dict()
for use in {USES!r}:
    try:
        eval(use)
    except RuntimeError as e:
        errors[use] = str(e)
print(json.dumps(errors))
"""


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_a_library_that_does_not_load_is_explained_at_first_use(library, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "effnet_aot", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = tmp_path / "effnet_aot/lib/libeffnet_aot.so"
    if library == "broken":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no library")
    errors = json.loads(output(PROBE, tmp_path))
    assert errors.keys() == set(USES)
    for text in errors.values():
        assert text.startswith(f"effnet_aot is not usable: {path}: ") and "pip install" in text
        assert ("No such file" if library == "missing" else "file too short") in text
