"""What became of every node of a model."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One or more nodes of the original graph, and what computes them now."""

    op: str  # an op of this package, "identity", "reshape", or "aten"
    path: str  # of the module that they come from
    kind: str  # the class of that module
    nodes: tuple[str, ...]  # names in the graph
    targets: tuple[str, ...]  # "conv2d", "batch_norm", ...
    shapes: tuple[str, ...]  # of the input and the output
    multiply_adds: int | None  # for one image; None: unknown
    reason: str = ""  # why ATen computes them


@dataclass(frozen=True)
class Report:
    """Which nodes of a model run on which op. `rows` are in the order of the graph."""

    model: str
    rows: tuple[Row, ...]

    @property
    def unmapped(self) -> list[Row]:
        return [row for row in self.rows if row.op == "aten"]

    @property
    def complete(self) -> bool:
        return not self.unmapped

    @property
    def share(self) -> float:
        """Of the model's multiply-adds, how many run on this package's ops: 0 to 1."""
        total = sum(row.multiply_adds or 0 for row in self.rows)
        return 1 - sum(row.multiply_adds or 0 for row in self.unmapped) / total if total else float(self.complete)

    def summary(self) -> str:
        ops = sum(row.op not in ("identity", "reshape", "aten") for row in self.rows)
        counted = sum(len(row.nodes) for row in self.rows)
        nodes = f"{counted - len(self.unmapped)} of {counted} nodes map"
        text = f"{self.model}: {nodes}, onto {ops} calls of this package's ops with {self.share:.1%} of the multiply-adds"
        unknown = sum(row.multiply_adds is None for row in self.rows)
        return text + (f" that could be counted ({unknown} nodes could not)" if unknown else "")

    def __rich__(self):
        table = Table(title=self.summary(), title_justify="left")
        for name in ("op", "module", "nodes", "input", "output"):
            table.add_column(name, overflow="fold")
        table.add_column("MMAC", justify="right")
        for row in self.rows:
            style = {"aten": "bold red", "identity": "dim", "reshape": "dim"}.get(row.op)
            nodes = " ".join(row.targets) + (f"\n{row.reason}" if row.reason else "")
            count = "?" if row.multiply_adds is None else f"{row.multiply_adds / 1e6:.2f}" if row.multiply_adds else ""
            table.add_row(row.op, row.path, nodes, *row.shapes, count, style=style)
        return table

    def print(self) -> None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160
        console.print(self)

    def __str__(self) -> str:
        console = Console(highlight=False, width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


class ConversionError(RuntimeError):
    """A model that cannot be converted. `report` says what of it could be, where it got that far."""

    def __init__(self, problem: str | Report):
        self.report = problem if isinstance(problem, Report) else None
        super().__init__(explanation(problem) if self.report else problem)


def explanation(report: Report) -> str:
    rows = [(row.nodes[0], row.targets[0], f"{row.path} ({row.kind})" if row.path else row.kind, row.reason) for row in report.unmapped]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([
        f"{report.summary()}. These do not:",
        *lines,
        "With partial=True they run through ATen.",
    ])  # fmt: skip
