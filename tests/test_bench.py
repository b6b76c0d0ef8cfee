"""The benchmark: its ways compute what the oracle does, its arithmetic is right, its table hides nothing."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest

from jaxattn import cli
from jaxattn.bench import attention_ways, conv_ways, figures, machine, report, run, torch_ways
from jaxattn.bench.cases import AttentionCase, ConvCase, select
from jaxattn.bench.measure import Effort, Measurement, compare, sample, take_turns
from jaxattn.bench.programs import Program, make_program
from jaxattn.bench.ways import CannotError, Function, Way
from jaxattn.window import Window

EFFORT = Effort(rounds=2, seconds=1, turn=0, patience=60, memory=10**9)
HAS_TORCH, HAS_NATTEN = (importlib.util.find_spec(name) is not None for name in ("torch", "natten"))


def case(name, grid, size=None, bias=False, **geometry):
    window = None if size is None else Window(size, **geometry)
    return AttentionCase(name, (2, *grid, 2, 8), window, bias=bias), size, geometry


# each with those ways, other than ours, that can compute it
DENSE = {"jax.nn", "torch SDPA", "torch flex"}
OFFSETS = {"shifted slices", "patches + einsum"}
CASES = [
    (case("mask", (5, 6), (3, 3), boundary="mask"), DENSE | OFFSETS | {"gather + einsum"}),
    (case("shift", (5, 6), (3, 4), boundary="shift"), DENSE | {"gather + einsum", "NATTEN"}),
    (case("dilated", (6, 5), (3, 2), boundary="mask", dilation=2), DENSE | OFFSETS | {"gather + einsum"}),
    (case("shift-dilated", (7, 6), (3, 3), dilation=2), DENSE | {"gather + einsum", "NATTEN"}),
    (case("causal", (9,), (4,), boundary="mask", causal=True), DENSE | OFFSETS | {"gather + einsum"}),
    (case("bias", (5, 4), (3, 3), boundary="mask", bias=True), DENSE | OFFSETS | {"gather + einsum"}),
    (case("bias-shift", (5, 4), (3, 3), bias=True), DENSE | {"gather + einsum"}),
    (case("3d", (3, 4, 3), (3, 3, 1), boundary="mask"), DENSE | OFFSETS | {"gather + einsum"}),
    (case("swin", (4, 6), (2, 3), block=(2, 3)), DENSE | {"gather + einsum", "reshape + jax.nn", "NATTEN"}),
    (case("ragged", (5, 5), (3, 3), block=2, boundary="mask"), DENSE | {"gather + einsum"}),
    (case("global", (7,)), DENSE),
]
ABSENT = {"jax.nn, cuDNN"} | (set() if HAS_NATTEN else {"NATTEN"})  # cuDNN needs a GPU


def those(ways):
    """The ways that can be tested here, by name."""
    return {way.name: way for way in ways if way.name not in ABSENT and (HAS_TORCH or way.framework != "torch")}


ATTENTION = those([*attention_ways.WAYS, *torch_ways.ATTENTION])
CONV = those([*conv_ways.WAYS, *torch_ways.CONV])


@pytest.mark.skipif(not (HAS_TORCH and HAS_NATTEN), reason="torch and NATTEN, which are not both installed, are peers")
def test_the_peers_that_need_an_install_are_tested():
    assert {"torch SDPA", "torch flex", "NATTEN", "torch"} <= {*ATTENTION, *CONV}


def run_once(way, of, mode="forward"):
    inputs, cotangent = of.operands()
    program = make_program(way, of, mode, inputs, cotangent)
    return program.numpy(program.run()), inputs, cotangent


@pytest.mark.core(10)
@pytest.mark.filterwarnings("ignore:.*(return_lse|torch.compile):")  # NATTEN's own use of torch
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("described", "able"), CASES, ids=lambda x: x[0].name if isinstance(x, tuple) else "")
def test_every_way_of_attention_is_attention(name, described, able):
    of, size, geometry = described
    way = ATTENTION[name]
    if name not in able | {"jaxattn"}:
        with pytest.raises(CannotError):
            way.make(of)
        return
    (output,), inputs, _ = run_once(way, of)
    q, k, v, *bias = (np.asarray(x, np.float64) for x in inputs)
    relative = bias[0] if bias else None
    expected, _ = (
        oracle.attention(q, k, v, size=size, geometry=geometry, relative_bias=relative)
        if size
        else (oracle.attention(q, k, v))
    )
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def conv_loops(x, kernel, of):
    """y[n, i, o] = Σ x[n, stride·i + r - low, g·c + c'] · kernel[r, c', g·o + o'], place by place."""
    y = np.zeros(of.output)
    if of.transposed:  # y[n, stride·i + r, o] += x[n, i, c] · kernel[r, c, o]
        for place in itertools.product(*map(range, x.shape[1:-1])):
            for taps in itertools.product(*map(range, kernel.shape[: of.rank])):
                at = tuple(of.stride * i + r for i, r in zip(place, taps, strict=True))
                y[(slice(None), *at)] += x[(slice(None), *place)] @ kernel[taps]
        return y
    x = np.pad(x, [(0, 0), *of.pads, (0, 0)])
    per, out = kernel.shape[-2], kernel.shape[-1] // of.groups
    for place in itertools.product(*map(range, of.output[1:-1])):
        for taps in itertools.product(*map(range, kernel.shape[: of.rank])):
            seen = x[(slice(None), *(of.stride * i + r for i, r in zip(place, taps, strict=True)))]
            for o in range(kernel.shape[-1]):
                group = seen[:, o // out * per : (o // out + 1) * per]
                y[(slice(None), *place, o)] += group @ kernel[(*taps, slice(None), o)]
    return y


@pytest.mark.core(6)
@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("of", select("conv", True, []), ids=lambda of: of.name)
def test_every_way_of_convolution_is_convolution(name, of):
    small = {"shape": (2, *(min(n, 6) for n in of.shape[1:-1]), of.shape[-1])}
    of = dataclasses.replace(of, **small)
    if of.transposed and name == "nnx.Conv":
        with pytest.raises(CannotError):
            CONV[name].make(of)
        return
    (output,), inputs, _ = run_once(CONV[name], of)
    expected = conv_loops(*(np.asarray(x, np.float64) for x in inputs), of)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted({"jaxattn", "gather + einsum", "torch SDPA"} & {*ATTENTION}))
def test_both_is_the_output_and_the_gradients_of_its_product_with_the_cotangent(name):
    of = AttentionCase("small", (1, 3, 3, 1, 2), Window((3, 3), boundary="mask"))
    (output, *gradients), inputs, cotangent = run_once(ATTENTION[name], of, "both")
    operands = dict(zip(("query", "key", "value"), (np.asarray(x, np.float64) for x in inputs), strict=True))

    def loss(**operands):
        return np.sum(oracle.attention(**operands, size=(3, 3), geometry={"boundary": "mask"})[0] * cotangent)

    assert output.shape == of.shape
    for which, gradient in zip(operands, gradients, strict=True):
        direction = np.random.default_rng(1).standard_normal(of.shape)
        expected = oracle.directional(loss, operands, which, direction)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4, atol=1e-4)


