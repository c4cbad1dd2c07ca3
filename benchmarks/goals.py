"""What the CPU backend is meant to reach, and a table of how far results files say that it does.

A goal covers one or several measurements; it is met if all are. Every value is formed from rows of one file, so of one
run. REASONS says, for a goal that is missed, what stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .results import Results, Row

Measure = Callable[[Results], "float | None"]
BOTH = ("float32", "bfloat16")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
NORMS, GELUS = ("4096x768", "16384x1024"), ("gelu", "bias_gelu")
LENGTHS = {"256": "4x12x256x64", "512": "2x12x512x64", "1024": "1x12x1024x64", "2048": "1x12x2048x64"}
WIDE = {"256": "4x6x256x128", "2048": "1x6x2048x128"}  # heads of 128
HOLDS_TORCH = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # settings that hold PyTorch to an instruction set
GPT = {"variant": "gpt2-124m", "shape": "4x256"}


@dataclass(frozen=True)
class Goal:
    """Something to reach.

    Attributes:
        work: what is measured, one value for each of `measures`.
        wanted: the least value, or the greatest if `at_most`.
        unit: of the values: "x" for ratios, "%" for shares.
        measures: each returns a value from a file, or None if the file has not measured it.
    """

    work: str
    wanted: float
    unit: str
    measures: tuple[Measure, ...]
    at_most: bool = False

    def values(self, files: list[Results]) -> list[float | None]:
        """Of each measurement, from the first file that has it."""
        return [next((v for f in files if (v := m(f)) is not None), None) for m in self.measures]

    def met(self, value: float) -> bool:
        """Whether the value reaches the goal in the digits that are shown."""
        shown, wanted = _digits(value, self.unit), _digits(self.wanted, self.unit)
        return float(shown) <= float(wanted) if self.at_most else float(shown) >= float(wanted)


def row(results: Results, op: str, which: str, provider: str = "fastlm", **case: str) -> Row | None:
    """The timed row with these attributes; freed memory is kept and threads are the most unless said otherwise."""
    wanted = {"allocator": "kept", "variant": ""} | case
    found = [
        r
        for r in results.rows
        if r.status == "ok" and r.op == op and r.which == which and _provider(r) == provider
        and all(getattr(r, name) == value for name, value in wanted.items())
    ]  # fmt: skip
    return max(found, key=lambda r: r.threads, default=None)


def _provider(r: Row) -> str:
    """The CPU's kernels are what is judged; transformers as a benchmark's yardstick is still transformers."""
    if r.provider == "fastlm-cpu":
        return "fastlm"
    return "transformers" if r.label == "transformers" else r.provider


def speed(op: str, which: str, against: str = "torch", **case: str) -> Measure:
    """Times the speed of `against` in the same case."""

    def measure(results: Results) -> float | None:
        ours, theirs = row(results, op, which, **case), row(results, op, which, against, **case)
        return theirs.median / ours.median if ours and theirs and ours.median and theirs.median else None

    return measure


def roof(op: str, which: str, **case: str) -> Measure:
    """Percent of the copy, read or GEMM rate of the same run."""

    def measure(results: Results) -> float | None:
        ours = row(results, op, which, **case)
        return 100 * ours.roof_fraction if ours and ours.roof_fraction else None

    return measure


def memory(op: str, which: str, **case: str) -> Measure:
    """Percent of PyTorch's peak memory."""

    def measure(results: Results) -> float | None:
        ours, theirs = row(results, op, which, **case), row(results, op, which, "torch", **case)
        return (
            100 * ours.peak_bytes / theirs.peak_bytes
            if ours and theirs and ours.peak_bytes and theirs.peak_bytes
            else None
        )

    return measure


def beyond_gradients(M: int, K: int, V: int, dtype: str) -> Measure:
    """Percent of the logits' size that linear_cross_entropy takes beyond the gradients it returns."""

    def measure(results: Results) -> float | None:
        ours = row(results, "linear_cross_entropy", "full", shape=f"{M}x{K}x{V}", dtype=dtype)
        if ours is None or ours.peak_bytes is None:
            return None
        itemsize = 4 if dtype == "float32" else 2
        return 100 * (ours.peak_bytes / itemsize - (M + V) * K) / (M * V)

    return measure


