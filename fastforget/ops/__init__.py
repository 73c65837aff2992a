"""Fused operations: tensors in, tensors out.

Every operation takes `impl="auto" | "triton" | "torch"`. `auto` follows the tensors' device: Triton on CUDA and ROCm,
chunked PyTorch elsewhere. An explicit `impl` never falls back.
"""

from fastforget.ops._adamw import adamw_
from fastforget.ops._dampen import dampen_
from fastforget.ops._dispatch import resolve
from fastforget.ops._fisher_accumulate import fisher_accumulate_
from fastforget.ops._fisher_merge import fisher_merge_
from fastforget.ops._gradient_products import GradientProducts, gradient_products
from fastforget.ops._linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from fastforget.ops._sgd import sgd_
from fastforget.ops._square_accumulate import square_accumulate_
from fastforget.ops._steering import Steering
from fastforget.ops._topk_threshold import TopK, topk_threshold

__all__ = [
    "GradientProducts",
    "LinearCrossEntropy",
    "Steering",
    "TopK",
    "adamw_",
    "dampen_",
    "fisher_accumulate_",
    "fisher_merge_",
    "gradient_products",
    "linear_cross_entropy",
    "resolve",
    "sgd_",
    "square_accumulate_",
    "topk_threshold",
]