def test_work_is_counted_by_pair():
    of, size, geometry = CASES[0][0]
    pairs = oracle.indices_and_mask(of.grid, size, **geometry)[1].sum()
    assert of.visible == pairs
    assert of.flops("forward") == 2 * 2 * 2 * 2 * 8 * pairs  # 2 products of batch 2, heads 2, head_dim 8, as 2 FLOPs
    assert of.flops("both") == 3 * of.flops("forward")
    assert of.bytes("forward") == 4 * 4 * 2 * 30 * 2 * 8  # 4 arrays of float32
    conv = ConvCase("c", "n i+r c, r c o -> n i o", (2, 10, 3), (3, 3, 5), ((1, 0),), stride=2)
    assert conv.output == (2, 5, 5)
    assert conv.flops("forward") == 2 * (2 * 5 * 5) * (3 * 3)
    spread = ConvCase("t", "n i c, r c o -> n 2*i+r o", (2, 5, 3), (3, 3, 4), ((0, 0),), stride=2, transposed=True)
    assert spread.output == (2, 11, 4)
    assert spread.flops("forward") == 2 * (2 * 5) * (3 * 3 * 4)
    assert conv.bytes("both") == 2 * 4 * (2 * 10 * 3 + 3 * 3 * 5 + 2 * 5 * 5)


