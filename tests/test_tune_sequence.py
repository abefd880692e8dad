"""python -m effnet_aot tune sequence: choices by the time of whole networks. No GPU: the clock knows what every assignment
takes, or counts what the library launches on a driver that is a stub."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_network import torch_cuda  # noqa: F401 (a fixture)

from effnet_aot.aot.tables import NONE, Line, Table, read_table, write_table
from effnet_aot.cli import main
from effnet_aot.tune import networks, sequence
from effnet_aot.tune.calls import Call, Operand, all_parts
from effnet_aot.tune.choose import Measured
from effnet_aot.tune.library import Choice
from effnet_aot.tune.measure import Journal, Problem
from effnet_aot.tune.sequence import Change, Settled, lines_of, places, settle, ships, starting

BLOCK, EXPAND, FILTER, LAST = (("mbconv", "fp16", (("pixels", 1),), 2), ("pointwise", "fp16", (("pixels", 1),), 2),
                               ("depthwise", "fp32", (("pixels", 1),), 2), ("linear", "fp16", (("rows", 1),), 2))  # fmt: skip


def measured(key, **times):
    return Measured(*key, "a", {name.replace("none", NONE): us for name, us in times.items()})


ALONE = {BLOCK: measured(BLOCK, a=10.0, b=11.0, none=12.0), EXPAND: measured(EXPAND, a=5.0, b=5.1), FILTER: measured(FILTER, a=5.0, b=5.1), LAST: measured(LAST, a=10.0, b=9.0, far=17.0)}


class Trials:
    """A block, which can be done by two parts, and a last op. `cost(variants)` are the network's microseconds."""

    def __init__(self, cost, noise=0.0):
        self.cost, self.noise, self.calls, self.tried = cost, noise, 0, []

    def taken(self, variants):
        blocks = {BLOCK: variants.get(BLOCK, "a")}
        some = (EXPAND, FILTER) if blocks[BLOCK] == NONE else ()
        return blocks | {key: variants.get(key, "a") for key in (*some, LAST)}

    def choices(self, variants):
        return {key: Choice(key[0], key[3], key[2], variant, self.fitting(key)) for key, variant in self.taken(variants).items()}

    def fitting(self, key):
        return tuple(ALONE[key].times)

    def prepare(self, variants):
        taken = self.taken(variants)
        self.tried.append(taken)

        def once():
            self.calls += 1
            return (self.cost(taken) + self.noise * (self.calls * 7919 % 13 - 6) / 6 + self.calls / 1000) / 1e6  # and the clock drifts

        return once


def by_place(**us):
    """The cost where every choice has its own, whatever the others are."""
    return lambda taken: 100.0 + sum(us.get(f"{key[0]}_{variant}", 0.0) for key, variant in taken.items())


def test_what_is_faster_in_the_network_is_taken():
    settled = settle(Trials(by_place(linear_b=-1.0, mbconv_b=-2.0), noise=0.3), ALONE, {})
    assert settled.variants == {BLOCK: "b", LAST: "b"} and settled.complete and settled.reached == {BLOCK, LAST}
    assert [(change.key, change.before, change.after) for change in settled.changes] == [(BLOCK, "a", "b"), (LAST, "a", "b")]
    assert [change.seconds for change in settled.changes] == pytest.approx([2e-6, 1e-6], rel=0.3)
    assert settled.before == pytest.approx(100e-6, rel=0.05) and settled.before - settled.after == pytest.approx(3e-6, rel=0.2)


@pytest.mark.parametrize("gain", [-1.0, 0.0, 0.1, 0.25])
def test_less_than_the_noise_is_not(gain):
    trials = Trials(by_place(linear_b=-gain), noise=0.3)
    settled = settle(trials, ALONE, {})
    assert settled.variants == {} and not settled.changes and settled.after == settled.before
    assert all(taken[LAST] != "far" for taken in trials.tried), "it is 1.9 times as slow alone"


