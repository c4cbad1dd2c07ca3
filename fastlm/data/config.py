"""The configuration of `prepare`: defaults and checks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, shown
from . import reading
from .dedup import ExactOptions, NearOptions
from .pipeline.recipe import Recipe, load_recipe
from .sources import FORMATS, SourceOptions
from .sources.base import TEXT_COLUMN
from .tokenizers.training import needs_sentencepiece

TRAINED_KINDS = ("bpe", "wordpiece", "unigram")
MOST_CHUNK_BYTES = 1 << 30
MOST_WORKERS = 1024


@dataclass
class PrepareConfig:
    """What to read, how to clean and split it, and where to write."""

    inputs: tuple[Path, ...]
    """Files, folders that are searched recursively, patterns such as 'dumps/*.jsonl.gz', or folders that the datasets
    library saved."""
    out: Path
    """Folder to write: train.bin, val.bin, tokenizer.json and manifest.json."""
    tokenizer: str = "bpe"
    """bpe, wordpiece or unigram (trained on the training split), characters, or the path of an existing one:
    tokenizer.json, vocab.txt, GPT-2's files, SentencePiece's .model, a .tiktoken or GGUF file, or a folder with one."""
    vocab_size: int = 8192
    """The most tokens of a trained tokenizer."""
    special: Literal["auto", "causal", "masked", "seq2seq", "chat"] = "auto"
    """What the special tokens are for, which an existing tokenizer must have; auto: causal for a trained one."""
    val_fraction: float = 0.05
    """Share of the text kept for validation."""
    seed: int = 0
    """Chooses the validation text."""
    split: Literal["auto", "documents", "spans"] = "auto"
    """Validate on whole documents, or on a span of each; auto: documents if that holds out at least ten."""
    glob: tuple[str, ...] = ("*.txt",)
    """Which files of a folder to read."""
    encoding: str = "utf-8"
    """Encoding of the files; utf-8-sig drops a byte order mark."""
    format: Literal["auto", "text", "html", "jsonl", "csv", "tsv", "parquet", "arrow", "warc"] = "auto"
    """What the files are; auto goes by their names, .gz, .zst, .xz and .bz2 aside, and takes the unknown for text."""
    text_column: str = TEXT_COLUMN
    """Column or key of a table that holds the text."""
    meta_columns: tuple[str, ...] = ()
    """Columns of a table to keep beside the text, such as a label, for steps and the report."""
    id_column: str = ""
    """Column of a table that names a document."""
    delimiter: str = ""
    """Between the fields of CSV; by default a comma, and a tab in TSV."""
    quoting: Literal["auto", "minimal", "none"] = "auto"
    """Double quotes around fields of CSV: minimal where needed, none for never; auto: minimal in CSV, none in TSV."""
    header: bool = True
    """The first row of CSV names the columns; where none does, they are called 1, 2 and so on."""
    max_document_bytes: int = 1 << 25
    """The most bytes of a document, but for plain text without a recipe; memory is a dozen times that a worker."""
    on_error: Literal["stop", "skip"] = "stop"
    """A row that cannot be read, or a file from where it is damaged: stop, or leave it out and count it."""
    recipe: str = ""
    """Steps of cleaning: the name of a recipe that comes along (web, books), or a TOML file."""
    without: tuple[str, ...] = ()
    """Steps of the recipe to leave out."""
    workers: int = 0
    """Processes that clean; 0: one a core. The result does not depend on it."""
    executor: Literal["local", "ray"] = "local"
    """Where they run: on this machine, or on the machines of a Ray cluster that all see the files and the folder."""
    ray_address: str = ""
    """Address of a Ray cluster; by default what RAY_ADDRESS says, else one on this machine alone."""
    keep_documents: bool = False
    """Leave the cleaned documents in the folder documents, as JSON lines in Zstandard."""
    errors: Literal["strict", "replace", "skip-file"] = "strict"
    """Text that cannot be decoded: stop, put U+FFFD, or leave the file out."""
    document_separator: str = "none"
    r"""none (a file is one document), blank-line, or a string to cut at (\n and \t are understood)."""
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation."""
    line_endings: Literal["keep", "lf"] = "keep"
    """lf turns CR LF and CR into LF."""
    allow_lossy: bool = False
    """Take a tokenizer that does not give the text back, and count what is lost."""
    deduplicate: Literal["recipe", "none", "exact", "near"] = "recipe"
    """Documents to drop for an earlier one: as the recipe says, if there is one; none of them; exact: equal ones alone;
    near: nearly equal ones too. With the options of the recipe's [exact] and [near]; it says alone of [lines]."""
    duplicate_pairs: Path | None = None
    """File for a line of JSON about each document that is dropped for another."""
    overwrite: bool = False
    """Replace an earlier prepared folder."""
    chunk_bytes: int = 1 << 20
    """How much of a file is read at once; the result does not depend on it."""

    def __post_init__(self) -> None:
        """Raises ConfigError where `out` is an empty string."""
        self.inputs = tuple(map(Path, [self.inputs] if isinstance(self.inputs, (str, Path)) else self.inputs))
        if self.out == "":  # which would be the current folder
            raise ConfigError("out names no folder; give one to write to")
        self.out = Path(self.out)
        for name in ("glob", "meta_columns", "without"):
            value = getattr(self, name)
            setattr(self, name, (value,) if isinstance(value, str) else tuple(value))

    def check(self) -> None:
        """Raise ConfigError if an option is out of range."""
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction}, expected at least 0 and less than 1")
        if not self.inputs:
            raise ConfigError(
                "inputs is empty, expected PATH, text files or folders (before --glob, which takes all that follow it)"
            )
        if self.chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes={self.chunk_bytes}, expected at least 1")
        if self.chunk_bytes > MOST_CHUNK_BYTES:
            raise ConfigError(f"chunk_bytes={shown(self.chunk_bytes)}, expected at most {MOST_CHUNK_BYTES}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed={shown(self.seed)}, expected an integer of 64 bits")
        if self.document_separator == "":
            raise ConfigError("document_separator is empty, expected none, blank-line or a string")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ConfigError(f"vocab_size={self.vocab_size}, expected at least 257 (256 bytes and an end of text)")
        if self.tokenizer in TRAINED_KINDS and self.vocab_size < 16:
            raise ConfigError(f"vocab_size={self.vocab_size}, expected at least 16")
        if self.tokenizer == "unigram" and find_spec("sentencepiece") is None:
            raise needs_sentencepiece()  # before all of the text is read
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}, expected one of {', '.join(known)}")
        reading.check_encoding(self.encoding)
        self._check_sources()

    def _check_sources(self) -> None:
        if not 0 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"workers={shown(self.workers)}, expected 0 to {MOST_WORKERS}")
        if not 1 <= self.max_document_bytes <= MOST_CHUNK_BYTES:
            raise ConfigError(f"max_document_bytes={shown(self.max_document_bytes)}, expected 1 to {MOST_CHUNK_BYTES}")
        if len(self.delimiter) > 1 or self.delimiter in ("\n", "\r", '"'):
            raise ConfigError(f"delimiter={self.delimiter!r}, expected one character, no line end or quote")
        if self.without and not self.recipe:
            raise ConfigError(f"without is {self.without[0]!r}, expected a recipe whose steps it leaves out")

    def source_options(self) -> SourceOptions:
        """How the files are read."""
        names = {field.name for field in fields(SourceOptions)} & {field.name for field in fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["errors"] = "replace" if self.errors == "replace" else "strict"
        return SourceOptions(**values, max_bytes=self.max_document_bytes)

    def steps(self) -> Recipe:
        """The recipe, checked; one without steps where none is given."""
        recipe = load_recipe(self.recipe) if self.recipe else Recipe()
        recipe = recipe.without(self.without)
        if self.deduplicate != "recipe":
            found = recipe.duplicates
            exact = (found.exact or ExactOptions()) if self.deduplicate != "none" else None
            near = (found.near or NearOptions()) if self.deduplicate == "near" else None
            recipe = replace(recipe, duplicates=replace(found, exact=exact, near=near))
        found = recipe.duplicates
        if self.duplicate_pairs is not None and not (found.exact or found.near):
            wanted = "a recipe with [exact] or [near], or deduplicate = exact or near, whose pairs it is for"
            raise ConfigError(f"duplicate_pairs is '{self.duplicate_pairs}', expected {wanted}")
        recipe.check()
        return recipe


_CHOICES = {
    "special": ("auto", "causal", "masked", "seq2seq", "chat"),
    "split": ("auto", "documents", "spans"),
    "errors": ("strict", "replace", "skip-file"),
    "normalize": ("none", "nfc", "nfkc"),
    "line_endings": ("keep", "lf"),
    "deduplicate": ("recipe", "none", "exact", "near"),
    "format": ("auto", *FORMATS),
    "quoting": ("auto", "minimal", "none"),
    "on_error": ("stop", "skip"),
    "executor": ("local", "ray"),
}