def test_the_limit_is_the_larger_of_products_and_memory():
    of, _, _ = CASES[0][0]
    fast = machine.Limits({"float32": 1e30}, of.bytes("forward") / 2)
    assert fast.seconds(of, "forward") == 2.0
    narrow = machine.Limits({"float32": of.flops("forward") / 3}, 1e30)
    assert narrow.seconds(of, "forward") == 3.0


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def wait(self, seconds):
        self.now += seconds


def test_a_step_is_timed_from_what_the_last_one_returned(monkeypatch):
    clock = Clock(monkeypatch)

    def halve(x):
        clock.wait(x)
        return x / 2

    assert machine.best_seconds(halve, 4.0, times=3) == 0.5  # 4 first, which does not count, then 2, 1 and 0.5


def fake(name, log, seconds=0.0):
    def go():
        log.append(name)

    return Program(go, lambda outputs: []), Measurement(name, "forward", samples=[seconds] if seconds else [])


def test_programs_take_turns_until_their_time_is_used_up(monkeypatch):
    monkeypatch.setattr("jaxattn.bench.measure.sample", lambda run, turn: run() or 0.4)
    log = []
    programs = [fake("a", log), fake("slow", log, seconds=0.7), fake("spent", log, seconds=1.0)]
    take_turns(programs, Effort(rounds=4, seconds=1, turn=0, patience=9, memory=1))
    assert log == ["a", "slow", "a", "a"]
    assert [len(m.samples) for _, m in programs] == [3, 2, 1]


def test_a_turn_is_the_median_of_its_runs_without_the_first(monkeypatch):
    clock = Clock(monkeypatch)
    assert sample(iter_wait(clock, [0.2, 0.06, 0.04, 0.04, 0.2]), 0.5) == pytest.approx(0.05)
    assert sample(iter_wait(clock, [0.7, 0.1]), 0.5) == pytest.approx(0.7)
    assert sample(iter_wait(clock, [0.1, 0.2]), 0) == pytest.approx(0.1)


def test_the_peak_of_memory_is_seen_and_forgotten():
    if not machine.peak_memory():
        pytest.skip("this system does not say what a process has had in memory")
    machine.forget_peak()
    before = machine.peak_memory()
    np.ones(2**25)
    assert machine.peak_memory() - before > 2**27
    machine.forget_peak()
    assert machine.peak_memory() - before < 2**27


def test_a_program_whose_thin_case_grows_is_not_run(monkeypatch):
    peaks = itertools.cycle([0, 10**9])
    monkeypatch.setattr("jaxattn.bench.measure.sample", lambda run, turn: 3.0)
    monkeypatch.setattr("jaxattn.bench.measure.peak_memory", lambda: next(peaks))
    found, _ = measured([attention_ways.WAYS[0]], EFFORT._replace(patience=15))
    assert found["jaxattn", "both"].note == "would need about 4.0 GB, 4 times what a thin case grows by"


def iter_wait(clock, seconds):
    """A run that takes these times, one after the other."""
    times = iter(seconds)
    return lambda: clock.wait(next(times))


def way(name, function, **options):
    return Way(name, "jax", lambda case: Function(function), **options)


def broken(q, k, v):
    raise RuntimeError("no luck\nand more lines")


def measured(ways, effort=EFFORT):
    of = CASES[0][0][0]
    return {(m.way, m.mode): m for m in compare(of, ways, effort, lambda said: None)}, of


def test_what_is_wrong_fails_or_is_too_large_is_said():
    ours = attention_ways.WAYS[0]
    huge = way("huge", lambda q, k, v: q, needs=lambda case: 10**10)
    found, _ = measured(
        [ours, way("wrong", lambda q, k, v: v), way("broken", broken), huge, ATTENTION["reshape + jax.nn"]]
    )
    assert {(w, m.status) for (w, _), m in found.items()} == {
        ("jaxattn", "ok"),
        ("wrong", "differs"),
        ("broken", "failed"),
        ("huge", "skipped"),
        ("reshape + jax.nn", "cannot"),
    }
    assert found["huge", "forward"].note == "would need 10.0 GB, and 1.0 GB may be used"
    assert found["broken", "forward"].note == "RuntimeError: no luck"
    assert "allowed: 1e-04" in found["wrong", "forward"].note
    assert len(found["jaxattn", "both"].samples) == EFFORT.rounds
    assert found["jaxattn", "both"].compile_seconds > 0
    assert found["wrong", "forward"].samples == []


