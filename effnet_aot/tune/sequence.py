"""Choosing again by the time of whole networks.

An op that is timed alone, many launches of it in a row, finds its code in the instruction caches and its input in its own
multiprocessor's; in a network it finds neither, and it overlaps with its neighbours, which launch early. So a network is
timed in the sequence that csrc/network.cpp makes, with one choice changed at a time: among the candidates that were right
and nearly the fastest alone, the one by which the network gets faster by more than noise is taken. Each assignment is a
CUDA graph of a few passes; graphs are replayed in turns, so that a drift of the clock meets all of them.

What the library has in networks that it holds alone, two steps' products as one and whole blocks with narrow maps, is timed here: all of
the candidates, and doing without. Such lines have the network's times.
"""

import statistics
from dataclasses import dataclass, field

import torch

from ..aot.tables import NONE, Line
from .calls import all_parts, parts
from .choose import GAIN, SHIPPED
from .measure import Problem
from .networks import exact

NEAR = 1.6  # of the fastest time alone
RIVALS = 8  # for a choice
SWEEPS = 2
FIRST, ROUNDS = 3, 9  # samples of each rival, and of those that may have won
FINALISTS = 3
AGREE = 0.75  # of the samples
OF_NETWORK, OF_OP = 0.003, 0.02  # what must be gained, of both


def is_of_networks(key):
    """Whether the choice is there in networks that are held alone: two steps' products as one, whole blocks with narrow maps."""
    op, precision, *_ = key
    return op.startswith("merged_") or (op, precision) == ("mbconv", "narrow")


@dataclass(frozen=True)
class Change:
    key: tuple
    before: str
    after: str
    seconds: float  # by which the network got faster


@dataclass
class Settled:
    """What came out for a network."""

    variants: dict  # by key
    changes: list[Change] = field(default_factory=list)
    reached: frozenset = frozenset()  # the keys of what is launched
    before: float = 0.0  # seconds
    after: float = 0.0
    complete: bool = True


class Trials:
    """A network's choices and times under assignments of variants to keys."""

    def __init__(self, library, clock, run):
        self._library, self._clock, self._run = library, clock, run
        self._pool = clock.pool()
        self._kept = clock.sequence(run, 1, self._pool)  # a pool without a graph is gone
        self._passes = clock.passes(self._kept())

    def choices(self, variants):
        """What the network launches, by key."""
        with self._library.assigned(variants):
            self._run()
            return {choice.key: choice for choice in self._library.choices()}

    def prepare(self, variants):
        """A function that gives the seconds of one pass, each time that it is called."""
        with self._library.assigned(variants, tell=False):
            return self._clock.sequence(self._run, self._passes, self._pool)


def compare(present, others, rounds):
    """What each of `others` gains, {name: seconds in each round}, and the seconds of `present` in each round."""
    ways, samples = {None: present, **others}, {name: [] for name in (None, *others)}
    names = list(samples)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(ways[name]())
    base = samples.pop(None)
    return {name: [b - s for b, s in zip(base, times)] for name, times in samples.items()}, base


def settle(trials, measured, variants, fixed=frozenset(), may_ship=lambda key, variant: True, expired=lambda: False, told=lambda key: None):
    """Settled. `measured` are the candidates alone, by key, `variants` the choices to start from; those of the keys in `fixed`
    stay. `may_ship(key, variant)` says whether a variant is allowed beside those of the shape's other batches."""
    first, found, hopeless = dict(variants), Settled(dict(variants)), set()
    gained = {}  # {key: (the variant before, seconds)}
    start = present = trials.prepare(first)
    choices, changed = trials.choices(first), True
    for key, choice in choices.items():
        wanted = first.get(key, choice.variant)
        assert wanted == choice.variant or wanted not in choice.fitting, f"{wanted} was asked for and {choice.variant} came"
    for _ in range(SWEEPS):
        if not changed or not found.complete:
            break
        changed, visited = False, set()
        while key := next((key for key in choices if key not in visited and key not in fixed), None):
            if expired():
                found.complete = False
                break
            visited.add(key)
            told(key)
            m, now = measured.get(key), choices[key].variant
            if is_of_networks(key):
                rivals, most, of_op = list(choices[key].fitting), None, 0.0
            elif m and now in m.times:
                rivals, most, of_op = near(m, choices[key].fitting), RIVALS, OF_OP * m.times[now] / 1e6
            else:
                continue
            rivals = [v for v in rivals if v != now and (key, v) not in hopeless and may_ship(key, v)][:most]
            ways = {v: trials.prepare(found.variants | {key: v}) for v in rivals}
            gains, base = compare(present, ways, FIRST) if ways else ({}, [])
            least = max(OF_NETWORK * statistics.median(base), of_op) if ways else 0
            median = {v: statistics.median(some) for v, some in gains.items()}
            hopeless |= {(key, v) for v, gain in median.items() if gain < -least}
            final = sorted((v for v in ways if median[v] > least / 2), key=median.get, reverse=True)[:FINALISTS]
            if not final:
                continue
            gains, _ = compare(present, {v: ways[v] for v in final}, ROUNDS)  # fresh ones: the first were lucky in part
            best = max(final, key=lambda v: statistics.median(gains[v]))
            gain = statistics.median(gains[best])
            if gain >= least and sum(g > 0 for g in gains[best]) >= AGREE * ROUNDS:
                found.variants[key], present, changed = best, ways[best], True
                was, seconds = gained.get(key, (now, 0.0))
                gained[key] = was, seconds + gain
                choices = trials.choices(found.variants)  # a block's parts come in its place, or go
                assert choices[key].variant == best, f"{best} was asked for and {choices[key].variant} came"
    found.reached = frozenset(choices)
    if gained:
        gains, base = compare(start, {"now": present}, 2 * ROUNDS)
        found.before = statistics.median(base)
        found.after = found.before - statistics.median(gains["now"])
        if found.after >= found.before:  # none of it was there
            found.variants, gained, found.reached, found.after = first, {}, frozenset(trials.choices(first)), found.before
    else:
        found.before = found.after = statistics.median(start() for _ in range(FIRST))
    found.changes = [Change(key, was, found.variants[key], seconds) for key, (was, seconds) in gained.items() if found.variants[key] != was and key in found.reached]
    return found


