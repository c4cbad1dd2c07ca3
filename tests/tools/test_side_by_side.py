"""The counts of docs/design/side_by_side.md: right where they are known, and ours no worse than they were."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import sass

ROOT = Path(__file__).resolve().parents[2]

# As nvdisasm prints a kernel: two nested loops, a slow path and padding, put together by hand.
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], !P0 ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0080*/              @!P2 BRA `(.L_x_0) ;
        /*0090*/              @P3 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;
.L_x_2:
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*00d0*/                   NOP;
"""


def test_a_listing_is_split_into_its_loops():
    outside, outer, inner = sass.regions(LISTING)
    assert (outside.instructions, outer.instructions, inner.instructions) == (5, 3, 4)
    assert (outside.depth, outer.depth, inner.depth) == (0, 1, 2)
    assert (outside.loads, outer.loads, inner.loads) == ({16: 1}, {2: 1}, {16: 1})
    assert (outside.stores, outer.stores, inner.stores) == ({4: 1}, {8: 1}, {})
    assert (outside.stream, outer.stored, inner.names["FADD"]) == (16, 8, 1)
    assert not sass.crossing([outside, outer, inner])


def test_code_without_loops_is_one_region():
    (outside,) = sass.regions("        /*0000*/                   MOV R1, c[0x0][0x28] ;\n        /*0010*/  EXIT ;\n")
    assert (outside.instructions, outside.stream, outside.stored) == (2, 0, 0)


def test_a_jump_back_from_behind_the_last_exit_makes_no_loop():
    slow = LISTING.replace("BRA `(.L_x_3)", "BRA `(.L_x_1)")
    assert [region.instructions for region in sass.regions(slow)] == [6, 3, 4]


def test_loops_that_overlap_are_found():
    overlapping = LISTING.replace("@P1 BRA `(.L_x_1)", "NOP").replace("@P3 BRA `(.L_x_2)", "@P3 BRA `(.L_x_1)")
    assert sass.crossing(sass.regions(overlapping))


def _printed(script, *arguments):
    """JSON lines of a script of the repository, run outside the interpreter."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "tools"), "TRITON_DISABLE_LINE_INFO": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.gpu_code
def test_counts_of_kernels_whose_source_tells_them():
    """A thread has 8 elements of a block: one load and store of 16 bytes of bfloat16, two of float32."""
    found = {(line["arch"], line["case"]): line["regions"] for line in _printed("tests/tools/known_kernels.py")}
    assert len(found) == 6
    for (_, case), (outside, *loops) in found.items():
        if case.startswith("copy"):
            accesses = {"16": 1 if "bfloat16" in case else 2}
            assert (outside["loads"], outside["stores"], loops) == (accesses, accesses, [])
        else:
            reading = [loop for loop in loops if loop["loads"]]  # ptxas may make one of four turns and one for the rest
            assert reading
            for loop in reading:
                assert set(loop["loads"]) == {"16"}
                assert (loop["stores"], loop["names"]["FADD"]) == ({}, 4 * loop["loads"]["16"])
            assert outside["stores"] == {"16": 2}


# Of our kernels for sm_90: instructions an element (of attention a tile), with a twentieth for another compiler.
BOUNDS = {
    ("layer_norm", 1024): 12.8, ("layer_norm", 4096): 14.0, ("layer_norm", 8192): 14.4,
    ("rms_norm", 1024): 7.5, ("rms_norm", 4096): 8.2, ("rms_norm", 8192): 8.4,
    ("layer_norm_bwd", 1024): 19.1, ("layer_norm_bwd", 4096): 16.0, ("layer_norm_bwd", 8192): 15.2,
    ("rms_norm_bwd", 1024): 13.9, ("rms_norm_bwd", 4096): 11.8, ("rms_norm_bwd", 8192): 11.2,
    ("cross_entropy", 50257): 23.6, ("cross_entropy", 50304): 18.1, ("cross_entropy", 128256): 15.8,
    ("cross_entropy_loss", 50257): 11.4, ("cross_entropy_loss", 50304): 9.2, ("cross_entropy_loss", 128256): 8.0,
    ("attention", 64): 545, ("attention", 128): 375, ("attention, causal", 64): 545, ("attention, causal", 128): 377,
}  # fmt: skip


@pytest.mark.gpu_code
def test_our_kernels_take_no_more_than_they_did():
    found = {(line["op"], line["N"]): line for line in _printed("tools/side_by_side.py", "--ours", "sm_90")}
    assert set(found) == set(BOUNDS)
    over = {key: line for key, line in found.items() if (line["per_element"] or line["loop"]) > BOUNDS[key]}
    assert not over
    assert not [line for line in found.values() if line["spills"] or line["stack"]]
    narrow = [key for key, line in found.items() if line["per_element"] and line["wide"] < 0.99 and key[1] % 16 == 0]
    assert not narrow


def test_the_page_shows_what_the_results_file_says():
    text = (ROOT / "docs/design/side_by_side.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"`benchmarks/results/(\S+-side-by-side\.json)`", text)
    lines = json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))["lines"]
    assert {line["who"] for line in lines} == {"fastlm", "liger", "fla", "tutorial"}
    rows = re.findall(r"^\| `", text, re.MULTILINE)
    assert len(rows) == len(lines)
    for line in lines:
        measure = f"{line['per_element']:.1f}" if line["per_element"] else str(line["loop"])
        assert re.search(rf"^\| `{line['op']}` \| {line['N']} \| .* {measure} ", text, re.MULTILINE), line
