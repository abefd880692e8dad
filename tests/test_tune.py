"""python -m effnet_aot tune: candidates, their measurement, the table, and what the library makes of it. No GPU: the driver
is a stub and the clock is a list."""

import functools
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import stub_cuda
import torch

from effnet_aot.aot import BuildError, build_kernels
from effnet_aot.aot.architectures import Target
from effnet_aot.aot.candidates import admits, fits, is_conservative, tile
from effnet_aot.aot.discover import discover
from effnet_aot.aot.registry import Image, write_registry
from effnet_aot.aot.tables import NONE, Line, Table, read_table, read_tables, write_table
from effnet_aot.bench.children import environment
from effnet_aot.cli import main
from effnet_aot.tune import calls, weigh, weigh_child
from effnet_aot.tune.choose import Measured, choose, needed, update
from effnet_aot.tune.library import Choice
from effnet_aot.tune.measure import Journal, Problem, measure, problems
from triton_src._variant import Variant

pytestmark = pytest.mark.xdist_group("stub_cuda")

SHAPE = (("channels_last", 1), ("pixels", 64), ("in_channels", 16), ("out_channels", 24), ("residual", 0))


def line(variant="b", batch=10, capability=90, shape=SHAPE, us=8.0, default_us=10.0):
    return Line("pointwise", "fp16", shape, batch, capability, variant, us, "a", default_us)


def measured(times, batch=10, wrong=(), default="a"):
    return Measured("pointwise", "fp16", SHAPE, batch, default, times, dict.fromkeys(wrong, "wrong"))


# ---- the table ----


def test_table_round_trip(tmp_path):
    table = Table(90, {"device": "some GPU"}, [line(batch=128), line(batch=1, variant="c")])
    write_table(tmp_path / "sm_90.json", table)
    text = (tmp_path / "sm_90.json").read_text()
    assert json.loads(text)["capability"] == "9.0" and '"variant": "c"' in text.splitlines()[6], "one line of text a line"
    (read,) = read_tables(tmp_path)
    assert read.lines == [line(batch=1, variant="c"), line(batch=128)] and read.measured == table.measured and read.name == "sm_90"
    write_table(tmp_path / "again.json", read)
    assert (tmp_path / "again.json").read_text() == text


def test_a_broken_table_is_named(tmp_path):
    path = tmp_path / "sm_90.json"
    for text in ("{", "{}", '{"capability": "9.0", "lines": [{"op": "linear"}]}'):
        path.write_text(text)
        with pytest.raises(BuildError, match=r"sm_90\.json is not a tuning table"):
            read_table(path)


def test_two_percent():
    """The default stands, and so does an earlier choice, against anything that is not clearly faster."""
    assert [v for _, v in choose([measured({"a": 10.0, "b": 9.81})], {})] == ["a"]
    assert [v for _, v in choose([measured({"a": 10.0, "b": 9.79})], {})] == ["b"]
    times = {"a": 12.0, "b": 10.0, "c": 9.81}
    key = measured({}).key
    assert [v for _, v in choose([measured(times)], {key: "b"})] == ["b"]
    assert [v for _, v in choose([measured({**times, "c": 9.7})], {key: "b"})] == ["c"]
    assert [v for _, v in choose([measured({"a": 12.0, "c": 11.9})], {key: "gone"})] == ["a"]


def test_three_variants_for_one_shape():
    names = "abcdef"
    members = [measured({v: 5.0 if i == j else 6.0 + j / 10 for j, v in enumerate(names)}, batch) for i, batch in enumerate((1, 10, 32, 128, 512))]
    chosen = dict((m.batch, v) for m, v in choose(members, {}))
    assert len(chosen) == 5 and len(set(chosen.values())) == 3
    table = update(Table(90, {}, [line("x", 2), line("y", 3)]), members, 90)
    assert len({entry.variant for entry in table.lines}) <= 3 and len(table.lines) == 7
    # To do without a kernel is no variant.
    without = measured({NONE: 4.0, "a": 6.0, "b": 6.0}, 1000)
    assert dict((m.batch, v) for m, v in choose([*members[:3], without], {})) == {1: "a", 10: "b", 32: "c", 1000: NONE}


def test_variants_that_serve_more_shapes():
    """What is as fast within 2% gives way: to a variant of more shapes, or to a default."""
    def shape(pixels):
        return {"shape": (("pixels", pixels), *SHAPE[2:])}

    fast = [replace(measured({"a": 12.0, "b": 10.0, "c": 10.1}), **shape(pixels)) for pixels in (1, 2)]
    other = replace(measured({"a": 12.0, "b": 10.1, "c": 10.0}), **shape(3))
    far = replace(measured({"a": 12.0, "b": 10.3, "d": 10.0}), **shape(4))
    near_default = replace(measured({"a": 10.1, "e": 10.0}), **shape(5))
    chosen = {entry.shape[0][1]: entry.variant for entry in update(None, [*fast, other, far, near_default], 90).lines}
    assert chosen == {1: "b", 2: "b", 3: "b", 4: "d", 5: "a"}
    # Three variants for the batches of one shape stay three.
    batches = [measured({v: 10.0 if v == own else 10.1 if v == "b" else 20.0 for v in "abcdef"}, batch) for batch, own in ((1, "c"), (2, "d"), (3, "e"))]
    chosen = [entry.variant for entry in update(None, [*fast, *batches], 90).lines if entry.shape == SHAPE]
    assert chosen == ["b", "b", "b"]


