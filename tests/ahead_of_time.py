"""Compile every registered kernel for every architecture, with no GPU, and print what the compiler reports as JSON.

Runs as a process of its own: the interpreter, which the other tests need, replaces the compiler in theirs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from kernel_registry import OPERATIONS, Compilation
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TENSOR_CORE_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


def compile_for(compilation: Compilation, arch: str) -> dict[str, object]:
    kernel = compilation.kernel
    unknown = (compilation.types.keys() | compilation.constants.keys()) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{compilation.label}: arguments without a type or a constant, or unknown: {sorted(unknown)}")
    index = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    aligned = [n for n, t in compilation.types.items() if t.startswith("*")] + list(compilation.divisible_by_16)
    source = ASTSource(
        fn=kernel,
        signature={name: compilation.types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={index[name]: value for name, value in compilation.constants.items()},
        attrs={index[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=target, options=compilation.options)
    assembly = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    registers, spilled = _amd_report(assembly) if arch.startswith("gfx") else _nvidia_report(compiled.asm["cubin"])
    return {
        "arch": arch,
        "label": compilation.label,
        "wants_tensor_cores": compilation.tensor_cores,
        "tensor_cores": TENSOR_CORE_INSTRUCTION[arch] in assembly,
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
    }


def _nvidia_report(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory: spills, since no kernel has arrays of its own."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_report(assembly: str) -> tuple[int, int]:
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)\n", assembly)}
    return usage["vgpr_count"], usage["vgpr_spill_count"] + usage["private_segment_fixed_size"]


if __name__ == "__main__":
    architectures = sys.argv[1:]
    reports = [compile_for(c, arch) for op in OPERATIONS for arch in architectures for c in op.compilations(arch)]
    print(json.dumps(reports))