def test_parts_compete_as_they_come():
    """The block is left for its parts, whose own choices are then tried as well."""
    settled = settle(Trials(by_place(mbconv_none=-5.0, depthwise_b=-2.0)), ALONE, {EXPAND: "b"})
    assert settled.variants == {BLOCK: NONE, EXPAND: "b", FILTER: "b"} and settled.reached == {BLOCK, EXPAND, FILTER, LAST}
    assert [change.key for change in settled.changes] == [BLOCK, FILTER]
    settled = settle(Trials(by_place(mbconv_a=-5.0, depthwise_b=-2.0)), ALONE, {BLOCK: NONE})
    assert settled.variants == {BLOCK: "a"} and settled.reached == {BLOCK, LAST}


def test_a_second_sweep_when_the_first_changed_something():
    """The block's b is better beside the last op's b alone."""
    def cost(taken):
        return 100.0 - 2 * (taken[LAST] == "b") - 3 * (taken[LAST] == taken[BLOCK] == "b")

    assert settle(Trials(cost), ALONE, {}).variants == {LAST: "b", BLOCK: "b"}


def test_what_stays():
    gain = by_place(linear_b=-5.0, mbconv_b=-5.0)
    assert settle(Trials(gain), ALONE, {}, fixed={BLOCK}).variants == {LAST: "b"}
    assert settle(Trials(gain), ALONE, {}, may_ship=lambda key, variant: key != LAST).variants == {BLOCK: "b"}
    assert settle(Trials(gain), {LAST: ALONE[LAST]}, {}).variants == {LAST: "b"}, "what was not measured"
    checks = iter([False, True])
    settled = settle(Trials(gain), ALONE, {}, expired=lambda: next(checks))
    assert settled.variants == {BLOCK: "b"} and not settled.complete and settled.changes, "out of time: what was decided counts"


TOGETHER = ("merged_pool", "fp16", (("pixels", 1),), 2)


class WithMerged(Trials):
    """Of whose last two products one can be made, by many a candidate."""

    FITTING = (NONE, *(f"fp16_{i}" for i in range(12)))

    def taken(self, variants):
        return {TOGETHER: variants.get(TOGETHER, NONE)} | super().taken(variants)

    def fitting(self, key):
        return self.FITTING if key == TOGETHER else super().fitting(key)


def test_products_that_become_one_are_timed_in_the_network_alone():
    trials = WithMerged(by_place(merged_pool_fp16_11=-3.0, merged_pool_fp16_2=-1.0))
    settled = settle(trials, ALONE, {})
    assert settled.variants == {TOGETHER: "fp16_11"} and {taken[TOGETHER] for taken in trials.tried} == set(WithMerged.FITTING)
    (entry,) = [entry for entry in lines_of(settled, ALONE, {}, {}, 90) if entry.key == TOGETHER]
    assert (entry.variant, entry.default) == ("fp16_11", NONE) and entry.us == pytest.approx(97, rel=0.05) and entry.default_us == pytest.approx(100, rel=0.05)
    # What another batch gained does not count for one that gains nothing.
    settled = settle(WithMerged(by_place(merged_pool_fp16_2=0.1)), ALONE, {})
    assert [(entry.key, entry.variant) for entry in lines_of(settled, ALONE, {}, {}, 90)] == [(TOGETHER, NONE)]
    # And what the table has is where the next sequence starts.
    assert starting(ALONE, ALONE, {TOGETHER: entry})[TOGETHER] == "fp16_11"
    slower = by_place(**{f"merged_pool_{variant}": 1.0 for variant in WithMerged.FITTING if variant != NONE})
    assert settle(WithMerged(slower), ALONE, {TOGETHER: "fp16_11"}).variants == {TOGETHER: NONE}


# ---- the table ----


def line(key, variant, us=8.0, default_us=10.0, **changes):
    return Line(*replace(ALONE[key], **changes).key, 90, variant, us, "a", default_us)


def test_starting():
    """From the table; parts without a line from what was the fastest alone."""
    times = {**ALONE, FILTER: measured(FILTER, a=5.0, b=4.0), EXPAND: measured(EXPAND, a=5.0, b=4.95)}
    lines = {BLOCK: line(BLOCK, "b")}
    assert starting(times, times, lines) == {BLOCK: "b", FILTER: "b", EXPAND: "a", LAST: "b"}
    batches = {entry.key: entry for entry in (line(FILTER, name, batch=batch) for batch, name in ((8, "x"), (16, "y"), (32, "z")))}
    assert starting({FILTER}, times, batches) == {FILTER: "a"}, "three variants for a shape are the most"
    assert ships(batches)(FILTER, "x") and not ships(batches)(FILTER, "b") and ships(batches)((*FILTER[:3], 32), "b")