def test_parts_of_a_block_with_its_own_kernel():
    call = next(call for call in modelnew() if call.op == "mbconv" and len(calls.all_parts(call)) == 4)
    other = next(call for call in modelnew() if call.op == "linear")
    made, lines = {}, []
    for index, (one, batch) in enumerate((one, batch) for batch in (1, 10) for one in (call, *calls.all_parts(call), other)):
        variant = NONE if one is call and batch == 1 or one.op == "expand_depthwise" and batch == 1 else "b"
        made[Problem(one, "float16", batch)] = Measured(one.op, "fp16", (("index", index),), batch, "a", {"a": 2.0, variant: 1.0})
        lines.append(Line(one.op, "fp16", (("index", index),), batch, 90, variant, 1.0, "a", 2.0))
    kept = needed(lines, list(made), made)
    assert [(entry.op, entry.batch) for entry in kept] == [("mbconv", 1), ("expand_depthwise", 1), ("pointwise", 1), ("depthwise", 1), ("pointwise", 1), ("linear", 1), ("mbconv", 10), ("linear", 10)]
    lines = [replace(entry, variant="b") if entry.op == "expand_depthwise" else entry for entry in lines]
    kept = needed(lines, list(made), made)
    assert [(entry.op, entry.batch) for entry in kept] == [("mbconv", 1), ("expand_depthwise", 1), ("pointwise", 1), ("linear", 1), ("mbconv", 10), ("linear", 10)]
    lines = [replace(entry, variant=NONE) if entry.op == "expand_depthwise" else entry for entry in lines]
    kept = needed(lines, list(made), {problem: m for problem, m in made.items() if problem.call != call})
    assert kept == lines, "a block that has no kernel, or was not measured yet"


def test_parts_of_parts(monkeypatch):
    """A part that itself has parts: theirs are needed where neither it nor the block has a kernel of its own."""
    from effnet_aot.tune import choose as module

    tree = {"block": ["pair", "project"], "pair": ["expand", "filter"]}
    monkeypatch.setattr(module, "parts", lambda call: [calls.Call(name, ()) for name in tree.get(call.op, [])])
    made = {Problem(call, "float16", 1): Measured(call.op, "fp16", (), 1, "a", {"a": 1.0}) for call in (calls.Call(name, ()) for name in ("expand", "filter", "pair", "project", "block"))}

    def kept(**variants):
        lines = [Line(m.op, "fp16", (), 1, 90, variants.get(m.op, "a"), 1.0, "a", 1.0) for m in made.values()]
        return {entry.op for entry in needed(lines, list(made), made)}

    assert kept() == {"block"}
    assert kept(pair=NONE) == {"block"}, "which is not needed itself"
    assert kept(block=NONE) == {"block", "pair", "project"}
    assert kept(block=NONE, pair=NONE) == {"block", "pair", "project", "expand", "filter"}


def test_inner_choices_are_needed_without_a_kernel_of_the_block():
    """... those of its beginning's two kernels without one of the beginning, and no parts' own."""
    call = next(call for call in modelnew() if call.op == "mbconv" and len(calls.all_parts(call)) == 4)
    block = Problem(call, "float32", 1)
    every = [*block.inside(), *(Problem(part, "float32", 1) for part in calls.all_parts(call)), block]
    names = {p: " ".join(p.inner or (p.call.op,)) for p in every}
    made = {p: Measured(p.inner[0] if p.inner else p.call.op, p.inner[1] if p.inner else "tf32", (("index", index),), 1, "a", {"a": 1.0}) for index, p in enumerate(every)}

    def kept(**variants):
        lines = [Line(*m.key, 90, variants.get(names[p].replace(" ", "_"), "a"), 1.0, "a", 1.0) for p, m in made.items()]
        return {f"{entry.op} {entry.precision}" for entry in needed(lines, every, made)}

    assert kept() == {"mbconv tf32"}
    without = {"mbconv tf32", "expand_depthwise narrowing", "pointwise widening", "pointwise widening16"}
    assert kept(mbconv=NONE) == without
    assert kept(mbconv=NONE, expand_depthwise_narrowing=NONE) == without | {"pointwise narrowing", "depthwise narrow"}
    assert not [p for one in (Problem(call, "float16", 1), *block.inside(), Problem(calls.parts(call)[0], "float32", 1)) for p in one.inside()]


