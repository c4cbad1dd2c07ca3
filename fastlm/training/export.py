"""A run's best model as a folder for other software."""

from __future__ import annotations

import shutil
from pathlib import Path

from .._core.files import replacing
from ..formats.load import load, save


def export(run: Path, folder: Path) -> None:
    """Write the best checkpoint of a run, or its last where none was the best, as a Hugging Face folder.

    Raises:
        CheckpointError: for a model that has no such layout, and if the files cannot be written.
    """
    save(load(run), folder)
    tokenizer = run / "tokenizer.json"
    if tokenizer.is_file():
        with replacing(folder / "tokenizer.json") as temporary:
            shutil.copyfile(tokenizer, temporary)