def test_a_program_beyond_the_memory_is_not_run():
    found, _ = measured([attention_ways.WAYS[0]], EFFORT._replace(memory=1))
    assert found["jaxattn", "forward"].status == "skipped"
    assert "of temporaries, and 0.0 GB may be used" in found["jaxattn", "forward"].note


def test_a_backward_pass_beyond_patience_is_not_run(monkeypatch):
    monkeypatch.setattr("jaxattn.bench.measure.sample", lambda run, turn: 8.0)  # so the forward pass took 8 s
    found, _ = measured([attention_ways.WAYS[0]], EFFORT._replace(patience=20))
    assert found["jaxattn", "both"].note == "would take more than 24 s"


def test_a_slow_backward_pass_is_tried_on_one_head_first(monkeypatch):
    monkeypatch.setattr("jaxattn.bench.measure.sample", lambda run, turn: 3.0)
    found, _ = measured([attention_ways.WAYS[0]], EFFORT._replace(patience=10))
    assert found["jaxattn", "both"].note == "would take about 12 s, 4 times what a thin case takes"
    found, _ = measured([attention_ways.WAYS[0]], EFFORT._replace(patience=13))
    assert found["jaxattn", "both"].status == "ok"


def results(*peers, ours=(2.0, 2.1, 2.2)):
    """A result of made-up samples, in both modes."""
    of = CASES[0][0][0]
    measurements = []
    for mode in ("forward", "both"):
        known = dict(samples=list(ours), compile_seconds=1.5, temporaries=10**6)
        measurements.append(Measurement("jaxattn", mode, ours=True, **known))
        measurements += [Measurement(name, mode, **values) for name, values in peers]
    return report.Result(of, measurements, {"forward": 0.21, "both": 0.021})


MADE_UP = results(
    ("fast", {"samples": [1.0, 1.1, 1.2]}),
    ("even", {"samples": [1.0, 2.05, 3.0]}),
    ("slow", {"samples": [4.2]}),
    ("wrong", {"status": "differs", "note": "differs by 1"}),
    ("unable", {"status": "cannot", "note": "it is not made for this"}),
)


def test_the_table_marks_what_is_faster():
    lines = {line.split("  ")[1]: line for line in report.table(MADE_UP).splitlines() if line.startswith("  ")}
    assert "0.52<" in lines["fast"]
    assert "0.98~" in lines["even"]
    assert "2.00 " in lines["slow"]
    assert "<" not in lines["slow"] + lines["jaxattn"]
    assert "10.0%" in lines["jaxattn"]
    assert "1.0%" in lines["jaxattn"]
    assert "2.1e+03 (2.05e+03 - 2.15e+03)" in lines["jaxattn"]
    assert lines["jaxattn"].endswith("1.5")
    assert "wrong: differs: differs by 1" in report.table(MADE_UP)
    assert "unable: cannot: it is not made for this" in report.table(MADE_UP)


def test_the_summary_names_the_best_peer_and_every_loss():
    said = report.summary([MADE_UP])
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("  mask")] == ["fast", "fast"]
    assert "a peer is faster than jaxattn in: mask" in said
    assert "wrong results: wrong at mask" in said
    assert "in: no case" in report.summary([results(("slow", {"samples": [4.2]}))])


def test_a_summary_without_ours_does_not_crash():
    lost = results(("fast", {"samples": [1.0]}))
    for m in lost.measurements[::2]:
        m.refuse("failed", "no luck")
    assert "no case" in report.summary([lost])
    assert "failed" in report.table(lost)


def test_a_figure_has_a_bar_for_every_time():
    figure = figures.bars([MADE_UP], "a machine")
    for axes in figure.axes:
        colors = {bar.get_width(): bar.get_facecolor() for bar in axes.patches}
        assert sorted(colors) == pytest.approx([1100, 2050, 2100, 4200])
        assert len({colors[w] for w in sorted(colors)}) == 3  # ours, a faster peer, the others
        assert [label.get_text() for label in axes.get_yticklabels()] == ["jaxattn", "fast", "even", "slow"]


