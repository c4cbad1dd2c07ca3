"""`fastlm doctor`: what is installed, what was built, which backend serves which op here, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import torch

import fastlm
from fastlm._core import architecture, proofs, registry
from fastlm.backends import cpu as _native
from fastlm.backends import cuda as _native_cuda
from fastlm.ops._gemm import leads
from fastlm.runtime import PACKAGES, PEERS, TRIED, cpu_model, driver_version, minor, settings, untried, version


def _allocator() -> dict[str, str | None]:
    """The C library that serves memory, and what is preloaded in its place."""
    name, release = platform.libc_ver()
    return {"libc": f"{name} {release}".strip() or None, "preloaded": os.environ.get("LD_PRELOAD")}


def _loaded_libgomp() -> list[str]:
    """Paths of the OpenMP runtimes in this process; more than one means that thread settings are not shared."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line})


def _cuda() -> dict:
    compiler = shutil.which("nvcc")
    found: dict = {
        "torch_cuda": torch.version.cuda,
        "driver": driver_version(),
        "available": torch.cuda.is_available(),
        "nvcc": None,
        "extension": _native_cuda.unusable() or "loaded",
        "built_for": [f"sm_{name}" for name in _native_cuda.architectures()],
        "devices": [],
    }
    if compiler:
        lines = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout.splitlines()
        found["nvcc"] = next((line.partition("release ")[2] for line in lines if "release" in line), "unknown")
    for index in range(torch.cuda.device_count() if found["available"] else 0):
        device = proofs.properties(index)
        assert device is not None
        memory = torch.cuda.get_device_properties(index).total_memory
        found["devices"].append(
            {
                "name": device.device,
                "arch": device.architecture,
                "memory_gib": round(memory / 2**30, 1),
                "proof": _proof(proofs.state(index)),
            }
        )
    return found


def _proof(state: proofs.State) -> str:
    """What is proved of a GPU's kernels, in one line."""
    if not state.entries:
        return state.reason
    entries = [entry for entry in state.entries.values() if entry.features != proofs.TILES]
    counts = Counter(entry.verdict for entry in entries)
    found = [f"{count} {verdict}" for verdict, count in counts.items()]
    refused = sorted({f"{e.op} on {e.backend}" for e in entries if e.verdict != "right"})
    text = f"{', '.join(found)}, by {max(entry.date for entry in entries)}"
    return "; ".join([text, *([f"refused: {', '.join(refused)}"] if refused else []), *filter(None, [state.reason])])


def _served_by(op: registry.Op, device: str, dtype: torch.dtype) -> dict[str, str]:
    """Each backend of an op: "selected", or why not, for a call without special features."""
    reasons = fastlm.explain(op.function, **op.samples(device, dtype)[0]).reasons
    return {row.name: reasons[row.name] for row in op.backends}


def _advice(report: dict) -> list[str]:
    advice = []
    if report["cpu"]["extension"] != "loaded":
        advice.append(f"with a C++17 compiler and Python's headers, build the CPU kernels:  {_native.HOW_TO_BUILD}")
    if len(report["cpu"]["openmp_runtimes"]) > 1:
        advice.append("two OpenMP runtimes are loaded; set the threads of both:  export OMP_NUM_THREADS=$(nproc)")
    if missing := [name for name in ("tokenizers", "safetensors", "rich", "tyro") if not report["packages"][name]]:
        advice.append(f"for training ({', '.join(missing)} missing):  pip install {' '.join(missing)}")
    if found := untried(report["packages"]):
        torch_version = str(report["packages"]["torch"]).partition("+")[0]
        advice.append(
            f"never tried with {' and '.join(f'{name} {v}' for name, v in found.items())}; in a checkout the tests run "
            f"with it by  python tools/versions.py {torch_version}"
        )
    cuda = report["cuda"]
    if cuda["available"] and not cuda["built_for"]:
        needs = "" if cuda["nvcc"] else "install a CUDA toolkit, then  "
        build = _native.HOW_TO_BUILD.replace("FASTLM_CPU", "FASTLM_CUDA")
        advice.append(f"for the CUDA kernels:  {needs}{build}; Triton serves until then")
    elif cuda["built_for"] and "driver serves" in cuda["extension"]:
        advice.append(f"the CUDA kernels can't run: {cuda['extension']}")
    for arch in {device["arch"] for device in cuda["devices"]} if cuda["built_for"] else ():
        if reason := _native_cuda.unserved(architecture.parse(arch)):
            again = f'; reinstall with  FASTLM_CUDA_ARCHS="{arch[3:]}"' if arch.startswith("sm_") else ""
            advice.append(f"the CUDA kernels: {reason}{again}")
    return advice


