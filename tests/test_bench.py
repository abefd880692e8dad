"""python -m effnet_aot bench: small, on the CPU; and on a GPU what only a GPU has."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from effnet_aot.bench import comparison, plots, scaling
from effnet_aot.bench.kernels import Machine, measure
from effnet_aot.bench.timing import Timer
from effnet_aot.bench.ways import PEERS, WAYS, Way, ours
from effnet_aot.bench.workload import Point, Workloads
from effnet_aot.cli import main


def bench(*arguments, timeout=600, **environment):
    """(output, results) of the command in a process of its own."""
    file = environment.pop("file")
    done = subprocess.run(
        [sys.executable, "-m", "effnet_aot", "bench", *arguments, "--json", file], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "NO_COLOR": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run where JAX is not installed, and which peers need a GPU."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "sitecustomize.py").write_text("import importlib.abc, sys\n" + HIDE_JAX)
    plot = ["--plot", folder / "plots"] if importlib.util.find_spec("matplotlib") else []
    text, results = bench(
        "--quick", "--device", "cpu", "--size", "40", "--batch", "1", "3", "--dtype", "float32", *plot,
        "--peers", "eager", "folded-channels-last", "jax", "baseline", "--cold-start",
        file=folder / "results/bench.json", PYTHONPATH=str(folder), OMP_NUM_THREADS="1",
    )  # fmt: skip
    return text, results, folder


HIDE_JAX = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "jax" else find_spec(name, package)
"""


def test_json(quick):
    _, results, _ = quick
    environment, settings = results["environment"], results["settings"]
    assert {"device", "torch", "triton", "effnet_aot", "commit", "python"} <= environment.keys()
    assert settings["size"] == 40 and settings["batch"] == [1, 3] and settings["seconds"] > 0
    rows = {(row["batch"], row["way"]): row for row in results["comparison"]}
    assert rows.keys() == {(batch, way) for batch in (1, 3) for way in ("ours-eager", "ours", "eager", "folded-channels-last", "jax", "baseline")}
    for (_, way), row in rows.items():
        if way in ("jax", "baseline"):
            assert "us" not in row and row["missing"]
        else:
            assert row["us"] > 0 and 0 <= row["rms_error"] < 1e-5 and row["rms_error"] <= row["max_error"] and row["graph"] is False
    assert [(row["batch"], row["peer"] in ("eager", "folded-channels-last")) for row in results["ratios"]] == [(1, True), (3, True)]
    for row in results["ratios"]:
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])


def test_ops(quick):
    _, results, _ = quick
    rows = [row for row in results["kernels"] if row["batch"] == 3]
    assert [row["op"] for row in rows][:3] == ["conv", "depthwise", "pointwise"] and [row["op"] for row in rows][-2:] == ["pointwise_pool", "linear"]
    assert rows[0]["flops"] == 2 * 27 * 32 * 20 * 20 * 3
    assert rows[0]["bytes"] == 4 * (3 * 3 * 40 * 40 + 32 * 27 + 32 + 3 * 32 * 20 * 20)
    machine = results["machine"]
    for row in rows:
        floor = max(row["bytes"] / machine["copy_bytes_per_s"], row["flops"] / machine["flops_per_s"]["float32"])
        assert row["floor_us"] == pytest.approx(1e6 * floor) and row["share"] == pytest.approx(row["floor_us"] / row["us"])


def test_what_is_missing_is_named(quick):
    text, results, _ = quick
    assert "JAX/XLA jit: missing: jax is not installed" in text
    assert "two JIT kernels + torch: missing: Triton's JIT needs a GPU" in text


def test_tables(quick):
    text, _, _ = quick
    for words in ("float32, batch 1, 40 x 40", "best peer / ours", "rms error", "ours op by op", "floor / us", "cold start", "first - second"):
        assert words in text


def test_cold_start(quick):
    _, results, _ = quick
    rows = {row["way"]: row for row in results["cold_start"]}
    assert rows.keys() == {"ours", "eager"}
    for row in rows.values():
        assert row["total_s"] >= row["first_s"] > 0 and row["extra_s"] == pytest.approx(row["first_s"] - row["second_s"])


def test_plots(quick):
    pytest.importorskip("matplotlib")
    _, results, folder = quick
    pictures = sorted(path.name for path in (folder / "plots").iterdir())
    assert pictures == ["cold_start.png", "comparison.png", "roofline.png"]
    for name in pictures:
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def small():
    return Workloads("cpu", num_classes=10), Timer("cpu", quick=True)


