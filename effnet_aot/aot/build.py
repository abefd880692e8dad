"""The build: discover, compile what the cache lacks, write the registry that the C++ library embeds."""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .architectures import parse_archs
from .candidates import admits, fits, is_conservative, tile
from .compiler import cache_key, compile_variant, is_cached, source_digest, start_worker, tool_versions, work
from .discover import discover
from .errors import BuildError
from .registry import Image, write_registry
from .tables import NONE, read_tables

PROJECT = Path(__file__).resolve().parents[2]

__all__ = ["BuildResult", "build_kernels", "compile_variant"]


@dataclass(frozen=True)
class BuildResult:
    """Files for the C++ build. `entries` are the cache's that it took, without suffix; `compiled` of them were not there before."""

    registry_cpp: Path
    blob: Path
    manifest: Path
    cuda_headers: Path
    entries: frozenset
    compiled: int


def build_kernels(out_dir, cache_dir, archs=None, jobs=None, quiet=False, source_dir=PROJECT / "triton_src", candidates=None):
    """Compiles every variant in `source_dir` for the architectures `archs` (default: $EFFNET_AOT_ARCHS): the default ones
    and those that the tuning tables in `source_dir`/tuned name for these architectures.

    `candidates`, for tuning, is (ops, precisions, names), each a list or None for all, or the first of these: what these have to try, besides the variants of the
    tables, whose choices the library does not know then.
    `jobs` compilers run at once (default: $MAX_JOBS or the number of cores). Raises BuildError, naming what failed.
    """
    targets = parse_archs(os.environ.get("EFFNET_AOT_ARCHS") if archs is None else archs)
    out_dir, cache_dir, source_dir = Path(out_dir), Path(cache_dir), Path(source_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    cache_dir.mkdir(parents=True, exist_ok=True)
    defaults, known = discover(source_dir), discover(source_dir, candidates=True)
    if repeated := {str(v) for v in known} & {str(v) for v in defaults}:
        raise BuildError(f"a candidate has the name of a variant: {', '.join(sorted(repeated))}")
    versions = tool_versions()
    digests = {op: source_digest(source_dir, op) for op in {v.op for v in (*defaults, *known)}}
    jobs = jobs or int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count()

    def cached(variant, target):
        return cache_dir / cache_key(variant, target.capability, versions, digests[variant.op])

    named = {}  # by tables: {candidate's name: for which capabilities}

    def targets_of(variant):
        return [t for t in targets if t.capability in named.get(str(variant), {t.capability})]

    def compiled(variants):
        """How many of them were not in the cache. A cubin and the PTX of the same capability come out of one compilation."""
        wanted = {cached(v, t): (str(v), t.capability) for v in variants for t in targets_of(v)}
        missing = [(name, capability, path) for path, (name, capability) in wanted.items() if not is_cached(path)]
        compile_all(missing, source_dir, jobs, quiet)
        return len(missing)

    def reports(variant):
        return {target: json.loads(cached(variant, target).with_suffix(".json").read_text()) for target in targets_of(variant)}

    by_tables, tuned = tabled(read_tables(source_dir / "tuned"), {t.capability for t in targets}, defaults, known)
    if candidates is not None:
        tried = [v for v in select(known, *candidates) if cached(v, targets[0]) not in {cached(d, targets[0]) for d in defaults}]
        count = compiled([*defaults, *(v for v in tried if is_conservative(v))])
        registers = {tile(v): scarcest(reports(v)) for v in [*tried, *defaults] if (v.num_warps, v.num_stages) == (v.base_warps, 2)}
        admitted = [v for v in tried if admits(v, registers.get(tile(v)))]
        count += compiled(admitted)
        # What does not fit one of the GPUs may be the best of another.
        fitting = {str(v): {t.capability for t in targets} - {t.capability for t, report in reports(v).items() if not fits(t, report)} for v in admitted}
        fitting = {name: capabilities for name, capabilities in fitting.items() if capabilities}
        if not quiet:
            print(f"{len(fitting)} candidates; {len(tried) - len(admitted)} not worth a try by their registers, {len(admitted) - len(fitting)} fit nowhere", flush=True)
        named, tuned = by_tables | fitting, []
    else:
        named, count = by_tables, 0
    added = [v for v in known if str(v) in named]
    count += compiled([*defaults, *added])

    variants = sorted([*defaults, *added], key=lambda v: v.op)
    images = []
    for variant in variants:
        for target, report in reports(variant).items():
            images.append(Image(variant, target, cached(variant, target).with_suffix("." + target.kind).read_bytes(), **report))
    registry_cpp, blob, manifest = write_registry(out_dir, variants, images, versions, {str(v) for v in defaults}, tuned)
    entries = frozenset(cached(variant, target) for variant in variants for target in targets_of(variant))
    return BuildResult(registry_cpp, blob, manifest, cuda_headers(), entries, count)


def select(known, ops=None, precisions=None, names=None):
    """The candidates of these ops, precisions and names; tf32 means fp32 for an op that does not tell them apart."""
    if unknown := set(ops or ()) - {v.op for v in known}:
        raise BuildError(f"no candidates of {', '.join(sorted(unknown))}; there are those of {', '.join(sorted({v.op for v in known}))}")
    distinct = {(v.op, v.precision) for v in known}

    def is_wanted(v):
        stands_for = {v.precision} | ({"tf32"} if v.precision == "fp32" and (v.op, "tf32") not in distinct else set())
        return (ops is None or v.op in ops) and (precisions is None or bool(stands_for & set(precisions))) and (names is None or v.name in names)

    return [v for v in known if is_wanted(v)]


def scarcest(reports):
    """The most registers of any target, or None where one of them spills."""
    return None if any(r["spills"] for r in reports.values()) else max(r["registers"] for r in reports.values())


def tabled(tables, capabilities, defaults, known):
    """({name of a candidate: the capabilities whose tables name it}, lines that name something) for the capabilities that are
    built. A choice by one GPU's times is no use to another."""
    lines = [line for table in tables if table.capability in capabilities for line in table.lines]
    shipped, candidates = {str(v) for v in defaults}, {str(v) for v in known}
    gone = {name for line in lines if (name := f"{line.op}/{line.variant}") not in shipped | candidates and line.variant != NONE}
    if gone:  # no error, or the kernels could not be worked on without a GPU at hand
        print(f"warning: the tuning tables name variants that are gone, so the default serves: {', '.join(sorted(gone))}", file=sys.stderr)
    lines = [line for line in lines if f"{line.op}/{line.variant}" not in gone]
    named = {}
    for line in lines:
        if (name := f"{line.op}/{line.variant}") in candidates:
            named.setdefault(name, set()).add(line.capability)
    return named, lines


def compile_all(missing, source_dir, jobs, quiet):
    if not missing:
        return
    # Fresh interpreters, not forks: the parent may run threads (the progress bar, a build front end).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(missing)), context, start_worker, (source_dir, list(sys.path))) as pool, progress(len(missing), quiet) as advance:
        try:
            for future in as_completed([pool.submit(work, *job) for job in missing]):
                future.result()
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def progress(total, quiet):
    if quiet:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def cuda_headers():
    """Where cuda.h is: Triton ships the driver API's header."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"
