"""Builds fastlm's extension modules; everything else is in pyproject.toml.

torch is neither imported nor needed here: kernels take raw pointers, so one build serves every torch
release. FASTLM_CPU=0 skips the CPU module, =1 makes a failed build an error; unset, a failed build
leaves a working package on its reference backend.
"""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("FASTLM_JOBS").install()

CPU_FLAGS = [
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # gcc 12 warns inside its own avx512fintrin.h


def cpu_extension() -> Pybind11Extension:
    flags, link = CPU_FLAGS, ["-fopenmp"]
    if sys.platform == "darwin":  # Apple's clang ships no OpenMP: single-threaded kernels
        flags, link = [f for f in CPU_FLAGS if f != "-fopenmp"], []
    return Pybind11Extension(
        "fastlm._cpu",
        sources=["csrc/bindings_cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/cpu/*.h")),
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=link,
        optional=os.environ.get("FASTLM_CPU", "") != "1",
    )


setup(
    ext_modules=[cpu_extension()] if os.environ.get("FASTLM_CPU", "") != "0" else [],
    cmdclass={"build_ext": build_ext},
)
