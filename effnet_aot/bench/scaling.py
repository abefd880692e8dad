"""The cost of more images, and of larger ones: time and extra memory of ours and of peers, by default those that need no compiling."""

from .comparison import Comparison, is_wrong
from .workload import Point

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
SIZES = [128, 160, 192, 224, 256, 320, 384, 448, 512]
BATCH = 10  # of the larger images
QUICK = ["ours-eager", "ours", "eager-channels-last", "folded-channels-last"]


def points(dtypes, size, batches=BATCHES, sizes=SIZES):
    """The growing batches and the growing images, once a dtype."""
    return list(dict.fromkeys(
        point for dtype in dtypes for point in [*(Point(dtype, batch, size) for batch in batches), *(Point(dtype, BATCH, side) for side in sizes)]
    ))  # fmt: skip


def by_dtype(where):
    """One dtype's points after the other's: a peer that compiles keeps a process, and its memory, for every point."""
    return [[point for point in where if point.dtype == dtype] for dtype in dict.fromkeys(point.dtype for point in where)]


def steps(where, names):
    """How often run() calls `advance`."""
    return sum(Comparison.steps(some, names) for some in by_dtype(where))


def run(workloads, timer, where, names, advance):
    """Yields the rows of one point after the other."""
    for some in by_dtype(where):
        for _, rows in Comparison(workloads, timer, some, names, advance).run():
            for row in rows:
                if "us" in row:
                    row["us_per_image"] = row["us"] / row["batch"]
            yield rows


def summary(rows):
    """For every point ours beside the fastest peer, in time, and beside eager, in memory."""
    found = []
    for point in dict.fromkeys((row["dtype"], row["batch"], row["size"]) for row in rows):
        here = {row["way"]: row for row in rows if (row["dtype"], row["batch"], row["size"]) == point and "us" in row}
        peers = [row for row in here.values() if row["role"] == "peer" and not is_wrong(row)]
        ours = [row for row in here.values() if row["role"] == "ours"]
        if not ours or not peers:
            continue
        peer, us = min(peers, key=lambda row: row["us"]), min(ours, key=lambda row: row["us"])
        eager = [row["peak_bytes"] for row in peers if row["way"].startswith("eager") and row["peak_bytes"] is not None]
        found.append({
            "dtype": point[0], "batch": point[1], "size": point[2], "ours_us": us["us"], "ours_us_per_image": us["us_per_image"],
            "peer": peer["way"], "peer_us": peer["us"], "peer_us_per_image": peer["us_per_image"], "ratio": peer["us"] / us["us"],
            "ours_peak_bytes": us["peak_bytes"], "eager_peak_bytes": min(eager, default=None),
        })  # fmt: skip
    return found
