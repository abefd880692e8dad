"""tools/gpu_report.py: figures from what the steps write, limits of time, and what fails. Without a GPU."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_build import kernel_sources

from effnet_aot.bench import comparison, projection, scaling

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tools" / "gpu_report.py"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs a checkout")
committed = pytest.mark.skipif(not (ROOT / "results").exists(), reason="needs the committed results")


@pytest.fixture(scope="module")
def report():
    specification = importlib.util.spec_from_file_location("gpu_report", FILE)
    module = sys.modules["gpu_report"] = importlib.util.module_from_spec(specification)  # where dataclasses look themselves up
    specification.loader.exec_module(module)
    return module


# Figures


@committed
@pytest.mark.parametrize("image", ["cubin", "ptx"])
def test_committed_tests(report, image):
    results = json.loads((ROOT / f"results/gpu-tests-{image}.json").read_text())
    (line,) = report.tests(results)
    assert line.startswith(f"{results['total']['passed']} passed, ") and line.endswith(f" on {results['serving_images'][0]}")
    assert re.search(rf"{results['total'].get('failed', 0)} failed, \d+ error, \d+ skipped", line)
    calls = results["measured"]["test_stress"]["calls"]
    assert report.stress(results) == [line, f"{results['options']['fuzz_cases']} random cases, 0 failed; {calls} calls, 0 wrong results"]


@committed
def test_committed_sanitizer(report):
    errors, tests = report.sanitizer((ROOT / "results/sanitizer-memcheck.txt").read_text())
    assert errors == "0 errors" and re.match(r"\d+ passed", tests) and " failed" not in tests


@committed
def test_committed_op_times(report):
    lines = report.op_times((ROOT / "results/op-times.txt").read_text())
    assert len(lines) == 6 and re.fullmatch(r"fp16, batch 1: sum [\d.]+ us, floor [\d.]+ us", lines[0])


def test_sanitizer_of_several_processes(report):
    text = "compute-sanitizer --tool racecheck\n" + 2 * "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n" + "97 passed in 26.32s\n3 passed, 1 failed in 5s\n"
    assert report.sanitizer(text) == ["0 hazards displayed (0 errors, 0 warnings)", "100 passed, 1 failed"]


def test_run(report, tmp_path):
    """What the command really writes."""
    pytest.importorskip("skimage")
    file = tmp_path / "results" / "run.json"
    command = [sys.executable, "-m", "effnet_aot", "run", "--device", "cpu", "--batch", "3", "--size", "64", "--json", file]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "GIT_COMMIT": "c0ffee", "OMP_NUM_THREADS": "1"})
    results = json.loads(file.read_text())
    assert results["environment"]["commit"] == "c0ffee" and results["settings"]["size"] == 64
    time, error = report.run(results)
    assert re.fullmatch(r"[\d.]+ [mu]s; torch.nn.* [\d.]+ [mu]s, ratio [\d.]+", time)
    assert re.fullmatch(r"error [\d.e-]+; torch.nn [\d.e-]+", error)


def row(way, batch=10, **more):
    return {"dtype": "float16", "batch": batch, "size": 240, "way": way, "title": way, "role": "ours" if way.startswith("ours") else "peer", **more}


def test_bench(report):
    rows = [row("ours", us=100.0), row("ours-eager", error="RuntimeError: no"), row("eager", us=1500.0), row("compile", us=250.0), row("jax", missing="not installed")]
    assert report.bench({"comparison": rows, "ratios": comparison.ratios(rows)}) == [
        "float16, batch 10: ours-eager FAILED", "float16, batch 10: 100.0 us; compile 250.0 us, ratio 2.50",
    ]  # fmt: skip
    assert report.bench({"comparison": [], "ratios": []}) == []


def test_scaling(report):
    rows = [row(way, batch, us=us, us_per_image=us / batch, peak_bytes=1) for batch in (1, 2) for way, us in (("ours", 100.0), ("eager", 150.0 / batch))]
    assert report.scaling({"scaling_summary": scaling.summary(rows)}) == ["2 points, ratio 0.75 to 1.50, 1 of them below 1"]
    assert report.scaling({"scaling_summary": []}) == []


def test_counters_and_projection(report):
    kernel = {"kernel": "effnet_conv", "ns": 20_000, "instructions": 1000}
    result = projection.network([kernel], [kernel, kernel], projection.GPUS["8.9"], "float16")
    expected = result["sums"]["ours"]["expected_us"]
    failed = row("ours", error="ncu is not installed")
    assert report.projection({"projection": [row("ours", **result), failed]}) == [
        f"float16, batch 10: {expected:.1f} us expected on NVIDIA GeForce RTX 4090, unfused / ours 2.00", "float16, batch 10: ncu is not installed",
    ]  # fmt: skip
    assert report.counters({"counters": {"float16": {"ours": [kernel], "baseline": 2 * [kernel]}, "float32": {"error": "no ncu"}}}) == [
        "float16: 20.0 us, the kernels of the beginning 40.0 us, cold cache", "float32: no ncu",
    ]  # fmt: skip


def test_cold_start(report):
    rows = [row("ours", total_s=0.5), row("compile", error="no result"), row("aoti", missing="not here")]
    assert report.cold_start({"cold_start": rows}) == ["ours: 0.50 s", "compile: no result", "aoti: not here"]


def test_tune(report):
    text = (
        "3 shapes, 120 candidates of them, 61 s; 4 of 9 calls\ndone\nWRONG conv/fp16_a on pixels=4, batch 1: off by 3.0 times\n"
        "sm_90: device NVIDIA H200\n/results/tuned/sm_90.json: \n12 lines\n"
    )
    assert report.tune(text) == ["3 shapes, 4 of 9 calls done; 12 lines", "1 wrong candidates"]
    text = "Whole networks\n...\n5 of 6 networks done, 7 choices changed, 0 wrong, 81 s\n/results/tuned/sm_90.json: 90 lines\n"
    assert report.sequence(text) == ["5 of 6 networks done, 7 choices changed; 90 lines", "0 wrong networks"]
    assert report.sequence("no times of this bundle\n") == []
    assert report.tune("build/bundle is no bundle: it lacks manifest.json\n") == []


def test_networks(report):
    rows = [{"network": name, "batch": batch, "way": way, "us": us} for name, batch, way, us in (
        ("a", 1, "ours", 100.0), ("a", 1, "compile", 150.0), ("a", 1, "folded", 120.0), ("a", 32, "ours", 1000.0), ("b", 1, "compile", 5.0),
    )]  # fmt: skip
    rows.append({"network": "b", "batch": 1, "way": "ours", "error": "not fully converted"})
    assert report.networks({"networks": rows}) == ["a: batch 1 ratio 1.20, batch 32 1.00 ms", "b: batch 1 FAILED"]


def test_host_time(report):
    rows = [{"dtype": "float16", "batch": 10, "process": i, "host_us": us, "call_us": [90.0]} for i, us in enumerate(([40.0, 41.0, 70.0], [38.0, 38.0, 39.0]), 1)]
    assert report.host_time({"rows": rows}) == ["float16, batch 10: host 38.0 us to 41.0 us"]


# Steps


def fake(report, name, code, needs=0, limit=20, file=None, **more):
    """A step that runs Python code; {results} is in its arguments."""
    return report.Step(name, f"what {name} does", f"{{python}} {code} {{results}}", needs, limit, file or f"{name}.json", lambda found: [f"figure {found['figure']}"], **more)


WRITE = "import json, pathlib, sys\npathlib.Path(sys.argv[1], '{name}.json').write_text(json.dumps({{'figure': 7}}))\n"


@pytest.fixture
def steps(report, tmp_path, monkeypatch):
    """Calls main() with steps that are made of {name: code}; returns (exit status, rows of the table, seconds)."""
    monkeypatch.setattr(report, "GRACE", 1)

    def call(codes, *arguments, names=None, **settings):
        made = []
        for name, code in codes.items():
            path = tmp_path / f"{name}.py"
            path.write_text(code.replace("WRITE", WRITE.format(name=name)))
            made.append(fake(report, name, path, **settings.get(name.replace("-", "_"), {})))
        begin = time.monotonic()
        folders = ["--results", str(tmp_path / "results"), "--logs", str(tmp_path / "logs")]
        status = report.main([*(names or codes), *folders, *arguments], known=made, first=fake(report, "first", shlex.quote(str(tmp_path / "first.py"))))
        return status, time.monotonic() - begin

    (tmp_path / "first.py").write_text(WRITE.format(name="first").replace("7", "1"))
    return call


def printed(capsys):
    """{step: (outcome, figures)} of the table that is printed last."""
    text = capsys.readouterr().out
    rows = {}
    for line in text.splitlines():
        if line.startswith("│"):
            name, _, outcome, figures = (cell.strip() for cell in line.strip("│").split("│"))
            rows[name] = (outcome, figures)
    return rows


def test_steps_that_pass(steps, capsys, tmp_path):
    status, _ = steps({"a-one": "WRITE", "a-two": "WRITE\nprint('said')", "b": "WRITE"}, names=["b", "a"], a_two={"prints": "two.txt"})
    rows = printed(capsys)
    assert status == 0 and list(rows) == ["first", "b", "a-one", "a-two"]
    assert rows["first"] == ("passed", "figure 1") and rows["b"] == rows["a-one"] == ("passed", "figure 7")
    assert (tmp_path / "results/two.txt").read_text() == "said\n"
    assert (tmp_path / "logs/gpu-report-b.log").read_text().startswith(sys.executable)


def test_what_fails_does_not_stop_the_others(steps, capsys, tmp_path):
    code = "import sys\nprint('why [not]', file=sys.stderr)\nprint('make: *** Error 1')\nsys.exit(3)"
    (tmp_path / "results").mkdir()
    (tmp_path / "results/bad.json").write_text('{"figure": "of an earlier run"}')
    status, _ = steps({"bad": code, "half": "WRITE\nsys.exit(1)", "broken": "WRITE\npathlib.Path(sys.argv[1], 'broken.json').write_text('{')", "good": "WRITE"})
    rows = printed(capsys)
    assert status == 1
    assert rows["bad"] == ("FAILED: exit status 3", "why [not]"), "not the figures of an earlier run"
    assert rows["half"] == ("FAILED: exit status 1", "figure 7")
    assert rows["broken"][0] == "passed" and rows["broken"][1].startswith("broken.json: JSONDecodeError")
    assert rows["good"] == ("passed", "figure 7")


def test_what_lasts_too_long_is_stopped(steps, capsys, tmp_path):
    """The first with an interrupt, at which it writes what it has; the second, deaf, with its child."""
    # A shell's job in the background, as tests may be, ignores interrupts, and what it starts does.
    polite = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ntry: time.sleep(60)\nexcept KeyboardInterrupt:\n    WRITE".replace("WRITE", "\n    ".join(WRITE.format(name="polite").splitlines()))
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    deaf = (
        f"import pathlib, signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid))\ntime.sleep(60)"
    )
    status, seconds = steps({"polite": polite, "deaf": deaf, "good": "WRITE"}, polite={"limit": 4}, deaf={"limit": 2})
    rows = printed(capsys)
    assert status == 1 and seconds < 30
    assert rows["polite"] == ("STOPPED after 4 s", "figure 7")
    assert rows["deaf"] == ("STOPPED after 2 s", "no output")
    assert rows["good"] == ("passed", "figure 7")
    pid = (tmp_path / "results/pid").read_text()
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z", "the child has ended"


def test_what_does_not_fit_is_skipped(steps, capsys):
    status, seconds = steps({"long": "WRITE", "short": "WRITE"}, "--seconds", "21", long={"needs": 100, "limit": 200})
    rows = printed(capsys)
    assert status == 0, "nothing failed"
    assert re.fullmatch(r"skipped: it needs 100 s, (19|20) s are left", rows["long"][0])
    assert rows["short"] == ("passed", "figure 7")


def test_the_limit_is_also_the_time_that_is_left(steps, capsys):
    status, seconds = steps({"endless": "import time\ntime.sleep(60)"}, "--seconds", "4", endless={"limit": 50})
    assert status == 1 and seconds < 20
    assert printed(capsys)["endless"][0].startswith("STOPPED after ")


def test_command_that_does_not_exist(report, capsys, tmp_path):
    step = report.Step("lost", "", "/nowhere/at-all", 0, 9, "lost.json", lambda found: [])
    arguments = ["lost", "--results", str(tmp_path), "--logs", str(tmp_path)]
    assert report.main(arguments, known=[step], first=fake(report, "first", "-c 1")) == 1
    assert printed(capsys)["lost"][0].startswith("FAILED: [Errno 2]")


def test_every_command_can_be_formatted(report, tmp_path):
    """Words of paths stay together, and every file is one of the results."""
    arguments = ["--results", str(tmp_path / "a b"), "--logs", str(tmp_path), "--seconds", "100"]
    seen = []

    class Seen(report.Report):
        def step(self, step):
            seen.append((step, self.command(step, 60)))
            return report.Outcome(step, "passed")

    original, report.Report = report.Report, Seen
    try:
        assert report.main([*arguments, *(step.name for step in report.STEPS)]) == 0
    finally:
        report.Report = original
    assert [step.name for step, _ in seen] == ["build", *(step.name for step in report.STEPS)]
    for step, words in seen:
        assert not any(re.search(r"[{}]", word) for word in words), words
        assert words[0] in ("make", sys.executable)
        if step.name != "build":
            assert any(str(tmp_path / "a b") in word for word in words) and not Path(step.file).is_absolute()
        if words[0] == sys.executable and words[1] != "-m":
            assert (ROOT / words[1]).exists()


def test_make_knows_the_targets(report):
    """The build is left out, and the variables reach the recipes."""
    for target, wanted in {
        "gpu-test IMAGES=ptx": "for image in ptx;", "gpu-stress": "--stress-calls 5000", "gpu-sanitize TOOLS=racecheck": "for tool in racecheck;",
    }.items():  # fmt: skip
        command = ["make", "--no-print-directory", "-n", "-o", "gpu-build", "PYTHON=python3", "RESULTS=elsewhere", "PYTEST_ARGS=-q -n 3", *target.split()]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert wanted in text and " elsewhere" in text and "-q -n 3" in text and "build_ext" not in text
    text = subprocess.run(["make", "--no-print-directory", "-n", "gpu-report", "STEPS=run bench", "REPORT_ARGS=--seconds 9"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert text == "python3 tools/gpu_report.py run bench --results results --seconds 9\n"


# The command line


def command(*arguments, **environment):
    return subprocess.run([sys.executable, FILE, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_list(report):
    done = command("--list")
    assert done.returncode == 0, done.stderr
    for step in report.STEPS:
        assert re.search(rf"│ {step.name} +│ +{step.needs} s +│ +{step.limit} s +│ {re.escape(step.does)} ", done.stdout)


@pytest.mark.parametrize("arguments, message", [
    (["walk"], "there is no step walk; --list prints those that there are"),
    (["run", "walk"], "there is no step walk"),
    (["--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_interrupted(tmp_path):
    """As `timeout` does it: the step ends, too, and the table is printed."""
    code = (
        f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import runpy, gpu_report\n"
        "step = lambda name, code: gpu_report.Step(name, '', '{python} -c ' + code, 0, 50, 'x.json', lambda found: [])\n"
        f"sys.argv = ['x', 'slow', '--results', {str(tmp_path)!r}, '--logs', {str(tmp_path)!r}]\n"
        "gpu_report.signals()\nsys.exit(gpu_report.main(known=[step('slow', '__import__(\"time\").sleep(50)')], first=step('first', '1')))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "gpu-report-slow.log"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and re.search(r"│ slow +│ +\d+ +│ INTERRUPTED", out)


# The cache for a machine with a GPU


def test_kernels_for_another_machine(tmp_path):
    """A build with the folder as its cache compiles nothing; what is not needed any more goes, and nothing else."""
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'effnet_aot')!r}, {str(ROOT / 'tools')!r}]\n"
        "from pathlib import Path; from gpu_kernels import fill; from aot import build_kernels\n"
        "here, cache = Path('triton_src').resolve(), Path('cache')\n"
        "print(*fill(cache, sys.argv[1], here, quiet=True), build_kernels('out', cache, sys.argv[1], quiet=True, source_dir=here).compiled)"
    )

    def fill(archs):
        text = subprocess.run([sys.executable, "-c", script, archs], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        return tuple(map(int, text.split())), sorted(path.name for path in (tmp_path / "cache").iterdir())

    kernel_sources(tmp_path / "triton_src", [64])
    counts, both = fill("8.9 9.0")
    assert counts == (2, 2, 0) and len(both) == 6
    (tmp_path / "cache" / "notes.json").touch()
    counts, one = fill("8.9")
    assert counts == (1, 0, 0) and len(one) == 4 and "notes.json" in one and set(one) - {"notes.json"} < set(both)
