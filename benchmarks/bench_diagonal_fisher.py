"""The exact per-example diagonal Fisher of a Llama, beside the loops that people write and the libraries that exist.

A CPU measures 4 layers in float32, a GPU the shape of a 1B model in bfloat16. Every variant adds one batch to sums that
are there before, and its first result is compared with a loop of batch size 1 in the next wider dtype: per tensor,
norm(difference) / norm(reference). The ceiling is an ordinary forward + backward, which gives no Fisher.

Units: tokens a second. Peak memory is what one call needs above the model and the sums (whose size the title gives): the
activations, the logits where they exist, the gradients (`.grad` is None before and after every call), and whatever a
variant materialises, with peers also their own sums before they are added to those. What is set up once is not measured:
copies of the model, a captured graph, the choice of rules in the first `update`.

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

Tensors = dict[str, Tensor]
Run = Callable[[], Callable[[], Tensors] | None]
"""One measured call; what it returns gives the diagonal, a mean over examples by parameter's name."""


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
    sums: Tensors
    """Where all but fastforget add, one after the other."""
    reference: Tensors
    tolerance: float
    runs: dict[str, Run | str] = field(default_factory=dict)
    """Every variant's, or why there is none."""
    compared: set[str] = field(default_factory=set)

    def diagonal(self) -> Tensors:
        """Of all parameters, if the sums began at zero."""
        return {name: value / self.case.examples for name, value in self.sums.items()}

    def add_(self, squares: Tensors, factor: float = 1.0) -> Callable[[], Tensors]:
        """Add the squares of some parameters, times the factor; what it returns gives the diagonal of just these."""
        for name, square in squares.items():
            self.sums[name].add_(square.view_as(self.sums[name]), alpha=factor)
        names = set(squares)
        return lambda: {name: value for name, value in self.diagonal().items() if name in names}

    def errors(self, run: Run) -> Tensor:
        """Relative error of every tensor that a variant covers, from one run of it."""
        for value in self.sums.values():
            value.zero_()
        diagonal = run()
        found = diagonal() if diagonal else {}
        assert found.keys() <= self.reference.keys(), f"unknown parameters: {found.keys() - self.reference.keys()}"
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
    sums = {name: torch.zeros_like(p.detach(), dtype=torch.float32) for name, p in model.named_parameters()}
    made = Problem(case, model, ids, sums, in_wider_dtype(model, ids), 1e-4)
    if case.dtype == torch.bfloat16:  # what the loop loses in this dtype is what may be lost
        made.tolerance = 2 * float(made.errors(batch_1_foreach(made)).max()) + 1e-2
    yield made
    made.runs.clear()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over the targets, which all examples have as many of."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def in_wider_dtype(model: nn.Module, ids: Tensor) -> Tensors:
    """The diagonal by a loop in float64, or in float32 for a model in bfloat16; on the CPU."""
    wide = copy.deepcopy(model).to(torch.float32 if next(model.parameters()).dtype == torch.bfloat16 else torch.float64)
    parameters = dict(wide.named_parameters())
    sums = {name: torch.zeros_like(parameter.detach()) for name, parameter in parameters.items()}

    def add() -> None:
        for name, parameter in parameters.items():
            sums[name].addcmul_(parameter.grad, parameter.grad)

    one_by_one(wide, ids, add)
    return {name: value.cpu() / len(ids) for name, value in sums.items()}


def one_by_one(model: nn.Module, ids: Tensor, add: Callable[[], Any]) -> None:
    """A forward and backward an example."""
    for b in range(len(ids)):
        model.zero_grad()
        loss_of(model, ids[b : b + 1]).backward()
        add()
    model.zero_grad()


# Variants: set up once, then one call a measurement ------------------------------------------------------------------


def ordinary(problem: Problem) -> Run:
    """A training step without its update."""

    def run() -> None:
        loss_of(problem.model, problem.ids).backward()
        problem.model.zero_grad()

    return run


def ordinary_fused_head(problem: Problem) -> Run:
    """The same loss without logits in memory."""

    def run() -> None:
        ff.log_perplexity(problem.model, problem.ids).mean().backward()
        problem.model.zero_grad()

    return run


def fastforget(problem: Problem) -> Run:
    """`update`, which writes no `.grad`."""
    fisher = ff.DiagonalFisher(problem.model)

    def run() -> Callable[[], Tensors]:
        fisher.update(problem.ids)
        return fisher.diagonal

    return run


def fastforget_observe(problem: Problem, *, fuse_grad: bool = False) -> Run:
    """On top of the caller's own forward + backward with full logits."""
    fisher = ff.DiagonalFisher(problem.model)

    def run() -> Callable[[], Tensors]:
        with fisher.observe(fuse_grad=fuse_grad):
            loss_of(problem.model, problem.ids).backward()
        problem.model.zero_grad()
        return fisher.diagonal

    return run


def fastforget_observe_fused(problem: Problem) -> Run:
    """The weights' `.grad` in the same pass."""
    return fastforget_observe(problem, fuse_grad=True)


def batch_1(problem: Problem) -> Run:
    """As people write it."""
    model, sums = problem.model, problem.sums

    def add() -> None:
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.detach() ** 2

    def run() -> Callable[[], Tensors]:
        one_by_one(model, problem.ids, add)
        return problem.diagonal

    return run


def batch_1_foreach(problem: Problem) -> Run:
    """With a multi-tensor square."""
    model = problem.model

    def run() -> Callable[[], Tensors]:
        one_by_one(model, problem.ids, lambda: square_all_(problem))
        return problem.diagonal

    return run


