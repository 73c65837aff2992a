"""Labels that `ff.ops.linear_cross_entropy` draws: the random numbers, their distribution, and what must not change them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_registry import interpreter_problem
from test_linear_cross_entropy import INTERPRETER, head

from fastforget import ops, reference
from fastforget.ops import _linear_cross_entropy_torch as torch_path
from fastforget.ops._exponential_race import arrival_times, random_bits, row_keys

WORD, HALF = 2**64 - 1, 2**32 - 1
IDS = [0, 1, 2, 1000, 2**33 + 5, -1, 2**63 - 1, -(2**63)]
IMPLEMENTATIONS = ["torch", INTERPRETER]


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def bits_in_plain_python(seed: int, row_id: int, v: int) -> int:
    key = mix((mix(seed & WORD) + (row_id + 1) * 0x9E3779B97F4A7C15) & WORD)
    x = v ^ (key & HALF)
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) & HALF
    x = ((x ^ (x >> 11) ^ (key >> 32)) * 0xAC4C1B51) & HALF
    x = ((x ^ (x >> 15)) * 0x31848BAB) & HALF
    return x ^ (x >> 14)


def bits(seed: int, row_ids: torch.Tensor, classes: int, first: int = 0) -> torch.Tensor:
    return random_bits(row_keys(seed, row_ids), first, first + classes).long() & HALF


def draw(x, w, t, impl="torch", seed=1, **options) -> torch.Tensor:
    return ops.linear_cross_entropy(x, w, t, sample_seed=seed, impl=impl, **options).targets


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean under the null hypothesis."""
    expected = probabilities.double() * counts.sum()
    assert expected.min() > 5, "too few draws for the approximation"
    freedom = counts.numel() - 1
    return float((((counts - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_keys_are_splitmix64():
    assert [key & WORD for key in row_keys(0, torch.arange(3)).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]  # the published first numbers of seed 0; mix(0) is 0


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**63 - 1, -(2**63)])
def test_bits_are_those_of_plain_integers(seed: int):
    got = bits(seed, torch.tensor(IDS), 40, first=250_000)
    assert got.tolist() == [[bits_in_plain_python(seed, i, v) for v in range(250_000, 250_040)] for i in IDS]
    noise = reference.gumbel_noise(seed, IDS, 30)
    u = torch.tensor([[(bits_in_plain_python(seed, i, v) + 0.5) / 2**32 for v in range(30)] for i in IDS]).double()
    assert torch.allclose(noise, -(-(-u).log1p()).log(), atol=1e-6)


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_bits_and_arrival_times_of_the_kernel():
    import triton
    import triton.language as tl
    from fastforget_kernels import exponential_race as kernels

    @triton.jit
    def kernel(bits_ptr, time_ptr, key_ptr, SIZE: tl.constexpr, random_bits: tl.constexpr, times: tl.constexpr):
        offs = tl.arange(0, SIZE)
        key = tl.load(key_ptr + tl.arange(0, 8))[:, None]
        out = tl.arange(0, 8)[:, None] * SIZE + offs[None, :]
        drawn = random_bits(key.to(tl.uint32), (key >> 32).to(tl.uint32), offs[None, :].to(tl.uint32))
        tl.store(bits_ptr + out, drawn.to(tl.int64))
        tl.store(time_ptr + out, times(tl.zeros((8, SIZE), dtype=tl.float32) - 0.5, key, offs[None, :]))

    keys = row_keys(5, torch.tensor(IDS))
    got, times = torch.empty(8, 8192, dtype=torch.int64), torch.empty(8, 8192)
    kernel[(1,)](got, times, keys, 8192, kernels.random_bits, kernels.arrival_times)
    assert torch.equal(got, bits(5, torch.tensor(IDS), 8192))
    exact = -torch.log1p(-(got.double() + 0.5) / 2**32)
    allowed = 3e-7 * exact + 2**-24 * exact.expm1()  # late arrivals, which do not win, are coarse
    for approximate in (times, arrival_times(torch.full((8, 8192), math.exp(-0.5)), keys, 0)):
        assert ((approximate.double() * math.exp(-0.5) - exact).abs() < allowed).all()
    assert got.min() < 2**20  # the smallest arrival times, where log(1 - u) would lose every bit, are among them


def test_extreme_bits(monkeypatch: pytest.MonkeyPatch):
    from fastforget.ops import _exponential_race

    extremes = torch.tensor([[0, 1, 2**31 - 1, -(2**31), -2, -1]], dtype=torch.int32)  # 0, 1, ..., 2^32 - 1
    monkeypatch.setattr(_exponential_race, "random_bits", lambda keys, first, last: extremes.clone())
    times = arrival_times(torch.ones(1, 6), torch.zeros(1, dtype=torch.int64), 0)[0]
    assert torch.allclose(times[:4], torch.tensor([2**-33, 1.5 * 2**-32, math.log(2), math.log(2)]), rtol=1e-6)
    assert ((times[4:] > 16.6) & (times[4:] < 16.7)).all()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(lambda b: b[:, :-1], lambda b: b[:, 1:], id="neighbouring classes"),
        pytest.param(lambda b: b[:-1], lambda b: b[1:], id="neighbouring rows"),
        pytest.param(lambda b: b[:, :-32], lambda b: b[:, 32:], id="classes 32 apart"),
        pytest.param(lambda b: b[:-1, :-1], lambda b: b[1:, 1:], id="diagonal"),
        pytest.param(lambda b: b, lambda b: bits(4, torch.arange(512), 2048), id="neighbouring seeds"),
        pytest.param(lambda b: b, lambda b: bits(3 + 2**32, torch.arange(512), 2048), id="high half of the seed"),
        pytest.param(lambda b: b, lambda b: bits(3, torch.arange(512) + 2**32, 2048), id="high half of the row id"),
    ],
)
def test_pairs_are_uniform(first, second):
    """The joint distribution of the top (and of the bottom) 5 bits of two numbers, and every bit against every bit."""
    drawn = bits(3, torch.arange(512), 2048)
    a, b = first(drawn).flatten(), second(drawn).flatten()
    for shift in (0, 27):
        pair = ((a >> shift) & 31) * 32 + ((b >> shift) & 31)
        assert abs(chi_square(torch.bincount(pair, minlength=1024), torch.full((1024,), 1 / 1024))) < 5
    ones = [torch.stack([((n >> bit) & 1).float() * 2 - 1 for bit in range(32)]) for n in (a[:300_000], b[:300_000])]
    correlation = ones[0] @ ones[1].T / math.sqrt(ones[0].shape[1])  # standard normal each
    assert correlation.abs().max() < 5.5
    assert abs(float(correlation.square().mean()) - 1) < 0.25