def test_a_wrong_candidate_is_never_chosen():
    table = update(None, [measured({"a": 10.0, "b": 8.0}, wrong=["fast"])], 90)
    assert [entry.variant for entry in table.lines] == ["b"] and table.lines[0].default_us == 10.0
    assert update(table, [measured({"a": 10.0}, wrong=["b"])], 90).lines[0].variant == "a"
    assert update(table, [measured({}, wrong=["a", "b"])], 90).lines == []


# ---- measuring ----


@functools.cache
def modelnew():
    return calls.network_calls("modelnew", 32)


class FakeLibrary:
    def __init__(self, fitting):
        self.fitting, self.variant, self.log = fitting, None, []

    @contextmanager
    def taking(self, op=None, variant=None):
        with self.assigned({op: variant}):
            yield self

    @contextmanager
    def assigned(self, variants):
        self.variant, self.log = next(iter(variants.values()), None), []
        yield self
        self.variant = None

    def choices(self):
        return self.log


class FakeClock:
    device = "cpu"

    def __init__(self, library, seconds):
        self.library, self.seconds = library, seconds

    def synchronize(self):
        pass

    def pool(self):
        return "shared"

    def prepare(self, function, pool, most):
        assert pool == "shared"
        variant = self.library.variant or function.__name__
        return lambda: self.seconds[variant]


@pytest.mark.parametrize("op", ["conv", "stem_mbconv", "mbconv", "expand_depthwise", "depthwise", "pointwise", "pointwise_pool", "linear"])
def test_measure(op, monkeypatch):
    """A candidate that writes one wrong number, and one that leaves one out, are refused however fast they are."""
    call = next(call for call in modelnew() if call.op == op)
    library = FakeLibrary(("fp32_a", "fp32_b", "fp32_off", "fp32_nan"))
    run = calls.Call.run

    def run_as(self, arguments):
        out = run(self, arguments).clone()
        library.log.append(Choice(call.op, 3, SHAPE, library.variant or "fp32_a", library.fitting))
        if library.variant in ("fp32_off", "fp32_nan"):
            index = tuple(size - 1 for size in out.shape)
            out[index] = out[index] + 0.01 if library.variant == "fp32_off" else torch.nan
        return out

    monkeypatch.setattr(calls.Call, "run", run_as)
    clock = FakeClock(library, {"fp32_a": 4e-6, "fp32_b": 3e-6, "fp32_off": 1e-6, "fp32_nan": 1e-6})
    found = measure(library, clock, Problem(call, "float32", 3), tf32=False)
    assert found.key == (call.op, "fp32", SHAPE, 3) and found.default == "fp32_a"
    assert found.times == pytest.approx({"fp32_a": 4.0, "fp32_b": 3.0})
    assert found.wrong.keys() == {"fp32_off", "fp32_nan"}
    assert [entry.variant for entry in update(None, [found], 90).lines] == ["fp32_b"]


def test_a_block_competes_with_its_parts(monkeypatch):
    """... as their own fastest variants compute it; the result is checked like any other."""
    pixels = calls.Operand((8, 6, 5), (0, 2, 3, 1))
    shapes = {"expand_weight": (48, 8, 1, 1), "expand_bias": (48,), "depthwise_weight": (48, 1, 3, 3), "depthwise_bias": (48,), "project_weight": (8, 48, 1, 1), "project_bias": (8,)}
    operands = {name: calls.Operand(shape, tuple(range(len(shape)))) for name, shape in shapes.items()}
    call = calls.Call("mbconv", tuple({"x": pixels, **operands, "residual": pixels, "stride": (1, 1), "padding": (1, 1, 1, 1)}.items()))
    library, taken = FakeLibrary(("fp32_a", NONE)), []
    run = calls.Call.run

    def run_as(self, arguments):
        taken.append((self.op, library.variant))
        library.log.append(Choice(self.op, 3, SHAPE, library.variant or "fp32_a", library.fitting))
        return run(self, arguments)

    monkeypatch.setattr(calls.Call, "run", run_as)
    clock = FakeClock(library, {"fp32_a": 4e-6, "<lambda>": 3e-6})
    fastest = {part: f"of {part}" for part in calls.parts(call)}.get
    found = measure(library, clock, Problem(call, "float32", 3), tf32=False, fastest=fastest)
    assert found.times == pytest.approx({"fp32_a": 4.0, NONE: 3.0}) and not found.wrong
    assert taken == [("mbconv", None), ("mbconv", "fp32_a"), *((part.op, f"of {part}") for part in calls.parts(call))]
    # One of the parts may itself be better in parts.
    beginning, project = calls.parts(call)
    fastest = {part: NONE if part == beginning else f"of {part}" for part in calls.all_parts(call)}.get
    taken.clear()
    measure(library, clock, Problem(call, "float32", 3), tf32=False, fastest=fastest)
    assert taken[2:] == [(part.op, f"of {part}") for part in (*calls.parts(beginning), project)]


