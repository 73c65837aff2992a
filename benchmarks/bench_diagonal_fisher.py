"""The exact per-example diagonal Fisher of a Llama, beside the loops that people write and the libraries that exist.

A CPU measures 4 layers in float32, a GPU the shape of a 1B model in bfloat16. Every variant adds one batch to sums that
are there before, and its first result is compared with a loop of batch size 1 in the next wider dtype: per tensor,
norm(difference) / norm(reference). The ceiling is an ordinary forward + backward, which gives no Fisher.

Units: tokens a second. Peak memory is what one call needs above the model and the sums (whose size the title gives): the
activations, the logits where they exist, the gradients (`.grad` is None before and after every call), whatever a variant
materialises. Not counted: sums of a variant that can add to given ones or to its own from before. What is set up once is
outside the measured calls, as is the choice of rules in the first `update`.

Peers are measured where they are installed, beside torch and never instead of it: `pip install --no-deps
backpack-for-pytorch opacus nngeometry kronfluence unfoldNd einconv opt-einsum`, and scipy, einops and accelerate. A peer
that does not run on the model is in the record with its error.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import TURNS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastforget as ff

Sums = dict[str, Tensor]
"""By parameter: sum over the examples of the squared gradient of each one's own loss."""


@dataclass(frozen=True)
class Case:
    """A model's shape and a batch's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    examples: int
    tokens: int
    tied: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        """For the title and the test's name."""
        tied = ", tied" if self.tied else ""
        model = f"{self.layers}-layer Llama, H {self.hidden}, V {self.vocabulary}{tied}"
        return f"{model}, B {self.examples} x T {self.tokens}, {str(self.dtype)[6:]}"


CASES = {
    "cpu": [Case(4, 256, 688, 4, 4, 8192, 16, 64, False, torch.float32)],
    "cuda": [Case(16, 2048, 8192, 32, 8, 128256, b, t, True, torch.bfloat16) for b, t in ((8, 1024), (64, 128))],
}


@dataclass
class Problem:
    """What the variants of one case share."""

    case: Case
    model: LlamaForCausalLM
    ids: Tensor  # [B, T]
    sums: Sums
    """Where the loops add; the variants take turns."""
    reference: Sums
    tolerance: float
    runs: dict[str, Callable[[], Sums | None] | str] = field(default_factory=dict)
    """One call of every variant, or why there is none."""
    compared: set[str] = field(default_factory=set)

    def add_(self, squares: dict[str, Tensor], factor: float = 1.0) -> Sums:
        """Add some parameters' squares, times the factor; the sums of just these."""
        for name, square in squares.items():
            self.sums[name].add_(square.view_as(self.sums[name]), alpha=factor)
        return {name: self.sums[name] for name in squares}

    def errors(self, found: Sums) -> Tensor:
        """Relative error of every tensor that a variant covers."""
        missing = found.keys() - self.reference.keys()
        assert found and not missing, f"expected sums of the model's parameters, got {sorted(missing) or 'none'}"
        errors = [(found[n].cpu().to(r.dtype) - r).norm() / r.norm() for n, r in self.reference.items() if n in found]
        return torch.stack(errors)


@pytest.fixture(scope="module", params=CASES["cuda" if torch.cuda.is_available() else "cpu"], ids=str)
def problem(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Problem]:
    """A random model and batch, and the right Fisher."""
    case: Case = request.param
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        tie_word_embeddings=case.tied,
    )
    model = LlamaForCausalLM(config).to(device, case.dtype).eval()
    ids = torch.randint(case.vocabulary, (case.examples, case.tokens), device=device)
    # float32 beside bfloat16, float64 beside float32
    wide = copy.deepcopy(model).to(torch.float32 if case.dtype == torch.bfloat16 else torch.float64)
    reference = {name: torch.zeros_like(parameter) for name, parameter in wide.named_parameters()}
    one_by_one(wide, ids, lambda: [reference[n].addcmul_(p.grad, p.grad) for n, p in wide.named_parameters()])
    reference = {name: value.cpu() for name, value in reference.items()}
    del wide
    sums = {n: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for n, p in model.named_parameters()}
    made = Problem(case, model, ids, sums, reference, 1e-4)
    if case.dtype == torch.bfloat16:  # what the loop loses in this dtype is what may be lost
        made.tolerance = 2 * float(made.errors(batch_1_foreach(made)() or {}).max()) + 1e-2
    yield made
    made.runs.clear()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over the targets, which all examples have as many of."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def one_by_one(model: nn.Module, ids: Tensor, add: Callable[[], Any]) -> None:
    """A forward and backward an example."""
    for b in range(len(ids)):
        model.zero_grad()
        loss_of(model, ids[b : b + 1]).backward()
        add()
    model.zero_grad()


