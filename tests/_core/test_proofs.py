"""What the proofs of a GPU's kernels say decides who serves it, and whatever is not a proof of that GPU does not.

Requests are made by hand, so that no GPU is needed; files are written by the writer, under keys made as a GPU's are.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastlm
from fastlm._core import dispatch, proofs
from fastlm._core.architecture import SM90
from fastlm._core.proofs import Entry, Properties, Timing
from fastlm.backends import cuda as _native_cuda
from fastlm.errors import DataError

H200 = Properties("NVIDIA H200", "sm_90", "570.86.10", "CUDA 13.0")
MI300X = Properties("AMD Instinct MI300X", "gfx942", "6.12.12", "ROCm 7.1")
DAY = "2026-11-29"


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A pretended GPU that both kernels' builds serve, and an empty folder of proofs; yields its key."""
    monkeypatch.setenv("FASTLM_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setattr(dispatch, "oldest_architecture", lambda: SM90)
    for name, value in {"emulated": False, "unusable": lambda: None, "architectures": lambda: ("80", "90a")}.items():
        monkeypatch.setattr(_native_cuda, name, value)
    key = proofs.key_of(H200)
    with proofs.pretend(key):
        dispatch.clear_cache()
        yield key
    dispatch.clear_cache()


def bits(*extents):
    return tuple(n.bit_length() for n in extents)


def timing(backend, ratio, shape=(4096, 1024), which="fwd", other="torch", variant=""):
    """Of rows: `backend` is `ratio` times as fast as the other."""
    size = bits(shape[0] * shape[1], shape[1])
    return Timing(shape, variant, which, size, {backend: 1e-5, other: ratio * 1e-5})


def entry(op, backend, *timings, dtype="bfloat16", features="plain", verdict="right", **more):
    return Entry(op, backend, dtype, features, verdict, DAY, 48, timings=timings, **more)


def request(extents=(4096 * 1024, 1024), dtype=torch.bfloat16, features=(), gpu=0, grad=False):
    return dispatch.Request("cuda", dtype, features, gpu, bits(*extents), grad)


def write(key, *entries):
    path = proofs.add(key, list(entries))
    dispatch.clear_cache()
    return path


def chosen(op="layer_norm", asked=None):
    return dispatch.choose(op, asked or request())


def reason(op, backend, asked=None):
    row = next(row for row in dispatch.backends(op) if row.name == backend)
    return dispatch.held_back(op, row, asked or request())


def test_nothing_is_chosen_over_pytorch_without_a_proof():
    assert chosen() == "torch"
    assert reason("layer_norm", "triton") == reason("layer_norm", "cuda") == "unproved: run `fastlm tune`"
    assert chosen("add_layer_norm") == "triton"  # over the reference alone


def test_a_right_and_faster_kernel_is_chosen(gpu):
    write(gpu, entry("layer_norm", "triton", timing("triton", 1.31)))
    assert chosen() == "triton"
    told = proofs.find("layer_norm", "triton", request())
    assert told.text == "proved on this GPU on 2026-11-29, 1.31x torch at (4096, 1024)"
    assert chosen("gelu") == "torch"
    assert reason("gelu", "triton") == "unproved for bfloat16, plain: run `fastlm tune`"
    assert chosen(asked=request(dtype=torch.float16)) == "torch"


def test_a_slower_kernel_is_not(gpu):
    write(gpu, entry("layer_norm", "triton", timing("triton", 0.8)))
    assert chosen() == "torch"
    assert reason("layer_norm", "triton") == "slower here: 0.80x torch at (4096, 1024)"


def test_the_fastest_of_two_right_kernels_is_chosen(gpu):
    write(gpu, entry("layer_norm", "triton", timing("triton", 1.2)), entry("layer_norm", "cuda", timing("cuda", 1.5)))
    assert chosen() == "cuda"
    assert reason("layer_norm", "triton") == "slower here: 0.80x cuda at (4096, 1024)"
    write(gpu, entry("layer_norm", "cuda", timing("cuda", 1.5), verdict="crashed", reason="SIGSEGV"))
    assert chosen() == "triton"


@pytest.mark.parametrize(
    ("verdict", "cause", "command", "text"),
    [
        ("wrong", "gradient: dx: error 3.0e-02 > 1.0e-03", "fastlm verify --op layer_norm --seed 17",
         "wrong here: gradient: dx: error 3.0e-02 > 1.0e-03 (fastlm verify --op layer_norm --seed 17 repeats it)"),
        ("crashed", "SIGSEGV", "", "crashed here: SIGSEGV"),
        ("hung", "no sign of life for 180 s", "", "hung here: no sign of life for 180 s"),
    ],
)  # fmt: skip
def test_what_is_wrong_serves_nobody(gpu, verdict, cause, command, text):
    broken = {"verdict": verdict, "reason": cause, "command": command}
    write(gpu, entry("layer_norm", "triton", **broken), entry("swiglu", "triton", **broken))
    assert chosen() == "torch"
    assert reason("layer_norm", "triton") == text
    assert chosen("swiglu") == "reference"  # which is slow, and right
    with fastlm.backend("triton"):
        assert dispatch.choose("swiglu", request()) == "triton"  # an explicit choice is never replaced


def test_a_kernel_without_times_is_not_chosen_over_pytorch(gpu):
    write(gpu, entry("layer_norm", "triton"), entry("swiglu", "triton"))
    assert chosen() == "torch"
    assert reason("layer_norm", "triton") == "proved on this GPU on 2026-11-29, but not timed with these features"
    assert chosen("swiglu") == "triton"


def test_a_kernel_slower_than_the_reference_is_not_chosen(gpu):
    write(gpu, entry("swiglu", "triton", timing("triton", 0.5, other="reference")))
    assert chosen("swiglu") == "reference"
    assert reason("swiglu", "triton") == "slower here: 0.50x reference at (4096, 1024)"


def test_the_nearest_measured_shape_decides(gpu):
    write(gpu, entry("layer_norm", "triton", timing("triton", 1.5, (16384, 8192)), timing("triton", 0.6, (64, 768))))
    assert chosen(asked=request((10000 * 5000, 5000))) == "triton"
    assert chosen(asked=request((16 * 700, 700))) == "torch"
    assert reason("layer_norm", "triton", request((16 * 700, 700))) == "slower here: 0.60x torch at (64, 768)"


def test_of_two_forms_of_a_shape_the_worse_decides(gpu):
    forms = (timing("triton", 1.5, variant="tanh"), timing("triton", 0.9, variant="erf"))
    write(gpu, entry("gelu", "triton", *forms))
    assert chosen("gelu") == "torch"


def test_training_goes_by_both_passes(gpu):
    write(gpu, entry("layer_norm", "triton", timing("triton", 2.0), timing("triton", 0.5, which="bwd")))
    assert chosen() == "triton"
    assert chosen(asked=request(grad=True)) == "triton"  # (2 + 0.5) / 2
    assert proofs.find("layer_norm", "triton", request(grad=True)).ratio == pytest.approx(1.25)
    slow = Timing((4096, 1024), "", "bwd", bits(4096 * 1024, 1024), {"triton": 4e-5, "torch": 1e-5})
    write(gpu, entry("layer_norm", "triton", timing("triton", 2.0), slow))
    assert chosen() == "triton"
    assert chosen(asked=request(grad=True)) == "torch"


ATTENTION = (("head_dim", 64), ("mask", "none"), ("dropout", False), ("lse", False), ("window", False),
             ("softcap", False), ("short_decode", False))  # fmt: skip


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ((), "plain"),
        (ATTENTION, "plain"),
        ((*ATTENTION[:3], ("lse", True)), "plain"),
        ((("head_dim", 128), ("mask", "bool")), "mask=bool"),
        ((("dropout", True), ("mask", "none")), "dropout"),
        ((("dropout", True), ("mask", "additive")), "several"),
    ],
)
def test_classes_of_features(features, name):
    assert proofs.feature_class(features) == name


