"""Every variant in the library without a GPU: the launcher hands the PTX that ships to a driver that executes it on the CPU."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from variants import EMBEDDED

# A process checks the variants of one op and precision, on one worker.
GROUPS = {}
for op, variant in EMBEDDED:
    GROUPS.setdefault((op, variant.split("_")[0]), []).append(variant)


@cache
def outcomes(stub, op, precision):
    names = [(op, variant) for variant in GROUPS[op, precision]]
    child = Path(__file__).with_name("variants_child.py")
    done = subprocess.run([sys.executable, child], input=json.dumps(names), env=stub.executing(stub.new_log()), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(zip(GROUPS[op, precision], json.loads(done.stdout), strict=True)), done.stderr


@pytest.mark.parametrize(
    "op, precision, variant",
    [
        pytest.param(op, precision, variant, id=f"{op}-{variant}", marks=pytest.mark.xdist_group(f"emulated_{op}_{precision}"))
        for (op, precision), variants in GROUPS.items() for variant in variants
    ],
)  # fmt: skip
def test_variant(stub, op, precision, variant):
    wrong, stderr = outcomes(stub, op, precision)
    assert not wrong[variant], wrong[variant] + stderr