def test_lines():
    """A time is the predecessor's, less what the network gained a place."""
    settled = Settled({BLOCK: NONE, EXPAND: "b", FILTER: "a", LAST: "a"}, [Change(BLOCK, "b", NONE, 3e-6), Change(LAST, "b", "a", 2e-6)], frozenset({BLOCK, EXPAND, LAST}))
    lines = {BLOCK: line(BLOCK, "b"), LAST: line(LAST, "b")}
    made = {entry.key: (entry.variant, entry.us, entry.default_us) for entry in lines_of(settled, ALONE, lines, {BLOCK: 3}, 90)}
    assert made == {BLOCK: (NONE, 7.0, 10.0), EXPAND: ("b", 5.1, 5.0), LAST: ("a", 6.0, 6.0)}
    assert lines_of(Settled({LAST: "b"}, [], frozenset({LAST})), ALONE, lines, {}, 90) == [], "what did not change stays as it is"


def block():
    x = Operand((8, 6, 5), (0, 2, 3, 1))
    shapes = {"expand_weight": (48, 8, 1, 1), "expand_bias": (48,), "depthwise_weight": (48, 1, 3, 3), "depthwise_bias": (48,), "project_weight": (8, 48, 1, 1), "project_bias": (8,)}
    operands = {name: Operand(shape, tuple(range(len(shape)))) for name, shape in shapes.items()}
    return Call("mbconv", tuple({"x": x, **operands, "residual": x, "stride": (1, 1), "padding": (1, 1, 1, 1)}.items()))


def test_places():
    call = block()
    keys = {call: [BLOCK]} | {part: [EXPAND] if part.op == "pointwise" else [FILTER] for part in all_parts(call) if part.op != "expand_depthwise"}
    assert places([call, call], keys, {BLOCK: "a"}) == {BLOCK: 2}
    assert places([call, call], keys, {BLOCK: NONE}) == {BLOCK: 2, EXPAND: 4, FILTER: 2}
    del keys[call]  # of which no kernel fits
    assert places([call], keys, {}) == {EXPAND: 2, FILTER: 1}
    done = {str(Problem(part, "float16", 2)): ALONE[EXPAND] if part.op == "pointwise" else None for part in all_parts(call)}
    assert list(sequence.keys_of([call], "float16", 2, done).values()) == [[EXPAND]] * 2, "float16 of batch 2, where it has candidates"


def test_places_of_inner_choices():
    """A block's kernels with narrow maps stand for its parts."""
    call = block()
    done = {str(problem): ALONE[EXPAND] if problem.inner[0] == "pointwise" else None for problem in Problem(call, "float32", 2).inside()}
    keys = sequence.keys_of([call], "float32", 2, done)
    assert keys == {call: [None, EXPAND, EXPAND, EXPAND]} and places([call, call], keys, {}) == {EXPAND: 6}
    keys[call][0] = BLOCK
    assert places([call], keys, {BLOCK: NONE}) == {BLOCK: 1, EXPAND: 3} and places([call], keys, {BLOCK: "a"}) == {BLOCK: 1}


# ---- networks ----