def between(op: str, which: str, ours: dict, other: dict, per_flop: bool = False) -> Measure:
    """Our time in the case `other` over that in `ours`: how much faster `ours` is. Optionally for equal FLOPs."""

    def measure(results: Results) -> float | None:
        one, two = row(results, op, which, **ours), row(results, op, which, **other)
        if not (one and two and one.median and two.median):
            return None
        return two.median / one.median * (one.flops / two.flops if per_flop else 1)

    return measure


def slowest(op: str, against: str, dtype: str) -> Measure:
    """Times the speed of `against` where that is least, over all cases of a file."""

    def measure(results: Results) -> float | None:
        cases = {(r.which, r.variant, r.shape) for r in results.rows if r.op == op}
        speeds = (speed(op, w, against, variant=v, shape=s, dtype=dtype)(results) for w, v, s in cases)
        return min((value for value in speeds if value is not None), default=None)

    return measure


def held(measure: Measure, alike: bool) -> Measure:
    """From files where PyTorch is held to the kernels' instruction set, or only from those where it has its own."""

    def chosen(results: Results) -> float | None:
        is_held = any(name in results.environment.get("settings", {}) for name in HOLDS_TORCH)
        return measure(results) if is_held == alike else None

    return chosen


def inverse(measure: Measure) -> Measure:
    def inverted(results: Results) -> float | None:
        value = measure(results)
        return 1 / value if value else None

    return inverted


def _norms() -> Iterator[Goal]:
    name = "layer_norm 4096x768, 16384x1024"
    for which, goals in (("fwd", (1.2, 1.3)), ("bwd", (1.5, 1.8))):
        for dtype, wanted in zip(BOTH, goals, strict=True):
            measures = tuple(speed("layer_norm", which, shape=shape, dtype=dtype) for shape in NORMS)
            yield Goal(f"{name} {SHORT[dtype]} {which}", wanted, "x", measures)
    for dtype in BOTH:
        both_ways = tuple(roof("layer_norm", which, shape=NORMS[1], dtype=dtype) for which in ("fwd", "bwd"))
        yield Goal(f"layer_norm 16384x1024 {SHORT[dtype]} fwd, bwd, of the copy rate", 80, "%", both_ways)


def _gelu() -> Iterator[Goal]:
    for form, goals in (("tanh", (4.0, 3.0)), ("erf", (1.8, 1.2))):
        for dtype, wanted in zip(BOTH, goals, strict=True):
            cases = [(op, which) for op in GELUS for which in ("fwd", "bwd")]
            case = {"variant": form, "shape": "4096x3072", "dtype": dtype}
            name = f"{form} 4096x3072 {SHORT[dtype]}: gelu fwd, bwd, bias_gelu fwd, bwd"
            yield Goal(name, wanted, "x", tuple(speed(op, which, **case) for op, which in cases))
            yield Goal(f"{name}, of the copy rate", 80, "%", tuple(roof(op, which, **case) for op, which in cases))


