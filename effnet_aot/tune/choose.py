"""From times to lines of the tuning table.

A choice that stands is only given up for one that is at least 2% faster, so that noise does not move it; and at most three
variants ship for the batches of one shape.
"""

from dataclasses import dataclass, field
from itertools import combinations

from ..aot.tables import Line, Problem, Table

GAIN = 0.02
SHIPPED = 3


@dataclass(frozen=True)
class Measured(Problem):
    """The microseconds of every candidate that computed the right numbers."""

    default: str
    times: dict[str, float]
    wrong: dict[str, str] = field(default_factory=dict)  # variant: why


def update(table, measured, capability):
    """The table with what was measured put in its place; `table` is the one so far or None."""
    old = {line.key: line for line in table.lines} if table else {}
    groups = {}
    for m in measured:
        if m.times:
            groups.setdefault(m.group, []).append(m)
    lines = dict(old)
    for group, members in groups.items():
        measured_keys = {m.key for m in members}
        others = {line.variant for line in old.values() if line.group == group and line.key not in measured_keys}
        for m, variant in choose(members, {m.key: old[m.key].variant for m in members if m.key in old}, others):
            lines[m.key] = Line(*m.key, capability, variant, m.times[variant], m.default, m.times.get(m.default, m.times[variant]))
    for m in measured:
        if not m.times or (m.key in lines and lines[m.key].variant in m.wrong):
            lines.pop(m.key, None)  # nothing was right, or what stood here is not any more
    return Table(capability, table.measured if table else {}, list(lines.values()))


def choose(members, standing, others=frozenset()):
    """(measured, variant) for the batches of one shape. `standing` are the present choices by key, `others` the variants that
    ship for batches of the shape which were not measured."""
    picks = {}
    for m in members:
        stands = standing.get(m.key)
        stands = stands if stands in m.times else m.default if m.default in m.times else min(m.times, key=m.times.get)
        best = min(m.times, key=m.times.get)
        picks[m.key] = best if m.times[best] <= (1 - GAIN) * m.times[stands] else stands
    wanted = list(dict.fromkeys(picks.values()))
    if len({*wanted, *others}) > SHIPPED:
        kept = [v for v in others if any(v in m.times for m in members)]
        free = max(0, SHIPPED - len(others))
        sets = [[*kept, *some] for some in combinations([v for v in wanted if v not in others], free)] if free else [kept]
        sets = [s for s in sets if all(any(v in m.times for v in s) for m in members)] or [[members[0].default]]
        allowed = min(sets, key=lambda s: sum(min(m.times.get(v, float("inf")) for v in s) / m.times[picks[m.key]] for m in members))
        for m in members:
            if picks[m.key] not in allowed:
                picks[m.key] = min((v for v in allowed if v in m.times), key=m.times.get, default=m.default)
    return [(m, picks[m.key]) for m in members if picks[m.key] in m.times]