# Variants: set up once, then one call a measurement ------------------------------------------------------------------


def ordinary(problem: Problem) -> Callable[[], None]:
    """A training step without its update."""

    def run() -> None:
        loss_of(problem.model, problem.ids).backward()
        problem.model.zero_grad()

    return run


def ordinary_fused_head(problem: Problem) -> Callable[[], None]:
    """The same loss without logits in memory."""

    def run() -> None:
        ff.log_perplexity(problem.model, problem.ids).mean().backward()
        problem.model.zero_grad()

    return run


def fastforget(problem: Problem) -> Callable[[], Sums]:
    """`update`, which writes no `.grad`."""
    fisher = ff.DiagonalFisher(problem.model)

    def run() -> Sums:
        fisher.update(problem.ids)
        return fisher._sums.tensors

    return run


def fastforget_observe(problem: Problem, *, fuse_grad: bool = False) -> Callable[[], Sums]:
    """On top of the caller's own forward + backward with full logits."""
    fisher = ff.DiagonalFisher(problem.model)

    def run() -> Sums:
        with fisher.observe(fuse_grad=fuse_grad):
            loss_of(problem.model, problem.ids).backward()
        problem.model.zero_grad()
        return fisher._sums.tensors

    return run


def fastforget_observe_fused(problem: Problem) -> Callable[[], Sums]:
    """The weights' `.grad` in the same pass."""
    return fastforget_observe(problem, fuse_grad=True)


def batch_1(problem: Problem) -> Callable[[], Sums]:
    """As people write it."""
    model, sums = problem.model, problem.sums

    def add() -> None:
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.detach() ** 2

    def run() -> Sums:
        one_by_one(model, problem.ids, add)
        return sums

    return run


def batch_1_foreach(problem: Problem) -> Callable[[], Sums]:
    """With a multi-tensor square."""
    model = problem.model

    def run() -> Sums:
        one_by_one(model, problem.ids, lambda: square_all_(problem))
        return problem.sums

    return run


def square_all_(problem: Problem, impl: str = "auto") -> None:
    """Add the squares of all gradients at once."""
    gradients = {name: parameter.grad for name, parameter in problem.model.named_parameters()}
    ff.ops.square_accumulate_([problem.sums[n] for n in gradients], list(gradients.values()), impl=impl)


def batch_1_graph(problem: Problem) -> Callable[[], Sums]:
    """Forward, backward and square captured once, replayed for every example."""
    model, row = problem.model, problem.ids[:1].clone()

    def step() -> None:
        model.zero_grad()
        loss_of(model, row).backward()
        square_all_(problem, "torch")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up, as capture asks for
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    model.zero_grad()

    def run() -> Sums:
        for b in range(len(problem.ids)):
            row.copy_(problem.ids[b : b + 1])
            graph.replay()
        return problem.sums

    return run


def vmap_of_grad(problem: Problem) -> Callable[[], Sums]:
    """All per-example gradients in memory, by torch.func."""
    model = problem.model
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (), inputs).loss

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def run() -> Sums:
        gradients = per_example(parameters, problem.ids)
        return problem.add_({name: gradient.float().square().sum(0) for name, gradient in gradients.items()})

    return run


def backpack(problem: Problem) -> Callable[[], Sums]:
    """BackPACK over the whole model."""
    return _backpack(problem, lambda module: True)


def backpack_linear(problem: Problem) -> Callable[[], Sums]:
    """BackPACK over the modules that it knows."""
    return _backpack(problem, lambda module: isinstance(module, nn.Linear | nn.Embedding))


def _backpack(problem: Problem, covered: Callable[[nn.Module], bool]) -> Callable[[], Sums]:
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import SumGradSquared

    model = copy.deepcopy(problem.model)
    for module in model.modules():
        if covered(module) and not list(module.children()):
            extend(module)

    def run() -> Sums:
        with extensions(SumGradSquared()):
            loss_of(model, problem.ids).backward()
        found = {}
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "sum_grad_squared"):
                found[name] = parameter.sum_grad_squared
                del parameter.sum_grad_squared
        model.zero_grad()
        return problem.add_(found, len(problem.ids) ** 2)  # of the mean over examples

    return run


