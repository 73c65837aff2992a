"""`linear_cross_entropy` of a vocabulary that processes share: the merge in one process, and the whole in two."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from end_to_end.two_processes import run_in_two_processes
from kernel_registry import OPERATIONS, interpreter_problem
from transformers import LlamaConfig, LlamaForCausalLM

from fastforget import ops
from fastforget.ops._vocabulary_parallel import merged, own_report

HEAD = next(operation for operation in OPERATIONS if operation.name == "linear_cross_entropy")
IMPLS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())),
]
CASES = [name for name in HEAD.cases if name not in ("one class", "sampled, one class")]


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value)"
)  # the interpreter's, of a part that is wholly banned
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_three_parts_of_the_vocabulary_say_what_the_whole_says(case, impl):
    """Uneven parts; ties, banned classes and drawn labels across them."""
    inputs = HEAD.cases[case](torch.float32)
    whole = ops.linear_cross_entropy(**inputs, impl=impl)
    classes, ignore = len(inputs["linear_weight"]), inputs["ignore_index"]
    starts = [0, max(classes // 5, 1), max(classes // 2, 2), classes]
    bias = inputs["linear_bias"]
    reports = [
        own_report(
            inputs["input"],
            inputs["linear_weight"][a:b],
            inputs["target"],
            None if bias is None else bias[a:b],
            inputs["softcap"] or 0.0,
            inputs["scale"],
            inputs["sample_seed"],
            inputs.get("row_ids"),
            impl,
            a,
        )
        for a, b in itertools.pairwise(starts)
    ]
    loss, hit, lse, label = merged(reports, starts)
    counts = inputs["target"] != ignore
    torch.testing.assert_close(lse, whole.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss[counts], whole.loss[counts], rtol=1e-5, atol=2e-5)
    assert torch.equal(hit[counts], whole.hit[counts])
    assert torch.equal(label[counts], whole.targets[counts])


def test_rows_without_a_softmax_are_nan_and_banned_labels_infinitely_wrong():
    """As the whole vocabulary says it."""
    x, weight, bias = torch.zeros(3, 2), torch.zeros(6, 2), torch.zeros(6)
    x[0, 0], weight[5, 0] = 10.0, 3e38  # row 0: +inf in the last part
    bias[:2] = -torch.inf  # the whole first part, with the label of row 1
    target, starts = torch.tensor([2, 0, 3]), [0, 2, 4, 6]
    whole = ops.linear_cross_entropy(x, weight, target, linear_bias=bias)
    parts = [
        own_report(x, weight[a : a + 2], target, bias[a : a + 2], 0.0, 1.0, None, None, "torch", a) for a in starts[:-1]
    ]
    loss, hit, _, _ = merged(parts, starts)
    assert loss[0].isnan()
    assert loss[1] == torch.inf
    assert loss[2] == pytest.approx(torch.tensor(4.0).log())
    torch.testing.assert_close(loss, whole.loss, equal_nan=True)
    assert torch.equal(hit, whole.hit)


TWO_PROCESSES = """
from kernel_registry import OPERATIONS
from fastforget import ops

HEAD = next(operation for operation in OPERATIONS if operation.name == "linear_cross_entropy")
rank = dist.get_rank()
for case in ("bias, softcap and scale", "ties", "sampled, everything", "ignored class"):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = HEAD.cases[case](dtype)
        names = ("input", "linear_weight", "linear_bias")
        leaves = {n: inputs[n].clone().requires_grad_() for n in names if inputs[n] is not None}
        whole = ops.linear_cross_entropy(**inputs | leaves)
        rows = torch.arange(len(whole.loss), dtype=torch.float64)
        objective = lambda r: (r.loss * torch.cos(rows)).sum() + (r.lse * torch.sin(rows)).sum()
        objective(whole).backward()
        cut = len(inputs["linear_weight"]) // 3
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        own = {n: inputs[n].clone()[mine if n != "input" else slice(None)].requires_grad_() for n in leaves}
        shared = ops.linear_cross_entropy(**inputs | own, group=dist.group.WORLD)
        objective(shared).backward()
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        narrow = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(shared.loss, whole.loss, rtol=narrow, atol=narrow)
        torch.testing.assert_close(shared.lse, whole.lse, rtol=narrow, atol=narrow)
        assert torch.equal(shared.hit, whole.hit) and torch.equal(shared.targets, whole.targets), case
        close(own["input"].grad, leaves["input"].grad)
        for name in leaves.keys() - {"input"}:
            close(own[name].grad, leaves[name].grad[mine])
        for value in (shared.loss, shared.lse, own["input"].grad):  # the same bits everywhere
            copies = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(copies, value.detach())
            assert torch.equal(*copies), case

alone = dist.new_group([0])
try:
    ops.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([7]), group=dist.group.WORLD)
    raise AssertionError("7 of 6 classes was accepted")
except ValueError as error:
    assert "[0, 6)" in str(error), error
if rank == 1:
    try:
        ops.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), group=alone)
        raise AssertionError("a foreign group was accepted")
    except ValueError as error:
        assert "group:" in str(error), error
"""


PARALLEL_MODEL = """
from transformers import AutoModelForCausalLM

folder = os.path.dirname(__file__)
ids = torch.arange(24).view(3, 8) % 50
labels = ids.clone()
labels[1, 3:] = -100
alone = AutoModelForCausalLM.from_pretrained(folder)
shared = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
results = []
for model in (alone, shared):
    result = ff.log_perplexity(model, ids, labels=labels)
    result.sum().backward()
    grads = [model.get_submodule(n).weight.grad for n in ("lm_head", "model.layers.0.mlp.up_proj", "model.embed_tokens")]
    results.append([result.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)])
assert shared.lm_head.weight.to_local().shape[0] == 32
for one, other in zip(*results):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes_agree_with_one(tmp_path):
    """Values, drawn labels, and the gradients of input, weight and bias; uneven parts. And a model of transformers."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(tmp_path)
    run_in_two_processes(TWO_PROCESSES + PARALLEL_MODEL, tmp_path)


def test_a_group_is_a_group():
    """By name."""
    with pytest.raises(TypeError, match="group: expected a process group or None, got str"):
        ops.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), group="world")