def _attention() -> Iterator[Goal]:
    def lengths(which: str, dtype: str, *named: str) -> tuple[Measure, ...]:
        shapes = [table[n] for table in (LENGTHS, WIDE) for n in named if n in table]
        return tuple(speed("attention", which, variant="causal", shape=s, dtype=dtype) for s in shapes)

    def rates(dtype: str) -> tuple[Measure, ...]:
        shapes = (*LENGTHS.values(), *WIDE.values())
        return tuple(roof("attention", "fwd", variant="causal", shape=s, dtype=dtype) for s in shapes)

    short, middle, long = ("256", "512"), "1024", "2048"
    causal = "attention causal fwd"
    yield Goal(f"{causal} fp32, d64 T 256, 512, 1024, d128 T 256", 2, "x", lengths("fwd", BOTH[0], *short, middle))
    yield Goal(f"{causal} fp32, d64, d128 T 2048", 1.6, "x", lengths("fwd", BOTH[0], long))
    yield Goal(f"{causal} bf16, d64 T 256, 512, d128 T 256", 3.5, "x", lengths("fwd", BOTH[1], *short))
    yield Goal(f"{causal} bf16, d64 T 1024, 2048, d128 T 2048", 3, "x", lengths("fwd", BOTH[1], middle, long))
    full = {"variant": "full", "shape": LENGTHS["1024"]}
    for dtype, forward, backward, share in ((BOTH[0], 1.2, 1.5, 100), (BOTH[1], 2.0, 2.5, 80)):
        short_name = SHORT[dtype]
        fwd, bwd = (speed("attention", which, dtype=dtype, **full) for which in ("fwd", "bwd"))
        yield Goal(f"attention full fwd {short_name}, d64 T 1024", forward, "x", (fwd,))
        name = f"attention bwd {short_name}, causal d64 T 256, 512, 1024, 2048, d128 T 256, 2048, full d64 T 1024"
        yield Goal(name, backward, "x", (*lengths("bwd", dtype, *LENGTHS), bwd))
        name = f"{causal} {short_name}, d64 T 256, 512, 1024, 2048, d128 T 256, 2048, of the GEMM rate"
        yield Goal(name, share, "%", rates(dtype))
        plain = {"variant": "causal", "shape": LENGTHS["512"], "dtype": dtype}
        variants = ("padding", "bias", "dropout", "gqa")
        times = tuple(inverse(between("attention", "fwd", plain | {"variant": v}, plain, True)) for v in variants)
        name = f"attention fwd {short_name}, padding, bias, dropout, GQA: time a FLOP over plain causal"
        yield Goal(name, 1.2, "x", times, at_most=True)
    for dtype, wanted in zip(BOTH, (1.2, 5.0), strict=True):
        decode = speed("attention", "fwd", variant="decode", shape=LENGTHS["1024"], dtype=dtype)
        yield Goal(f"attention of one query and 1024 keys, {SHORT[dtype]}", wanted, "x", (decode,))


def _losses() -> Iterator[Goal]:
    for dtype in BOTH:
        case = {"shape": "1024x50257", "dtype": dtype}
        measure = speed("cross_entropy", "full", **case)
        yield Goal(f"cross_entropy 1024x50257 {SHORT[dtype]} fwd + bwd", 2.5, "x", (measure,))
        linear = {"shape": "1024x768x50257", "dtype": dtype}
        to_torch, to_fused = (speed("linear_cross_entropy", "full", p, **linear) for p in ("torch", "torch-fused"))
        name = f"linear_cross_entropy 1024x768x50257 {SHORT[dtype]}"
        yield Goal(f"{name}, of linear and cross_entropy", 1.11, "x", (to_torch,))
        yield Goal(f"{name}, of torch's own F.linear_cross_entropy", 1, "x", (to_fused,))
        extra = beyond_gradients(1024, 768, 50257, dtype)
        yield Goal(f"{name}, extra memory, of the logits", 10, "%", (extra,), at_most=True)


def _engine() -> Iterator[Goal]:
    adamw = speed("adamw", "full", shape="12x768x50257", dtype="float32")
    yield Goal("gradient clipping and AdamW, fp32", 1.5, "x", (adamw,))
    for dtype, plain, default in ((BOTH[1], 1.25, 1.6), (BOTH[0], 1.04, 1.2)):
        case = {**GPT, "dtype": dtype}
        name = f"GPT-2 124M training step 4x256 {SHORT[dtype]}"
        yield Goal(name, plain, "x", (speed("train", "full", **case),))
        if dtype == "bfloat16":
            yield Goal(f"{name}, of torch.compile", 1.1, "x", (speed("train", "full", "compile", **case),))
        as_it_comes = speed("train", "full", allocator="default", **case)
        yield Goal(f"{name}, default malloc", default, "x", (as_it_comes,))
        yield Goal(f"{name}, peak memory, of PyTorch's", 75, "%", (memory("train", "full", **case),), at_most=True)
    yield Goal("the same in fp32, of the GEMM rate", 95, "%", (roof("train", "full", **GPT, dtype="float32"),))
    generated = {"shape": "1x16x128", "dtype": "bfloat16"}
    for scheme, wanted in (("", 2.5), (" int8", 4.0)):
        measure = _generation(scheme, generated)
        yield Goal(f"GPT-2 124M generation{scheme or ' bf16'}, of transformers in bf16", wanted, "x", (measure,))
    lean = tuple(speed("generate", "fwd", variant=f"gpt2-124m{s}", **generated) for s in ("", " int8", " int4"))
    yield Goal("GPT-2 124M generation bf16, int8, int4, of a static-cache loop in bf16", 1.5, "x", lean)