def square_all_(problem: Problem, impl: str = "auto") -> None:
    """Add the squares of all gradients at once."""
    gradients = {name: parameter.grad for name, parameter in problem.model.named_parameters()}
    ff.ops.square_accumulate_([problem.sums[n] for n in gradients], list(gradients.values()), impl=impl)


def batch_1_graph(problem: Problem) -> Run:
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

    def run() -> Callable[[], Tensors]:
        for b in range(len(problem.ids)):
            row.copy_(problem.ids[b : b + 1])
            graph.replay()
        return problem.diagonal

    return run


def vmap_of_grad(problem: Problem) -> Run:
    """All per-example gradients in memory, by torch.func."""
    model = problem.model
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (), inputs).loss

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def run() -> Callable[[], Tensors]:
        gradients = per_example(parameters, problem.ids)
        return problem.add_({name: gradient.float().square().sum(0) for name, gradient in gradients.items()})

    return run


def backpack(problem: Problem) -> Run:
    """BackPACK; it has no rule for the norms, and warns of them."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import SumGradSquared

    model = extend(copy.deepcopy(problem.model))

    def run() -> Callable[[], Tensors]:
        with extensions(SumGradSquared()):
            loss_of(model, problem.ids).backward()
        found = {}
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "sum_grad_squared"):
                found[name] = parameter.sum_grad_squared
                del parameter.sum_grad_squared
        model.zero_grad()
        return problem.add_(found, len(problem.ids) ** 2)  # the loss is a mean over examples

    return run


def opacus(problem: Problem) -> Run:
    """Opacus's per-sample gradients, which its `GradSampleModule` keeps on the parameters."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(problem.model).train(), loss_reduction="mean")

    def run() -> Callable[[], Tensors]:
        loss_of(model, problem.ids).backward()
        named = [(name.removeprefix("_module."), parameter) for name, parameter in model.named_parameters()]
        result = problem.add_({name: parameter.grad_sample.float().square().sum(0) for name, parameter in named})
        model.zero_grad()
        return result

    return run


def nngeometry(problem: Problem) -> Run:
    """NNGeometry's diagonal, of the linear layers, from embeddings: it differentiates to a floating-point input."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    model = copy.deepcopy(problem.model)
    layers = LayerCollection.from_model(model, ignore_unsupported_layers=True)

    def losses(embeddings: Tensor, ids: Tensor) -> Tensor:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1, keepdim=True)

    def run() -> Callable[[], Tensors]:
        embeddings = model.get_input_embeddings()(problem.ids).detach()
        generator = TorchHooksJacobianBackend(model=model, function=losses, layer_collection=layers)
        flat = PMatDiag(generator=generator, examples=(embeddings, problem.ids)).data
        sizes = [layer.numel() for layer in layers.layers.values()]
        found = dict(zip((f"{name}.weight" for name in layers.layers), flat.split(sizes), strict=True))
        return problem.add_(found, len(problem.ids))

    return run


def kronfluence(problem: Problem) -> Run:
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

    def run() -> Callable[[], Tensors]:
        options = {"factor_args": arguments, "disable_tqdm": True}
        _, factors = fit_lambda_matrices_with_loader(model, state, task, [{"input_ids": problem.ids}], **options)
        found = {f"{name}.weight": value.to(problem.ids.device) for name, value in factors["lambda_matrix"].items()}
        return problem.add_({name: found[name] for name in found.keys() & problem.sums.keys()})  # not a tied head

    return run


Variant = Callable[[Problem], Run]
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
    "BackPACK (linear layers and embedding only)": backpack,
    "Opacus": opacus,
    "NNGeometry (linear layers only)": nngeometry,
    "Kronfluence (linear layers only)": kronfluence,
}
"""A failure of these is a row of the table."""


@pytest.mark.parametrize("variant", [*OURS, *FALLIBLE])
@pytest.mark.parametrize("turn", range(TURNS))
@pytest.mark.filterwarnings("ignore")  # of the peers
def test_diagonal_fisher(variant, turn, problem, measure, unavailable):
    """One batch."""
    size = sum(value.numel() * value.element_size() for value in problem.sums.values()) / 2**20
    group = f"diagonal Fisher, {problem.case}, Fisher {size:,.0f} MB"
    if variant not in problem.runs:
        problem.runs[variant] = prepared(problem, variant)
    run = problem.runs[variant]
    if isinstance(run, str):
        return unavailable(group, variant, run)

    ceiling = variant.startswith("ordinary")

    def compared() -> Tensor | None:
        """Relative errors at first; later calls do nothing beside the run."""
        if ceiling or variant in problem.compared:
            run()
            return None
        problem.compared.add(variant)
        return problem.errors(run)

    measure(
        group,
        variant,
        compared,
        None if ceiling else torch.zeros(()),
        tolerance=problem.tolerance,
        work=problem.ids.numel(),
        unit="tokens/s",
    )


def prepared(problem: Problem, variant: str) -> Run | str:
    """A variant's run, or why there is none; a fallible one has run once, and was compared."""
    if variant in OURS:
        return OURS[variant](problem)
    if "CUDA graph" in variant and not problem.ids.is_cuda:
        return "for GPUs"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = FALLIBLE[variant](problem)
            error = float(problem.errors(run).max())
    except ImportError as missing:
        return f"not installed ({missing.name})"
    except Exception as raised:  # whatever a library raises on a model that it was not made for
        problem.model.zero_grad()
        return f"fails: {type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"
    return run if error <= problem.tolerance else f"another quantity: off by {error:.2g}"
