"""From times to lines of the tuning table.

A choice that stands is only given up for one that is at least 2% faster, so that noise does not move it; and at most three
variants ship for the batches of one shape. Of variants that are as fast within 2%, the one that serves more shapes is taken.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations

from ..aot.tables import NONE, Line, Problem, Table
from .calls import INNER, parts

GAIN = 0.02
SHIPPED = 3
BEGINNING = ("expand_depthwise", "narrowing")  # of the INNER choices the one that others are made without


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
    lines, picked = dict(old), {}
    for group, members in groups.items():
        measured_keys = {m.key for m in members}
        others = {line.variant for line in old.values() if line.group == group and line.key not in measured_keys} - {NONE}
        picked |= {m.key: (m, variant) for m, variant in choose(members, {m.key: old[m.key].variant for m in members if m.key in old}, others)}
    for m, variant in consolidate(picked, [line for line in old.values() if line.key not in picked]):
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
    wanted = [v for v in dict.fromkeys(picks.values()) if v != NONE]
    if len({*wanted, *others}) > SHIPPED:
        kept = [v for v in others if any(v in m.times for m in members)]
        free = max(0, SHIPPED - len(others))
        sets = [[*kept, *some] for some in combinations([v for v in wanted if v not in others], free)] if free else [kept]
        sets = [s for s in sets if all(any(v in m.times for v in s) for m in members)] or [[members[0].default]]
        allowed = min(sets, key=lambda s: sum(min(m.times.get(v, float("inf")) for v in s) / m.times[picks[m.key]] for m in members if picks[m.key] != NONE))
        for m in members:
            if picks[m.key] not in (*allowed, NONE):
                picks[m.key] = min((v for v in allowed if v in m.times), key=m.times.get, default=m.default)
    return [(m, picks[m.key]) for m in members if picks[m.key] in m.times]


def needed(lines, problems, measured):
    """The lines without those of a chain's parts where the chain has a kernel of its own. `problems` are measure.Problem,
    `measured` maps those that have been measured."""
    variants = {line.key: line.variant for line in lines}
    of_blocks = {part for problem in problems for part in parts(problem.call)}
    keys, kept = {m.key for m in measured.values()}, set()
    asked = [problem for problem in problems if problem.call not in of_blocks and not problem.inner]
    for problem in asked:  # which grows: parts may have parts
        key = measured[problem].key if problem in measured else None
        kept.add(key)
        if variants.get(key, NONE) == NONE:
            inner = {p.inner: measured[p].key for p in problem.inside() if p in measured}
            kept |= {k for kind, k in inner.items() if "expand_depthwise" not in INNER[kind] or variants.get(inner.get(BEGINNING), NONE) == NONE}
            asked += [] if inner else [replace(problem, call=part) for part in parts(problem.call)]
    return [line for line in lines if line.key in kept or line.key not in keys]


def consolidate(picked, others):
    """(measured, variant) for every pick: a variant that few shapes take gives way to one that more of them do, or that ships
    anyway, if that is at most 2% slower. Each is a kernel to compile, to carry and to test. `picked` are (measured, variant)
    by key, `others` the lines that stay."""
    taken = Counter((line.op, line.variant) for line in others)
    taken.update((m.op, variant) for m, variant in picked.values())
    taken.update({key: len(taken) + sum(taken.values()) for key in {(m.op, m.default) for m, _ in picked.values()}})
    shipped = {}  # by group, how often
    for problem, variant in [*((line, line.variant) for line in others), *picked.values()]:
        shipped.setdefault(problem.group, Counter())[variant] += 1
    found, moved = {key: variant for key, (_, variant) in picked.items()}, True
    while moved:
        moved = False
        for m, pick in sorted(picked.values(), key=lambda pair: taken[pair[0].op, found[pair[0].key]]):
            present, of_shape = found[m.key], shipped[m.group]
            near = [v for v, us in m.times.items() if us <= (1 + GAIN) * m.times[pick] and (of_shape[v] or of_shape[present] == 1 or len(+of_shape) < SHIPPED)]
            best = max(near, key=lambda v: (taken[m.op, v], -m.times[v]), default=present)
            if taken[m.op, best] > taken[m.op, present]:
                taken[m.op, best] += 1
                taken[m.op, present] -= 1
                of_shape[best] += 1
                of_shape[present] -= 1
                found[m.key], moved = best, True
    return [(m, found[key]) for key, (m, _) in picked.items()]