def _generation(scheme: str, case: dict) -> Measure:
    def measure(results: Results) -> float | None:
        ours = row(results, "generate", "fwd", variant=f"gpt2-124m{scheme}", **case)
        theirs = row(results, "generate", "fwd", "transformers", variant="gpt2-124m", **case)
        return theirs.median / ours.median if ours and theirs and ours.median and theirs.median else None

    return measure


def _linear() -> Iterator[Goal]:
    shapes = ("1x768x768", "1x3072x768", "1x768x3072", "1x50257x768", "8x3072x768")
    cases = [{"shape": shape, "dtype": "bfloat16"} for shape in shapes]
    name = "linear 1x768x768, 1x3072x768, 1x768x3072, 1x50257x768, 8x3072x768"
    plain = [case | {"variant": "plain"} for case in cases]
    yield Goal(f"{name} bf16", 2, "x", tuple(speed("linear", "fwd", **case) for case in plain))
    yield Goal(f"{name} bf16, of the read rate", 80, "%", tuple(roof("linear", "fwd", **case) for case in plain))
    for scheme, wanted in (("int8", 1.7), ("int4", 2.5)):
        pairs = zip(cases, plain, strict=True)
        gains = tuple(between("linear", "fwd", case | {"variant": scheme}, other) for case, other in pairs)
        yield Goal(f"{name} {scheme}, of our bf16", wanted, "x", gains)


def _small() -> Iterator[Goal]:
    for dtype in BOTH:
        calls = (
            speed("layer_norm", "fwd", shape="1x768", dtype=dtype),
            speed("gelu", "fwd", variant="tanh", shape="1x3072", dtype=dtype),
            speed("attention", "fwd", variant="full", shape="1x12x1x64", dtype=dtype),
        )
        name = f"one row of layer_norm, gelu, attention, {SHORT[dtype]}: time over PyTorch's"
        yield Goal(name, 1.5, "x", tuple(inverse(call) for call in calls), at_most=True)


def _scaling() -> Iterator[Goal]:
    works = (
        ("attention", "fwd", {"variant": "causal", "shape": LENGTHS["1024"]}),
        ("attention", "bwd", {"variant": "causal", "shape": LENGTHS["1024"]}),
        ("gelu", "fwd", {"variant": "tanh", "shape": "4096x3072"}),
        ("gelu", "bwd", {"variant": "tanh", "shape": "4096x3072"}),
        ("cross_entropy", "full", {"shape": "1024x50257"}),
    )
    for dtype in BOTH:
        gains = tuple(
            between(op, which, case | {"dtype": dtype, "threads": 2}, case | {"dtype": dtype, "threads": 1})
            for op, which, case in works
        )
        name = f"two threads over one, {SHORT[dtype]}: attention fwd, bwd, gelu fwd, bwd, cross_entropy"
        yield Goal(name, 1.8, "x", gains)


def _models() -> Iterator[Goal]:
    def accelerated(variant: str, which: str = "fwd", shape: str = "8x128") -> tuple[Measure, ...]:
        case = {"variant": variant, "shape": shape}
        return tuple(speed("huggingface", which, "transformers", dtype=dtype, **case) for dtype in BOTH)

    name = "transformers' BERT base 8x128 accelerated, fp32, bf16"
    yield Goal(f"{name}: inference", 1.3, "x", accelerated("bert-base"))
    yield Goal(f"{name}: inference with padding", 1.6, "x", accelerated("bert-base-padded"))
    yield Goal(f"{name}: training with padding", 1.2, "x", accelerated("bert-base-padded-train", "full"))
    least = tuple(slowest("huggingface", "transformers", dtype) for dtype in BOTH)
    yield Goal("the slowest accelerated model of transformers, fp32, bf16", 1, "x", least)


