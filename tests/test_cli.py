"""python -m effnet_aot run and info, as a user starts them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stub_cuda import StubDriver

import effnet_aot
from effnet_aot.cli import main


def command(*arguments, environment=None, folder=None, code=0):
    """The output, after checking the exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "effnet_aot", *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", **(environment or {})},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def without_gpu():
    return {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("arguments", [["info"], ["run", "--help"], ["bench", "--help"], ["tune", "--help"], ["classify", "--help"]], ids=" ".join)
def test_needs_nothing_but_the_dependencies(without_gpu, arguments):
    """Not even numpy, which torch does without."""
    optional = ["numpy", "matplotlib", "PIL", "skimage", "jax", "triton", "torchvision", "timm"]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional})); from effnet_aot.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **without_gpu, "PYTHONPATH": StubDriver.python_path()}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_info(without_gpu):
    text = command("info", environment={**without_gpu, "EFFNET_AOT_LOG": "0"})
    assert effnet_aot.__version__ in text and torch.__version__ in text
    build = effnet_aot.build_info()
    assert f"triton {build['triton']}, ptxas {build['ptxas']}" in text
    kernels = effnet_aot.kernels()
    assert kernels
    for arch, kind in {(kernel["arch"], kernel["kind"]) for kernel in kernels}:
        count = sum((kernel["arch"], kernel["kind"]) == (arch, kind) for kernel in kernels)
        name = {"cubin": "sm_", "ptx": "compute_"}[kind] + arch.replace(".", "")
        assert f"{count} {kind} {name}" in text
    assert "environment EFFNET_AOT_LOG=0\n" in text
    assert re.search(r"^GPU +none", text, re.MULTILINE)
    assert "ERROR" not in text


def test_without_the_library(tmp_path, without_gpu):
    """The Python files alone, as after a failed build: both commands say so, and how to rebuild."""
    shutil.copytree(Path(effnet_aot.__file__).parent, tmp_path / "effnet_aot", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("info", "run"):
        text = command(name, environment=without_gpu, folder=tmp_path, code=1)
        assert str(tmp_path / "effnet_aot/lib/libeffnet_aot.so") in text.replace("\n", "") and "pip install" in text


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_run_on_the_cpu(without_gpu, precision):
    pytest.importorskip("skimage")
    text = command("run", "--batch", "3", "--size", "64", "--dtype", precision, environment=without_gpu)
    assert f"3 photographs of 64 x 64, {precision}" in text
    assert "the CPU implementation serves" in text
    ours, eager = (re.search(rf"{name} +│ (\S+) +│ (\S+) +│ (\S+ [mu]s) ", text) for name in ("effnet_aot", "torch.nn"))
    assert 0 < float(ours[1]) <= 1.25 * float(eager[1])
    for op in {kernel["op"] for kernel in effnet_aot.kernels()}:
        assert re.search(rf"│ {op} +│ cubin sm_", text)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_run_on_the_gpu(precision):
    pytest.importorskip("skimage")
    text = command("run", "--dtype", precision)
    assert re.search(r"(cubin sm_|ptx compute_)\d+ serves", text)
    for op in ("stem_mbconv", "mbconv", "pointwise", "(pointwise|merged)_pool", "linear"):
        assert re.search(rf"│ effnet_{op}(_\w+)? ", text)
    assert "not of this package" not in text and "Warning" not in text


def test_photographs_are_ten_views():
    pytest.importorskip("skimage")
    from effnet_aot.cli.photographs import photographs

    x = photographs(23, 40)
    assert x.shape == (23, 3, 40, 40) and x.dtype == torch.float32
    assert torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(1).min() > 0.1
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: command"),
        (["walk"], "invalid choice: 'walk'"),
        (["run", "--batch", "0"], "argument --batch: must be at least 1, got 0"),
        (["run", "--size", "big"], "argument --size: invalid integer value: 'big'"),
        (["run", "--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["run", "--device", "cuda"], "--device cuda: torch finds no usable GPU here"),
        (["info", "--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_the_commands():
    text = command("--help")
    assert " run " in text and " info " in text