def test_a_class_of_features_is_proved_by_itself(gpu):
    op, shape = "scaled_dot_product_attention", (8, 16, 1024, 64)
    timed = Timing(shape, "causal", "fwd", bits(128, 1024, 1024, 64), {"triton": 1e-5, "torch": 2e-5})
    write(gpu, entry(op, "triton", timed), entry(op, "triton", features="mask=bool", verdict="wrong", reason="value"))
    asked = request((128, 1024, 1024, 64), features=ATTENTION)
    assert chosen(op, asked) == "triton"
    masked = tuple((name, "bool" if name == "mask" else value) for name, value in ATTENTION)
    assert chosen(op, asked._replace(features=masked)) == "torch"


def test_each_gpu_goes_by_its_own_proof(gpu):
    amd = proofs.key_of(MI300X)
    write(gpu, entry("layer_norm", "triton", timing("triton", 1.3)))
    write(amd, entry("layer_norm", "triton", timing("triton", 0.7)))
    with proofs.pretend(gpu, amd):
        dispatch.clear_cache()
        assert chosen(asked=request(gpu=0)) == "triton"
        assert chosen(asked=request(gpu=1)) == "torch"
        assert chosen(asked=request(gpu=2)) == "torch"  # of which nothing is known


CHANGES = {
    "driver": ("550.1", "the proof is of driver 550.1, this is 570.86.10"),
    "runtime": ("CUDA 12.4", "the proof is of CUDA 12.4, this is CUDA 13.0"),
    "torch": ("2.9.0", f"the proof is of torch 2.9.0, this is {torch.__version__}"),
    "triton": ("3.6.0", "the proof is of triton 3.6.0, this is "),
    "kernels": ("0123", "the Triton kernels have changed since the proof"),
    "cuda_kernels": ("0123", "the CUDA kernels have changed since the proof"),
}