def test_uniform_at_every_scale():
    drawn = bits(9, torch.arange(1024), 4096)
    for shift in (24, 16, 8, 0):
        counts = torch.bincount(((drawn >> shift) & 255).flatten(), minlength=256)
        assert abs(chi_square(counts, torch.full((256,), 1 / 256))) < 5
    counts = torch.stack([(drawn < 2**k).sum() for k in (10, 12, 14, 16)])  # the tail that decides large vocabularies
    expected = torch.tensor([2.0**k * drawn.numel() / 2**32 for k in (10, 12, 14, 16)])
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 3).all()
    lowest = bits(9, torch.arange(16384), 2048).argmin(1)  # of equal logits, this is the label
    assert abs(chi_square(torch.bincount(lowest // 32, minlength=64), torch.full((64,), 1 / 64))) < 5


def test_frequencies_are_the_softmax():
    x, w, _ = head(1, 8, 40, seed=3)
    rows = 60_000
    probabilities = (x @ w.T * 0.4)[0].softmax(0)
    many, target = x.expand(rows, 8), torch.zeros(rows, dtype=torch.int64)
    for seed in (0, 1, 2**40):
        labels = draw(many, w, target, seed=seed, scale=0.4)
        assert abs(chi_square(torch.bincount(labels, minlength=40), probabilities)) < 5
    # Independent from row to row: pairs of neighbours fall as the product of their probabilities.
    three = torch.bucketize(probabilities.cumsum(0), torch.tensor([0.33, 0.66])).clamp(max=2)
    group, mass = three[labels], torch.zeros(3).index_add_(0, three, probabilities)
    pairs = torch.bincount(group[:-1] * 3 + group[1:], minlength=9)
    assert abs(chi_square(pairs, (mass[:, None] * mass).flatten())) < 5


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_frequencies_of_the_kernel_are_the_softmax():
    x, w, _ = head(1, 16, 150, seed=4)
    rows = 2048
    labels = draw(x.expand(rows, 16), w, torch.zeros(rows, dtype=torch.int64), impl="triton", scale=0.25)
    probabilities = (x @ w.T * 0.25)[0].softmax(0)
    groups = torch.arange(150) // 10
    mass = torch.zeros(15).index_add_(0, groups, probabilities)
    assert abs(chi_square(torch.bincount(groups[labels], minlength=15), mass)) < 5


def test_a_rare_class_is_drawn_as_often_as_it_should():
    """The tail of the noise: 2^-14 each, beside a class that has nearly everything."""
    w = torch.zeros(257, 1)
    w[0] = math.log(2**14 - 256)
    rows = 2**17
    labels = draw(torch.ones(rows, 1), w, torch.zeros(rows, dtype=torch.int64))
    rare, expected = int((labels != 0).sum()), rows / 64
    assert abs(rare - expected) < 5 * math.sqrt(expected)
    assert len(labels[labels != 0].unique()) > 250


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_labels_are_those_of_the_oracle(impl: str):
    x, w, t = head(150, 24, 700, seed=5)
    ids = torch.randperm(150) * 7 - 1000
    options = {"linear_bias": w[:, 0].clone(), "softcap": 8.0, "scale": 0.7, "row_ids": ids}
    for seed in (0, -3):
        expected = reference.linear_cross_entropy(x.double(), w.double(), t, sample_seed=seed, **upcast(options))[3]
        assert torch.equal(draw(x, w, t, impl, seed, **options), expected)
    assert len(expected.unique()) > 70


def upcast(options: dict) -> dict:
    return options | {"linear_bias": options["linear_bias"].double()}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_but_seed_row_and_logits_matters(impl: str, monkeypatch: pytest.MonkeyPatch):
    from fastforget_kernels import linear_cross_entropy as kernels

    x, w, t = head(90, 16, 300, seed=6)
    expected = draw(x, w, t, impl)
    assert len(expected.unique()) > 30
    assert torch.equal(draw(x, w, torch.full_like(t, 10**6), impl), expected)  # the labels given are not looked at
    order, ids = torch.randperm(90), torch.arange(90)
    assert torch.equal(draw(x[order], w, t, impl, row_ids=order), expected[order])
    parts = [draw(x[r], w, t[r], impl, row_ids=ids[r]) for r in (slice(0, 1), slice(1, 50), slice(50, 90))]
    assert torch.equal(torch.cat(parts), expected)
    for rows, columns, most_rows, most_splits in ((16, 24, 32, 64), (7, 299, 64, 1), (90, 1, 16384, 2)):
        monkeypatch.setattr(torch_path, "ROWS", rows)
        monkeypatch.setattr(torch_path, "COLUMNS", columns)
        monkeypatch.setattr(kernels, "MAX_ROWS", most_rows)
        monkeypatch.setattr(kernels, "MAX_SPLITS", most_splits)
        assert torch.equal(draw(x, w, t, impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_other_seeds_and_rows_draw_other_labels(impl: str):
    x, w, t = head(1, 16, 300, seed=6)
    x, t, ids = x.expand(128, 16) * 0.3, t.expand(128), torch.arange(128)
    drawn = [draw(x, w, t, impl, seed) for seed in (0, 1, 2**32, -1)]
    drawn.append(draw(x, w, t, impl, 0, row_ids=ids + 128))
    drawn.append(draw(x, w, t, impl, 0, row_ids=ids + 2**32))
    for a, b in itertools.combinations(drawn, 2):
        assert (a == b).float().mean() < 0.1
    assert len(drawn[0].unique()) > 60


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sampled_labels_act_as_if_they_had_been_given(impl: str):
    x, w, t = head(70, 12, 400, seed=7)
    t[::7] = -100
    x, w = x.requires_grad_(), w.requires_grad_()
    bias = torch.linspace(-1, 1, 400).requires_grad_()
    options = {"linear_bias": bias, "softcap": 20.0, "scale": 1.5, "impl": impl}
    sampled = ops.linear_cross_entropy(x, w, t, sample_seed=3, **options)
    given = ops.linear_cross_entropy(x, w, sampled.targets, **options)
    assert not sampled.targets.requires_grad
    assert given.targets is sampled.targets
    assert 5 < int(sampled.hit.sum()) < 60
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # another tile may have summed the logits
    for name in ("loss", "lse"):
        torch.testing.assert_close(getattr(sampled, name), getattr(given, name), **tolerance)
    assert torch.equal(sampled.hit, given.hit)
    got, expected = (
        torch.autograd.grad((r.loss * torch.arange(70)).sum() + r.lse.sum(), (x, w, bias)) for r in (sampled, given)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignored_rows(impl: str):
    x, w, t = head(40, 6, 5, seed=8)
    t = t.clamp(max=3)
    for ignore_index in (-100, 4, 2):  # a class too: then it may be drawn
        target = t.masked_fill(torch.arange(40) % 3 == 0, ignore_index)
        ignored = target == ignore_index
        x.grad, w.grad = None, None
        result = ops.linear_cross_entropy(
            x.requires_grad_(), w.requires_grad_(), target, ignore_index=ignore_index, sample_seed=1, impl=impl
        )
        assert (result.targets[ignored] == ignore_index).all()
        assert ((result.targets[~ignored] >= 0) & (result.targets[~ignored] < 5)).all()
        assert torch.equal(result.targets[~ignored], draw(x.detach(), w.detach(), t, impl)[~ignored])
        assert (result.loss[ignored] == 0).all()
        assert not result.hit[ignored].any()
        assert (result.loss[~ignored] > 0).all()
        (gradient,) = torch.autograd.grad(result.loss.sum(), x)
        assert (gradient[ignored] == 0).all()
        assert (gradient[~ignored] != 0).any(1).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_banned_classes_are_never_drawn(impl: str):
    x, w, t = head(256, 6, 600, seed=9)
    bias = torch.zeros(600)
    allowed = torch.arange(600) % 50 == 49
    bias[~allowed] = -torch.inf
    assert allowed[draw(x, w, t, impl, linear_bias=bias)].all()
    bias[:] = -torch.inf
    bias[431] = -1e30
    assert (draw(x, w, t, impl, linear_bias=bias) == 431).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_far_apart_logits_draw_the_largest(impl: str):
    x, w = torch.ones(30, 1), torch.zeros(900, 1)
    for label in (0, 1, 450, 899):  # in every tile and split; before and after it nothing comes near
        w[:] = -300.0 * torch.arange(1, 901)[:, None]
        w[label] = 5000.0
        assert (draw(x, w, torch.zeros(30, dtype=torch.int64), impl) == label).all()


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide by zero):RuntimeWarning")  # NumPy's, interpreting
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_without_a_softmax(impl: str, monkeypatch: pytest.MonkeyPatch):
    x, w, t = head(8, 5, 300, seed=10)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    result = ops.linear_cross_entropy(x, w, t, sample_seed=1, impl=impl)
    bad = torch.zeros(8, dtype=torch.bool).index_fill_(0, torch.tensor([1, 3]), True)
    assert torch.equal(result.loss.isnan(), bad)
    assert (result.targets[bad] == 0).all()
    assert torch.equal(result.targets[~bad], draw(head(8, 5, 300, seed=10)[0], w, t, impl)[~bad])
    assert not result.hit[bad].any()
    monkeypatch.setattr(torch_path, "COLUMNS", 64)
    x, last = head(8, 5, 300, seed=10)[0], torch.zeros(300)
    last[299] = torch.nan  # after all others have drawn
    for bias in (last, torch.full((300,), -torch.inf)):
        result = ops.linear_cross_entropy(x, w, t, linear_bias=bias, sample_seed=1, impl=impl)
        assert result.loss.isnan().all()
        assert (result.targets == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [256, 100])
def test_labels_on_a_gpu_are_those_of_the_cpu(dtype: torch.dtype, hidden: int):
    x, w, t = head(2000, hidden, 32_003, dtype=dtype, seed=11)
    x, ids = x * 0.2, torch.randperm(2000) + 2**35
    expected = draw(x, w, t, row_ids=ids)
    got = draw(x.cuda(), w.cuda(), t.cuda(), "triton", row_ids=ids.cuda()).cpu()
    assert (got != expected).sum() <= 2  # logits that tie within rounding
    assert len(expected.unique()) > 1000


def test_compiles_as_one_graph():
    x, w, t = head(12, 5, 50)

    def objective(x, seed, ids):
        result = ops.linear_cross_entropy(torch.tanh(x), w, t, sample_seed=seed, row_ids=ids)
        return result.loss.sum(), result.targets

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    for seed, ids in ((3, None), (4, None), (5, torch.arange(12) * 3)):
        loss, targets = compiled(x, seed, ids)
        expected, expected_targets = objective(x, seed, ids)
        assert torch.equal(targets, expected_targets)
        gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients)


X, W, T = head()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_ids": T}, ValueError, "row_ids: expected None without sample_seed, got a tensor; pass sample_seed"),
        ({"sample_seed": 1.0}, TypeError, r"sample_seed: expected an int or None, got float; call int\(\)"),
        ({"sample_seed": True}, TypeError, "sample_seed: expected an int or None, got bool"),
        ({"sample_seed": 2**63}, ValueError, r"sample_seed: expected an int in \[-2\^63, 2\^63\), got 92233"),
        ({"sample_seed": -(2**63) - 1}, ValueError, "sample_seed: expected an int in"),
        ({"sample_seed": 1, "row_ids": [1]}, TypeError, r"row_ids: expected a tensor \[S\], got list"),
        ({"sample_seed": 1, "row_ids": T[1:]}, ValueError, r"row_ids: expected shape \[S\] = \(6,\), got \(5,\)"),
        (
            {"sample_seed": 1, "row_ids": T.int()},
            TypeError,
            r"row_ids: expected int64, got torch.int32; call .long\(\)",
        ),
        ({"sample_seed": 1, "row_ids": T.to("meta")}, ValueError, "row_ids: expected device cpu like input, got meta"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(X, W, T, **options)
