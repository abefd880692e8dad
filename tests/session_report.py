"""--report FILE: what ran on which machine, with what result, as JSON."""

import json
import os
import platform
import subprocess
import time
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path

import pytest
import torch

import effnet_aot
from effnet_aot.cli.images import counts
from effnet_aot.cli.info import driver

ROOT = Path(__file__).parents[1]
OPTIONS = ("markexpr", "keyword", "stress_calls", "fuzz_examples", "fuzz_cases", "fuzz_seed")


class SessionReport:
    """A plugin of the process that started the session: pytest-xdist's workers send it their results."""

    def __init__(self, path):
        self.path, self.started = Path(path), time.time()
        self.counts = defaultdict(Counter)
        self.measured = {}

    def pytest_runtest_logreport(self, report):
        # A test has one outcome; its setup and teardown only count where they are what failed or was skipped.
        if report.when == "call" or report.outcome != "passed":
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self.counts[report.nodeid.split("::")[0]][outcome] += 1
        if report.when == "call" and report.user_properties:
            self.measured[report.nodeid.split("::")[1].split("@")[0]] = {"outcome": report.outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}

    def pytest_collectreport(self, report):
        if report.failed:
            self.counts[report.nodeid.split("::")[0] or "collection"]["error"] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        total = sum(self.counts.values(), Counter())
        report = {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.time() - self.started, 1),
            "exit_status": int(exitstatus),
            "options": {name: session.config.getoption(name) for name in OPTIONS},
            "total": dict(total),
            "files": {name: dict(counts) for name, counts in sorted(self.counts.items())},
            "measured": dict(sorted(self.measured.items())),  # what tests gave to record_property
            **environment(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(report, indent=1) + "\n")


def environment():
    gpus = range(torch.cuda.device_count())
    return {
        # The variable is for a copy of the sources without their repository, or with an older state of it.
        "commit": os.environ.get("GIT_COMMIT") or git("rev-parse", "HEAD"),
        "has_uncommitted_changes": None if "GIT_COMMIT" in os.environ or git("rev-parse", "HEAD") is None else git("status", "--porcelain") != "",
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "serving_images": [attempt(lambda: serving_image(i)) for i in gpus],
        "EFFNET_AOT_IMAGE": os.environ.get("EFFNET_AOT_IMAGE"),
        "embedded_images": attempt(lambda: dict(counts(effnet_aot.kernels()))),
        "built_by": attempt(effnet_aot.build_info),
        "driver": attempt(driver),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": attempt(lambda: metadata.version("triton")),
        "python": platform.python_version(),
    }


def serving_image(device):
    from effnet_aot import _C

    return _C.images(device)["image"]


def attempt(function):
    try:
        return function()
    except Exception as error:  # what cannot be had is no reason to lose the rest
        return f"{type(error).__name__}: {error}"


def git(*arguments):
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
