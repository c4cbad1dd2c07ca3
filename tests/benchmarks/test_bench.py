"""fastlm bench: counts, clocks, the fp64 check that guards every time, the file format, compare, report, failures."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from fastlm._core import dispatch as _dispatch
from fastlm._core.registry import ops
from fastlm.backends import cpu as _native
from fastlm.benchmarks import compare, goals, harness, kernel, memory, plots, registry, report, roof, runner, worker
from fastlm.benchmarks.case import Case, Counts, Unavailable
from fastlm.benchmarks.engine import SIZES, build, weights
from fastlm.benchmarks.layer_norm import LAYER_NORM
from fastlm.benchmarks.results import Results, Row, environment, load
from fastlm.cli import main
from fastlm.cli.bench import Options, make_plan
from fastlm.errors import ConfigError, DataError
from fastlm.inference import generate

ROOF = roof.Roof(10.0, 12.0, {"float32": 0.1, "bfloat16": 0.2})
SMALL = Case("layer_norm", (8, 32), "float32", passes=("fwd", "bwd"), headline=True)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def _rows(case, against=("torch",), **kwargs):
    return worker.run_case(case, "cpu", list(against), ROOF, 0.0, **kwargs)


# By how many extents a benchmark has, and of those that need more to take their own way.
SHAPES = {2: (6, 32), 3: (5, 8, 33), 4: (2, 3, 17, 8)}
LARGER = {"train": (1, 32), "bert": (3, 16), "generate": (1, 5, 4), "linear": (2, 40, 96), "adamw": (1, 32, 64)}
# What fastlm's own code always serves.
ON_CPU = [op.name for op in ops() if op.backend("cpu")]
OWN = {b.name for b in registry.KERNELS if any(map(b.times, ON_CPU))} | {"train", "bert", "generate"}


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_every_benchmark_is_right_and_timed(name):
    quick = registry.select(name, "cpu", ["float32"], [], [], quick=True)[0]
    case = dataclasses.replace(quick, shape=LARGER.get(name, SHAPES[len(quick.shape)]))
    rows = _rows(case)
    stock = {row.which: row for row in rows if row.provider == "torch"}
    assert set(stock) == set(case.passes)
    assert all(row.status == "ok" and row.ratio_to_torch == 1.0 for row in stock.values())
    served = [row for row in rows if row.provider in ("fastlm", "fastlm-cpu") and row.status != "unsupported"]
    if _native.missing_reason is None and name in OWN:
        assert served
    for row in served:
        assert row.status == "ok", row.reason
        assert row.p10 <= row.median <= row.p90
        assert row.rounds >= 3
        assert 0 <= row.rms_error <= row.max_error * 10 < 1e-3
        assert row.roof_fraction == pytest.approx(ROOF.seconds(Counts(row.bytes, row.flops, *_gemm(row))) / row.median)


def _gemm(row):
    if row.op in ("attention", "linear_cross_entropy", "train", "bert", "generate", "huggingface"):
        return "float32", row.op == "generate"
    return None, row.op == "linear"


def test_a_wrong_result_gets_no_time(monkeypatch):
    broken = dataclasses.replace(LAYER_NORM, ours=lambda case: lambda *args: LAYER_NORM.ours(case)(*args) * 1.01)
    monkeypatch.setitem(registry.BENCHMARKS, "layer_norm", broken)
    ours = [row for row in _rows(SMALL, ["torch", "fastlm-reference"]) if row.provider == "fastlm-reference"]
    assert [row.status for row in ours] == ["wrong", "wrong"]
    assert all(row.median is None and "output 0: error" in row.reason for row in ours)
    assert ours[0].max_error == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory",
            marks=pytest.mark.slow,
        ),
        pytest.param(RuntimeError("boom"), "failed", marks=pytest.mark.slow),
        pytest.param(Unavailable("not today"), "unsupported", marks=pytest.mark.slow),
    ],
)
def test_a_provider_that_fails_is_marked_and_the_others_go_on(monkeypatch, error, status):
    def peer(case, device):
        raise error

    monkeypatch.setitem(registry.BENCHMARKS, "layer_norm", dataclasses.replace(LAYER_NORM, peers={"quack": peer}))
    monkeypatch.setattr("fastlm.benchmarks.providers.require", lambda provider: None)
    rows = _rows(SMALL, ["torch", "quack"])
    assert {row.status for row in rows if row.provider == "quack"} == {status}
    assert {row.status for row in rows if row.provider == "torch"} == {"ok"}


def test_a_case_too_large_for_memory_is_marked(monkeypatch):
    def inputs(case, device):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setitem(registry.BENCHMARKS, "layer_norm", dataclasses.replace(LAYER_NORM, inputs=inputs))
    assert {row.status for row in _rows(SMALL)} == {"out of memory"}


def test_absent_peers_say_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch.clear_cache()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = {row.provider: row for row in _rows(SMALL, ["liger", "torch"]) if row.which == "fwd"}
    assert rows["liger"].status == "unsupported"
    assert rows["liger"].reason == "liger_kernel is not installed"
    assert rows["fastlm-triton"].status == "unsupported"
    assert "the tensors are on cpu" in rows["fastlm-triton"].reason


@pytest.mark.slow
def test_slow_providers_run_on_slow_cases_or_when_asked_for():
    plain = dataclasses.replace(SMALL, passes=("fwd",))
    status = {row.provider: row.status for row in _rows(plain, [])}
    assert status["fastlm-reference"] == status["compile"] == "unsupported"
    slow = _rows(dataclasses.replace(plain, slow=True), ["torch"])
    assert "fastlm-reference" not in {row.provider for row in slow}
    assert {r.status for r in _rows(plain, ["fastlm-reference"]) if r.provider == "fastlm-reference"} == {"ok"}


def test_counts_by_hand():
    assert LAYER_NORM.counts(SMALL, "fwd").bytes == 4 * (8 * 32 + 8 * 32 + 2 * 32)
    both = [LAYER_NORM.counts(SMALL, which) for which in ("fwd", "bwd")]
    assert LAYER_NORM.counts(SMALL, "full") == Counts(*(a + b for a, b in zip(both[0][:2], both[1][:2], strict=True)))
    attention = registry.BENCHMARKS["attention"]
    causal, full = (Case("attention", (1, 2, 4, 8), "bfloat16", v) for v in ("causal", "full"))
    assert attention.counts(full, "fwd") == Counts(2 * 4 * (2 * 4 * 8), 2 * 2 * (2 * 4 * 4 * 8), "bfloat16")
    assert attention.counts(causal, "fwd").flops == 2 * 2 * (2 * 10 * 8)  # 4 + 3 + 2 + 1 pairs
    assert attention.counts(causal, "bwd").flops == 2.5 * attention.counts(causal, "fwd").flops


def test_train_flops_agree_with_the_models_own_count():
    case = registry.select("train", "cpu", ["float32"], [], [], quick=True)[0]
    session = registry.BENCHMARKS["train"].session(case, "cpu")
    B, T = case.shape
    config = SIZES[case.variant]
    causal_half = 6 * config.n_layer * T * config.n_embd
    model = build("fastlm", config, weights(config))
    assert session.counts("full").flops == B * T * (model.flops_per_token(T) - causal_half)


def test_plain_gpt_generates_what_the_engine_does():
    config = SIZES["gpt2-8m"]
    state = weights(config)
    # Larger embeddings set the logits apart, so that rounding cannot change which is largest.
    state["wte.weight"] = state["wte.weight"] * 10
    tokens = torch.randint(config.vocab_size, (2, 7))
    steps = generate(build("fastlm", config, state), tokens, 9, temperature=0.0)
    assert torch.equal(build("torch", config, state).generate(tokens, 9), torch.stack(list(steps), 1))


def test_interleaving_visits_everyone_in_every_round():
    order = []

    def sampler(name):
        def take():
            order.append(name)
            return float(len(order))

        return take

    timings = harness.interleave({n: sampler(n) for n in "abc"}, seconds=0.0)
    assert [len(t.samples) for t in timings.values()] == [3, 3, 3]
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert rounds[:3] == ["abc", "bca", "cab"]


def test_quantiles():
    timing = harness.Timing(tuple(float(i) for i in range(11)))
    assert (timing.quantile(0.1), timing.median, timing.quantile(0.9)) == (1.0, 5.0, 9.0)


def test_the_clock_counts_every_call():
    calls = []
    sample = harness.CpuClock().prepare(lambda: calls.append(0))
    warm = len(calls)
    assert warm == 2
    assert 0 < sample() < 1
    assert len(calls) > warm + 100  # a call too short for the clock is repeated


@pytest.mark.skipif(memory.resident() is None, reason="no resident memory to read")
def test_peak_memory():
    size = 64 * 2**20

    def allocate():
        return torch.ones(size // 2, dtype=torch.uint8), torch.ones(size // 2, dtype=torch.uint8)

    allocate()
    found = memory.peak(allocate, "cpu")
    if found is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.99 * size <= found < 1.5 * size  # the kernel adds up pages in batches
    assert memory.peak(lambda: None, "cpu") < size / 8


def test_roof():
    measured = roof.Roof(10.0, 20.0, {"float32": 1.0})
    assert measured.seconds(Counts(10**10, 0)) == 1.0
    assert measured.seconds(Counts(10**10, 0, None, True)) == 0.5
    assert measured.bound(Counts(10**9, 10**12, "float32")) == "compute"
    assert measured.seconds(Counts(10**9, 2 * 10**12, "float32")) == 2.0
    assert measured.bound(Counts(10**9, 10**12, None)) == "memory"


def _result(median=1.0, provider="fastlm-cpu", spread=0.01, **fields):
    row = Row("gelu", "tanh", "fwd", "float32", "4x8", provider, provider, allocator="kept", threads=2)
    row.median, row.p10, row.p90, row.ratio_to_torch = median, median * (1 - spread), median * (1 + spread), 1 / median
    shared = {"rounds": 5, "gbps": 1.0, "tflops": 1.0, "bound": "memory", "roof_fraction": 0.5}
    return dataclasses.replace(row, **shared, **fields)


def _results(*rows):
    e = {"cpu": "test", "device": "cpu", "date": "2026-01-02T03:04:05+00:00", "packages": {"torch": "2"}, "fastlm": "0"}
    return Results(e, {"kept": ROOF.to_dict()}, list(rows))


UNSUPPORTED = Row("gelu", "", "fwd", "float32", "4x8", "triton", "triton", "unsupported", "no such device", "kept", 2)


def test_files_round_trip(tmp_path):
    results = _results(_result(), _result(provider="torch", work={"tokens": 3}), UNSUPPORTED)
    results.save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == results
    unsupported = next(line for line in (tmp_path / "r.json").read_text().splitlines() if "no such device" in line)
    assert len(json.loads(unsupported)) == 11  # one line, nothing empty
    results.save_csv(tmp_path / "r.csv")
    header, *lines = (tmp_path / "r.csv").read_text().splitlines()
    assert header.startswith("op,variant,which,dtype,shape,provider,")
    assert header.endswith("cpu,device,date,fastlm")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a results file of fastlm bench"),
        ('{"format": "fastlm-bench", "version": 99}', "results of version 99, this fastlm reads 1"),
        ('{"format": "fastlm-bench", "version": 1}', "damaged results: 'rows'"),
        ('{"format": "fastlm-bench", "version": 1, "environment": {}, "roofs": {}, "rows": [{"x": 1}]}', "damaged"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load(path)


def test_compare(tmp_path, capsys):
    before, same, slower, noisy, faster = (
        tmp_path / f"{n}.json" for n in ("before", "same", "slower", "noisy", "fast")
    )
    _results(_result()).save(before)
    _results(_result(1.005)).save(same)
    _results(_result(1.2)).save(slower)
    _results(_result(1.2, spread=0.3)).save(noisy)
    _results(_result(0.5)).save(faster)
    assert main(["bench", "compare", str(before), str(same)]) == 0
    assert "1 rows in both files, 0 moved beyond the noise" in capsys.readouterr().out
    assert main(["bench", "compare", str(before), str(slower)]) == 1
    assert "1.20x  regression" in capsys.readouterr().out
    assert main(["bench", "compare", str(before), str(slower), "--threshold", "0.25"]) == 0
    assert main(["bench", "compare", str(before), str(noisy)]) == 0
    assert main(["bench", "compare", str(before), str(faster)]) == 0
    assert "0.50x  faster" in capsys.readouterr().out


def test_compare_leaves_peers_in_peace_and_sees_lost_rows(capsys):
    changes, lost = compare.compare(_results(_result(provider="torch")), _results(_result(2.0, provider="torch")))
    assert not changes[0].is_regression(0.05)
    ours, stock = _result(), _result(provider="torch")
    gone = dataclasses.replace(ours, median=None, status="wrong")
    changes, lost = compare.compare(_results(ours, stock), _results(gone, stock))
    assert [row.provider for row in lost] == ["fastlm-cpu"]
    with pytest.raises(DataError, match="no timed row in common"):
        compare.compare(_results(ours), _results(stock))


def test_compare_relative_to_torch():
    """A machine of half the speed: every time doubles, the ratio stays."""
    before, after = (_results(_result(median, ratio_to_torch=2.0)) for median in (1.0, 2.0))
    assert compare.compare(before, after)[0][0].factor == 2.0
    assert compare.compare(before, after, relative=True)[0][0].factor == 1.0


def test_report_fills_the_readme(tmp_path, capsys):
    results = _results(_result(0.5), _result(provider="torch"), _result(0.25, allocator="default"))
    results.environment["settings"] = {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"}
    results.save(tmp_path / "r.json")
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- bench:gelu -->\nold\n<!-- /bench -->\nkept\n")
    for _ in range(2):  # writing it again changes nothing
        assert main(["bench", "report", str(readme), str(tmp_path / "r.json")]) == 0
        text = readme.read_text()
        assert text.startswith("# A\n<!-- bench:gelu -->\n| case | pass | fastlm-cpu | torch | of roof |\n")
        assert "| gelu tanh 4x8 float32 | fwd | 500 ms (2.00x) | 1 s | 50 % |" in text
        assert "| gelu tanh 4x8 float32 (default malloc) | fwd | 250 ms (4.00x) |  | 50 % |" in text
        assert "torch 2 with ATEN_CPU_CAPABILITY=avx2, fastlm 0" in text
        assert "old" not in text
        assert text.endswith("<!-- /bench -->\nkept\n")
    assert "wrote gelu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# A\n", "no line <!-- bench:NAME --> says where"),
        ("<!-- bench:gelu -->\n", "has no <!-- /bench --> after it"),
        ("<!-- bench:softmax -->\n<!-- /bench -->\n", "bench:softmax was not measured; the files hold gelu, all"),
    ],
)
def test_report_leaves_a_text_it_cannot_fill(tmp_path, capsys, text, message):
    _results(_result()).save(tmp_path / "r.json")
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main(["bench", "report", str(readme), str(tmp_path / "r.json")]) == 1
    assert message in capsys.readouterr().err
    assert readme.read_text() == text


def test_plots(tmp_path):
    written = plots.write(_results(_result(), _result(provider="torch")), tmp_path / "plots")
    assert [path.name for path in written] == ["gelu_ratio.png", "gelu_throughput.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_plot_of_growth_gives_the_slope(tmp_path):
    rows = [_result(median=1e-3 * rows, shape=f"{rows}x8") for rows in (1, 64, 512)]
    assert plots._growth(rows) == {"tanh fwd float32 8 kept 2 threads": [(1, 1e-3), (64, 0.064), (512, 0.512)]}
    assert plots._growth(rows[:2]) == {}
    assert (tmp_path / "gelu_cost.png") in plots.write(_results(*rows), tmp_path)
    attention = [_result(op="attention", variant="causal", shape=f"{2048 // T}x12x{T}x64") for T in (256, 512, 1024)]
    (series,) = plots._growth(attention).values()
    assert series == [(256, 1 / 8), (512, 1 / 4), (1024, 1 / 2)]


def test_compute_bound_headlines_run_on_one_thread_too():
    cases = [
        Case("gelu", (4, 8), "float32", "tanh", headline=True),
        Case("layer_norm", (4, 8), "float32", headline=True),
    ]
    parts = runner.Plan(cases, threads=2, allocators=("kept",), scaling=True).parts()
    assert parts == [("kept", 2, cases, []), ("kept", 1, cases[:1], ["torch"])]
    assert len(runner.Plan(cases, threads=1, allocators=("kept",), scaling=True).parts()) == 1
    one, two = _result(threads=1), _result()
    assert one.case != two.case
    assert report.case_name(one) == "gelu tanh 4x8 float32 (1 thread)"


def test_optimizer_case_agrees_with_pytorch():
    for dtype in ("float32", "bfloat16"):
        session = registry.BENCHMARKS["adamw"].session(Case("adamw", (1, 16, 50), dtype, passes=("full",)), "cpu")
        yardstick = {}
        for provider in ("torch", "fastlm"):
            made = session.build(provider)
            assert worker.judge(session, provider, made, yardstick, {})[1] == ""
            made.run["full"]()


def _everything(isa="amx", settings=None, **ours):
    """A row of every case, pass and provider: one second, a GiB, half the roof; `ours` changes fastlm's."""
    rows = []
    for case in registry.select("all", "cpu", [], [], []) + registry.select("huggingface", "cpu", [], [], []):
        for which in case.passes:
            for provider in ("fastlm", "torch", "compile", "transformers", "torch-fused"):
                for allocator, threads in (("kept", 2), ("default", 2), ("kept", 1)):
                    shape = "x".join(map(str, case.shape))
                    row = Row(case.op, case.variant, which, case.dtype, shape, provider, provider)
                    row.median, row.flops, row.roof_fraction, row.peak_bytes = 1.0, 8, 0.5, 2**30
                    row.allocator, row.threads, row.isa = allocator, threads, isa
                    rows.append(dataclasses.replace(row, **ours) if provider == "fastlm" else row)
    return Results(environment("cpu") | {"settings": settings or {}}, {}, rows)


