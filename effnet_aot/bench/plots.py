"""The results as PNG files: drawn from the dictionary that --json writes, so that a stored one can be drawn again."""

import math
from pathlib import Path

OURS, PEER, EXAMPLE = "#1a7f37", "#8c959f", "#d0d7de"
COLORS = {"ours": OURS, "peer": PEER, "example": EXAMPLE}
MARKERS = {"conv": "s", "mbconv": "P", "expand_depthwise": "<", "stem_mbconv": "X", "pointwise": "o", "depthwise": "^", "pointwise_pool": "D", "linear": "v"}


def draw(results, folder):
    """Writes a picture for every part of the results that is there; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"comparison": "comparison", "kernels": "roofline", "cold_start": "cold_start", "scaling": "scaling"}
    return [path for part, name in parts.items() if results.get(part) for path in [PICTURES[part](results, folder / f"{name}.png")]]


def figure(rows, columns, width, height):
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def save(figure_, path):
    import matplotlib.pyplot as plt

    figure_.savefig(path, dpi=150)
    plt.close(figure_)
    return path


def tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)


def horizontal_bars(panel, rows, key):
    panel.set_yticks(range(len(rows)), [row["title"] for row in rows])
    return panel.barh(range(len(rows)), [row[key] for row in rows], color=[COLORS[row["role"]] for row in rows])


def machine(results):
    where = results["environment"]
    torch, commit = where.get("torch"), where.get("commit")
    return ", ".join(filter(None, [where["device"], torch and f"torch {torch}", where.get("image"), commit and f"commit {commit[:10]}"]))


def comparison(results, path):
    """Bars of time, a panel for every dtype and batch."""
    timed = [row for row in results["comparison"] if "us" in row]
    dtypes, points = unique(row["dtype"] for row in timed), unique((row["batch"], row["size"]) for row in timed)
    ways = len(unique(row["way"] for row in timed))
    picture, axes = figure(len(dtypes), len(points), 5.2, 0.27 * ways + 1.1)
    for i, dtype in enumerate(dtypes):
        for j, (batch, size) in enumerate(points):
            panel = axes[i][j]
            rows = sorted((row for row in timed if (row["dtype"], row["batch"], row["size"]) == (dtype, batch, size)), key=lambda row: -row["us"])
            bars = horizontal_bars(panel, rows, "us")
            panel.bar_label(bars, [f"{row['us']:.0f}" for row in rows], padding=3, fontsize=8)
            panel.set_xlim(0, 1.15 * max((row["us"] for row in rows), default=1))
            panel.tick_params(axis="y", labelsize=8)
            panel.set_title(f"{dtype}, batch {batch}, {size} x {size}", fontsize=10)
            panel.set_xlabel("time (us)")
            tidy(panel)
    picture.suptitle(machine(results))
    return save(picture, path)


def roofline(results, path):
    """Every op of ours below the machine's two limits, a panel for every dtype; larger batches are darker."""
    rows = [row for row in results["kernels"] if row["flops"]]
    dtypes, batches = unique(row["dtype"] for row in rows), unique(row["batch"] for row in rows)
    picture, axes = figure(1, max(1, len(dtypes)), 6, 4.6)
    bandwidth = results["machine"]["copy_bytes_per_s"]
    for panel, dtype in zip(axes[0], dtypes, strict=False):
        rate = results["machine"]["flops_per_s"][dtype]
        here = [row for row in rows if row["dtype"] == dtype]
        intensities = [row["flops"] / row["bytes"] for row in here]
        low, high = min(intensities) / 2, max(*intensities, rate / bandwidth) * 4
        corner = rate / bandwidth
        panel.plot([low, corner, high], [low * bandwidth / 1e12, rate / 1e12, rate / 1e12], color="black", lw=1)
        panel.annotate(f"copy {bandwidth / 1e9:.0f} GB/s", (math.sqrt(low * corner), math.sqrt(low * corner) * bandwidth / 1e12), fontsize=8,
                       xytext=(-6, 6), textcoords="offset points", ha="right")  # fmt: skip
        panel.annotate(f"matrix product {rate / 1e12:.3g} TFLOP/s", (high, rate / 1e12), fontsize=8, xytext=(0, 4), textcoords="offset points", ha="right")
        for row in here:
            shade = 0.35 + 0.65 * (batches.index(row["batch"]) + 1) / len(batches)
            panel.plot(row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e6, MARKERS.get(row["op"], "P"), color=OURS, alpha=shade, ms=5, mec="none")
        for op in unique(row["op"] for row in here):
            panel.plot([], [], MARKERS.get(op, "P"), color=OURS, label=op, ls="none")
        panel.set(xscale="log", yscale="log", xlabel="floating-point operations per byte", ylabel="TFLOP/s", title=f"{dtype}, batches {', '.join(map(str, batches))}")
        panel.legend(fontsize=8, loc="lower right")
        tidy(panel)
    picture.suptitle(machine(results))
    return save(picture, path)


def cold_start(results, path):
    rows = [row for row in results["cold_start"] if "total_s" in row][::-1]
    picture, axes = figure(1, 1, 7, 0.35 * len(rows) + 1.2)
    panel = axes[0][0]
    bars = horizontal_bars(panel, rows, "total_s")
    panel.bar_label(bars, [f"{row['total_s']:.2f} s, of which first call {row['first_s'] * 1e3:.0f} ms" for row in rows], padding=3, fontsize=8)
    panel.set_xlim(right=1.6 * max((row["total_s"] for row in rows), default=1))
    panel.set_xlabel("seconds from `import torch` to the first result")
    panel.set_title(machine(results), fontsize=10)
    tidy(panel)
    return save(picture, path)


def scaling(results, path):
    """Time an image over the batch and over the image's side, a line a way."""
    rows = [row for row in results["scaling"] if "us" in row]
    dtypes = unique(row["dtype"] for row in rows)
    side = results["settings"]["size"]
    picture, axes = figure(len(dtypes), 2, 5.5, 3.6)
    for line, dtype in zip(axes, dtypes, strict=True):
        here = [row for row in rows if row["dtype"] == dtype]
        for way in unique(row["way"] for row in here):
            mine = [row for row in here if row["way"] == way]
            style = {"color": COLORS[mine[0]["role"]] if mine[0]["role"] == "ours" else None, "label": mine[0]["title"], "marker": ".", "lw": 1, "ls": "-" if "graph" in mine[0]["title"] else "--"}
            for panel, key, chosen in [
                (line[0], "batch", [row for row in mine if row["size"] == side]),
                (line[1], "size", [row for row in mine if row["batch"] == results["settings"]["scaling_batch"]]),
            ]:
                chosen = sorted(chosen, key=lambda row: row[key])
                panel.plot([row[key] for row in chosen], [row["us_per_image"] for row in chosen], **style)
        for panel, label in zip(line, (f"images in the batch ({side} x {side})", f"height and width (batch {results['settings']['scaling_batch']})"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel="us an image", title=dtype)
            sizes = unique(x for drawn in panel.lines for x in drawn.get_xdata())
            panel.set_xticks(sizes, list(map(str, sizes)))
            panel.set_xticks([], minor=True)
            tidy(panel)
        line[0].legend(fontsize=7)
    picture.suptitle(machine(results))
    return save(picture, path)


def unique(values):
    return list(dict.fromkeys(values))


PICTURES = {"comparison": comparison, "kernels": roofline, "cold_start": cold_start, "scaling": scaling}
