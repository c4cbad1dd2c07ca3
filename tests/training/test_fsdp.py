"""FSDP2 over our models, stand-ins and optimizer: two processes give what one gives with the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("this torch has no FSDP2", allow_module_level=True)

from training import fsdp_worker

WORKER = Path(fsdp_worker.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes has to say about each case."""
    folder = tmp_path_factory.mktemp("fsdp")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        command = [sys.executable, str(WORKER), str(rank), str(folder / "store"), str(folder / f"out{rank}")]
        with (folder / f"log{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, f"process {rank} ended with {code}: {(folder / f'log{rank}').read_text()[-3000:]}"
    return [json.loads((folder / f"out{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*fsdp_worker.CASES, "mixed lists"])
def test_sharded_loss_gradients_and_step_equal_the_whole_models(results, name):
    for rank, found in enumerate(results):
        assert found[name] == "", f"process {rank}: {found[name]}"