def test_every_goal_is_measured_by_a_registered_case():
    held = {"ATEN_CPU_CAPABILITY": "avx2"}
    files = [_everything(), *(_everything(isa, s) for isa in ("avx2", "baseline") for s in ({}, held))]
    assert not [goal.work for goal in goals.GOALS if None in goal.values(files)]
    for i, name in enumerate(("AVX2 against", "AVX2 on both sides", "SSE2 against", "SSE2 on both sides"), start=1):
        chosen = [goal for goal in goals.GOALS if goal.work.startswith(name)]
        assert chosen
        assert all(set(goal.values([*files[:i], *files[i + 1 :]])) == {None} for goal in chosen)
    assert goals.REASONS.keys() <= {goal.work for goal in goals.GOALS}


def test_goals_compare_within_a_file_and_say_what_is_missed():
    def lines(*files):
        cells = [line.split(" | ") for line in goals.table(list(files)).splitlines()[2:]]
        return {work.removeprefix("| "): (measured, verdict.removesuffix(" |")) for work, _, measured, verdict in cells}

    fast, slow = _everything(median=0.2, peak_bytes=2**28), _everything(median=2.0)
    step, memory_, scaled = (
        "GPT-2 124M training step 4x256 fp32",
        "GPT-2 124M training step 4x256 fp32, peak memory, of PyTorch's",
        "two threads over one, fp32: attention fwd, bwd, gelu fwd, bwd, cross_entropy",
    )
    assert lines(fast, slow)[step] == ("5.00x", "met")
    assert lines(fast)[memory_] == ("25%", "met")
    assert lines(fast)[scaled] == ("1.00x, 1.00x, 1.00x, 1.00x, 1.00x", f"missed: {goals.REASONS[scaled]}")
    assert lines(slow, fast)[step][0] == "0.50x"
    assert lines(slow, fast)[step][1].startswith("missed")
    assert lines(slow)[memory_][1].startswith("missed")
    fast.rows = [row for row in fast.rows if row.op != "train" or row.provider != "torch"]
    assert lines(fast)[step] == ("-", "not all measured")
    assert lines(fast, slow)[step][0] == "0.50x"


