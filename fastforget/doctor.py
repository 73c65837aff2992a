"""What `fastforget doctor` prints: versions, devices, the implementation of each operation and why, and warnings."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from inspect import signature

import torch

from fastforget import ops

# The lower bounds of pyproject.toml; None where any version that the others accept will do.
MINIMUM_VERSIONS = {
    "torch": "2.11",
    "triton": "3.6",
    "transformers": "5.10.2",
    "tokenizers": None,
    "safetensors": None,
    "numpy": "1.26",
    "pyarrow": "17",
    "matplotlib": "3.8",
    "peft": "0.18",
    "datasets": "3",
}
_OPTIONAL = ("peft", "datasets")
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "FASTFORGET_CACHE",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "TRITON_INTERPRET",
)


def report() -> str:
    """Describe this installation in plain text that a user can paste.

    Returns:
        One block of lines for each of versions, devices, operations, environment variables and warnings.
    """
    found = {name: _version(name) for name in MINIMUM_VERSIONS}
    settings = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    devices = _devices()
    blocks = {
        "versions": [
            f"fastforget    {_version('fastforget') or 'not installed: running from a checkout'}",
            f"python        {platform.python_version()} ({sys.executable})",
            f"platform      {platform.platform()}",
            *(f"{name:<13} {version or 'missing'}" for name, version in found.items()),
        ],
        "devices": [f"{device!s:<13} {description}" for device, description in devices],
        "operations (impl='auto')": [
            f"{operation} on {device}: {implementation} ({reason})"
            for operation in _operations()
            for device, _ in devices
            for implementation, reason in [ops.resolve("auto", device)]
        ],
        "environment": [f"{name}={value}" for name, value in settings.items()] or ["nothing set"],
        "warnings": _warnings(found, [device for device, _ in devices]) or ["none"],
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in blocks.items())


def _operations() -> list[str]:
    # An operation is what lets its caller choose the implementation.
    candidates = {name: getattr(ops, name) for name in ops.__all__ if name != "resolve"}
    return [name for name, value in candidates.items() if callable(value) and "impl" in signature(value).parameters]


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the build, such as +cu130, which the metadata may lack
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[torch.device, str]]:
    found = [(torch.device("cpu"), f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            description = f"{properties.name}, capability {capability}, {memory}, {runtime}"
            found.append((torch.device("cuda", index), description))
    if torch.backends.mps.is_available():
        found.append((torch.device("mps"), platform.processor()))
    return found


def _warnings(found: dict[str, str | None], devices: list[torch.device]) -> list[str]:
    warnings = []
    for name, minimum in MINIMUM_VERSIONS.items():
        version = found[name]
        if version is not None and minimum is not None and _release(version) < _release(minimum):
            warnings.append(f"{name}: expected {minimum} or newer, got {version}; pip install -U {name}")
        if version is None and name not in _OPTIONAL and (name != "triton" or sys.platform == "linux"):
            warnings.append(f"{name} is missing; pip install '{name}>={minimum or 0}'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        warnings.append(
            "TRITON_INTERPRET=1: Triton kernels run in the interpreter, thousands of times slower; unset it"
        )
    if os.path.exists("/dev/nvidia0") and not torch.cuda.is_available():
        warnings.append(
            f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use; install a CUDA build"
        )
    for device in devices:
        if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            warnings.append(f"{device}: the kernels are built and tested for compute capability 8.0 and newer")
    return warnings


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