def _lesser_sets() -> Iterator[Goal]:
    """What a CPU without AVX-512 has: against PyTorch without it too, as there, and against one that keeps it."""
    cases = {
        "layer_norm 4096x768 fwd, bwd, 16384x1024 fwd, bwd": [
            ("layer_norm", which, {"shape": shape}) for shape in NORMS for which in ("fwd", "bwd")
        ],
        "gelu 4096x3072 tanh fwd, bwd, erf fwd, bwd": [
            ("gelu", which, {"variant": form, "shape": "4096x3072"})
            for form in ("tanh", "erf")
            for which in ("fwd", "bwd")
        ],
        "cross_entropy 1024x50257 fwd, fwd + bwd": [
            ("cross_entropy", which, {"shape": "1024x50257"}) for which in ("fwd", "full")
        ],
    }
    for isa, name in (("avx2", "AVX2"), ("baseline", "SSE2")):
        for alike, whom in ((True, "on both sides"), (False, "against AVX-512")):
            for dtype in BOTH:
                for works, calls in cases.items():
                    speeds = (speed(op, which, dtype=dtype, isa=isa, **case) for op, which, case in calls)
                    yield Goal(f"{name} {whom}, {SHORT[dtype]}: {works}", 1, "x", tuple(held(s, alike) for s in speeds))