def test_inner_choices_are_timed_as_a_block(monkeypatch):
    """... which has no kernel of its own then, and the fastest kernels that are known for the others."""
    call = next(call for call in modelnew() if call.op == "mbconv" and len(calls.all_parts(call)) == 4)
    fitting, run, asked = {"mbconv": ("tf32_a", NONE), "pointwise": ("widening_a", "widening_b")}, calls.Call.run, []
    shapes = {"mbconv": SHAPE, "pointwise": (("pixels", 3),)}

    class Library(FakeLibrary):
        @contextmanager
        def assigned(self, variants):
            asked.append(variants)
            self.variants, self.log = {key[0] if isinstance(key, tuple) else key: variant for key, variant in variants.items()}, []
            yield self

    def run_as(self, arguments):
        for op in ("mbconv", "pointwise"):
            variant = library.variants.get(op, fitting[op][0])
            library.log.append(Choice(op, 3, shapes[op], variant, fitting[op]))
            if op == "mbconv" and variant != NONE:
                break
        return run(self, arguments)

    class Clock(FakeClock):
        def prepare(self, function, pool, most):
            variants = dict(library.variants)
            return lambda: {"widening_a": 4e-6, "widening_b": 3e-6, None: 5e-6}[variants.get("pointwise") if variants["mbconv"] == NONE else None]

    monkeypatch.setattr(calls.Call, "run", run_as)
    library = Library(())
    problem = Problem(call, "float32", 3)
    *_, widening, _ = problem.inside()
    inner = measure(library, Clock(library, {}), widening, tf32=False)
    assert inner.key == ("pointwise", "widening", shapes["pointwise"], 3) and inner.times == pytest.approx({"widening_a": 4.0, "widening_b": 3.0})
    assert asked[0] == {"mbconv": NONE} and asked[-1] == {"mbconv": NONE, inner.key: "widening_b"}
    found = measure(library, Clock(library, {}), problem, tf32=False, fastest={}.get, inner=[inner])
    assert found.times == pytest.approx({"tf32_a": 5.0, NONE: 3.0}) and asked[-1] == {inner.key: "widening_b", found.key: NONE}
    assert measure(library, Clock(library, {}), problem.inside()[0], tf32=False) is None, "a choice that the block does not make"


def test_a_stem_and_a_block_compete_with_the_two(monkeypatch):
    call = next(call for call in modelnew() if call.op == "stem_mbconv")
    assert [part.op for part in calls.parts(call)] == ["conv", "mbconv"] and all(part in modelnew() for part in [call, *calls.all_parts(call)])
    assert [one.op for one in [call, *calls.all_parts(call)]] == ["stem_mbconv", "conv", "mbconv", "depthwise", "pointwise"]
    library = FakeLibrary(("fp32_a", NONE))
    run = calls.Call.run

    def run_as(self, arguments):
        library.log.append(Choice(self.op, 3, SHAPE, library.variant or "fp32_a", library.fitting))
        return run(self, arguments)

    monkeypatch.setattr(calls.Call, "run", run_as)
    clock = FakeClock(library, {"fp32_a": 4e-6, "<lambda>": 3e-6})
    found = measure(library, clock, Problem(call, "float32", 3), tf32=False, fastest={}.get)
    assert found.times == pytest.approx({"fp32_a": 4.0, NONE: 3.0}) and not found.wrong


def test_calls_of_a_network(tmp_path):
    found = modelnew()
    assert {"conv", "mbconv", "expand_depthwise", "pointwise", "depthwise", "pointwise_pool", "linear", "stem_mbconv"} == {call.op for call in found}
    call = next(call for call in found if call.op == "depthwise")
    arguments = call.make(5, torch.float16, "cpu")
    assert arguments["x"].shape == (5, 32, 16, 16) and arguments["x"].is_contiguous(memory_format=torch.channels_last)
    assert arguments["weight"].dtype == torch.float16 and arguments["bias"].dtype == torch.float32
    calls.save(tmp_path / "calls.json", {"modelnew": found})
    assert calls.load(tmp_path / "calls.json") == {"modelnew": found}
    assert len(problems({"modelnew": found, "again": found}, ["float16"], [1, 10])) == 2 * len(found)
    with pytest.raises(RuntimeError, match="no network 'resnet_of_nowhere'"):
        calls.network_calls("resnet_of_nowhere")


def test_journal(tmp_path):
    problem = Problem(modelnew()[0], "float16", 10)
    journal = Journal(tmp_path / "sm_90.journal", {"bundle": "1"})
    journal.add(problem, measured({"a": 10.0}, wrong=["b"]))
    assert Journal(journal.path, {"bundle": "1"}).done == {str(problem): measured({"a": 10.0}, wrong=["b"])}
    assert Journal(journal.path, {"bundle": "2"}).done == {}, "times of another build or machine"


# ---- the build ----


