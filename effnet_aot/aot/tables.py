"""The tuning tables, triton_src/tuned/sm_90.json and so on: which variant was the fastest for which shape.

    {"capability": "9.0",
     "measured": {what on: device, driver, torch, image, ...},
     "lines": [{"op", "precision", "shape": {"pixels": 3600, ...}, "batch", "variant", "us", "default", "default_us"}, ...]}

One table a capability, measured with that capability's images. `us` is the time of the variant and `default_us` that of
the variant that the library would take without the table, in the same run. `shape` are the numbers by which
csrc/<op>.cpp looks a problem up, and in its order.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError


NONE = "none"  # as a variant: the op is faster without a kernel of its own, by other ops' kernels


@dataclass(frozen=True)
class Problem:
    """What a variant is chosen for."""

    op: str
    precision: str  # "fp16", "bf16", "tf32" or "fp32"
    shape: tuple[tuple[str, int], ...]
    batch: int

    @property
    def key(self):
        return self.op, self.precision, self.shape, self.batch

    @property
    def group(self):
        """The problems that differ in their batch alone."""
        return self.op, self.precision, self.shape


@dataclass(frozen=True)
class Line(Problem):
    capability: int  # 90 for 9.0
    variant: str
    us: float
    default: str
    default_us: float


@dataclass
class Table:
    capability: int
    measured: dict
    lines: list[Line]

    @property
    def name(self):
        return f"sm_{self.capability}"


def path_of(folder, capability):
    return Path(folder) / f"sm_{capability}.json"


def read_table(path):
    try:
        content = json.loads(Path(path).read_text())
        capability = int(content["capability"].replace(".", ""))
        lines = [Line(**{**line, "capability": capability, "shape": tuple(line["shape"].items())}) for line in content["lines"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(f"{path} is not a tuning table: {type(error).__name__}: {error}") from error
    return Table(capability, content.get("measured", {}), lines)


def read_tables(folder):
    """All tables of a folder, which need not exist."""
    return [read_table(path) for path in sorted(Path(folder).glob("sm_*.json"))]


def write_table(path, table):
    """A line of text a line, in an order that does not depend on the order of measuring."""
    lines = [
        {"op": line.op, "precision": line.precision, "shape": dict(line.shape), "batch": line.batch, "variant": line.variant, "us": round(line.us, 3),
         "default": line.default, "default_us": round(line.default_us, 3)}
        for line in sorted(table.lines, key=lambda line: line.key)
    ]  # fmt: skip
    head = json.dumps({"capability": f"{table.capability // 10}.{table.capability % 10}", "measured": table.measured}, indent=1)
    text = head.removesuffix("\n}") + ',\n "lines": [\n' + ",\n".join("  " + json.dumps(line) for line in lines) + "\n ]\n}\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)
