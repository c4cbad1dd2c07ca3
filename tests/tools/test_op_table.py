"""The README's table of ops is what their specifications say."""

import dataclasses

import pytest

import op_table
from fastlm._core import registry


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


def test_a_proof_is_named():
    op = registry.get("swiglu")
    proved = [row._replace(proved=frozenset({90, 80})) if row.name == "triton" else row for row in op.backends]
    assert op_table.cell(op, "triton") == "unproved"
    assert op_table.cell(dataclasses.replace(op, backends=tuple(proved)), "triton") == "sm_80, sm_90"


@pytest.mark.parametrize("text", ["", "<!-- ops -->\n", "<!-- ops -->\n<!-- /ops -->\n" * 2])
def test_a_text_without_one_place_for_it_is_refused(text):
    with pytest.raises(ValueError, match="no one place"):
        op_table.filled(text)