def test_a_goal_is_met_in_the_digits_that_are_shown():
    goal = goals.Goal("work", 1.2, "x", ())
    assert [goal.met(v) for v in (1.194, 1.196, 1.2)] == [False, True, True]
    assert [dataclasses.replace(goal, at_most=True).met(v) for v in (1.2, 1.204, 1.206)] == [True, True, False]


def test_memory_beyond_the_gradients_of_linear_cross_entropy():
    peak = 4 * ((1024 + 50257) * 768 + 1024 * 50257 // 4)
    (value,) = goals.Goal("", 0, "%", (goals.beyond_gradients(1024, 768, 50257, "float32"),)).values(
        [_everything(peak_bytes=peak)]
    )
    assert value == pytest.approx(25)


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    """The whole way: workers in their own processes, one for each allocator setting."""
    files = [str(tmp_path / name) for name in ("r.json", "r.csv")]
    options = ["--shape", "16x32", "--dtype", "float32", "--pass", "fwd", "--against", "torch", "--device", "cpu"]
    status = main(["bench", "gelu", *options, "--json", files[0], "--csv", files[1], "--plot", str(tmp_path / "p")])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "x torch" in out
    assert "fastlm-cuda: unsupported: the tensors are on cpu" in out
    results = load(files[0])
    timed = [row for row in results.rows if row.status == "ok"]
    assert {row.provider for row in timed} >= {"torch"}
    assert {row.allocator for row in timed} == set(results.roofs)
    assert {row.shape for row in timed} == {"16x32"}
    assert results.environment["packages"]["torch"] == torch.__version__
    assert (tmp_path / "p" / "gelu_ratio.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["softmax"], "op is 'softmax', expected one of attention, cross_entropy, "),
        (["gelu", "--dtype", "int8"], "dtype is 'int8', expected one of float32, "),
        (["gelu", "--pass", "sideways"], "pass is 'sideways', expected one of fwd, bwd, full"),
        (["gelu", "--against", "torch,jax"], "provider is 'jax', expected one of fastlm, "),
        (["gelu", "--shape", "3"], "shape is '3', expected MxN for gelu, such as 1024x3072"),
        (["gelu", "--shape", "0x4"], "shape is '0x4', expected MxN"),
        (["gelu", "--device", "tpu"], "device is 'tpu', expected auto, cpu, cuda or cuda:N"),
        (["gelu", "--device", "cuda:64"], "device is 'cuda:64', but this machine has"),
        (["gelu", "--threads", "0"], "threads is 0, expected at least 1"),
        (["gelu", "--seconds", "0"], "seconds is 0.0, expected a finite number above 0"),
        (["gelu", "--seconds", "inf"], "seconds is inf, expected"),
        (["gelu", "--json", "/no/such/folder/r.json"], "the folder /no/such/folder is not there"),
        (["cross_entropy", "--quick", "--pass", "bwd", "--dtype", "float32", "--shape", "4x5,4"], "shape is '4'"),
        (["compare", "/no/a.json", "/no/b.json"], "No such file"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_seconds_of_a_pass():
    plans = [make_plan(Options(op="gelu", device="cpu", quick=quick, seconds=s)) for quick in (0, 1) for s in (None, 7)]
    assert [plan.seconds for plan in plans] == [0.2, 7, 0.1, 7]


def test_plan_covers_the_second_allocator_with_headline_cases_only():
    plan = make_plan(Options(op="layer_norm", device="cpu", threads=1))
    if len(plan.allocators) == 1:
        pytest.skip("another C library than glibc")
    (first, _, cases, _), (second, _, headline, against) = plan.parts()
    assert (first, second) == ("kept", "default")
    assert headline == [case for case in cases if case.headline] != []
    assert against == ["torch"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills by signal")
def test_a_worker_that_dies_costs_one_case_only(monkeypatch):
    """The first case kills its process, as the kernel does where memory runs out."""
    real = runner.subprocess.Popen
    code = """
import os, signal, sys
from fastlm.benchmarks import worker
run_case = worker.run_case
def dies(case, *args):
    if case.shape == (2, 2): os.kill(os.getpid(), signal.SIGKILL)
    return run_case(case, *args)
worker.run_case = dies
worker.measure = lambda *args: worker.Roof(1.0, 1.0, {})
sys.exit(worker.main())
"""
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **kw: real([sys.executable, "-c", code], **kw))
    cases = [Case("gelu", shape, "float32", "tanh", ("fwd",)) for shape in ((2, 2), (3, 4))]
    results = Results(environment("cpu"))
    plan = runner.Plan(cases, against=["torch"], seconds=0.0, allocators=("default",))
    runner.run(plan, results, lambda *args: None, lambda row: None)
    assert [(r.shape, r.status) for r in results.rows if r.provider == "worker"] == [("2x2", "out of memory")]
    assert [(r.shape, r.status) for r in results.rows if r.provider == "torch"] == [("3x4", "ok")]


def test_an_interrupt_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    def run(plan, results, started, measured):
        results.rows.append(_result())
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlm.cli.bench.run", run)
    path = tmp_path / "r.json"
    assert main(["bench", "gelu", "--quick", "--device", "cpu", "--json", str(path)]) == 130
    assert len(load(path).rows) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_events_survive_what_libraries_print():
    """Lines that a library prints to standard output must not reach the parent as events."""
    code = """
from fastlm.benchmarks import worker
worker.run = lambda plan, emit: (print("hello", flush=True), emit("row", 1))
worker.main()
"""
    done = subprocess.run([sys.executable, "-c", code], input="{}", capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == ["row", 1]
    assert "hello" in done.stderr


def test_dropout_is_off_while_results_are_compared():
    case = Case("attention", (1, 2, 4, 8), "float32", "dropout")
    assert kernel.without_dropout(case).variant == "causal"
    assert report.case_name(_result()) == "gelu tanh 4x8 float32"
    with pytest.raises(ConfigError, match="has no case"):
        registry.select("cross_entropy", "cpu", ["float32"], ["4x5"], ["bwd"]) and registry.select(
            "generate", "cpu", ["float32"], [], ["bwd"]
        )


def test_all_leaves_out_the_cases_that_are_extra():
    everything = registry.select("all", "cpu", [], [], [])
    assert not any(case.extra for case in everything)
    for name, count in (("bert", 8), ("huggingface", 36)):
        assert all(case.op != name for case in everything)
        assert len(registry.select(name, "cpu", [], [], [])) == count


def test_several_ops_can_be_asked_for():
    both = registry.select("gelu, layer_norm", "cpu", [], [], [])
    assert both == registry.select("gelu", "cpu", [], [], []) + registry.select("layer_norm", "cpu", [], [], [])
    with pytest.raises(ConfigError, match="op is 'nothing', expected one of attention"):
        registry.select("gelu,nothing", "cpu", [], [], [])


def test_a_dtype_asked_for_does_not_run_a_case_twice():
    for name, count in (("huggingface", 18), ("layer_norm", 5), ("train", 1)):
        chosen = registry.select(name, "cpu", ["bfloat16"], [], [])
        assert len({(case.variant, case.shape) for case in chosen}) == len(chosen) == count
    slow = [[case.slow for case in registry.select("train", "cpu", [d], [], [])] for d in ("float32", "bfloat16")]
    assert slow == [[False], [True]]
    assert all(case.slow for case in registry.select("gelu", "cpu", ["float32", "float16"], ["4x8"], []))
