"""What of `make gpu-check` can be tested without a GPU: how it ends, and that no part takes the others with it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check
from fastlm.cli import main
from gpu_check import Part


def _python(code):
    return [sys.executable, "-c", code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    script = Path(gpu_check.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "gpu-check: torch finds no CUDA device, and only a GPU can prove the GPU kernels"
    ]


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3600)"
    done = gpu_check.run_all(
        [
            Part("fails", _python("raise SystemExit(3)"), 30),
            Part("dies", _python("import os; os.kill(os.getpid(), 11)"), 30),
            Part("hangs", _python(hangs), 1),
            Part("works", _python("print('worked')"), 30),
        ],
        60,
    )
    assert [part["status"] for part in done] == [3, -11, 124, 0]
    assert "worked" in capfd.readouterr().out


def test_an_interrupted_part_can_write_what_it_has(tmp_path):
    file = tmp_path / "rows"
    # Its own handler, since what a shell runs in the background is born without one.
    code = f"""import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try: print("ready", flush=True) or time.sleep(600)
except KeyboardInterrupt: open({str(file)!r}, "w").write("two rows")"""
    process = subprocess.Popen(_python(code), stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        gpu_check._end(process)
    assert file.read_text() == "two rows"


def test_no_time_left_is_no_pass():
    done = gpu_check.run_all([Part("first", _python("import time; time.sleep(60)"), 1), Part("last", [], 30)], 0.5)
    assert [part["status"] for part in done] == [124, 124]


def test_counts_of_a_test_run(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_a(): pass\n\ndef test_b(): assert 0\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    (done,) = gpu_check.run_all([Part("tests", command, 60)], 60)
    assert done["status"] == 1
    assert (done["tests"], done["failures"], done["errors"], done["skipped"]) == (2, 1, 0, 0)


def test_the_result_is_written_whole_and_summed_up(tmp_path):
    result = {"parts": [{"part": "parity", "status": 0, "seconds": 2.5, "tests": 7}], "passed": True}
    path = gpu_check.write_result(tmp_path, "sm_90-2030-01-01T000000+0000", result)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in tmp_path.iterdir()] == ["gpu-check-sm_90-2030-01-01T000000+0000.json"]
    assert gpu_check._summary(result).split() == ["parity", "passed", "2.5", "s", "7", "tests"]


def test_every_benchmark_it_names_exists(tmp_path):
    """Each command is one that `fastlm bench` takes, but for the GPU that is not there; every op is timed."""
    from fastlm._core.registry import ops
    from fastlm.benchmarks import providers, registry

    benches = [part for part in gpu_check.parts(tmp_path, "x") if part.name.startswith("bench ")]
    timed = [b for b in registry.KERNELS if f"bench {b.name}" in {part.name for part in benches}]
    on_gpus = {op.name for op in ops() if {"triton", "cuda"} & {row.name for row in op.backends}}
    assert {op for op in on_gpus if not any(b.times(op) for b in timed)} == set()
    for part in benches:
        op, peers = part.command[4], part.command[part.command.index("--against") + 1]
        assert registry.select(op, "cuda", ["bfloat16"], [], [])
        registry.known(peers.split(","), providers.ALL, "provider")


def test_the_proof_is_made_by_tune(tmp_path):
    """The command is one that `fastlm tune` takes, but for the GPU that is not there."""
    (part,) = (part for part in gpu_check.parts(tmp_path, "x") if part.name == "tune")
    assert part.command[:5] == [sys.executable, "-m", "fastlm.cli", "tune", "--json"]
    assert part.command[5] == str(tmp_path / "proof-x.json")
    if not torch.cuda.is_available():
        assert main(part.command[3:]) == 2


def test_the_sanitizer_sees_every_kernel():
    """The tests it goes through: each CUDA kernel of attention and the norms is launched by some of them."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-k", gpu_check.SMALL]
    expected = [
        "backends/test_cuda_attention.py::test_parity",
        "backends/test_cuda_attention.py::test_decoding_with_everything_else",
        "backends/test_cuda_attention.py::test_gradient_of_a_mask_with_everything_else",
        "backends/test_cuda_hopper.py::test_gradient_of_lse[64-",
        "backends/test_cuda_hopper.py::test_gradient_of_lse[128-",
        "ops/test_layer_norm.py::test_parity",
        "ops/test_rms_norm.py::test_parity",
        "ops/test_gelu.py::test_parity",
        "backends/test_cuda_emulation.py::test_layer_norm_of_wide_rows",
        "backends/test_cuda_emulation.py::test_rms_norm_of_wide_rows",
    ]
    files = sorted({name.partition("::")[0] for name in expected})
    done = subprocess.run([*command, *files], cwd=gpu_check.TESTS, capture_output=True, text=True, timeout=300)
    chosen = [line for line in done.stdout.splitlines() if "cuda" in line.partition("[")[2]]
    for name in expected:
        assert any(name in line for line in chosen), name


@pytest.mark.parametrize("variant", ["padding+dropout", "bias+dropout"])
def test_attention_with_a_mask_and_dropout_is_measured(variant):
    """In the GPU's table in every pass, and right on the CPU, where dropout is off to tell and on to time."""
    from fastlm.benchmarks import registry, roof, worker

    chosen = [case for case in registry.select("attention", "cuda", [], [], []) if case.variant == variant]
    assert {case.dtype for case in chosen} == {"bfloat16", "float16"}
    case = dataclasses.replace(chosen[0], shape=(2, 3, 17, 8))
    rows = worker.run_case(case, "cpu", ["torch"], roof.Roof(10.0, 12.0, {"bfloat16": 0.2}), 0.0)
    served = [row for row in rows if row.provider in ("torch", "fastlm", "fastlm-cpu") and row.status != "unsupported"]
    assert {(row.provider, row.which) for row in served} >= {("torch", which) for which in ("fwd", "bwd", "full")}
    assert all(row.status == "ok" for row in served), served
