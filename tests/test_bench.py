"""python -m effnet_aot bench: small, on the CPU; and on a GPU what only a GPU has."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from effnet_aot.bench import children, comparison, counters, plots, projection, report, scaling
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
    assert [row["op"] for row in rows] == ["stem_mbconv", *6 * ["mbconv"], "pointwise_pool", "linear"]
    assert rows[0]["flops"] == 2 * 20 * 20 * 3 * (27 * 32 + 32 * 9 + 32 * 16)
    # Block 2 at 20 x 20 pixels: expanded from 16 to 96 channels, filtered to 10 x 10, projected to 24.
    assert rows[1]["flops"] == 2 * 3 * (20 * 20 * 16 * 96 + 10 * 10 * (96 * 9 + 96 * 24))
    assert rows[0]["bytes"] == 4 * (3 * 3 * 40 * 40 + 32 * 27 + 32 + 32 * 9 + 32 + 16 * 32 + 16 + 3 * 16 * 20 * 20)
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
    told = []
    rows = [row for rows in scaling.run(*small, points[:3], scaling.QUICK, told.append) for row in rows]
    assert len(told) == scaling.steps(points[:3], scaling.QUICK)
    summary = scaling.summary(rows)
    assert [row["batch"] for row in summary] == [1, 2, 10]
    assert summary[1]["ours_us_per_image"] == pytest.approx(summary[1]["ours_us"] / 2)
    pytest.importorskip("matplotlib")
    results = {"environment": {"device": "some GPU"}, "settings": {"size": 40, "scaling_batch": 10}, "scaling": rows}
    assert plots.draw(results, tmp_path) == [tmp_path / "scaling.png"]


def test_scaling_goes_through_one_dtype_after_the_other(small):
    where = [Point("float32", 1, 32), Point("bfloat16", 1, 32), Point("float32", 2, 32)]
    assert scaling.by_dtype(where) == [[where[0], where[2]], [where[1]]]
    rows = [rows[0] for rows in scaling.run(*small, where, ["ours"], lambda text: None)]
    assert [(row["dtype"], row["batch"]) for row in rows] == [("float32", 1), ("float32", 2), ("bfloat16", 1)]


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


def test_a_package_that_crashes_costs_its_row(small, monkeypatch):
    """AOTInductor's packages are loaded by the process that built them before this one does."""
    crash = "print('loading the package', flush=True); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    popen = subprocess.Popen
    monkeypatch.setattr(children.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", crash], **options))
    ((_, rows),) = comparison.Comparison(*small, [Point("float32", 1, 32)], ["aoti", "eager"]).run()
    assert rows[0]["error"] == "RuntimeError: AOTInductor: SIGSEGV after: loading the package" and rows[1]["us"] > 0


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


NCU = """==PROF== Connected to process 4242 (/usr/bin/python3)
==PROF== Profiling "effnet_pointwise": 0%....50%....100% - 9 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","gpu__time_duration.sum","smsp__inst_executed.sum","sm__inst_executed_pipe_tensor_op_hmma.sum","lts__t_bytes.sum","dram__bytes_read.sum","dram__bytes_write.sum","lts__t_sector_hit_rate.pct","sm__throughput.avg.pct_of_peak_sustained_elapsed","smsp__inst_executed.avg.pct_of_peak_sustained_elapsed","sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_elapsed","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","lts__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active","sm__cycles_elapsed.avg.per_second","launch__registers_per_thread","launch__grid_size","launch__block_size"
"","","","","","","","","","","","","nsecond","inst","inst","Mbyte","Mbyte","Mbyte","%","%","%","%","%","%","%","Ghz","register/thread","",""
"0","4242","python3","127.0.0.1","effnet_pointwise","1","7","(128, 1, 1)","(45, 1, 1)","0","9.0","Command line profiler metrics","6,400","1,290,240","12,902.5","64.512","10.08","100.8","88.1","9.9","20","10","30","25","16.6","1.26","96","45","128"
"1","4242","python3","127.0.0.1","void (anonymous namespace)::copy<float>(float*, long)","1","7","(128, 1, 1)","(16, 1, 1)","0","9.0","Command line profiler metrics","1000","n/a","0","1","1","1","50","1","1","n/a","1","1","1","1.26","32","16","128"
==PROF== Disconnected from process 4242
"""


def test_counters_of_ncu():
    first, second = counters.parse(NCU)
    assert first["kernel"] == "effnet_pointwise" and second["kernel"].startswith("void")
    assert first["ns"] == 6400 and first["instructions"] == 1290240 and first["tensor_instructions"] == 12902.5
    assert first["l2_bytes"] == 64512000 and first["dram_write_bytes"] == 100.8e6 and first["cycles_per_s"] == 1.26e9
    assert (first["sm_pct"], first["warps_active_pct"], first["l2_hit_pct"], first["registers"], first["grid"]) == (9.9, 16.6, 88.1, 96, 45)
    assert "instructions" not in second and "tensor_pct" not in second, "n/a is no number"
    assert counters.parse("==ERROR== nothing was profiled\n") == []


def test_counters_are_those_that_the_gpu_has():
    names = {"gpu__time_duration", "smsp__inst_executed", "smsp__inst_executed_pipe_tensor"}
    assert counters.chosen(names)["tensor_instructions"] == "smsp__inst_executed_pipe_tensor.sum" and "l2_bytes" not in counters.chosen(names)
    assert counters.chosen(None)["tensor_instructions"] == "sm__inst_executed_pipe_tensor_op_hmma.sum"


def test_ncu_is_run_and_read(tmp_path, monkeypatch):
    """A program in ncu's place: what it is started with, and what becomes of its answer or of its failure."""
    ncu = tmp_path / "ncu"
    ncu.write_text(f"""#!{sys.executable}
import os, pathlib, sys
if sys.argv[1] == "--query-metrics":
    print("gpu__time_duration    the duration\\nsmsp__inst_executed   instructions")
elif os.environ.get("REFUSED"):
    pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text("==ERROR== ERR_NVGPUCTRPERM - no permission")
    sys.exit(1)
else:
    assert sys.argv[-6:-4] == [{str(Path(counters.__file__).with_name("counters_child.py"))!r}, "network"] and os.environ["EFFNET_AOT_IMAGE"] == "ptx"
    pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text({NCU!r})
""")
    ncu.chmod(0o755)
    rows = counters.collect("network", "float16", 10, 240, 1, ncu=str(ncu), image="ptx", keep=tmp_path / "kept.csv")
    assert [row["ns"] for row in rows] == [6400, 1000] and set(rows[0]) == {"kernel", "ns", "instructions", "issue_pct", "registers", "grid", "block"}
    assert (tmp_path / "kept.csv").read_text() == NCU
    monkeypatch.setenv("REFUSED", "1")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        counters.collect("network", "float16", 10, 240, 1, ncu=str(ncu))


def test_projection(capsys):
    gpu, (kernel, _) = projection.GPUS["8.9"], counters.parse(NCU)
    result = projection.project(kernel, gpu, "float16")
    # 1.29 M instructions at 4 a cycle on 128 multiprocessors of 2.52 GHz; 111 MB of which 72 fit into the L2, at 1008 GB/s.
    assert kernel["instructions"] / (4 * 128 * 2.52e9) == pytest.approx(1e-6)
    assert result["bound_us"] == pytest.approx((110.88e6 - 72e6) / 1008e9 * 1e6)
    assert result["expected_us"] == pytest.approx(110 + 6.4 * 0.7 * 1.26 / 2.52) and result["limit"] == "dram"
    small = {**kernel, "dram_read_bytes": 0, "dram_write_bytes": 0, "l2_bytes": 0}
    assert projection.project(small, gpu, "float16")["bound_us"] == pytest.approx(1.0) and projection.project(small, gpu, "float16")["limit"] == "latency"
    network = projection.network([kernel], [kernel, kernel], gpu, "float16")
    assert network["ratios"] == pytest.approx({"bound_us": 2, "expected_us": 2, "measuring_us": 2}) and network["projection"] is True
    console = Console(width=160)
    for printed in (*report.projection({**network, "dtype": "float16", "batch": 10, "size": 240})[:1],
                    report.counters({"dtype": "float16", "batch": 10, "size": 240}, {"baseline": [kernel], "ours": [kernel]}),
                    report.network_counters({"dtype": "float16", "batch": 10, "size": 240}, [kernel, {"kernel": "lean", "ns": 1000}])):  # fmt: skip
        console.print(printed)
    text = capsys.readouterr().out
    assert "PROJECTION onto NVIDIA GeForce RTX 4090, not measured there" in text and "unfused / ours" in text and text.count("16.6") == 3
    assert "kernel by kernel: float16, batch 10" in text and "lean" in text


def test_without_ncu_the_rest_goes_on(tmp_path):
    text, results = bench("--quick", "--device", "cpu", "--size", "32", "--batch", "1", "--dtype", "float32", "--skip-comparison", "--counters", "--project", "8.9",
                          file=tmp_path / "bench.json", PATH=os.path.dirname(sys.executable))  # fmt: skip
    if counters.find_ncu():
        pytest.skip("ncu is installed")
    assert "counters, float32, batch 10, 32 x 32: ncu (Nsight Compute) is not installed" in text
    missing = [{"dtype": "float32", "batch": 1, "size": 32, "error": "ncu (Nsight Compute) is not installed"}]
    assert results["projection"] == results["network_counters"] == missing


def test_wrong_logits_are_not_compared_with():
    point = {"dtype": "float16", "batch": 1, "size": 240}
    ours = {**point, "way": "ours", "title": "ours", "role": "ours", "us": 10.0, "rms_error": 2e-3, "max_error": 1e-2}
    peers = [{**ours, "way": way, "title": way, "role": "peer", "us": us, "rms_error": error} for way, us, error in (("a", 30.0, 9e-3), ("b", 20.0, 0.97), ("c", 5.0, math.nan))]
    (ratio,) = comparison.ratios([ours, *peers])
    assert (ratio["peer"], ratio["ratio"]) == ("a", 3)
    _, lines = report.comparison([ours, *peers])
    assert [line.split(":")[0] for line in lines] == ["b", "c"]


def test_compiled_peers_have_processes_of_their_own(small):
    """One that compiles is timed, and one that fails says why."""
    points = [Point("float32", 2, 32)]
    ((_, (row,)),) = comparison.Comparison(*small, points, ["compile"]).run()
    assert "us" in row, row
    assert row["batch"] == 2 and row["rms_error"] < 1e-5 and row["build_s"] > 0
    broken = Workloads("nowhere", num_classes=10)
    broken._networks["float32"] = small[0].network("float32")
    with children.Compiled(broken, small[1], points) as compiled:
        compiled.wait()
        with pytest.raises(RuntimeError, match="nowhere"):
            compiled.measure(points[0])


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
        # TF32, which the baseline cuts off instead of rounding.
        assert row["rms_error"] < (2e-2 if row["dtype"] == "float16" or row["way"] == "baseline" else 5e-3), row
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
