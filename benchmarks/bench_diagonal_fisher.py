"""The exact per-example diagonal Fisher of a Llama, beside the loops that people write and the libraries that exist.

A CPU measures 4 layers in float32, a GPU the shape of a 1B model in bfloat16. Every variant adds one batch to sums that
are there before, and its first result is compared with a loop of batch size 1 in the next wider dtype: per tensor,
norm(difference) / norm(reference). The ceiling is an ordinary forward + backward, which gives no Fisher.

Units: tokens a second. Peak memory is what one call needs above the model and the sums (whose size the title gives): the
activations, the logits where they exist, the gradients (`.grad` is None before and after every call), and whatever a
variant materialises, with peers also their own sums before they are added to those. What is set up once is not measured:
copies of the model, a captured graph, the choice of rules in the first `update`.

Peers (`fisher_peers.py`) are measured where they are installed. One that does not run on the model is in the record with its
error, and so is one whose result is not the Fisher, or is of fewer parameters than its row says.
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
from fisher_peers import PEERS, loss_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastforget as ff

Tensors = dict[str, Tensor]
Run = Callable[[], Callable[[], Tensors] | None]
"""One measured call; what it returns gives the diagonal, a mean over examples by parameter's name."""
Variant = Callable[["Problem"], Run | str]
"""Sets a run up, or says why there is none."""


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

    def errors(self, run: Run) -> Tensor:
        """Relative error of every tensor that a variant covers, from one run of it."""
        for value in self.sums.values():
            value.zero_()
        diagonal = run()
        found = diagonal() if diagonal else {}
        assert found.keys() <= self.reference.keys(), f"unknown parameters: {found.keys() - self.reference.keys()}"
        errors = [(found[n].cpu().to(r.dtype) - r).norm() / r.norm() for n, r in self.reference.items() if n in found]
        return torch.stack(errors)


def random_model(case: Case, device: torch.device) -> tuple[Any, Tensor]:
    """A model of the case's shape, in eval mode, and a batch `[B, T]` of token ids."""
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
    model: Any = LlamaForCausalLM(config).to(device, case.dtype).eval()  # type: ignore[arg-type]
    ids = torch.randint(case.vocabulary, (case.examples, case.tokens), device=device)
    return model, ids


@pytest.fixture(scope="module", params=CASES["cuda" if torch.cuda.is_available() else "cpu"], ids=str)
def problem(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Problem]:
    """A random model and batch, and the right Fisher."""
    case: Case = request.param
    model, ids = random_model(case, device)
    sums = {name: torch.zeros_like(p.detach(), dtype=torch.float32) for name, p in model.named_parameters()}
    made = Problem(case, model, ids, sums, in_wider_dtype(model, ids), 1e-4)
    if case.dtype == torch.bfloat16:  # what the loop loses in this dtype is what may be lost
        made.tolerance = 2 * float(made.errors(batch_1_foreach(made)).max()) + 1e-2
    yield made
    made.runs.clear()


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


def batch_1_graph(problem: Problem) -> Run | str:
    """Forward, backward and square captured once, replayed for every example."""
    if not problem.ids.is_cuda:
        return "for GPUs"
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


def peer(name: str) -> Variant:
    """Add what another library finds."""

    def prepare(problem: Problem) -> Run:
        squares = PEERS[name](problem.model, problem.ids)

        def run() -> Callable[[], Tensors]:
            found = squares()
            for name, square in found.items():
                problem.sums[name].add_(square.view_as(problem.sums[name]))
            names = set(found)
            return lambda: {name: value for name, value in problem.diagonal().items() if name in names}

        return run

    return prepare


NEEDED: dict[str, Variant] = {
    "ordinary forward + backward (ceiling)": ordinary,
    "ordinary forward + backward, fused head": ordinary_fused_head,
    "fastforget": fastforget,
    "fastforget, observe": fastforget_observe,
    "fastforget, observe(fuse_grad=True)": fastforget_observe_fused,
    "batch-1 loop": batch_1,
    "batch-1 loop, foreach": batch_1_foreach,
}
FALLIBLE: dict[str, Variant] = {"batch-1 loop, CUDA graph": batch_1_graph} | {name: peer(name) for name in PEERS}
"""A failure of these is a row of the table."""


@pytest.mark.parametrize("variant", [*NEEDED, *FALLIBLE])
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
    if variant in NEEDED:
        return NEEDED[variant](problem)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = FALLIBLE[variant](problem)
            if isinstance(run, str):
                return run
            errors = problem.errors(run)
    except ImportError as missing:
        return f"not installed ({missing.name})"
    except Exception as raised:  # whatever a library raises on a model that it was not made for
        problem.model.zero_grad()
        return f"fails: {type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"
    if (len(errors) < len(problem.reference)) != variant.endswith("only)"):
        return f"mislabelled: covers {len(errors)} of {len(problem.reference)} parameters"
    wrong = int((~(errors <= problem.tolerance)).sum())  # NaN is wrong, too
    return f"another quantity: {wrong} of {len(errors)} tensors are off, by up to {errors.max():.2g}" if wrong else run
