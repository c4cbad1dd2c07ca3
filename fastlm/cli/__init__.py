"""The `fastlm` command: one verb a module, imported only when it is the one asked for."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from typing import Any

import torch

from .._core import proofs
from ..errors import ConfigFileError, FastlmError

VERBS = {
    "prepare": "text files -> tokenizer and memory-mapped token files",
    "train": "train a model for an objective, on prepared text or a table",
    "finetune": "train a model that is there on a table of examples",
    "generate": "sample text from a trained model",
    "demo": "prepare, train and generate on a small real corpus",
    "bench": "time every op and the engine against PyTorch and its peers",
    "tune": "prove every GPU kernel on this machine's GPU, so that the right and fast ones serve",
    "verify": "check every op and backend on random inputs against the fp64 reference",
    "doctor": "what is installed, what was built, which backend serves what",
}

USAGE = "usage: fastlm VERB [options]\n\n" + "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 141 where the reader of a pipe has gone.
    """
    _open_streams()
    status = 0
    try:
        try:
            status = _run(sys.argv[1:] if argv is None else argv)
        finally:  # here, since at the interpreter's end an error would be shown
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        if not status:  # else its own line has been printed
            print(f"fastlm: standard output cannot be written to: {error.strerror}", file=sys.stderr)
        return status or 1
    return status


def _open_streams() -> None:
    """Give a closed stream the null device, and let output hold any character, whatever its encoding."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for as long as we run)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Let what is still in the buffer of standard output go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(f"fastlm {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        print(f"fastlm: no verb {verb!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    _warn_of_missing_kernels(rest)
    if verb not in ("tune", "doctor"):
        proofs.on_unproved = _hint_to_tune
    module = None
    try:
        module = importlib.import_module(f".{verb}", __name__)
        return module.main(rest) or 0
    except KeyboardInterrupt:
        print(f"fastlm {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "fastlm" or os.environ.get("FASTLM_DEBUG"):
            raise
        print(
            f"fastlm {verb}: needs the package {missing}; try: pip install {missing}, or all that the verbs need:"
            " pip install '.[train,hf]'  in the folder of fastlm's source",
            file=sys.stderr,
        )
        return 1
    except (FastlmError, OSError) as error:
        if os.environ.get("FASTLM_DEBUG"):
            raise
        print(f"fastlm {verb}: {_spelled(error, module)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("FASTLM_DEBUG") or not _tells_of_memory(error):
            raise
        print(f"fastlm {verb}: not enough memory: {_one_line(error)}".rstrip(": "), file=sys.stderr)
        return 1


def _tells_of_memory(error: Exception) -> bool:
    """Whether Python or torch is out of memory; torch has a type for that on GPUs alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines())


def _spelled(error: Exception, module: Any) -> str:
    """The message in one line, with settings spelled as the verb's flags, but for one about a file of settings."""
    from .spelling import spelled

    message = _one_line(error)
    options = getattr(module, "Arguments", None) or getattr(module, "Options", None)
    if options is None or not isinstance(error, FastlmError) or isinstance(error, ConfigFileError):
        return message
    return spelled(message, options)


def _hint_to_tune(state: proofs.State) -> None:
    """One line when a GPU of which nothing is proved is first asked to serve, once for each key ever."""
    if proofs.first_hint(state):
        print(f"fastlm: its GPU kernels are left out here, {state.reason}", file=sys.stderr)


def _warn_of_missing_kernels(arguments: list[str]) -> None:
    """One line, loud: without its kernels everything works, but slowly, and nothing else would say so."""
    from ..backends import cpu

    if cpu.missing_reason and not {"-h", "--help"} & set(arguments):
        print(
            f"fastlm: WITHOUT ITS CPU KERNELS, so slow: {cpu.missing_reason}; with a C++17 compiler and Python's"
            f" headers (apt: g++ python3-dev) get them by  {cpu.HOW_TO_BUILD}",
            file=sys.stderr,
        )
