"""What the tests of the exact Fisher share: steps of the estimator and of a caller, and what they are compared with."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fisher_oracle import batch_1_fisher, float64_throughout
from torch import Tensor, nn

import fastforget as ff

IGNORE = -100


SLOW_RULE = "DiagonalFisher. exact, but slow"  # a pattern, without the colon that parts a filter


# Family or adapter -> classes of modules that have no fast rule: scans, gates and experts of their own kind.
SLOW: dict[str, tuple[str, ...]] = {
    "Falcon-H1": ("FalconH1Mixer",),
    "Mamba": ("MambaMixer",),
    "DBRX": ("DbrxExperts",),
    "DiffLlama": ("DiffLlamaAttention",),
    "Falcon-Mamba": ("FalconMambaMixer",),
    "gpt-oss": ("GptOssAttention",),
    "Granite MoE Hybrid": ("GraniteMoeHybridMambaLayer",),
    "Jamba": ("JambaMambaMixer",),
    "JetMoE": ("JetMoeAttention", "JetMoeMoE"),
    "LFM2": ("Lfm2ShortConv",),
    "LFM2-MoE": ("Lfm2MoeShortConv",),
    "Llama 4": ("Llama4TextMoe",),
    "LongCat-Flash": ("LongcatFlashExperts", "LongcatFlashTopkRouter"),
    "Qwen3-Next": ("Qwen3NextGatedDeltaNet",),
    "Qwen3.5": ("Qwen3_5GatedDeltaNet",),
    "RecurrentGemma": ("Conv1d", "RecurrentGemmaRglru"),
    "RWKV": ("RwkvFeedForward", "RwkvSelfAttention"),
    "Zamba": ("ZambaMambaMixer",),
    "Zamba2": ("Zamba2MambaMixer",),
    "Bamba": ("BambaMixer",),
    "Mamba-2": ("Mamba2Mixer",),
    "LoRA on an embedding": ("Embedding",),
    "LoRA on experts": ("ParamWrapper",),
    "DoRA": ("DoraLinearLayer",),
}


UNSHIFTED = ["BART, its decoder"]  # its own loss compares a token's logits with the token itself


COVERED = ["Llama, tied", "GPT-2", "Qwen3-MoE", "Qwen2"]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def throughout(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Norms and losses of float64 models are float32 in transformers: not inside."""
    return float64_throughout() if dtype == torch.float64 else contextlib.nullcontext()


@contextlib.contextmanager
def slow_rules_of(family: str) -> Iterator[None]:
    """The warning about slow rules is an error, but not where they are known to be needed."""
    with warnings.catch_warnings():
        if family in SLOW:
            warnings.filterwarnings("ignore", message=SLOW_RULE, category=UserWarning)
        yield


def truth_of(model: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], dict[str, Tensor]]:
    """The oracle in float64, computed when it is needed."""

    @functools.cache
    def truth() -> dict[str, Tensor]:
        with float64_throughout():
            return batch_1_fisher(copy.deepcopy(model).double(), *args, **kwargs)

    return truth


def updated(model: nn.Module, *batches: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    fisher = ff.DiagonalFisher(model, **options)
    for batch in batches:
        fisher.update(**batch)
    return fisher.diagonal()


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as a training loop has it: labels, -100 at the padding."""
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)}


def mean_loss(model: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """A caller's own loss, in the model's dtype."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):  # read by functions
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def bits(fisher: ff.DiagonalFisher) -> dict[str, Tensor]:
    """Of the estimator's state."""
    return {name: value.clone() for name, value in fisher.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def same_bits(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> list[str]:
    """Names of what differs."""
    pairs = [(name, value, right[name]) for name, value in left.items()]
    return [n for n, a, b in pairs if (a is None) != (b is None) or (a is not None and not torch.equal(a, b))]
