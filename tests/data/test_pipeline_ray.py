"""The stage of documents on a Ray cluster of two nodes: the bytes of one process."""

import gzip
import json
import random

import pytest

from fastlm.data import PrepareConfig, prepare
from fastlm.data.pipeline import Job, StepSpec, make_shards
from fastlm.data.pipeline.local import LocalExecutor
from fastlm.data.sources import SourceOptions, find
from fastlm.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def _write(folder):
    """Two files of documents, a tenth of them with copies."""
    rng = random.Random(0)
    for name in ("a.jsonl", "b.jsonl.gz"):
        texts = [" ".join(f"word{rng.randrange(99)}" for _ in range(30)) for _ in range(900)]
        rows = [{"text": text} for text in texts + texts[:100]]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)


@pytest.mark.filterwarnings("ignore")
def test_two_nodes_make_the_bytes_of_one_process(cluster, tmp_path, monkeypatch):
    from fastlm.data.pipeline.distributed import RayExecutor

    monkeypatch.setattr("fastlm.data.sources.units.UNIT_BYTES", 20_000)
    _write(tmp_path)
    files = find([tmp_path / "*.jsonl*"], [])
    made = {}
    for name, executor in {"local": LocalExecutor(1), "ray": RayExecutor(cluster)}.items():
        job = Job((StepSpec("length", {"min_words": 30}), StepSpec("whitespace", {})), SourceOptions(), tmp_path / name)
        make_shards(job, files, executor, lambda done, total: None)
        made[name] = {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
    assert len(made["local"]) > 10
    assert made["ray"] == made["local"]
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b"{\n")
    with pytest.raises(DataError, match=r"a.jsonl: row 1001: is not JSON"):
        make_shards(job, files, RayExecutor(cluster), lambda done, total: None)


@pytest.mark.filterwarnings("ignore")
def test_prepare_on_two_nodes_gives_the_files_of_one_process(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.data.sources.units.UNIT_BYTES", 20_000)
    _write(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[step]]\nname = "whitespace"\n\n[exact]\n\n[near]\nthreshold = 0.8\n')
    made = {}
    for name, options in {"local": {"workers": 1}, "ray": {"executor": "ray", "ray_address": cluster}}.items():
        inputs = (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
        out = tmp_path / name / "out"
        prepare(PrepareConfig(inputs=inputs, out=out, recipe=str(recipe), vocab_size=300, **options))
        made[name] = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    assert made["ray"] == made["local"]
    assert json.loads(made["ray"]["manifest.json"])["preparation"]["documents"]["duplicates"]["exact duplicate"] == 200
