"""The README's table of ops is what their specifications say."""

import pytest

import op_table
from fastlm._core import proofs, registry


def test_the_readme_has_the_table():
    text = op_table.README.read_text(encoding="utf-8")
    assert op_table.filled(text) == text, "run  python tools/op_table.py"


def test_each_backend_of_each_op_has_its_cell():
    lines = op_table.table().splitlines()[2:]
    assert len(lines) == len(registry.ops())
    for op, line in zip(registry.ops(), lines, strict=True):
        name, options, *cells = line.strip("| ").split(" | ")
        assert name.startswith(f"`{op.name}`")
        assert all(f"`{option}`" in options for option in op.options)
        assert [c != "-" for c in cells] == [op.backend(b) is not None for b in ("cpu", "triton", "cuda", "torch")]


def test_what_pytorchs_operator_cannot_do_is_said():
    attention = registry.get("scaled_dot_product_attention")
    assert op_table.cell(attention, "torch") == "without `dropout_p`, `window`, `softcap`, `return_lse`"
    assert op_table.cell(registry.get("layer_norm"), "torch") == "yes"


def test_a_shipped_proof_is_named(tmp_path, monkeypatch):
    op = registry.get("swiglu")
    monkeypatch.setattr(proofs, "SHIPPED", tmp_path)
    assert op_table.cell(op, "triton") == "unproved"
    for architecture, verdict in (("sm_90", "right"), ("gfx942", "right"), ("sm_80", "wrong")):
        key = proofs.key_of(proofs.Properties("a GPU", architecture, "1", "CUDA 13.0"))
        entry = proofs.Entry("swiglu", "triton", "float32", "plain", verdict, "2026-11-29", 8)
        (tmp_path / key.file_name).write_text(proofs.dump(proofs.Proof(key, {entry.name: entry})))
    assert op_table.cell(op, "triton") == "gfx942, sm_90"
    assert op_table.cell(registry.get("gelu"), "triton") == "unproved"


@pytest.mark.parametrize("text", ["", "<!-- ops -->\n", "<!-- ops -->\n<!-- /ops -->\n" * 2])
def test_a_text_without_one_place_for_it_is_refused(text):
    with pytest.raises(ValueError, match="no one place"):
        op_table.filled(text)
