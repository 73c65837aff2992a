"""Fused operations: tensors in, tensors out.

Every operation takes `impl="auto" | "triton" | "torch"`. `auto` follows the tensors' device: Triton on CUDA and ROCm,
chunked PyTorch elsewhere. An explicit `impl` never falls back.
"""

from fastforget.ops._dispatch import resolve
from fastforget.ops._fisher_accumulate import fisher_accumulate_
from fastforget.ops._gradient_products import GradientProducts, gradient_products
from fastforget.ops._linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from fastforget.ops._square_accumulate import square_accumulate_

__all__ = [
    "GradientProducts",
    "LinearCrossEntropy",
    "fisher_accumulate_",
    "gradient_products",
    "linear_cross_entropy",
    "resolve",
    "square_accumulate_",
]