def test_a_scaling_figure_draws_every_size():
    points = []
    for n in (4, 8):
        of = AttentionCase(f"tokens-{n}", (1, n, n, 1, 2), Window((3, 3)), series="tokens")
        samples = [
            Measurement("jaxattn", mode, ours=True, samples=[n / 1e3], temporaries=n * 10**6)
            for mode in ("forward", "both")
        ]
        points.append(report.Result(of, samples, {"forward": 1.0, "both": 1.0}))
    axes = figures.scaling(points, "tokens").axes
    assert len(axes) == 4
    for panel in axes:
        measured, linear = panel.lines[:2]
        np.testing.assert_allclose(measured.get_xdata(), [16, 64])
        np.testing.assert_allclose(measured.get_ydata(), [4, 8])
        np.testing.assert_allclose(linear.get_ydata(), [4, 16])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code
    return str(stopped.value.code) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conv", "--cases", "depthwise-9x9"], "cases (=depthwise-9x9) must name some of `bench conv`"),
        (
            ["conv", "--json", "nowhere/bench.json"],
            "json (=nowhere/bench.json) must be in a folder that can be written to: nowhere",
        ),
        (["conv", "--json", "."], "json (=.) must be a file, not a folder"),
        (["conv", "--out", "file"], "out (=file) must be a folder that can be made"),
        (["everything"], "everything"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "measure_limits", lambda dtypes: pytest.fail("it began to measure"))
    assert said in fails(capsys, *arguments)


def test_wrong_results_make_the_command_fail(tmp_path, monkeypatch, capsys):
    wrong = way("wrong", lambda q, k, v: v)
    monkeypatch.setitem(run.WAYS, "attention", [attention_ways.WAYS[0], wrong])
    monkeypatch.setattr(machine, "measure_limits", lambda dtypes: machine.Limits({"float32": 1e9}, 1e9))
    said = fails(capsys, "attention", "--quick", "--cases", "1d-causal", "--out", str(tmp_path))
    assert "some results are wrong or missing" in said


@pytest.mark.full
def test_a_run_that_is_stopped_leaves_what_it_has_measured(tmp_path, monkeypatch):
    def stop_at_the_second(case, *arguments):
        if case.name == "swin":
            raise KeyboardInterrupt
        return compare(case, *arguments)

    monkeypatch.setattr(run, "compare", stop_at_the_second)
    monkeypatch.setitem(run.WAYS, "attention", attention_ways.WAYS[:1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["bench", "attention", "--quick", "--cases", "1d-causal", "swin", "--json", "bench.json"])
    assert [one["name"] for one in json.loads((tmp_path / "bench.json").read_text())["cases"]] == ["1d-causal"]


def test_the_load_of_others_is_told():
    assert machine.load_warning(0.0) is None
    assert machine.load_warning(None) is None
    busy = machine.load_warning(9.0 * machine.threads())
    assert busy is not None
    assert f"the load was {9.0 * machine.threads():.1f}" in busy


@pytest.mark.full
def test_the_command(tmp_path):
    """The real one, in a process of its own."""
    out, file = tmp_path / "figures", tmp_path / "bench.json"
    cases = ["1d-causal", "depthwise-1d-causal", "tokens-8"]
    start = [sys.executable, "-c", "from jaxattn.cli import main; main()"]
    arguments = ["bench", "all", "--quick", "--cases", *cases, "--json", file, "--out", out]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"attention.png", "conv.png", "scaling-tokens.png"}
    written = json.loads(file.read_text())
    assert set(written) == {"header", "limits", "cases"}
    assert {"device", "threads", "load", "python", "versions", "missing"} <= set(written["header"])
    assert [one["name"] for one in written["cases"]] == ["1d-causal", "tokens-8", "depthwise-1d-causal"]
    for one in written["cases"]:
        assert {"name", "kind", "case", "dtype", "bound_seconds", "measurements"} <= set(one)
        assert f"\n{one['name']}: {one['case']}\n" in done.stdout
        for m in one["measurements"]:
            assert m["status"] in ("ok", "cannot", "failed", "skipped")
            if m["status"] == "ok":
                assert 0 < m["lower_quartile"] <= m["median"] <= m["upper_quartile"]
                assert m["share_of_limit"] == pytest.approx(one["bound_seconds"][m["mode"]] / m["median"])
            if m["ours"]:
                assert m["status"] == "ok"
    assert "the fastest peer of each case" in done.stdout
