"""The per-example diagonal Fisher by other libraries: each as its documentation has it, on a model it was not made for.

A peer is set up once with the model and a batch `[B, T]` and gives a function; one call of that is one measurement and
returns `sum_b G_b^2` by parameter's name, for the parameters that the library covers. An exception is for the caller to
write down. What a library would keep until its next call is dropped at the end of a call: kept, it would be counted to what
was there before, and hide as much of the next call's memory.

Installed beside torch, never instead of it: `pip install --no-deps backpack-for-pytorch opacus nngeometry kronfluence
unfoldNd einconv opt-einsum`, and scipy, einops and accelerate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "loss_of"]

Tensors = dict[str, Tensor]
Squares = Callable[[], Tensors]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over the targets, which all examples have as many of."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def sum_of_squares(per_example: Tensor) -> Tensor:
    """`[B, ...]` to `[...]`."""
    return per_example.float().square().sum(0)


def vmap_of_grad(model: nn.Module, ids: Tensor) -> Squares:
    """All per-example gradients in memory, by torch.func."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: Tensors, row: Tensor) -> Tensor:
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (), inputs).loss

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return lambda: {name: sum_of_squares(gradient) for name, gradient in per_example(parameters, ids).items()}


def backpack(model: nn.Module, ids: Tensor) -> Squares:
    """BackPACK; it has no rule for the norms, and warns of them."""
    from backpack import backpack as extensions
    from backpack import extend, memory_cleanup
    from backpack.extensions import SumGradSquared

    model = extend(copy.deepcopy(model))

    def squares() -> Tensors:
        with extensions(SumGradSquared()):
            (loss_of(model, ids) * len(ids)).backward()  # a sum over the examples' losses
        found = {}
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "sum_grad_squared"):
                found[name] = parameter.sum_grad_squared
                del parameter.sum_grad_squared
        model.zero_grad()
        model.apply(memory_cleanup)  # of modules that it has no rule for
        return found

    return squares


def opacus(model: nn.Module, ids: Tensor) -> Squares:
    """Opacus's per-sample gradients, which its `GradSampleModule` keeps on the parameters."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="mean")

    def squares() -> Tensors:
        loss_of(model, ids).backward()
        named = [(name.removeprefix("_module."), parameter) for name, parameter in model.named_parameters()]
        found = {name: sum_of_squares(parameter.grad_sample) for name, parameter in named}
        model.zero_grad(set_to_none=True)  # its own default keeps them
        return found

    return squares


def nngeometry(model: nn.Module, ids: Tensor) -> Squares:
    """NNGeometry's diagonal, of the linear layers, from embeddings: it differentiates to a floating-point input."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    model = copy.deepcopy(model)
    layers = LayerCollection.from_model(model, ignore_unsupported_layers=True)

    def losses(embeddings: Tensor, ids: Tensor) -> Tensor:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1, keepdim=True)

    def squares() -> Tensors:
        embeddings = model.get_input_embeddings()(ids).detach()
        generator = TorchHooksJacobianBackend(model=model, function=losses, layer_collection=layers)
        mean = PMatDiag(generator=generator, examples=(embeddings, ids)).data
        parts = (mean * len(ids)).split([layer.numel() for layer in layers.layers.values()])
        return dict(zip((f"{name}.weight" for name in layers.layers), parts, strict=True))

    return squares


def kronfluence(model: nn.Module, ids: Tensor) -> Squares:
    """Kronfluence's lambda matrices in the parameters' own basis."""
    from kronfluence import FactorArguments, Task, prepare_model
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader
    from kronfluence.utils.state import State

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return loss_of(model, batch["input_ids"]) * len(ids)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            raise NotImplementedError

    task = Loss()
    names = {name for name, _ in model.named_parameters()}  # without a tied head
    model = prepare_model(copy.deepcopy(model), task)
    arguments = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
    state = State(cpu=not ids.is_cuda)

    def squares() -> Tensors:
        options = {"factor_args": arguments, "disable_tqdm": True}
        _, factors = fit_lambda_matrices_with_loader(model, state, task, [{"input_ids": ids}], **options)
        found = {f"{name}.weight": value.to(ids.device) for name, value in factors["lambda_matrix"].items()}
        return {name: value for name, value in found.items() if name in names}

    return squares


PEERS: dict[str, Callable[[nn.Module, Tensor], Squares]] = {
    "vmap(grad)": vmap_of_grad,
    "BackPACK (linear layers and embedding only)": backpack,
    "Opacus": opacus,
    "NNGeometry (linear layers only)": nngeometry,
    "Kronfluence (linear layers only)": kronfluence,
}
"""By the name of its row, which ends in "only)" where some parameters are left out."""