def collect() -> dict:
    """Everything that the command reports, ready for JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "packages": {name: version(name) for name in PACKAGES},
        "tried": {name: list(versions) for name, versions in TRIED.items()},
        "peers": {name: version(name) for name in PEERS},
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "extension": _native.missing_reason or "loaded",
            "isa": fastlm.cpu_isa(),
            "isas": list(fastlm.cpu_isas()),
            "large_products": {
                str(dtype).removeprefix("torch."): "fastlm's" if leads(dtype) else "PyTorch's"
                for dtype in (torch.float32, torch.bfloat16)
            },
            "openmp_threads": _native.omp_threads(),
            "openmp_runtimes": _loaded_libgomp(),
            "allocator": _allocator(),
        },
        "cuda": _cuda(),
        "settings": settings(),
        "backends": {
            op.name: {device: _served_by(op, device, torch.bfloat16 if device == "cuda" else torch.float32)}
            for op in registry.ops()
        },
    }
    report["advice"] = _advice(report)
    return report


def _package(report: dict, name: str) -> str:
    """Its version, and those that were tried."""
    tried = ", ".join(map(minor, report["tried"].get(name, ())))
    return f"{name} {report['packages'][name] or 'missing'}" + (f" (tried: {tried})" if tried else "")


def _print(report: dict) -> None:
    cpu, cuda = report["cpu"], report["cuda"]
    print(f"fastlm {report['fastlm']}   Python {report['python']}   {report['platform']}")
    print("packages   " + "  ".join(_package(report, name) for name in report["packages"]))
    print("peers      " + ("  ".join(f"{n} {v}" for n, v in report["peers"].items() if v) or "none installed"))
    print(f"cpu        {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads")
    if cpu["isa"]:
        shared = (
            "shared with torch"
            if len(cpu["openmp_runtimes"]) <= 1
            else "NOT shared: " + ", ".join(cpu["openmp_runtimes"])
        )
        print(f"           kernels: {cpu['isa']} (of {', '.join(cpu['isas'])}); OpenMP runtime {shared}")
        print("           large products: " + ", ".join(f"{k} {v}" for k, v in cpu["large_products"].items()))
    else:
        print(f"           kernels: none, {cpu['extension']}")
    memory = cpu["allocator"]
    print(f"memory     {memory['libc'] or 'unknown C library'}; preloaded: {memory['preloaded'] or 'nothing'}")
    devices = ", ".join(f"{d['name']} ({d['arch']}, {d['memory_gib']} GiB)" for d in cuda["devices"]) or "no device"
    print(
        f"cuda       {devices}; driver {cuda['driver'] or 'none'}; "
        f"torch built for {proofs.runtime()}; nvcc {cuda['nvcc'] or 'not found'}"
    )
    built = f" (built for {', '.join(cuda['built_for'])})" if cuda["built_for"] else ""
    print(f"           kernels: {cuda['extension']}{built}")
    for index, device in enumerate(cuda["devices"]):
        print(f"           proof of GPU {index}: {device['proof']}")
    if report["settings"]:
        print("settings   " + "  ".join(f"{name}={value}" for name, value in report["settings"].items()))
    print("backends")
    for op, devices_of_op in report["backends"].items():
        for device, rows in devices_of_op.items():
            selected = next((name for name, state in rows.items() if state == "selected"), "none")
            others = "; ".join(f"{name}: {state}" for name, state in rows.items() if state != "selected")
            print(f"  {op:<28} on {device}: {selected:<10} ({others})")
    for line in report["advice"]:
        print(f"advice     {line}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastlm doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0
