"""The tables."""

from rich.table import Column, Table

from .comparison import is_wrong

DASH = "-"


def lines_of(*columns, title):
    """A table whose first column is a text and whose others are numbers, or texts where they begin with a space."""
    named = [Column(name.strip(), justify="left" if name[:1] in ("", " ") else "right", no_wrap=True) for name in columns]
    return Table(*named, title=title, title_justify="left")


def microseconds(us):
    return DASH if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def seconds(value):
    return DASH if value is None else f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def mebibytes(count):
    return DASH if count is None else f"{count / 2**20:.1f}"


def first_line(text, width=120):
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= width else line[: width - 3] + "..."


def why_not(row):
    return f"missing: {row['missing']}" if "missing" in row else f"failed: {first_line(row['error'])}"


def comparison(rows):
    """One point, a line a way; those without a time under it."""
    point = rows[0]
    table = lines_of("", "us", "us, L2 flushed", "host us", "rms error", "max error", "peak MiB", "first call", title=heading(point))
    for row in sorted((row for row in rows if "us" in row), key=lambda row: row["us"]):
        style = {"ours": "bold green", "example": "dim"}.get(row["role"])
        table.add_row(
            row["title"], microseconds(row["us"]), microseconds(row.get("flushed_us")), microseconds(row.get("host_us")), f"{row['rms_error']:.1e}",
            f"{row['max_error']:.1e}", mebibytes(row.get("peak_bytes")), seconds(row.get("build_s", row.get("first_call_s"))), style=style,
        )  # fmt: skip
    lines = [f"{row['title']}: {why_not(row)}" for row in rows if "us" not in row]
    lines += [f"{row['title']}: {row['note']}" for row in rows if "note" in row]
    lines += [f"{row['title']}: WRONG, these are not the network's logits; not compared with" for row in rows if "us" in row and is_wrong(row)]
    return table, lines


def heading(point):
    return f"{point['dtype']}, batch {point['batch']}, {point['size']} x {point['size']}"


def ratios(rows):
    table = lines_of("", "ours, us", "best peer, us", "", "best peer / ours", title="best peer of the run / ours")
    for row in rows:
        table.add_row(heading(row), microseconds(row["ours_us"]), microseconds(row["peer_us"]), row["peer_title"], f"[bold]{row['ratio']:.2f}[/]")
    return table


def kernels(rows, network_us=None):
    table = lines_of(" op", " input", " output", "us", "MB", "GB/s", "floor, us", " bound", "floor / us", title=f"ours op by op: {heading(rows[0])}")
    for row in rows:
        table.add_row(
            row["op"], row["input"], row["output"], f"{row['us']:.2f}", f"{row['bytes'] / 1e6:.2f}", f"{row['bytes_per_s'] / 1e9:.0f}",
            f"{row['floor_us']:.2f}", row["bound"], f"{row['share']:.0%}",
        )  # fmt: skip
    total, floor, size = (sum(row[key] for row in rows) for key in ("us", "floor_us", "bytes"))
    table.add_section()
    table.add_row("sum", "", "", f"{total:.2f}", f"{size / 1e6:.2f}", f"{size / total / 1e3:.0f}", f"{floor:.2f}", "", f"{floor / total:.0%}")
    if network_us:
        table.add_row("network", "", "", f"{network_us:.2f}")
    return table


def cold_start(rows):
    table = lines_of("", "first result", "first call", "second call", "first - second", title=f"cold start: {heading(rows[0])}")
    for row in rows:
        if "total_s" in row:
            table.add_row(row["title"], *(seconds(row[key]) for key in ("total_s", "first_s", "second_s", "extra_s")))
    return table, [f"{row['title']}: {why_not(row)}" for row in rows if "total_s" not in row]


def scaling(rows):
    table = lines_of("", "ours, us an image", "peer, us an image", " peer", "peer / ours", "ours, peak MiB", "eager, peak MiB", title="scaling")
    for row in rows:
        worse = row["ratio"] < 1 or (row["eager_peak_bytes"] is not None and row["ours_peak_bytes"] >= row["eager_peak_bytes"])
        table.add_row(
            heading(row), f"{row['ours_us_per_image']:.2f}", f"{row['peer_us_per_image']:.2f}", row["peer"], f"{row['ratio']:.2f}",
            mebibytes(row["ours_peak_bytes"]), mebibytes(row["eager_peak_bytes"]), style="red" if worse else None,
        )  # fmt: skip
    return table


def counters(point, rows):
    table = lines_of("", " kernel", "grid", "us", "SM %", "warps active %", "DRAM %", "L2 hit %", "registers",
                     title=f"counters, cold cache: block 7's expand convolution and the linear layer, {heading(point)}")  # fmt: skip
    for what, kernels in rows.items():
        for kernel in kernels:
            shares = (kernel.get(key) for key in ("sm_pct", "warps_active_pct", "dram_pct", "l2_hit_pct"))
            table.add_row(
                what, kernel["kernel"], str(kernel.get("grid", DASH)), f"{kernel['ns'] / 1e3:.2f}", *(DASH if share is None else f"{share:.1f}" for share in shares),
                str(kernel.get("registers", DASH)), style="bold green" if what == "ours" else None,
            )  # fmt: skip
    return table


def network_counters(point, kernels):
    """What bounds a kernel: instructions that issue, tensor cores, L1, L2 or DRAM. Where none of them is busy, it waits."""
    table = lines_of(" kernel", "grid", "us", "issue %", "tensor %", "L1 %", "L2 %", "DRAM %", "warps active %", "registers",
                     title=f"counters of the network, cold cache, kernel by kernel: {heading(point)}")  # fmt: skip
    for kernel in kernels:
        shares = (kernel.get(key) for key in ("issue_pct", "tensor_pct", "l1_pct", "l2_pct", "dram_pct", "warps_active_pct"))
        table.add_row(
            kernel["kernel"], str(kernel.get("grid", DASH)), f"{kernel['ns'] / 1e3:.2f}", *(DASH if share is None else f"{share:.1f}" for share in shares), str(kernel.get("registers", DASH))
        )
    return table


def projection(result):
    """Ours kernel by kernel, the sums of both networks and what they are."""
    table = lines_of(" kernel", "grid", "us here, PTX", "lower bound, us", "expected, us", " limit", title=f"PROJECTION onto {result['onto']}, not measured there: {heading(result)}")
    for row in result["kernels"]:
        table.add_row(row["kernel"], str(row.get("grid", DASH)), f"{row['ns'] / 1e3:.2f}", f"{row['bound_us']:.2f}", f"{row['expected_us']:.2f}", row["limit"])
    table.add_section()
    for name, title in (("ours", "sum"), ("unfused", "unfused, sum")):
        sums = result["sums"][name]
        table.add_row(title, "", *(f"{sums[key]:.2f}" for key in ("measuring_us", "bound_us", "expected_us")))
    table.add_row("unfused / ours", "", *(f"{result['ratios'][key]:.2f}" for key in ("measuring_us", "bound_us", "expected_us")))
    return table, ["unfused: this package's own kernels for the same network, one launch an op (batch norm and activation within it), by the same PTX"]