def test_scaling(small, tmp_path):
    points = scaling.points(["float32"], 40, batches=[1, 2], sizes=[32, 40])
    assert points == [Point("float32", 1, 40), Point("float32", 2, 40), Point("float32", 10, 32), Point("float32", 10, 40)]
    rows = [row for rows in scaling.run(*small, points[:3], scaling.QUICK, lambda text: None) for row in rows]
    summary = scaling.summary(rows)
    assert [row["batch"] for row in summary] == [1, 2, 10]
    assert summary[1]["ours_us_per_image"] == pytest.approx(summary[1]["ours_us"] / 2)
    pytest.importorskip("matplotlib")
    results = {"environment": {"device": "some GPU"}, "settings": {"size": 40, "scaling_batch": 10}, "scaling": rows}
    assert plots.draw(results, tmp_path) == [tmp_path / "scaling.png"]


def test_a_failing_peer_is_reported_and_the_rest_go_on(small, monkeypatch):
    def build(workload):
        raise ValueError("no such kernel\nsecond line")

    monkeypatch.setitem(WAYS, "broken", Way("broken", "a broken peer", build))
    ((_, rows),) = comparison.Comparison(*small, [Point("float32", 1, 32)], ["broken", "eager"]).run()
    assert rows[0]["error"] == "ValueError: no such kernel\nsecond line" and rows[1]["us"] > 0


def test_after_a_lost_gpu_nothing_runs(small, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    timer = Timer("cpu", quick=True)
    run = comparison.Comparison(small[0], timer, [Point("float32", 1, 32)], ["eager", "folded"])
    monkeypatch.setattr(timer, "once", lambda function: (function(), 1e-3))
    monkeypatch.setattr(timer, "synchronize", synchronize)
    ((_, rows),) = run.run()
    assert rows[0]["us"] > 0
    assert rows[1]["error"] == "not run: the GPU failed under torch eager, NCHW (CUDA error: an illegal memory access was encountered)"


@pytest.mark.parametrize("batch", [1, 3])
def test_one_network_for_all(small, batch):
    """Every way that runs on a CPU computes the same logits, which are not those of a dead network."""
    workload = small[0](Point("float32", batch, 48))
    with torch.no_grad():
        for name in ("ours-eager", "eager", "eager-channels-last", "folded", "folded-channels-last"):
            way = WAYS[name]
            rms, largest = workload.errors(way.build(workload)(way.images(workload)))
            assert rms < 1e-5, name
    assert (workload.expected - workload.network.fc.bias.double()).std() > 0.1


def test_jax_computes_the_same(small):
    pytest.importorskip("jax")
    ((_, rows),) = comparison.Comparison(*small, [Point("float32", 2, 40)], ["jax"]).run()
    assert rows[0]["rms_error"] < 1e-5, rows


def test_bad_arguments(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in [
        (["--peers", "tvm"], "argument --peers: invalid choice: 'tvm'"),
        (["--batch", "0"], "argument --batch: must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda: torch finds no usable GPU here"),
    ]:
        with pytest.raises(SystemExit) as exit:
            main(["bench", *arguments])
        assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu(tmp_path):
    text, results = bench("--quick", "--size", "96", "--batch", "1", "8", "--peers", *(name for name in PEERS if not WAYS[name].slow), file=tmp_path / "bench.json")
    assert results["environment"]["driver"] and results["environment"]["image"] != "none"
    for row in results["comparison"]:
        assert "us" in row, row
        assert row["graph"] == WAYS[row["way"]].graph and row["flushed_us"] > 0 and row["peak_bytes"] > 0 and "note" not in row
        assert row["rms_error"] < (2e-2 if row["dtype"] == "float16" else 5e-3)
    assert all(row["kernels"] for row in results["profile"])


@pytest.mark.gpu
def test_floor_on_the_gpu():
    workloads, timer = Workloads("cuda"), Timer("cuda", quick=True)
    machine = Machine(timer)
    workload = workloads(Point("float16", 128, 240))
    with torch.no_grad():
        rows = measure(timer, machine, workload, ours(workload))
    largest = max(rows, key=lambda row: row["bytes"])  # far beyond the caches
    assert 0.02 < largest["share"] < 1.1, largest