def near(measured, fitting):
    """The candidates to try, the fastest alone first. Doing without a kernel is one of them wherever it was right."""
    most = NEAR * min(measured.times.values())
    found = sorted((v for v, us in measured.times.items() if us <= most and v in fitting), key=measured.times.get)
    return sorted(found, key=lambda v: v != NONE)  # which must not be one too many


# ---- what to start from, and what it says ----


def keys_of(calls, dtype, batch, done):
    """{call: [its own key or None, those of its inner choices]} of the calls and of what they can be done by instead, where any of
    it was measured; `done` are Measured or None by str(Problem)."""
    every = [Problem(part, dtype, batch) for part in dict.fromkeys(part for call in calls for part in (call, *all_parts(call)))]
    found = {problem.call: [m and m.key for p in (problem, *problem.inside()) if (m := done.get(str(p))) or not p.inner] for problem in every}
    return {call: keys for call, keys in found.items() if any(keys)}


def starting(keys, measured, lines):
    """The choice for every key: the table's, else, as for the parts of a block that has a kernel, the fastest alone."""
    found, may_ship = {key: line.variant for key, line in lines.items() if is_of_networks(key)}, ships(lines)
    for key in keys:
        m, line = measured[key], lines.get(key)
        if line and line.variant in m.times:
            found[key] = line.variant
            continue
        times = {v: us for v, us in m.times.items() if v == m.default or may_ship(key, v)}
        if times:
            best = min(times, key=times.get)
            found[key] = m.default if m.default in times and times[best] > (1 - GAIN) * times[m.default] else best
    return found


def places(calls, keys, variants):
    """How often a network takes each key, given its choices."""
    counts, queue = {}, list(calls)
    while queue:
        call = queue.pop()
        own, *inner = keys.get(call, [None])
        several = own is None or variants.get(own) == NONE
        for key in (own, *inner) if several else (own,):
            counts[key] = counts.get(key, 0) + 1
        if several and not inner:
            queue += parts(call)
    counts.pop(None, None)
    return counts


def ships(lines):
    """may_ship for the lines of a table, by key: at most three variants for the batches of a shape."""
    def allowed(key, variant):
        others = {line.variant for line in lines.values() if line.group == key[:3] and line.key != key} - {NONE}
        return variant == NONE or len(others | {variant}) <= max(SHIPPED, len(others))

    return allowed


def lines_of(settled, measured, lines, counts, capability):
    """The lines that a network's choices are, where the table has others. The time of one that changed is its predecessor's less
    what the network gained by it, a place of it."""
    changes, found = {change.key: change for change in settled.changes}, []
    for key in settled.reached & settled.variants.keys() & measured.keys():
        m, old, variant, change = measured[key], lines.get(key), settled.variants[key], changes.get(key)
        if variant not in m.times or (old and not change):
            continue
        us = m.times[variant]
        if change:
            us = old.us if old and old.variant == change.before else m.times[change.before]
            us = max(us - 1e6 * change.seconds / counts.get(key, 1), us / 10)
        default_us = us if variant == m.default else old.default_us if old and old.default == m.default else m.times.get(m.default, us)
        found.append(Line(*key, capability, variant, us, m.default, default_us))
    # All of them, or what was measured with another batch would count for this one.
    for key in settled.reached:
        if is_of_networks(key) and key[1] != NONE:
            found.append(Line(*key, capability, settled.variants.get(key, NONE), 1e6 * settled.after, NONE, 1e6 * settled.before))
    return found


# ---- whether it is right ----

IMAGES = 2  # at the beginning and at the end of a batch, that are computed in float64
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10}  # of the result; TF32 is float16 here
EXCESS = 3  # of the error of the library's own choices


def check(library, chain, arguments, variants):
    """None, or what is wrong with the network's result under the choices: no image's may be further from float64 than a small
    multiple of what the library's own choices, which the tests check, are at most; nor further from theirs."""
    x, weights, program = arguments
    with library.assigned(variants, tell=False):
        out = chain.run(arguments).double()
    with library.assigned({}, tell=False):
        own = chain.run(arguments).double()
    some = sorted({*range(min(IMAGES, len(x))), *range(max(0, len(x) - IMAGES), len(x))})
    truth = exact(x[some], weights, program)
    scale = own.square().mean().sqrt()
    allowed = ROUNDING[x.dtype]
    if truth is not None:
        allowed = max(EXCESS * apart(own[some], truth, scale), torch.finfo(x.dtype).eps)
        error = apart(out[some], truth, scale)
        if not error <= allowed:
            return f"{error:.1e} from float64, where {allowed:.1e} is allowed"
        allowed *= 1 + 1 / EXCESS
    error = apart(out, own, scale)
    return None if error <= allowed else f"{error:.1e} from the result by the library's own choices, where {allowed:.1e} is allowed"


def apart(a, b, scale):
    """The image that differs most, relative to all."""
    return ((a - b).flatten(1).square().mean(1).sqrt().max() / scale).item()
