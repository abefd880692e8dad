"""benchmarks/networks.py, on the CPU, with a network of plain torch.nn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/networks.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout")


def run(*options, cwd):
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], cwd=cwd, capture_output=True, text=True, timeout=600)


def test_times_and_errors(tmp_path):
    """Without torch.compile, which takes most of a minute; folding is by this script's own reading of the graph."""
    options = ["--models", "reference_network", "--ways", "ours", "folded", "--batch", 1, 2, "--size", 64, "--device", "cpu", "--quick", "--jobs", 2]
    done = run(*options, "--dtype", "float32", "--json", tmp_path / "a" / "networks.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "a" / "networks.json").read_text())
    assert results["environment"]["torch"] and list(results["settings"]["ways"]) == ["ours", "folded"]
    assert [(row["batch"], row["way"]) for row in results["networks"]] == [(1, "ours"), (1, "folded"), (2, "ours"), (2, "folded")]
    for row in results["networks"]:
        assert row["us"] > 0 and row["flushed_us"] > 0 and 0 < row["rms_error"] < 1e-5
    assert "reference_network" in done.stdout and "folded / ours" in done.stdout


def test_a_failure_is_a_row(tmp_path):
    options = ["--models", "reference_network", "--ways", "ours", "--batch", 1, "--size", 0, "--device", "cpu", "--quick"]
    done = run(*options, "--json", tmp_path / "networks.json", cwd=tmp_path)
    assert done.returncode == 1 and "reference_network, batch 1, ours: " in done.stderr
    (row,) = json.loads((tmp_path / "networks.json").read_text())["networks"]
    assert row["error"] and "us" not in row