def test_every_part_of_a_key_counts(gpu):
    assert {*CHANGES, "device", "architecture"} == set(gpu._fields) == set(proofs.FIELDS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_proof_does_not_outlive_a_change_of_its_key(gpu, name):
    before, text = CHANGES[name]
    write(gpu._replace(**{name: before}), entry("layer_norm", "triton", timing("triton", 1.31)))
    assert chosen() == "torch"
    assert reason("layer_norm", "triton").startswith(text)
    assert reason("layer_norm", "triton").endswith(": run `fastlm tune` again")


@pytest.mark.parametrize("name", ["device", "architecture"])
def test_a_proof_of_another_gpu_is_none(gpu, name):
    write(gpu._replace(**{name: "another"}), entry("layer_norm", "triton", timing("triton", 1.31)))
    assert chosen() == "torch"
    assert reason("layer_norm", "triton") == "unproved: run `fastlm tune`"


def test_a_renamed_file_of_another_gpu_is_found_out(gpu):
    path = write(gpu._replace(device="another"), entry("layer_norm", "triton", timing("triton", 1.31)))
    path.rename(path.with_name(gpu.file_name))
    dispatch.clear_cache()
    assert chosen() == "torch"
    assert "the key in it is another one" in reason("layer_norm", "triton")


def _without_a_field(document):
    del document["entries"][0]["verdict"]


DAMAGES = {
    "version": (lambda d: d.update(version=2), "a proof of version 2, this fastlm reads 1"),
    "format": (lambda d: d.update(format="fastlm-bench"), "not a proof"),
    "no key": (lambda d: d.pop("key"), "damaged: 'key'"),
    "key": (lambda d: d["key"].update(torch=2), "torch is 2, expected str"),
    "more key": (lambda d: d["key"].update(more="x"), "damaged: "),
    "entries": (lambda d: d.update(entries={}), "entries is {}, expected list"),
    "entry": (lambda d: d["entries"].append(3), "an entry is 3, expected dict"),
    "a field": (_without_a_field, "damaged: 'verdict'"),
    "verdict": (lambda d: d["entries"][0].update(verdict="fine"), "verdict is 'fine', expected one of right, wrong"),
    "seconds": (lambda d: d["entries"][0]["timings"][0]["seconds"].update(triton=0.0), "expected a number above 0"),
    "no number": (lambda d: d["entries"][0]["timings"][0]["seconds"].update(triton=float("nan")), "seconds of triton"),
    "whose": (lambda d: d["entries"][0]["timings"][0].update(seconds={"cuda": 1.0, "torch": 1.0}), "of triton and"),
    "size": (lambda d: d["entries"][0]["timings"][0].update(size=["a"]), "size is 'a', expected int"),
    "pass": (lambda d: d["entries"][0]["timings"][0].update(which="all"), "expected fwd, bwd or full"),
    "skipped": (lambda d: d["entries"][0].update(skipped="none"), "skipped is 'none', expected list"),
    "tiles": (lambda d: d["entries"][0].update(tiles={"x": [True]}), "tiles is True, expected int"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_proof_is_ignored_with_its_reason(gpu, name):
    path = write(gpu, entry("layer_norm", "triton", timing("triton", 1.31)))
    document = json.loads(path.read_text())
    damage, text = DAMAGES[name]
    damage(document)
    path.write_text(json.dumps(document))
    dispatch.clear_cache()
    with pytest.raises(DataError) as error:
        proofs.load(path)
    assert text in str(error.value)
    assert str(path) in str(error.value)
    assert chosen() == "torch"
    assert text in reason("layer_norm", "triton")
    assert reason("layer_norm", "triton").endswith("run `fastlm tune` again")


@pytest.mark.parametrize("text", ["", "{", '{"format": 3}', "[]", "[" * 100_000, "\udcff"])
def test_what_is_no_proof_is_ignored(gpu, text):
    path = write(gpu, entry("layer_norm", "triton", timing("triton", 1.31)))
    path.write_bytes(text.encode(errors="surrogateescape"))
    dispatch.clear_cache()
    assert chosen() == "torch"
    assert "the proof is damaged" in reason("layer_norm", "triton")


def test_half_a_file_is_ignored(gpu):
    path = write(gpu, entry("layer_norm", "triton", timing("triton", 1.31)))
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 97):
        path.write_text(whole[:length])
        dispatch.clear_cache()
        assert chosen() == "torch"
        assert "damaged" in reason("layer_norm", "triton")


def test_a_shipped_proof_serves_and_the_users_own_comes_first(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "SHIPPED", tmp_path / "shipped")
    proofs.SHIPPED.mkdir()
    shipped = [entry(op, "triton", timing("triton", 1.31)) for op in ("layer_norm", "gelu")]
    (proofs.SHIPPED / "h200.json").write_text(proofs.dump(proofs.Proof(gpu, {e.name: e for e in shipped})))
    dispatch.clear_cache()
    assert (chosen("layer_norm"), chosen("gelu")) == ("triton", "triton")
    write(gpu, entry("gelu", "triton", verdict="wrong", reason="value"))
    assert (chosen("layer_norm"), chosen("gelu")) == ("triton", "torch")


def test_what_is_written_is_read_back(gpu):
    given = [
        entry(
            "layer_norm",
            "triton",
            timing("triton", 1.31),
            skipped=("a case: out of memory",),
            tiles={"gelu.FORWARD 1024,2048": (1, 2)},
        ),
        entry("gelu", "cuda", verdict="hung", reason="no sign of life", command="fastlm verify"),
    ]
    path = write(gpu, *given)
    assert proofs.load(path) == proofs.Proof(gpu, {e.name: e for e in given})
    assert all(not name.startswith(".") for name in os.listdir(path.parent))  # nothing half-written, no lock


def test_entries_of_many_writers_are_all_kept(gpu):
    names = [f"op{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: proofs.add(gpu, [entry(name, "triton")]), names))
    assert {e.op for e in proofs.load(proofs.folder() / gpu.file_name).entries.values()} == set(names)


@pytest.mark.slow
def test_entries_of_two_processes_are_all_kept(gpu):
    code = f"""
import sys
from fastlm._core import proofs
key = proofs.Key(*{tuple(gpu)!r})
for i in range(12):
    proofs.add(key, [proofs.Entry(f"{{sys.argv[1]}}{{i}}", "triton", "float32", "plain", "right", "{DAY}")])
"""
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait(300) for process in running] == [0, 0]
    found = {e.op for e in proofs.load(proofs.folder() / gpu.file_name).entries.values()}
    assert found == {f"{name}{i}" for name in "ab" for i in range(12)}


def test_explain_quotes_the_proof(gpu, monkeypatch):
    """Of a call whose request is a GPU's; the ops make that from a tensor there."""
    write(gpu, entry("layer_norm", "triton", timing("triton", 1.31)), entry("layer_norm", "cuda", timing("cuda", 1.2)))
    told = fastlm.explain(lambda: dispatch.choose("layer_norm", request()))
    assert told.selected == "triton"
    assert told.reasons["triton"] == "selected"
    assert told.reasons["cuda"] == "slower here: 0.92x triton at (4096, 1024)"
    lines = str(told).splitlines()
    assert "  triton     selected: proved on this GPU on 2026-11-29, 1.31x torch at (4096, 1024)" in lines
    assert dispatch.choose("layer_norm", request()) == "triton"


def test_on_the_cpu_nothing_is_read(monkeypatch):
    monkeypatch.setattr(proofs, "state", lambda gpu: pytest.fail("a proof was asked for"))
    x = torch.randn(3, 8, requires_grad=True)
    fastlm.layer_norm(x, 8).sum().backward()
    fastlm.explain(fastlm.gelu, x)
    with fastlm.backend("reference"):
        fastlm.swiglu(x, x)


def test_a_gpu_without_a_proof_is_told_of_once(gpu, monkeypatch):
    told = []
    monkeypatch.setattr(proofs, "on_unproved", told.append)
    chosen()
    chosen("gelu")
    assert [state.key for state in told] == [gpu]
    write(gpu, entry("layer_norm", "triton", timing("triton", 1.31)))
    chosen()
    assert len(told) == 1


@pytest.mark.parametrize(("hip", "expected"), [(None, H200), ("7.1", MI300X)])
def test_a_gpu_is_described_by_what_torch_says_of_it(monkeypatch, hip, expected):
    """ROCm's torch calls its devices "cuda" too, and gfx942 has a capability of (9, 4)."""

    class Found:
        name, gcnArchName = expected.device, "gfx942:sramecc+:xnack-"
        major, minor = (9, 4) if hip else (9, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Found)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    monkeypatch.setattr(proofs, "driver_version", lambda: expected.driver)
    monkeypatch.setattr(proofs, "architecture", proofs.architecture.__wrapped__)  # which keeps what it found
    assert proofs.properties(0) == expected
    assert proofs.properties(1) is None


def test_file_names_are_of_the_key_and_safe():
    key = proofs.key_of(Properties("NVIDIA GeForce RTX 4090 D/../x", "sm_89", "1", "CUDA 13.0"))
    assert key.file_name.startswith("nvidia-geforce-rtx-4090-d-x-sm-89-")
    assert "/" not in key.file_name
    assert key.file_name != key._replace(driver="2").file_name


def test_a_changed_kernel_changes_the_hash(tmp_path, monkeypatch):
    package = tmp_path / "some_kernels"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "inner" / "gelu.py"
    file.write_text("BLOCK = 64\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = proofs.hash_of("some_kernels")
    assert before == proofs.hash_of("some_kernels") != proofs.hash_of("some_kernels", "more")
    file.write_text("BLOCK = 32\n")
    assert proofs.hash_of("some_kernels") != before
    assert "some_kernels" not in sys.modules or not hasattr(sys.modules["some_kernels"], "inner")


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTLM_PROOFS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not sys.platform.startswith("linux") or proofs.folder() == tmp_path / "fastlm" / "proofs"
    before = proofs.folder()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert not sys.platform.startswith("linux") or proofs.folder() == before
