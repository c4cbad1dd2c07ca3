"""Calls into other libraries that several ops share; each import happens only when a case wants it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Case, Unavailable
from .kernel import Inputs


def attribute(module: str, name: str) -> Any:
    """`module.name`; Unavailable where the installed version has no such thing or cannot be imported here."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise Unavailable(f"{module}.{name}: {str(error).splitlines()[0]}") from error


def onnx_session(case: Case, device: str, op: str, attributes: dict[str, Any], inputs: Inputs) -> Callable:
    """One ONNX operator in onnxruntime, with torch's thread count; inference on the CPU in fp32 only."""
    if device != "cpu" or case.dtype != "float32":
        raise Unavailable("run through onnxruntime in float32 on the CPU only")
    onnx, runtime = attribute("onnx", "helper"), importlib.import_module("onnxruntime")
    kind = attribute("onnx", "TensorProto").FLOAT
    tensors = [t for t in inputs.tensors if t is not None]
    names = [f"x{i}" for i in range(len(tensors))]
    graph = onnx.make_graph(
        [onnx.make_node(op, names, ["y"], **attributes)],
        "op",
        [onnx.make_tensor_value_info(n, kind, list(t.shape)) for n, t in zip(names, tensors, strict=True)],
        [onnx.make_tensor_value_info("y", kind, None)],
    )
    model = onnx.make_model(graph, opset_imports=[onnx.make_opsetid("", 20)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        feeds = {n: t.detach().numpy() for n, t in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    run.forward_only = True  # type: ignore[attr-defined]
    return run