def test_registers_decide_what_is_tried():
    def variant(warps, stages, loads=2, base_warps=4):
        return SimpleNamespace(num_warps=warps, num_stages=stages, loads=loads, base_warps=base_warps, judged=True)

    for registers, expected in [(80, (True, True, True)), (96, (True, True, False)), (140, (True, False, False)), (None, (True, False, False))]:
        assert (admits(variant(4, 2), registers), admits(variant(4, 3), registers), admits(variant(8, 2), registers)) == expected
    assert admits(variant(4, 2, 3), 80) and not admits(variant(8, 2, 3), 80)
    unjudged = variant(8, 3)
    unjudged.judged = False
    assert admits(unjudged, 200) and admits(unjudged, None)
    assert admits(variant(8, 2, base_warps=8), 140) and admits(variant(8, 3, base_warps=8), 120), "8 warps are the least that a product in 8 parts has"
    small = {"registers": 64, "spills": 0, "shared": 1024, "threads": 128}
    assert fits(Target(89, "cubin"), small)
    assert not fits(Target(89, "cubin"), {**small, "spills": 8}) and not fits(Target(89, "cubin"), {**small, "registers": 200, "threads": 512})
    large = {**small, "shared": 150 * 1024}
    assert fits(Target(90, "cubin"), large) and not fits(Target(89, "cubin"), large) and not fits(Target(80, "ptx"), large)


def test_every_candidate_can_be_judged():
    """By the registers of its tile with the least warps and stages: where no candidate is that, it would never be tried."""
    sources = Path(stub_cuda.ROOT, "triton_src")
    candidates = discover(sources, candidates=True)
    tiles = {tile(v) for v in [*discover(sources), *candidates] if (v.num_warps, v.num_stages) == (v.base_warps, 2)}
    assert not [str(v) for v in candidates if v.judged and not is_conservative(v) and tile(v) not in tiles]


