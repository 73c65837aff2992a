"""Fused operations: tensors in, tensors out.

Every operation takes `impl="auto" | "triton" | "torch"`. `auto` follows the tensors' device: Triton on CUDA and ROCm,
chunked PyTorch elsewhere. An explicit `impl` never falls back.
"""

from fastforget.ops._dispatch import resolve
from fastforget.ops._linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy", "resolve"]