def opacus(problem: Problem) -> Callable[[], Sums]:
    """Opacus's per-sample gradients, which its `GradSampleModule` keeps on the parameters."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(problem.model).train(), loss_reduction="mean")

    def run() -> Sums:
        loss_of(model, problem.ids).backward()
        named = [(name.removeprefix("_module."), parameter) for name, parameter in model.named_parameters()]
        result = problem.add_({name: parameter.grad_sample.float().square().sum(0) for name, parameter in named})
        model.zero_grad()
        return result

    return run


def nngeometry(problem: Problem) -> Callable[[], Sums]:
    """NNGeometry's diagonal, of the linear layers, from embeddings: it differentiates to a floating-point input."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    model = copy.deepcopy(problem.model)
    layers = LayerCollection.from_model(model, ignore_unsupported_layers=True)

    def losses(embeddings: Tensor, ids: Tensor) -> Tensor:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1, keepdim=True)

    def run() -> Sums:
        embeddings = model.get_input_embeddings()(problem.ids).detach()
        generator = TorchHooksJacobianBackend(model=model, function=losses, layer_collection=layers)
        flat = PMatDiag(generator=generator, examples=(embeddings, problem.ids)).data
        sizes = [layer.numel() for layer in layers.layers.values()]
        found = dict(zip((f"{name}.weight" for name in layers.layers), flat.split(sizes), strict=True))
        return problem.add_(found, len(problem.ids))

    return run


def kronfluence(problem: Problem) -> Callable[[], Sums]:
    """Kronfluence's lambda matrices in the parameters' own basis."""
    from kronfluence import FactorArguments, Task, prepare_model
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader
    from kronfluence.utils.state import State

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return loss_of(model, batch["input_ids"]) * len(problem.ids)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            raise NotImplementedError

    task = Loss()
    model = prepare_model(copy.deepcopy(problem.model), task)
    arguments = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
    state = State(cpu=not problem.ids.is_cuda)

    def run() -> Sums:
        options = {"factor_args": arguments, "disable_tqdm": True}
        _, factors = fit_lambda_matrices_with_loader(model, state, task, [{"input_ids": problem.ids}], **options)
        found = {f"{name}.weight": value.to(problem.ids.device) for name, value in factors["lambda_matrix"].items()}
        return problem.add_(found)

    return run


Variant = Callable[[Problem], Callable[[], Sums | None]]
OURS: dict[str, Variant] = {
    "ordinary forward + backward (ceiling)": ordinary,
    "ordinary forward + backward, fused head": ordinary_fused_head,
    "fastforget": fastforget,
    "fastforget, observe": fastforget_observe,
    "fastforget, observe(fuse_grad=True)": fastforget_observe_fused,
    "batch-1 loop": batch_1,
    "batch-1 loop, foreach": batch_1_foreach,
}
FALLIBLE: dict[str, Variant] = {
    "batch-1 loop, CUDA graph": batch_1_graph,
    "vmap(grad)": vmap_of_grad,
    "BackPACK": backpack,
    "BackPACK (linear layers and embedding only)": backpack_linear,
    "Opacus": opacus,
    "NNGeometry (linear layers only)": nngeometry,
    "Kronfluence (linear layers only)": kronfluence,
}
"""A failure of these is a row of the table."""


@pytest.mark.parametrize("variant", [*OURS, *FALLIBLE])
@pytest.mark.parametrize("turn", range(TURNS))
@pytest.mark.filterwarnings("ignore")  # of the peers
def test_diagonal_fisher(variant, turn, problem, device, measure, unavailable):
    """One batch."""
    size = sum(value.numel() * value.element_size() for value in problem.sums.values()) / 2**20
    group = f"diagonal Fisher, {problem.case}, Fisher {size:,.0f} MB"
    if variant not in problem.runs:
        problem.runs[variant] = prepared(problem, variant)
    run = problem.runs[variant]
    if isinstance(run, str):
        unavailable(group, variant, run)

    def compared() -> Tensor | None:
        """Relative errors at first; nothing that costs time in later calls."""
        if variant in problem.compared or variant.startswith("ordinary"):
            return run()  # not looked at
        problem.compared.add(variant)
        for value in problem.sums.values():
            value.zero_()
        return problem.errors(run())

    measure(
        group,
        variant,
        compared,
        None if variant.startswith("ordinary") else torch.zeros(()),
        tolerance=problem.tolerance,
        work=problem.ids.numel(),
        unit="tokens/s",
    )


def prepared(problem: Problem, variant: str) -> Callable[[], Sums | None] | str:
    """A variant's call, or why there is none; a fallible one has run once."""
    if variant in OURS:
        return OURS[variant](problem)
    if "CUDA graph" in variant and not problem.ids.is_cuda:
        return "for GPUs"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = FALLIBLE[variant](problem)
            run()
    except ImportError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # whatever a library raises on a model that it was not made for
        problem.model.zero_grad()
        return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return run