def test_chains(tmp_path):
    """A network is made again from its sizes, as it was recorded."""
    (chain,) = networks.chains("modelnew", 32)
    networks.save(tmp_path / "networks.json", {"modelnew": [chain]})
    assert networks.load(tmp_path / "networks.json") == {"modelnew": [chain]}
    assert [call.op for call in chain.calls()] == ["stem_mbconv", *["mbconv"] * 6, "pointwise_pool", "linear"]
    x, weights, program = arguments = chain.make(3, torch.float16, "cpu")
    assert x.shape == (3, 3, 32, 32) and {weight.dtype for weight in weights} == {torch.float16, torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(chain.run(arguments).double(), networks.exact(*arguments), atol=0.02, rtol=0.02)


class FakeLibrary:
    """Of which every op takes what is assigned; on the CPU."""

    def __init__(self, keys=()):
        self.keys, self.variants = keys, None

    def image(self):
        return "cubin sm_90"

    @contextmanager
    def assigned(self, variants, tell=True):
        self.variants = variants
        yield self
        self.variants = None

    def choices(self):
        return [Choice(key[0], key[3], key[2], self.variants.get(key, "fp16_a"), ("fp16_a", "fp16_b", "fp16_c")) for key in self.keys]


@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
def test_check(kept, monkeypatch):
    """One wrong image in a batch is enough, wherever it is."""
    (chain,), library, image, run = networks.chains("modelnew", 32), FakeLibrary(), None, networks.Chain.run

    def run_as(arguments):
        out = run(arguments).clone()
        if image is not None and library.variants:
            out[image] += 0.05 * (torch.nan if image == 2 else 1)
        return out

    monkeypatch.setattr(networks.Chain, "run", staticmethod(run_as))
    arguments = chain.make(6, kept, "cpu")
    with torch.no_grad():
        assert sequence.check(library, chain, arguments, {LAST: "b"}) is None
        image = 5
        assert "from float64, where" in sequence.check(library, chain, arguments, {LAST: "b"})
        image = 2
        assert "from the result by the library's own choices" in sequence.check(library, chain, arguments, {LAST: "b"})
        monkeypatch.setattr(sequence, "exact", lambda *_: None)
        image = 3
        assert "from the result by the library's own choices" in sequence.check(library, chain, arguments, {LAST: "b"})


# ---- the library ----


@pytest.mark.xdist_group("stub_cuda")
def test_assignments(stub, torch_cuda):  # noqa: F811
    """The launched kernels are the assigned ones, each problem's own; and the plans that are kept know nothing of them."""
    child = Path(__file__).with_name("sequence_child.py")
    # Without streams there are no graphs, in which launches would not be seen.
    environment = stub.environment(stub.new_log(), devices="9.0", fail="cuStreamCreate=2", PYTHONPATH=stub.python_path())
    done = subprocess.run([sys.executable, child, torch_cuda], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["plain"] == said["free"] == said["plain again"] == said["end"] and len(said["plain"]) >= 10
    assert said["plain then"] == said["free then"] != said["forced first"] and said["untold"] == 0
    asked = said["asked"]
    assert all(wanted == taken for _, _, wanted, taken in asked) and sum(free != wanted for _, free, wanted, _ in asked) > 3
    assert {wanted for _, _, wanted, _ in asked} - {NONE} <= set(said["forced"])
    assert NONE in {wanted for _, _, wanted, _ in asked} and len(said["forced"]) > len(said["plain"]), "a block by its parts"
    assert any(len({wanted for other, _, wanted, _ in asked if other == op}) > 1 for op, *_ in asked), "not one variant an op"
    before, after = said["seconds"]
    assert said["settled"] and after < before and after == pytest.approx(sum(2e-6 if v in said["fast"] else 5e-6 for v in said["settled launches"]))
    assert {after for _, _, after in said["settled"]} - {NONE} <= set(said["settled launches"])


@pytest.mark.xdist_group("stub_cuda")
def test_numbers_of_an_assignment(stub, torch_cuda):  # noqa: F811
    """Every choice another one, by the PTX that ships: blocks by their parts, with the workspace that these need."""
    child = Path(__file__).with_name("sequence_child.py")
    done = subprocess.run([sys.executable, child, torch_cuda, "numbers"], env=stub.executing(stub.new_log()), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 2
    for dtype, (why, apart, choices) in said.items():
        assert why is None and apart > 0 and choices >= 10, (dtype, why, apart, choices)


# ---- the command ----


class FakeClock:
    device = "cpu"

    def __init__(self):
        self.library = None

    def pool(self):
        return None

    def passes(self, seconds):
        return 1

    def sequence(self, function, passes, pool):
        seconds = 200e-6 - 10e-6 * list((FakeClock.library.variants or {}).values()).count("fp16_b")
        return lambda: seconds


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A folder with a network's calls, its times and table; the library and the GPU are made up."""
    from effnet_aot.cli import tune as command
    from effnet_aot.tune import calls, library, measure

    (chain,) = networks.chains("modelnew", 32)
    found = calls.network_calls("modelnew", 32)
    networks.save(tmp_path / "networks.json", {"modelnew": [chain]})
    calls.save(tmp_path / "calls.json", {"modelnew": found})
    (tmp_path / "manifest.json").write_text('{"triton": "3.6"}')
    (tmp_path / "libeffnet_aot.so").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    done = {call: Measured(call.op, "fp16", (("index", index),), 2, "fp16_a", {"fp16_a": 5.0, "fp16_b": 5.5, "fp16_c": 4.0}) for index, call in enumerate(found)}
    fake = FakeLibrary([done[call].key for call in chain.calls()])
    monkeypatch.setattr(library, "Library", lambda: fake)
    monkeypatch.setattr(measure, "Clock", FakeClock)
    monkeypatch.setattr(FakeClock, "library", fake, raising=False)
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    options = ["tune", "sequence", "--in-bundle", "--bundle", str(tmp_path), "--out", str(tmp_path), "--dtypes", "float16", "--batches", "2"]

    class Arguments:
        action, out, shapes, dtypes, batches, no_tf32, seconds = "sequence", tmp_path, None, ["float16"], [2], False, None
    Arguments.bundle = tmp_path

    journal = Journal(tmp_path / "sm_90.times", command.OnGpu(Arguments, None).identity)
    for call, m in done.items():
        journal.add(Problem(call, "float16", 2), m)
    write_table(tmp_path / "sm_90.json", Table(90, {"device": "some GPU"}, [Line(*m.key, 90, "fp16_c", 4.0, "fp16_a", 5.0) for call, m in done.items() if call in chain.calls()]))
    yield tmp_path, options, fake
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches


def test_command(bundle, capsys):
    folder, options, fake = bundle
    before = read_table(folder / "sm_90.json")
    assert main(options) == 0
    text, table = capsys.readouterr().out, read_table(folder / "sm_90.json")
    assert {entry.key for entry in table.lines} == {entry.key for entry in before.lines} and {entry.variant for entry in table.lines} == {"fp16_b"}
    assert all(0 < entry.us < 4 and entry.default_us == 5 for entry in table.lines)
    count = len(table.lines)
    assert f"1 of 1 networks done, {count} choices changed, 0 wrong" in text and f"{200 - 10 * count:.1f}" in text.replace("200.0", "")
    assert table.measured["sequence"] == f"{count} choices by the times of whole networks (modelnew)"
    assert main(options) == 0 and "0 choices changed" in capsys.readouterr().out


def test_a_wrong_network_is_not_written(bundle, capsys, monkeypatch):
    folder, options, fake = bundle
    run, before = networks.Chain.run, (folder / "sm_90.json").read_text()
    monkeypatch.setattr(networks.Chain, "run", staticmethod(lambda arguments: run(arguments) * (1.5 if "fp16_b" in fake.variants.values() else 1)))
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "WRONG modelnew, float16, batch 2: " in text and "0 of 1 networks done, 0 choices changed, 1 wrong" in text
    assert (folder / "sm_90.json").read_text() == before


def test_times_are_needed(bundle, capsys):
    folder, options, _ = bundle
    (folder / "manifest.json").write_text('{"triton": "3.7"}')
    assert main(options) == 1
    assert "no times of this bundle on this GPU" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_sequence_on_the_gpu():
    """Every choice of the network that the package's own library has, timed in it; and the result is right."""
    from effnet_aot.tune.library import Library
    from effnet_aot.tune.measure import Clock

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    library, (chain,) = Library(), networks.chains("modelnew", 96)
    with torch.no_grad():
        for dtype in (torch.float16, torch.float32):
            arguments = chain.make(2, dtype, "cuda")
            trials = sequence.Trials(library, Clock(), lambda: chain.run(arguments))  # noqa: B023
            choices = trials.choices({})
            times = {key: Measured(*key, choice.variant, dict.fromkeys(choice.fitting, 5.0)) for key, choice in choices.items()}
            settled = settle(trials, times, {})
            assert 5e-6 < settled.after <= settled.before < 1e-3 and settled.complete
            assert sequence.check(library, chain, arguments, settled.variants) is None
