"""`linear_cross_entropy`, forward with loss, hit and lse, beside what people use today.

Flop convention: 2 S H V, the product alone. The ceiling is that product by the vendor's library, measured in the same run:
as a whole, and, on a CPU, by blocks that stay in the cache, which is faster than writing all logits to memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import TURNS
from torch import Tensor

from fastforget import ops

# S, H, V; dtype; largest difference from the float32 chunked loss, nats
SHAPES = {"cpu": ((2048, 256, 32000), torch.float32, 1e-4), "cuda": ((8192, 4096, 128256), torch.bfloat16, 0.1)}


@pytest.fixture(scope="module")
def problem(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels, and the losses in full precision by row blocks."""
    (rows, hidden, classes), dtype, _ = SHAPES[device.type]
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device=device).to(dtype)
    w = (torch.randn(classes, hidden, device=device) / hidden**0.5).to(dtype)
    t = torch.randint(classes, (rows,), device=device)
    blocks = zip(x.split(256), t.split(256), strict=True)
    loss = torch.cat([F.cross_entropy(F.linear(a.float(), w.float()), b, reduction="none") for a, b in blocks])
    return x, w, t, loss


def eager(x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All logits in memory, all three results."""
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits, t, reduction="none"), logits.argmax(1) == t, torch.logsumexp(logits, 1)


def variants(x: Tensor, w: Tensor, t: Tensor) -> dict[str, Callable[[], Tensor | None] | str]:
    """Every variant, or the reason why it cannot run here."""
    compiled = torch.compile(eager, dynamic=False)
    block = torch.empty(len(x), 1024, dtype=x.dtype, device=x.device)

    def product_by_blocks() -> Tensor:
        for part in w.split(1024):
            torch.mm(x, part.T, out=block[:, : len(part)] if len(part) == 1024 else None)
        return block[:0, 0]

    found: dict[str, Callable[[], Tensor | None] | str] = {
        "product alone (ceiling)": lambda: F.linear(x, w)[:0, 0],
        "product alone, by blocks (ceiling)": "for CPUs" if x.is_cuda else product_by_blocks,
        "eager, full logits": lambda: eager(x, w, t)[0],
        "torch.compile, full logits": lambda: compiled(x, w, t)[0],
        "fastforget": lambda: ops.linear_cross_entropy(x, w, t).loss,
        "F.linear_cross_entropy (loss only)": "torch has it from 2.12 or 2.13 on",
        "Liger (loss only)": "liger-kernel is not installed, or there is no GPU",
        "cut-cross-entropy (loss only)": "cut-cross-entropy is not installed, or there is no GPU",
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy (loss only)"] = lambda: F.linear_cross_entropy(x, w, t, reduction="none")
    if x.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="none")
        found["Liger (loss only)"] = lambda: liger(w, x, t)
    if x.is_cuda and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy (loss only)"] = lambda: linear_cross_entropy(x, w, t, reduction="none")
    return found


NAMES = tuple(variants(torch.empty(0, 1), torch.empty(1, 1), torch.empty(0)))


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("turn", range(TURNS))
@torch.no_grad()
def test_forward(variant, turn, problem, device, measure, unavailable):
    """Forward of one head."""
    x, w, t, loss = problem
    (rows, hidden, classes), dtype, tolerance = SHAPES[device.type]
    group = f"linear_cross_entropy, forward, S {rows}, H {hidden}, V {classes}, {str(dtype)[6:]}"
    function = variants(x, w, t)[variant]
    if isinstance(function, str):
        unavailable(group, variant, function)
    reference = None if "ceiling" in variant else loss
    flops = 2 * rows * hidden * classes / 1e12
    measure(group, variant, function, reference, tolerance=tolerance, work=flops, unit="TFLOP/s")
