"""benchmarks/host_time.py, on the CPU, where the host is all there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/host_time.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout")


def test_every_process_measures_every_point(tmp_path):
    options = ["--dtype", "float32", "--batch", 1, 2, "--size", 64, "--processes", 2, "--medians", 2, "--device", "cpu", "--json", tmp_path / "a" / "host-time.json"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, options)], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = json.loads((tmp_path / "a" / "host-time.json").read_text())
    assert results["environment"]["torch"]
    assert [(row["dtype"], row["batch"], row["size"], row["process"]) for row in results["rows"]] == [("float32", batch, 64, process) for batch in (1, 2) for process in (1, 2)]
    for row in results["rows"]:
        assert len(row["host_us"]) == len(row["call_us"]) == 2 and min(row["host_us"] + row["call_us"]) > 0
    assert "host, us" in done.stdout and "float32" in done.stdout