def _digits(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "%" else f"{value:.2f}"


def table(files: list[Results]) -> str:
    """The goals as a Markdown table.

    Args:
        files: searched in this order for each measurement.
    """
    lines = ["| work | goal | measured | |", "|---|--:|---|---|"]
    for goal in GOALS:
        values = goal.values(files)
        shown = ", ".join("-" if v is None else _digits(v, goal.unit) + goal.unit for v in values)
        sign = "<=" if goal.at_most else ">="
        wanted = _digits(goal.wanted, goal.unit) + goal.unit
        lines.append(f"| {goal.work} | {sign} {wanted} | {shown} | {_verdict(goal, values)} |")
    return "\n".join(lines)


def _verdict(goal: Goal, values: list[float | None]) -> str:
    if any(v is not None and not goal.met(v) for v in values):
        return f"missed: {REASONS[goal.work]}" if goal.work in REASONS else "missed"
    return "not all measured" if None in values else "met"


REASONS: dict[str, str] = {
    "layer_norm 16384x1024 fp32 fwd, bwd, of the copy rate": "beside neighbours the rates of memory change within a "
    "run: 46 to 141 % in five",
    "layer_norm 16384x1024 bf16 fwd, bwd, of the copy rate": "the same",
    "tanh 4096x3072 fp32: gelu fwd, bwd, bias_gelu fwd, bwd": "memory decides: backward moves more than the copy "
    "rate, and PyTorch does it at a quarter to a third of that",
    "tanh 4096x3072 bf16: gelu fwd, bwd, bias_gelu fwd, bwd, of the copy rate": "beside neighbours the rates of "
    "memory change within a run",
    "erf 4096x3072 bf16: gelu fwd, bwd, bias_gelu fwd, bwd, of the copy rate": "the same",
    "attention causal fwd fp32, d64 T 256, 512, 1024, d128 T 256": "1.6 to 2.0 times at T 1024 in four runs, where "
    "the goal takes nine tenths of what the cores can multiply",
    "attention causal fwd fp32, d64, d128 T 2048": "the goal takes 75 to 80 % of what the cores can multiply, and "
    "exponentials and packing take 10 to 20 % of the time",
    "attention causal fwd bf16, d64 T 1024, 2048, d128 T 2048": "at d128 PyTorch runs at 29 % of the GEMM rate; the "
    "goal is 88 %, and exponentials take a sixth of the time",
    "attention causal fwd fp32, d64 T 256, 512, 1024, 2048, d128 T 256, 2048, of the GEMM rate": "the rate is our "
    "own on one large product, higher than the library's; packing, exponentials and outputs take a third of the time "
    "at T 256",
    "attention bwd bf16, causal d64 T 256, 512, 1024, 2048, d128 T 256, 2048, full d64 T 1024": "full, ours is at 80 "
    "% of what the cores can multiply, and the goal at 108 %; at d128 the goal is at 80 %",
    "attention causal fwd bf16, d64 T 256, 512, 1024, 2048, d128 T 256, 2048, of the GEMM rate": "the same, at the "
    "short lengths",
    "attention fwd bf16, padding, bias, dropout, GQA: time a FLOP over plain causal": "dropout's random numbers take "
    "0.4 ns a score",
    "attention of one query and 1024 keys, fp32": "both read the keys and values from the last cache at twice the "
    "rate of the memory",
    "linear_cross_entropy 1024x768x50257 bf16, of linear and cross_entropy": "three products at our rate, 85 to 90 % "
    "of the peak, are 0.85 of PyTorch's time, and 0.22 of one is made again to hold few logits; 0.99 to 1.15 times "
    "in five runs",
    "gradient clipping and AdamW, fp32": "both are bound by memory: ours moves 32 bytes a parameter, and PyTorch 40; "
    "1.1 to 1.6 times in six runs",
    "GPT-2 124M training step 4x256 fp32, peak memory, of PyTorch's": "parameters, gradients and both moments alone "
    "are 77 to 80 %; 86 to 98 %, by what either heap keeps",
    "the same in fp32, of the GEMM rate": "the rate is our own on one large product, higher than the library's",
    "linear 1x768x768, 1x3072x768, 1x768x3072, 1x50257x768, 8x3072x768 int8, of our bf16": "with one row 1.5 to 2.2 "
    "times in two runs, by the memory of the moment; with eight a dot product holds as many 16-bit words as pairs of "
    "bf16; x in 8 bits would be less accurate",
    "linear 1x768x768, 1x3072x768, 1x768x3072, 1x50257x768, 8x3072x768 int4, of our bf16": "the same; of 0.3 MB a "
    "call and the waking of a thread take a third of the time",
    "two threads over one, fp32: attention fwd, bwd, gelu fwd, bwd, cross_entropy": "attention 1.6 to 2.0 in five "
    "runs; one thread takes more than half of the memory's rate",
    "two threads over one, bf16: attention fwd, bwd, gelu fwd, bwd, cross_entropy": "the same",
    "transformers' BERT base 8x128 accelerated, fp32, bf16: inference": "in bf16 both run at the rate of large "
    "products, transformers at 70 to 75 % of the peak and ours at 85 to 90; with AMX it is at 1.41, by the other "
    "table of these models",
    "the slowest accelerated model of transformers, fp32, bf16": "of the three rounds of Qwen 3's training in fp32 "
    "two were held up; by the fastest it is 1.37 times, and the next slowest case is at 1.08",
    "SSE2 against AVX-512, fp32: gelu 4096x3072 tanh fwd, bwd, erf fwd, bwd": "PyTorch keeps its AVX-512, and takes "
    "fewer instructions for sixteen values than four take here, 47",
    "SSE2 against AVX-512, fp32: cross_entropy 1024x50257 fwd, fwd + bwd": "PyTorch keeps its AVX-512, four times as "
    "wide",
    "SSE2 against AVX-512, bf16: layer_norm 4096x768 fwd, bwd, 16384x1024 fwd, bwd": "the same, and bf16 has to be "
    "widened and rounded in many instructions",
    "SSE2 against AVX-512, bf16: cross_entropy 1024x50257 fwd, fwd + bwd": "the same",
}

PARTS = (_norms, _gelu, _attention, _losses, _engine, _linear, _small, _scaling, _models, _lesser_sets)
GOALS = tuple(goal for part in PARTS for goal in part())
