"""`ff.ops.adamw_` beyond the gates, and what all steps share: torch's bits, steering, rounding, checks, memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_registry import interpreter_problem, upcast
from test_linear_cross_entropy import LargestTensor
from update_registry import ALL, STATES, oracle_step, run_step, step_inputs

from fastforget import ops
from fastforget.ops import _adamw, _sgd, _steering
from fastforget.ops._exponential_race import random_bits, row_keys
from fastforget.ops._tensor_lists import chunk_elements

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]
SHAPES = ((70_001,), (0,), (1,), (7,), (), (300, 500), (4, 5, 6))
NUMBERS = {"adamw": {"lr": 0.05, "weight_decay": 0.1}, "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}
BOTH = pytest.mark.parametrize("operation", ["adamw", "sgd"])


def random_params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of awkward sizes and addresses, and one permuted; in float32 several chunks."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    params[0] = torch.empty(SHAPES[0][0] + 3, dtype=dtype)[3:].copy_(params[0])
    params[-1] = params[-1].permute(2, 0, 1)
    return params


def trajectory(optimizer: type[torch.optim.Optimizer], step, dtype: torch.dtype = torch.float32, **options):
    """20 steps of a torch optimizer beside 20 of `step(params, grads, number, states)`; both end points and their states."""
    theirs = [torch.nn.Parameter(param.clone()) for param in random_params(dtype=dtype)]
    ours = [torch.empty_like(param).copy_(param) for param in theirs]
    peer, states = optimizer(theirs, **options), {}
    for number in range(20):
        grads = random_params(number + 1, dtype)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        peer.step()
        step(ours, grads, number, states)
    return [param.detach() for param in theirs], ours, [peer.state[param] for param in theirs], states


def adamw_step(fused: bool = False, maximize: bool = False, amsgrad: bool = False, **options):
    def step(params, grads, number, states):
        names = STATES["adamw"][: 2 + amsgrad]
        lists = [states.setdefault(name, [torch.zeros_like(param) for param in params]) for name in names]
        steps = [torch.tensor(number + 1.0) for _ in params]
        maxima = lists[2] if amsgrad else None
        ops.adamw_(params, grads, *lists[:2], steps, max_exp_avg_sqs=maxima, maximize=maximize, fused=fused, **options)

    return step


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6, "betas": (0.0, 0.99)},
        {"lr": 1e-2, "weight_decay": 0.3, "amsgrad": True},
        {"lr": 0.5, "betas": (0.95, 0.5), "maximize": True},
    ],
)
def test_the_bits_are_those_of_torch(options, fused: bool):
    theirs, ours, peer_states, states = trajectory(
        torch.optim.AdamW, adamw_step(fused, **options), fused=fused, **options
    )
    assert all(map(torch.equal, theirs, ours))
    for name, own in states.items():
        assert all(torch.equal(peer[name], state) for peer, state in zip(peer_states, own, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_in_16_bits_has_torchs_bits_too(dtype: torch.dtype):
    theirs, ours, _, _ = trajectory(torch.optim.AdamW, adamw_step(True, lr=1e-2), dtype, fused=True, lr=1e-2)
    assert all(map(torch.equal, theirs, ours))


@BOTH
@pytest.mark.parametrize("change", [{}, ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("options", [{}, {"wide": True}], ids=["states alike", "float32 states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fused_equals_the_default(operation: str, change, options, dtype: torch.dtype):
    inputs = step_inputs(operation, dtype, **NUMBERS[operation], **options, **change)
    eps = torch.finfo(dtype).eps
    fused, default = (run_step(operation, inputs, "torch", fused=flag) for flag in (True, False))
    if dtype == torch.float32:
        assert any(not torch.equal(fused[name], default[name]) for name in fused), "it was not fused"
    for name, value in default.items():
        assert torch.allclose(fused[name], value, rtol=4 * eps, atol=4 * eps), name


STEERED = st.fixed_dictionaries(
    {},
    optional={
        "movable": st.just(True),
        "fisher_decay": st.sampled_from([0.0, 0.9, 1.0]),
        "min_fisher": st.sampled_from([0.25, 0.5]),
        "max_fisher": st.sampled_from([1.0, 2.5]),
        "ewc_lambda": st.sampled_from([0.5, 4.0]),
        "soft_weight": st.sampled_from([0.1, 3.0]),
        "maximize": st.just(True),
        "wide": st.just(True),
        "amsgrad": st.just(True),
        "nesterov": st.just(True),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    operation=st.sampled_from(["adamw", "sgd"]),
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    options=STEERED,
    impl=st.sampled_from(["torch"] if interpreter_problem() else ["torch", "triton"]),
    seed=st.integers(0, 2**31),
)
def test_trajectories_equal_the_oracle(operation, shapes, dtype, options, impl, seed):
    options.pop("nesterov" if operation == "adamw" else "amsgrad", None)
    options |= {"anchor": True} if "ewc_lambda" in options else {}
    options |= {"mean_fisher": 0.7} if "soft_weight" in options else {}
    got = step_inputs(operation, dtype, shapes, seed, **NUMBERS[operation], **options)
    impl = "torch" if dtype == torch.float64 else impl
    for step in range(4):
        grads = step_inputs(operation, dtype, shapes, seed + step + 1)
        got |= {name: value for name, value in grads.items() if name.startswith("grad")}
        expected = oracle_step(operation, upcast(got))  # of where it stands: thresholds are not continuous
        before = {name: got[name].double().norm() for name in expected if name in got}
        got |= run_step(operation, got, impl)
        for name, value in expected.items():
            error, eps = (got[name].double() - value).norm(), torch.finfo(got[name].dtype).eps
            size = max(value.norm(), before.get(name, 0.0))  # a momentum and a gradient may cancel
            tiny = torch.finfo(got[name].dtype).smallest_normal * eps * value.numel()  # float16 has few small numbers
            assert error <= max(eps, 3e-6 if eps > 1e-10 else 1e-14) * size + tiny, (name, step)


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounded", [False, True])
def test_an_entry_that_may_not_move_keeps_its_bits(operation: str, impl: str, dtype: torch.dtype, rounded: bool):
    inputs = step_inputs(operation, dtype, ((70_001,), (9, 5)), **NUMBERS[operation], **ALL)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    inputs["param0"].view(words)[:40] = torch.tensor([-1, torch.iinfo(words).min] * 20, dtype=words)  # a NaN, and -0
    keys = row_keys(0, torch.arange(2)) if rounded else None
    got = run_step(operation, inputs, impl, rounding_keys=keys)
    for i in range(2):
        fisher = inputs[f"fisher{i}"]
        frozen = ~(inputs[f"movable{i}"] & (fisher >= inputs["min_fisher"]) & (fisher < inputs["max_fisher"]))
        same = got[f"param{i}"].contiguous().view(words) == inputs[f"param{i}"].contiguous().view(words)
        assert same[frozen].all()
        assert not same[~frozen].all()
        state = "exp_avg" if operation == "adamw" else "momentum_buffer"
        assert (got[f"{state}{i}"] != inputs[f"{state}{i}"])[frozen].float().mean() > 0.9


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_thresholds_and_fishers_that_are_no_numbers(operation: str, impl: str):
    inputs = step_inputs(operation, torch.float32, ((4,),), **NUMBERS[operation], min_fisher=1.0)
    inputs["fisher0"] = torch.tensor([0.5, 1.0, math.inf, math.nan])

    def moved(**options) -> list[bool]:
        chosen = {name: value for name, value in (inputs | options).items() if value is not None}
        return (run_step(operation, chosen, impl)["param0"] != inputs["param0"]).tolist()

    assert moved() == [False, True, True, False]
    assert moved(min_fisher=None, max_fisher=1.0) == [True, False, False, False]
    assert moved(max_fisher=math.inf) == [False, True, False, False]


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_fisher_of_zeros_weighs_nothing(operation: str, impl: str):
    inputs = step_inputs(operation, torch.float32, ((70,),), **NUMBERS[operation], soft_weight=3.0, mean_fisher=0.0)
    inputs["fisher0"].zero_()
    plain = {name: value for name, value in inputs.items() if name not in ("soft_weight", "mean_fisher")}
    got, expected = (run_step(operation, own, impl)["param0"] for own in (inputs, plain))
    assert torch.allclose(got, expected, rtol=1e-6)


@pytest.fixture
def numbers_on_device(monkeypatch):
    """Numbers in tensors are taken for numbers on a device, which are never read."""
    for module in (_adamw, _sgd, _steering):
        keep = lambda value: value.reshape(()) if isinstance(value, torch.Tensor) else float(value)  # noqa: E731
        monkeypatch.setattr(module, "scalar", keep)


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_numbers_in_tensors(operation: str, impl: str, request):
    inputs = step_inputs(operation, torch.float32, first=True, **NUMBERS[operation], **ALL)
    expected = run_step(operation, inputs, impl)
    tensors = inputs | {name: torch.tensor(inputs[name], dtype=torch.float64) for name in ("lr", "mean_fisher")}
    got = run_step(operation, tensors, impl)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    request.getfixturevalue("numbers_on_device")
    got = run_step(operation, tensors | {"lr": tensors["lr"].float().reshape(1)}, impl)
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=2e-6, atol=1e-6), name


def rounded_steps(operation: str, values: torch.Tensor, keys: torch.Tensor, impl: str) -> torch.Tensor:
    """`values` `[n]` bfloat16, one step from them for every key: `[keys, n]`."""
    params = [values.clone() for _ in keys]
    grads = [torch.linspace(-1, 1, len(values), dtype=torch.bfloat16) for _ in keys]
    if operation == "sgd":
        ops.sgd_(params, grads, lr=1e-3, rounding_keys=keys, impl=impl)
    else:
        states = [[torch.zeros(len(values)) for _ in keys] for _ in range(2)]
        ops.adamw_(params, grads, *states, [torch.tensor(1.0)] * len(keys), lr=1e-3, rounding_keys=keys, impl=impl)
    return torch.stack(params)


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_stochastic_rounding_has_the_float32_value_as_mean(operation: str, impl: str):
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = row_keys(3, torch.arange(400))
    got = rounded_steps(operation, values, keys, impl).double()
    wide = {"sgd": values.float() - 1e-3 * torch.linspace(-1, 1, 64, dtype=torch.bfloat16).float()}
    if operation == "adamw":
        wide["adamw"] = values.float() * (1 - 1e-5) - 1e-3 * torch.linspace(-1, 1, 64).sign()
    expected = wide[operation].double()
    spacing = 2.0 ** (torch.frexp(values.float())[1] - 8).double()
    assert ((got - expected).abs() < 1.001 * spacing).all(), "a neighbour, above or below"
    errors = (got.mean(0) - expected) / spacing
    assert errors.abs().max() < 5 / (2 * 400**0.5)
    assert errors.mean().abs() < 5 / (2 * (400 * 64) ** 0.5)
    assert (got.std(0) > 0).float().mean() > 0.9


@BOTH
def test_stochastic_rounding_repeats_and_is_the_same_everywhere(operation: str):
    values = torch.randn(3 * chunk_elements(6) + 5, generator=torch.Generator().manual_seed(0)).bfloat16()[:70_001]
    keys = row_keys(5, torch.arange(2))
    first, second = (rounded_steps(operation, values, keys, "torch") for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1]), "every key has bits of its own"
    if not interpreter_problem():
        assert (
            rounded_steps(operation, values, keys, "triton") == first
        ).float().mean() > 0.9999  # the last float32 bit


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_stochastic_rounding_of_exact_values_has_the_same_bits_everywhere(impl: str):
    param, grad = torch.randn(70_001).bfloat16(), torch.randn(70_001).bfloat16() * 2.0**-12
    key, wide = row_keys(1, torch.arange(1)), param.float() - grad.float()
    bits = wide.view(torch.int32) + (random_bits(key, 0, 70_001)[0] & 0xFFFF)
    ops.sgd_([param], [grad], lr=1.0, rounding_keys=key, impl=impl)
    assert torch.equal(param.float(), (bits & -0x10000).view(torch.float32))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy, of infinities
def test_stochastic_rounding_keeps_infinity_and_nan(impl: str):
    param = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 0.0], dtype=torch.bfloat16).repeat(100)
    grad = torch.zeros_like(param)
    before = param.clone()
    ops.sgd_([param], [grad], lr=1.0, rounding_keys=row_keys(1, torch.arange(1)), impl=impl)
    assert torch.equal(param.nan_to_num(7.0, 8.0, 9.0), before.nan_to_num(7.0, 8.0, 9.0))
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001] * 100, dtype=torch.int32).view(torch.float32)  # GPUs make the first
    param = torch.ones(300, dtype=torch.bfloat16)
    ops.sgd_([param], [nan], lr=1.0, rounding_keys=row_keys(1, torch.arange(1)), impl=impl)
    assert param.isnan().all()


def test_random_bits_of_entries_beyond_31_bits():
    key = row_keys(0, torch.arange(1))
    around = random_bits(key, 2**31 - 3, 2**31 + 3)
    assert torch.equal(
        around, torch.cat([random_bits(key, 2**31 - 3, 2**31), random_bits(key, -(2**31), 3 - 2**31)], 1)
    )
    assert torch.equal(random_bits(key, 2**32, 2**32 + 5), random_bits(key, 0, 5))


@BOTH
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_path_holds_a_few_chunks(operation: str, dtype: torch.dtype, fused: bool):
    size = 5 * chunk_elements(1)
    inputs = step_inputs(operation, dtype, ((size,),), **NUMBERS[operation], **ALL)
    names = ("param", "grad", *STATES[operation], "fisher", "anchor")
    lists = {name: [inputs[f"{name}0"]] for name in names if f"{name}0" in inputs}
    mask = torch.full((-(-size // 8),), 85, dtype=torch.uint8)
    numbers = {name: ALL[name] for name in ALL if name not in ("anchor", "movable", "maximize")}
    steering = ops.Steering(fishers=lists["fisher"], anchors=lists["anchor"], masks=[mask], **numbers)
    states = {name: lists.get(name) for name in STATES[operation]}
    update = _steering.Update(lists["param"], lists["grad"], states, steering, row_keys(0, torch.arange(1)), True)
    with LargestTensor() as seen:
        if operation == "adamw":
            _adamw.adamw_step_(update, [torch.tensor(1.0)], _adamw.AdamWNumbers(0.1, fused=fused), "torch")
        else:
            _sgd.sgd_step_(update, [False], _sgd.SGDNumbers(0.1, 0.9, nesterov=True, fused=fused), "torch")
    assert 0 < seen.largest <= chunk_elements(len(lists) + _steering.FREE)


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(operation: str, impl: str):
    for shapes in ((), ((0,), (0, 3))):
        inputs = step_inputs(operation, torch.float32, shapes, **NUMBERS[operation])
        params = [value for name, value in inputs.items() if name.startswith("param")]
        states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        if operation == "adamw":
            ops.adamw_(params, params, *states, [torch.tensor(1.0)] * len(params), lr=0.1, impl=impl)
        else:
            ops.sgd_(params, params, lr=0.1, impl=impl)


@BOTH
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_graph_through_parameters_that_were_stepped_raises(operation: str, impl: str):
    param = torch.ones(3, requires_grad=True)
    loss = param.square().sum()
    states = [[torch.zeros(3)] for _ in range(2)]
    if operation == "adamw":
        ops.adamw_([param], [torch.ones(3)], *states, [torch.tensor(1.0)], lr=0.1, impl=impl)
    else:
        ops.sgd_([param], [torch.ones(3)], lr=0.1, impl=impl)
    assert param.requires_grad
    assert not torch.equal(param, torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_kept_tables_are_used_again():
    inputs = step_inputs("adamw", torch.float32, **NUMBERS["adamw"], amsgrad=True)
    lists = {name: [inputs[f"{name}{i}"] for i in range(7)] for name in ("param", "grad", *STATES["adamw"])}
    states = {name: lists[name] for name in STATES["adamw"]}
    tables = _steering.Update(lists["param"], lists["grad"], states).tables()
    expected = {}
    for step in range(2):
        expected = oracle_step("adamw", upcast(inputs))
        ops.adamw_(
            lists["param"], lists["grad"], lists["exp_avg"], lists["exp_avg_sq"],
            [torch.tensor(1.0 + i) for i in range(7)], max_exp_avg_sqs=lists["max_exp_avg_sq"], tables=tables,
            impl="triton", **NUMBERS["adamw"],
        )  # fmt: skip
        for i, param in enumerate(lists["param"]):
            assert torch.allclose(param.double(), expected[f"param{i}"], rtol=1e-5, atol=1e-6), (step, i)


ONES, MASK = [torch.ones(3), torch.ones(2, 4)], [torch.full((1,), 255, dtype=torch.uint8)] * 2
STEPS = [torch.tensor(1.0)] * 2


def steered(**options) -> dict:
    return {"steering": ops.Steering(**options)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": ONES[:1]}, ValueError, "grads: expected 2 tensors, one for each of params, got 1"),
        ({"exp_avgs": [ONES[0].half(), ONES[1]]}, TypeError, r"exp_avgs\[0\]: expected float32 beside parameters of"),
        ({"exp_avg_sqs": [t.double() for t in ONES]}, TypeError, r"exp_avg_sqs\[0\]: expected float32 beside"),
        (
            {"grads": [ONES[0], ONES[1].double()]},
            TypeError,
            r"grads\[1\]: expected bfloat16 or float16 or float32 beside",
        ),
        ({"grads": [ONES[0], torch.ones(4, 2).T]}, ValueError, r"grads\[1\]: expected strides \(4, 1\) like params"),
        ({"exp_avg_sqs": [ONES[0][:2], ONES[1]]}, ValueError, r"exp_avg_sqs\[0\]: expected shape \(3,\) like params"),
        ({"params": [ONES[0].long(), ONES[1]]}, TypeError, r"params\[0\]: expected float32"),
        ({"twice": True}, ValueError, r"params\[1\]: expected every tensor once, got params\[0\] again"),
        ({"steps": STEPS[:1]}, ValueError, "steps: expected 2 tensors, one for each of params, got 1"),
        ({"steps": [torch.tensor(1), STEPS[0]]}, TypeError, r"steps\[0\]: expected float32, got torch.int64"),
        ({"steps": [STEPS[0], torch.ones(1)]}, ValueError, r"steps\[1\]: expected no dimension"),
        ({"steps": [STEPS[0], torch.tensor(0.0)]}, ValueError, r"steps\[1\]: expected a count of at least 1"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected one number, got a tensor of shape"),
        (
            {"betas": (0.9, 1.0)},
            ValueError,
            r"betas\[1\]: expected a finite number of at least 0 and below 1, got 1.0",
        ),
        ({"eps": math.nan}, ValueError, "eps: expected a finite number"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay: expected a finite number"),
        ({"impl": "cuda"}, ValueError, 'impl: expected "auto"'),
        ({"rounding_keys": torch.zeros(2)}, TypeError, "rounding_keys: expected torch.int64, got torch.float32"),
        ({"rounding_keys": torch.zeros(3).long()}, ValueError, r"rounding_keys: expected a contiguous \[2\] on cpu"),
        (steered(min_fisher=1.0), ValueError, "fishers: expected a tensor for every parameter, .* got None"),
        (steered(fishers=ONES[:1]), ValueError, "fishers: expected 2 tensors"),
        (steered(fishers=[t.half() for t in ONES]), TypeError, r"fishers\[0\]: expected float32 or float64, got"),
        (steered(fishers=[t.double() for t in ONES]), TypeError, r"fishers\[0\]: expected float32 beside parameters"),
        (steered(fishers=ONES, ewc_lambda=1.0), ValueError, "anchors: expected a tensor for every parameter"),
        (steered(fishers=ONES, soft_weight=1.0), ValueError, "mean_fisher: expected a number, which soft_weight needs"),
        (steered(fishers=ONES, soft_weight=1.0, mean_fisher=-1.0), ValueError, "mean_fisher: expected a finite number"),
        (steered(fishers=ONES, soft_weight=-1.0, mean_fisher=1.0), ValueError, "soft_weight: expected a finite number"),
        (steered(fishers=ONES, fisher_decay=math.nan), ValueError, "fisher_decay: expected a finite number"),
        (steered(fishers=ONES, min_fisher=math.nan), ValueError, "min_fisher: expected a number, got nan"),
        (steered(fishers=[ONES[1][0, :3]] * 2, fisher_decay=1.0), ValueError, r"fishers\[1\]: expected shape"),
        (steered(anchors=[t.half() for t in ONES]), TypeError, r"anchors\[0\]: expected float32 beside parameters"),
        (steered(masks=MASK[:1]), ValueError, "masks: expected 2 tensors, one for each of params, got 1"),
        (steered(masks=[MASK[0], ONES[1].bool()]), TypeError, r"masks\[1\]: expected torch.uint8, got torch.bool"),
        (
            steered(masks=[MASK[0], MASK[1].repeat(2)]),
            ValueError,
            r"masks\[1\]: expected a contiguous \[1\] on cpu like",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, error, message):
    params, states = [t.clone() for t in ONES], [[t.clone() for t in ONES] for _ in range(2)]
    arguments = {"params": params, "grads": ONES, "exp_avgs": states[0], "exp_avg_sqs": states[1], "steps": STEPS}
    arguments |= {"lr": 0.1} | change
    if arguments.pop("twice", False):
        arguments["params"] = [params[0], params[0]]
        arguments |= {name: [ONES[0], ONES[0].clone()] for name in ("grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(error, match=message):
        ops.adamw_(**arguments)
    assert all(torch.equal(own, one) for own_list in (params, *states) for own, one in zip(own_list, ONES, strict=True))


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    wide = [t.double() for t in ONES]
    with pytest.raises(TypeError, match=r'params\[0\]: the Triton kernel .* got float64; pass impl="torch"'):
        ops.sgd_(wide, wide, lr=0.1, impl="triton")


@pytest.mark.gpu
@BOTH
def test_a_captured_graph_takes_numbers_from_the_device(operation: str):
    inputs = step_inputs(operation, torch.float32, **NUMBERS[operation], **ALL)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    lists = {name: [inputs[f"{name}{i}"] for i in range(7)] for name in ("param", "grad", "fisher")}
    states = {name: [inputs.get(f"{name}{i}") for i in range(7)] for name in STATES[operation]}
    states = {name: None if own[0] is None else own for name, own in states.items()}
    steering = dataclasses.replace(ops.Steering(), fishers=lists["fisher"], fisher_decay=0.5)
    update = _steering.Update(lists["param"], lists["grad"], states, steering)
    steps, lr = [torch.zeros((), device="cuda") for _ in range(7)], torch.tensor(0.1, device="cuda")
    tables, params = update.tables(), [param.clone() for param in lists["param"]]
    with pytest.raises(ValueError, match="tables: expected kept tables"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(operation, update, steps, lr, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(operation, update, steps, lr, tables)
    lr.fill_(0.0)
    graph.replay()
    assert all(map(torch.equal, params, lists["param"]))
    lr.fill_(0.1)
    graph.replay()
    assert not any(torch.equal(a, b) for a, b in zip(params, lists["param"], strict=True) if a.numel())


def step(operation, update, steps, lr, tables) -> None:
    if operation == "adamw":
        torch._foreach_add_(steps, 1)
        _adamw.adamw_step_(update, steps, _adamw.AdamWNumbers(lr), "triton", tables)
    else:
        _sgd.sgd_step_(update, [False] * len(steps), _sgd.SGDNumbers(lr, 0.9), "triton", tables)
