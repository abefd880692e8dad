"""tools/gpu_sanitize.py with a program that stands in for compute-sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[1] / "tools" / "gpu_sanitize.py"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs a checkout")

PROGRAM = """#!{python}
import sys, pathlib
words = sys.argv[1:]
if words[0] == "--help": print("--kernel-name")
elif words[0] == "--version": print("Version 1.2")
else:
    log = pathlib.Path(words[words.index("--log-file") + 1])
    share = next(word for word in words if word.startswith("--share="))
    {does}
"""
CLEAN = 'log.write_text("========= ERROR SUMMARY: 0 errors\\n"); print("== 3 passed, 1 skipped in 0.10s ==")'


def sanitize(tmp_path, does, *arguments):
    program = tmp_path / "compute-sanitizer"
    program.write_text(PROGRAM.format(python=sys.executable, does=does))
    program.chmod(0o755)
    command = [sys.executable, FILE, "memcheck", "--sanitizer", program, "--results", tmp_path / "results", "--logs", tmp_path, "--jobs", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GIT_COMMIT": "c0ffee"})
    file = tmp_path / "results" / f"sanitizer-memcheck{'-cached' if '--cached' in arguments else ''}.txt"
    return done, file.read_text() if file.exists() else ""


@pytest.mark.parametrize("options", [(), ("--cached",)])
def test_clean(tmp_path, options):
    setting = "assert os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING') == " + ("None" if options else "'1'")
    done, text = sanitize(tmp_path, f"import os; {setting}; {CLEAN}", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert text.startswith("commit c0ffee; 2 processes") and "Version 1.2" in text and "--kernel-name kns=effnet_" in text
    assert text.count("ERROR SUMMARY: 0 errors") == 2 and text.count("\n3 passed, 1 skipped in 0.10s") == 2
    assert f"caching of memory: {'on' if options else 'off'}" in text


@pytest.mark.parametrize("bad", ["none", "ptx"])
def test_every_kind_of_image(tmp_path, bad):
    done, text = sanitize(tmp_path, f"import os; {CLEAN}; sys.exit(os.environ['EFFNET_AOT_IMAGE'] == '{bad}')", "--images", "cubin", "ptx")
    assert done.returncode == (bad == "ptx"), done.stdout + done.stderr
    for image, part in zip(("cubin", "ptx"), text.split("\n\n"), strict=True):
        assert f"EFFNET_AOT_IMAGE={image}\n" in part and part.count("ERROR SUMMARY: 0 errors") == 2


@pytest.mark.parametrize("does", [
    f"{CLEAN}; sys.exit(share == '--share=1/2')",  # a test failed, or the sanitizer found something
    "print('3 passed in 0.10s')",  # it wrote nothing
    CLEAN.replace("3 passed, 1 skipped", "4 skipped"),
])  # fmt: skip
def test_not_clean(tmp_path, does):
    done, text = sanitize(tmp_path, does)
    assert done.returncode == 1 and text


def test_no_sanitizer(tmp_path):
    done = subprocess.run([sys.executable, FILE, "memcheck", "--sanitizer", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2 and "is not installed" in done.stderr


def test_shares_are_the_whole(pytestconfig):
    """Every test is in one share."""
    def collected(*options):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", Path(__file__).with_name("test_linear.py"), *options]
        return {line for line in subprocess.run(command, cwd=FILE.parents[1], capture_output=True, text=True).stdout.splitlines() if "::" in line}

    shares = [collected(f"--share={k}/3") for k in range(3)]
    assert set.union(*shares) == collected() and sum(map(len, shares)) == len(set.union(*shares)) > 100


@pytest.mark.parametrize("given, number, expected", [(None, 0, "0,1,2"), (None, 4, "1,2,0"), ("5,7,6", 1, "7,6,5"), ("5,7,6", 2, "6,5,7")])
def test_processes_side_by_side_begin_with_different_gpus(monkeypatch, given, number, expected):
    from conftest import spread_over_gpus

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given) if given else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    spread_over_gpus(number)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    spread_over_gpus(number + 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