SCALE = '''
import triton
import triton.language as tl

from ._variant import Variant


@triton.jit
def effnet_scale(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)


def variants():
    yield variant(64, 4)


def candidates():
    for block in (64, 128):
        for warps in (4, 8):
            yield variant(block, warps, f"w{warps}_")


def variant(block, warps, schedule=""):
    return Variant(op="scale", name=f"fp32_{schedule}{block}", kernel=effnet_scale, parameters={"x": "*fp32", "count": "i32"},
                   constants={"BLOCK": block}, attributes={"precision": 3, "block": block}, num_warps=warps)
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "scale_kernels"
    folder.mkdir()
    for name in ("__init__.py", "_variant.py"):
        shutil.copy(stub_cuda.ROOT / "triton_src" / name, folder)
    (folder / "scale.py").write_text(SCALE)
    return folder


def embedded(result):
    return sorted({image["variant"] for image in json.loads(result.manifest.read_text())["images"]})


def test_candidates_are_built(sources, tmp_path):
    result = build_kernels(tmp_path, sources.parent / "cache", "8.9", jobs=1, quiet=True, source_dir=sources, candidates=(None, None))
    # fp32_w4_64 is the default by another name.
    assert embedded(result) == ["fp32_64", "fp32_w4_128", "fp32_w8_128", "fp32_w8_64"]
    with pytest.raises(BuildError, match="no candidates of pool; there are those of scale"):
        build_kernels(tmp_path, sources.parent / "cache", "8.9", quiet=True, source_dir=sources, candidates=(["pool"], None))
    nothing = build_kernels(tmp_path, sources.parent / "cache", "8.9", quiet=True, source_dir=sources, candidates=(None, ["fp16"]))
    assert embedded(nothing) == ["fp32_64"]


def test_candidates_that_do_not_fit_every_gpu(sources, tmp_path, monkeypatch):
    """They have images for the others; what fits nowhere is left out."""
    from effnet_aot.aot import build

    monkeypatch.setattr(build, "fits", lambda target, report: report["threads"] == 128 or target.capability == 90)
    result = build_kernels(tmp_path, sources.parent / "cache", "8.9 9.0", jobs=1, quiet=True, source_dir=sources, candidates=(None, None))
    images = {(image["variant"], image["arch"]) for image in json.loads(result.manifest.read_text())["images"]}
    both = {(name, arch) for name in ("fp32_64", "fp32_w4_128") for arch in ("8.9", "9.0")}
    assert images == both | {("fp32_w8_128", "9.0"), ("fp32_w8_64", "9.0")}
    monkeypatch.setattr(build, "fits", lambda target, report: report["threads"] == 128)
    result = build_kernels(tmp_path, sources.parent / "cache", "8.9 9.0", jobs=1, quiet=True, source_dir=sources, candidates=(None, None))
    assert embedded(result) == ["fp32_64", "fp32_w4_128"]


def test_the_build_ships_what_the_tables_name(sources, tmp_path, capsys):
    def entry(variant, capability):
        return Line("scale", "fp32", (("count", 7),), 1, capability, variant, 1.0, "fp32_64", 2.0)

    try:
        write_table(sources / "tuned" / "sm_89.json", Table(89, {}, [entry("fp32_w8_128", 89)]))
        write_table(sources / "tuned" / "sm_90.json", Table(90, {}, [entry("fp32_w4_128", 90)]))
        result = build_kernels(tmp_path / "a", sources.parent / "cache", "8.9", jobs=1, quiet=True, source_dir=sources)
        assert embedded(result) == ["fp32_64", "fp32_w8_128"], "the table of 9.0 is not for this build"
        tried = build_kernels(tmp_path / "d", sources.parent / "cache", "8.9", jobs=1, quiet=True, source_dir=sources, candidates=(None, ["fp16"]))
        assert embedded(tried) == ["fp32_64", "fp32_w8_128"] and "kShape" not in tried.registry_cpp.read_text(), "what ships competes, and no line is known"
        registry = result.registry_cpp.read_text()
        assert '{{"count", 7}}' in registry and '{89, "scale", "fp32", 1, 1, {kShape0, 1}},' in registry
        both = build_kernels(tmp_path / "c", sources.parent / "cache", "8.9 9.0", jobs=1, quiet=True, source_dir=sources)
        images = {(image["variant"], image["kind"], image["arch"]) for image in json.loads(both.manifest.read_text())["images"]}
        assert images == {
            ("fp32_64", "cubin", "8.9"), ("fp32_64", "ptx", "8.9"), ("fp32_64", "cubin", "9.0"),
            ("fp32_w8_128", "cubin", "8.9"), ("fp32_w8_128", "ptx", "8.9"), ("fp32_w4_128", "cubin", "9.0"),
        }, "a table's choice is for its own GPUs"  # fmt: skip
        write_table(sources / "tuned" / "sm_89.json", Table(89, {}, [entry("fp32_w8_256", 89)]))
        result = build_kernels(tmp_path / "b", sources.parent / "cache", "8.9", quiet=True, source_dir=sources)
        assert embedded(result) == ["fp32_64"] and "scale/fp32_w8_256" in capsys.readouterr().err
    finally:
        shutil.rmtree(sources / "tuned")


# ---- the library ----

DEFAULTS = {"default_small": 16, "default_large": 128}
CANDIDATES = {"tuned_32": 32, "tuned_48": 48, "tuned_64": 64}
CUBIN_90, *OF_89 = Target(90, "cubin"), Target(89, "cubin"), Target(89, "ptx")
TARGETS = {"tuned_32": [CUBIN_90], "tuned_48": OF_89}  # of the others all
OTHER = tuple((name, 32 if name == "out_channels" else value) for name, value in SHAPE)
TUNED = [line("tuned_32", 2), line("tuned_64", 40), line("default_small", 2, shape=OTHER), line("tuned_64", 2, 89)]


@pytest.fixture(scope="module")
def tuned_library(tmp_path_factory):
    """The torch-free part of the library over a registry that the build wrote, with images that the stub takes."""
    folder = tmp_path_factory.mktemp("tuned_library")
    variants, images = [], []
    for name, block in (DEFAULTS | CANDIDATES).items():
        attributes = {"precision": 0, "channels_last": 1, "aligned": 1, "block_m": block, "block_n": block}
        kernel = SimpleNamespace(__name__="effnet_pointwise")
        variants.append(Variant("pointwise", name, kernel, dict.fromkeys(range(15), "i32"), {}, attributes))
        for target in TARGETS.get(name, [CUBIN_90, *OF_89]):
            data = b"\x7fELF" + name.encode() if target.kind == "cubin" else b"// " + name.encode() + b"\n.version 8.0\n"
            numbers = {field.name: 0 for field in fields(Image)} | {"registers": 64, "shared": 1024, "threads": 128}
            images.append(Image(**{**numbers, "variant": variants[-1], "target": target, "data": data}))
    registry = write_registry(folder, variants, images, {"triton": "none", "ptxas": "none"}, {f"pointwise/{name}" for name in DEFAULTS}, TUNED)[0]
    return stub_cuda.torch_free_library(folder, registry)


def launch(batch, **changes):
    problem = dict(precision=0, layout=1, x=2**40, weight=2**41, out=2**42, batch=batch, height=8, width=8, in_channels=16, out_channels=24)
    return ["launch", "pointwise", problem | changes, 0, 0]


def taken(stub, library, *launches, **settings):
    run = stub.run(*launches, **library, **settings).assert_ok()
    return [made["image"]["variant"] for made in run.launches]


def test_the_library_takes_what_the_table_says(stub, tuned_library):
    """At the nearest batch, and for maps of other sizes at the nearest work; other channels are left to the rule, which knows the
    default variants alone."""
    found = taken(stub, tuned_library, launch(1), launch(2), launch(8), launch(10), launch(500), devices="9.0")
    assert found == ["tuned_32", "tuned_32", "tuned_32", "tuned_64", "tuned_64"]
    found = taken(stub, tuned_library, *(launch(2, height=side, width=side) for side in (4, 16, 32, 64)), launch(10, height=16, width=32), devices="9.0")
    assert found == ["tuned_32", "tuned_32", "tuned_64", "tuned_64", "tuned_64"]
    large = {"batch": 512, "height": 64, "width": 64, "out_channels": 512}
    found = taken(stub, tuned_library, launch(2, in_channels=32), launch(2, residual=2**43), launch(2, out_channels=32), launch(**large), devices="9.0")
    assert found == ["default_small", "default_small", "default_small", "default_large"]


def test_each_image_has_its_table(stub, tuned_library):
    assert taken(stub, tuned_library, launch(500), devices="8.9") == ["tuned_64"]
    assert taken(stub, tuned_library, launch(2), devices="9.0", EFFNET_AOT_IMAGE="ptx") == ["tuned_64"], "the table of the PTX's capability"
    assert taken(stub, tuned_library, launch(2), devices="12.0") == ["tuned_64"]


@pytest.mark.parametrize("settings", [{"devices": "8.9"}, {"devices": "9.0", "EFFNET_AOT_IMAGE": "ptx"}])
def test_what_only_the_table_of_another_gpu_names(stub, tuned_library, settings):
    """The tuner is not offered it and does not get it, and loading everything leaves it out: it has no image here, or nothing but
    PTX, which would serve."""
    calls = ["tune", 1, "pointwise tuned_32"], launch(2), ["choices"], ["preload", 0]
    here, there = stub.run(*calls, **tuned_library, **settings).assert_ok(), stub.run(*calls, **tuned_library, devices="9.0").assert_ok()
    others = {"default_small", "default_large", "tuned_64"}
    for run, taken, names in ((here, "tuned_64", others | {"tuned_48"}), (there, "tuned_32", others | {"tuned_32"})):
        assert [made["image"]["variant"] for made in run.launches] == [taken]
        assert set(json.loads(run.results[2]["value"])["fitting"]) == {made["image"]["variant"] for made in run.loads} == names


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from stub_cuda import c_api
from effnet_aot import _library
from effnet_aot.tune.library import Library
library, c = Library(), c_api.Library(str(_library.PATH))
problem = dict(precision=0, layout=1, x=2**40, weight=2**41, out=2**42, batch=10, height=8, width=8, in_channels=16, out_channels=24)
def launch(**changes):
    assert c.launch("pointwise", {**problem, **changes})["status"] == 0
with library.taking():
    launch()
    (free,) = library.choices()
with library.taking("pointwise", free.fitting[-1]):
    launch()
    launch(precision=2)
    forced = library.choices()
launch()
print(json.dumps([library.image(), free.__dict__, [choice.variant for choice in forced], len(library.choices())]))
"""


def test_the_tuner_decides(stub):
    environment = stub.environment(stub.new_log(), devices="9.0", EFFNET_AOT_IMAGE="ptx")
    done = subprocess.run([sys.executable, "-c", CHILD, str(Path(__file__).parent)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image, free, forced, after = json.loads(done.stdout)
    assert image == "ptx compute_89"
    assert free["op"] == "pointwise" and free["batch"] == 10 and dict(free["shape"]) == dict(SHAPE)
    assert free["variant"] in free["fitting"] and all(name.startswith("fp16_nhwc_") for name in free["fitting"])
    assert forced[0] == free["fitting"][-1] and forced[1].startswith("tf32"), "what does not fit is not taken"
    assert after == 0, "off again"


# ---- the GPU that the table is for ----


def test_projection_takes_choices_back(tmp_path, monkeypatch, capsys):
    """What the measuring GPU gained by more bytes, for which the other lacks the bandwidth, is taken back."""
    def kernel(ns, mbytes):
        return {"kernel": "effnet_pointwise", "ns": ns, "instructions": 1000, "dram_read_bytes": mbytes * 10**6, "dram_pct": 100, "cycles_per_s": 1.8e9}

    lines = [line(batch=1), line(batch=10, variant="c"), line(batch=128, variant="a", us=10.0)]
    write_table(tmp_path / "sm_89.json", Table(89, {}, lines))
    for name in ("libeffnet_aot.so", "manifest.json", "calls.json"):
        (tmp_path / name).write_text("")

    def collect(table, recorded, said, script, image):
        assert table == tmp_path / "sm_89.json" and recorded == tmp_path / "calls.json" and script.name == "weigh_child.py" and image == "ptx"
        said.write_text(json.dumps([{"line": asdict(one), "launches": launches} for one, launches in zip(lines, ([2, 1], [1, 1]))]))
        # Lines 1 and 2, the default first; it was two kernels on line 1. Kernels of torch's are none of the two.
        return [kernel(9000, 5), kernel(1000, 5), {"kernel": "fill"}, kernel(8000, 8), kernel(10000, 5), kernel(8000, 6)]

    monkeypatch.setattr(weigh, "collect", collect)
    assert main(["tune", "weigh", "--in-bundle", "--bundle", str(tmp_path), "--out", str(tmp_path)]) == 0
    table = read_table(tmp_path / "sm_89.json")
    assert [(entry.batch, entry.variant, entry.us) for entry in table.lines] == [(1, "b", 8.0), (10, "a", 10.0), (128, "a", 10.0)]
    assert table.measured["weighed"] == "projection onto NVIDIA GeForce RTX 4090"
    text = capsys.readouterr().out
    assert "not measured there" in text and "1 of 2 choices stand" in text


@pytest.mark.gpu
def test_launches_that_are_weighed(tmp_path):
    """Without a profiler around it: which lines it finds among the calls, and how many kernels each way is."""
    from effnet_aot.tune.library import Library

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    library, lines, recorded = Library(), {}, calls.network_calls("modelnew", 96)
    for call in recorded:
        with library.taking():
            call.run(call.make(2, torch.float16, "cuda"))
            own = [choice for choice in library.choices() if choice.op == call.op]
        for choice in own:
            if call.op in ("mbconv", "linear") and len(choice.fitting) > 1:
                other = next(name for name in choice.fitting if name != choice.variant)
                lines[choice.key] = Line(*choice.key, 90, other, 1.0, choice.variant, 2.0)
    assert {key[0] for key in lines} == {"mbconv", "linear"}
    calls.save(tmp_path / "calls.json", {"modelnew": recorded})
    write_table(tmp_path / "sm_90.json", Table(90, {}, list(lines.values())))
    command = [sys.executable, weigh_child.__file__, tmp_path / "sm_90.json", tmp_path / "calls.json", tmp_path / "said.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONSAFEPATH=1))
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert {(entry["line"]["op"], entry["line"]["variant"]) for entry in said} == {(key[0], entry.variant) for key, entry in lines.items()}
    for entry in said:
        # Two kernels or three, as the library chooses for the first two steps; without expansion two.
        many = (2, 3) if dict(entry["line"]["shape"]).get("hidden") != 32 else (2,)
        assert all(count in (many if name == NONE else (1,)) for count, name in zip(entry["launches"], (entry["line"]["default"], entry["line"]["variant"]), strict=True))


# ---- the command ----


def test_show(tmp_path, capsys):
    write_table(tmp_path / "sm_90.json", Table(90, {"device": "some GPU"}, [line(), replace(line(batch=1), variant="a", us=10.0)]))
    assert main(["tune", "show", str(tmp_path / "sm_90.json")]) == 0
    text = capsys.readouterr().out
    assert "sm_90: device some GPU" in text and "1.25" in text and "1 of 2 choices are not the default's; sum 18 us, by default 20 us" in text


@pytest.mark.parametrize("action", ["measure", "sequence"])
def test_measuring_needs_a_bundle(action, tmp_path, capsys):
    assert main(["tune", action, "--bundle", str(tmp_path)]) == 1
    assert "is no bundle: it lacks libeffnet_aot.so, manifest.json, calls.json" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize("action", ["measure", "sequence"])
def test_measuring_needs_a_gpu(action, tmp_path):
    """Started as on the GPU machine: with another library than the one of the package."""
    from effnet_aot import _library
    from effnet_aot.tune.bundle import package

    for name in ("manifest.json", "calls.json"):
        (tmp_path / name).write_text("{}")
    shutil.copy(_library.PATH, tmp_path)
    command = [sys.executable, "-m", "effnet_aot", "tune", action, "--bundle", str(tmp_path), "--out", str(tmp_path / "out")]
    ours = {path.name: path.read_text() for path in (stub_cuda.ROOT / "triton_src" / "tuned").iterdir()}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=stub_cuda.ROOT)
    assert done.returncode == 1 and "torch finds no usable GPU here" in done.stdout, done.stdout + done.stderr
    copied = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} if action == "measure" else ours
    assert copied == ours, "measuring adds to them"
    with package(tmp_path) as folder:
        script = "from effnet_aot import _library; _library.require(); print(_library.PATH.resolve())"
        done = subprocess.run([sys.executable, "-P", "-c", script] if sys.version_info >= (3, 11) else [sys.executable, "-c", script],
                              env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, cwd=folder)  # fmt: skip
        assert done.stdout.strip() == str((tmp_path / "libeffnet_aot.so").resolve()), done.stderr


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_measure_on_the_gpu():
    """Every fitting variant of the package's own library, on every call of a network that has a choice."""
    from effnet_aot.tune.library import Library
    from effnet_aot.tune.measure import Clock

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    clock, library, ops = Clock(), Library(), set()
    for call in calls.network_calls("modelnew", 96):
        for dtype in ("float16", "float32"):
            found = measure(library, clock, Problem(call, dtype, 2))
            if found is None:  # a block that only three kernels compute, or an op of which one variant fits
                continue
            ops.add(call.op)
            assert found.times and not found.wrong and all(0.5 < us < 1000 for us in found.times.values()), (str(call), found)
    assert {"conv", "mbconv", "linear"} <= ops
