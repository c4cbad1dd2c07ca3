"""A run's best model as a folder for other software."""

from __future__ import annotations

import shutil
from pathlib import Path

from .._core.files import replacing
from ..errors import ConfigError
from ..formats.hf.files import CONFIG, INDEX, WHOLE
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


def check_export(folder: Path, own: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another model, before anything is trained for it.

    Args:
        own: whether what is there is of the run that is resumed.

    Raises:
        ConfigError: naming the folder and what is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"export is '{folder}', a file, expected a folder")
    found = [name for name in (CONFIG, WHOLE, INDEX) if (folder / name).exists()]
    if found and not (own or overwrite):
        raise ConfigError(f"export is '{folder}', which holds {found[0]}: give another folder, or --overwrite")
