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
from .compiler import cache_key, compile_variant, is_cached, source_digest, start_worker, tool_versions, work
from .discover import discover
from .registry import Image, write_registry

PROJECT = Path(__file__).resolve().parents[2]

__all__ = ["BuildResult", "build_kernels", "compile_variant"]


@dataclass(frozen=True)
class BuildResult:
    """Files for the C++ build. `compiled` counts the kernels that were not in the cache."""

    registry_cpp: Path
    blob: Path
    manifest: Path
    include_dirs: list
    compiled: int


def build_kernels(out_dir, cache_dir, archs=None, jobs=None, quiet=False, source_dir=PROJECT / "triton_src"):
    """Compiles every variant in `source_dir` for the architectures `archs` (default: $EFFNET_AOT_ARCHS).

    `jobs` compilers run at once (default: $MAX_JOBS or the number of cores). Raises BuildError, naming what failed.
    """
    targets = parse_archs(os.environ.get("EFFNET_AOT_ARCHS") if archs is None else archs)
    out_dir, cache_dir, source_dir = Path(out_dir), Path(cache_dir), Path(source_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    cache_dir.mkdir(parents=True, exist_ok=True)
    variants = discover(source_dir)
    versions = tool_versions()
    digests = {op: source_digest(source_dir, op) for op in {v.op for v in variants}}

    def cached(variant, target):
        return cache_dir / cache_key(variant, target.capability, versions, digests[variant.op])

    # A cubin and the PTX of the same capability come out of one compilation.
    wanted = {cached(v, t): (str(v), t.capability) for v in variants for t in targets}
    missing = [(name, capability, path) for path, (name, capability) in wanted.items() if not is_cached(path)]
    compile_all(missing, source_dir, jobs or int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count(), quiet)

    images = []
    for variant in variants:
        for target in targets:
            path = cached(variant, target)
            report = json.loads(path.with_suffix(".json").read_text())
            images.append(Image(variant, target, path.with_suffix("." + target.kind).read_bytes(), **report))
    registry_cpp, blob, manifest = write_registry(out_dir, variants, images, versions)
    return BuildResult(registry_cpp, blob, manifest, include_dirs(), len(missing))


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


def include_dirs():
    """Where cuda.h is: Triton ships the driver API's header."""
    import triton

    return [str(Path(triton.__file__).parent / "backends" / "nvidia" / "include")]
