"""linear_logprobs: hand-computed numbers, and every route on every backend against the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_cases import calls, cases
from linear_cases import BUDGETS, Watch, small_tiles, transparent
from torch import Tensor

from rlhf_fast.ops import _logprob_tiles, count_products
from rlhf_fast.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference

OP = "linear_logprobs"
# Which of hidden states, weight and bias are trained.
TRAINED = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`linear_logprobs` through one backend."""
    yield from calls(OP, linear_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, interpreter=False))
def run_long(request, monkeypatch):
    """As `run`, without what takes long."""
    yield from calls(OP, linear_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, linear_logprobs, request.param, monkeypatch)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def problem(
    rows: int = 8, dim: int = 4, vocab: int = 11, dtype: Any = torch.float64
) -> list[Tensor]:
    """hidden, weight, bias (all of which require grad) and tokens with some ignored."""
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    tokens = torch.randint(0, vocab, (rows,))
    tokens[1::5] = -100
    bias = torch.randn(vocab).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), tokens]


def test_two_token_head_by_hand(run) -> None:
    hidden, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    options = {"bias": torch.tensor([0.5, 0.0]), "logit_scale": 2.0, "temperature": 4.0}
    logprobs, entropy = run(hidden, weight, torch.tensor([0, 1]), **options)
    # Logits (1.5, 2) and (3.5, 4), times 2 / 4: the second token leads by 1/4 in both rows.
    p = 1 / (1 + math.exp(-0.25))
    assert logprobs.tolist() == pytest.approx([math.log(1 - p), math.log(p)], rel=1e-6)
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy.tolist() == pytest.approx([h, h], rel=1e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_output_passes_gradcheck_alone(
    run64, output: int, memory_budget: int | None, frozen: bool
) -> None:
    hidden, weight, bias, tokens = problem()
    options = {"temperature": torch.linspace(0.5, 2.0, 8), "softcap": 3.0, "logit_scale": -0.5}
    options["memory_budget"] = memory_budget

    others = (weight.detach(), bias.detach())

    def op(h: Tensor, *trained: Tensor) -> Tensor:
        w, b = trained or others
        return run64(h, w, tokens, bias=b, **options)[output]

    assert torch.autograd.gradcheck(op, hidden if frozen else (hidden, weight, bias))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("memory_budget", [0, 200, 600, None])
@pytest.mark.parametrize("upstream_of", ["logprobs", "entropy", "both"])
def test_every_route_agrees_with_the_formula(
    run, trained: tuple[int, ...], memory_budget: int | None, upstream_of: str
) -> None:
    *inputs, tokens = problem(rows=12, dtype=torch.float32)
    upstream = torch.randn(2, 12)
    upstream[:, 4:9] = 0.0  # a whole chunk without an upstream gradient, and more
    upstream[1 if upstream_of == "logprobs" else 0] *= upstream_of == "both"
    temperature = torch.rand(12) + 0.5

    def results(function: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        hidden, weight, bias = (
            x.detach().to(dtype).requires_grad_(bool(t))
            for x, t in zip(inputs, trained, strict=True)
        )
        outputs = function(hidden, weight, tokens, bias=bias, temperature=temperature, **options)
        used = {"logprobs": [0], "entropy": [1], "both": [0, 1]}[upstream_of]
        loss = sum((upstream[i] * outputs[i]).sum() for i in used)
        leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    expected = results(linear_logprobs_reference, torch.float64)
    got = results(run, torch.float32, memory_budget=memory_budget)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("trained", "memory_budget", "live", "entropy", "products"),
    [
        ((1, 1, 1), 0, 8, True, 4),  # 1 + 3 r
        ((1, 1, 1), 0, 4, True, 2.5),
        ((1, 1, 1), 0, 0, True, 1),
        ((1, 1, 1), 10**12, 8, True, 3),  # 1 + 2 r
        ((1, 1, 1), 10**12, 2, True, 1.5),
        ((1, 0, 0), 0, 8, False, 3),  # 1 + 2 r
        ((1, 0, 0), 0, 2, True, 1.5),
        ((1, 0, 0), 10**12, 8, True, 2),  # 1 + r
        ((1, 0, 0), 10**12, 4, True, 1.5),
        ((1, 0, 0), 8 * 4 * 4, 8, False, 2),  # what the forward summed is enough
        ((1, 0, 0), 8 * 4 * 4, 2, False, 2),
        ((1, 0, 0), 8 * 4 * 4, 8, True, 4),  # but not for the entropy
        ((0, 0, 1), 0, 8, True, 2),
        ((0, 0, 0), None, 8, True, 1),
    ],
)
def test_products_are_those_of_the_plan_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
    trained: tuple[int, ...],
    memory_budget: int | None,
    live: int,
    entropy: bool,
    products: float,
) -> None:
    transparent(monkeypatch)
    *inputs, tokens = problem(dtype=torch.float32)
    hidden, weight, bias = (
        x.detach().requires_grad_(bool(t)) for x, t in zip(inputs, trained, strict=True)
    )
    upstream = (torch.arange(8) < live).float()
    with count_products() as counted, Watch() as watch:
        outputs = linear_logprobs(
            hidden, weight, tokens.clamp(min=0), bias=bias, memory_budget=memory_budget
        )
        if any(trained):
            loss = (upstream * (outputs[0] + outputs[1] if entropy else outputs[0])).sum()
            loss.backward()
    assert counted.flops == products * 2 * 8 * 4 * 11
    assert watch.products == counted.calls


def test_counters_nest_and_stop() -> None:
    hidden, weight, _, tokens = problem()
    with count_products() as outer:
        linear_logprobs(hidden, weight, tokens)
        with count_products() as inner:
            linear_logprobs(hidden, weight, tokens)
    linear_logprobs(hidden, weight, tokens)
    assert outer.flops == 2 * inner.flops > 0 and outer.calls == 2 * inner.calls


@pytest.mark.parametrize("budget", [0, 4 * 64 * 8])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_is_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, budget: int
) -> None:
    small_tiles(monkeypatch, 8, 128)
    transparent(monkeypatch)
    hidden, weight, bias, tokens = problem(64, 8, 1000, torch.bfloat16)
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    with Watch() as watch:
        outputs = linear_logprobs(
            *(hidden, weight, tokens), bias=bias, memory_budget=budget, backend="reference"
        )
        loss = outputs[0] if frozen else outputs[0] - 0.1 * outputs[1]
        loss.sum().backward()
    assert hidden.grad is not None
    assert watch.elements <= max(8 * 128, 1000 * 8 * (not frozen))  # a tile; the weight's gradient


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("frozen", [False, True])
def test_no_bit_depends_on_grad_mode_budget_or_the_run(run_long, frozen: bool) -> None:
    hidden, weight, bias, tokens = problem(rows=20, dtype=torch.bfloat16)
    leaves = (hidden,) if frozen else (hidden, weight, bias)
    weight, bias = weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    with torch.no_grad():
        want = run_long(hidden, weight, tokens, bias=bias)
    for memory_budget in BUDGETS:
        grads = []
        for _ in range(2):
            got = run_long(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            loss = (torch.linspace(-1, 2, 20) * got[0]).sum()
            grads.append(torch.autograd.grad(loss, leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_a_second_backward_repeats_the_first(run, memory_budget: int | None) -> None:
    hidden, weight, bias, tokens = problem(dtype=torch.float32)
    outputs = run(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
    loss = (outputs[0] * torch.randn(8) - outputs[1]).sum()
    first, second = (
        torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("by_rows", [False, True])
def test_rows_left_out_are_zero_without_gradient_even_if_nan(
    run, memory_budget: int | None, by_rows: bool
) -> None:
    hidden, weight, _, tokens = problem(rows=20, dtype=torch.float32)
    tokens = tokens.clamp(min=0)
    out = torch.arange(20) % 3 == 1
    with torch.no_grad():
        hidden[out] = math.nan
    options: dict[str, Any] = {"memory_budget": memory_budget}
    if by_rows:
        tokens[out] = 10**6  # never read
        with torch.no_grad():
            hidden[0] = math.nan  # among the rows that count, but ignored
        tokens[0], out[0] = -100, True
        options["live_rows"] = torch.cat([torch.tensor([0]), (~out).nonzero().squeeze(-1)])
    else:
        tokens[out] = -100
    logprobs, entropy = run(hidden, weight, tokens, **options)
    assert logprobs[out].abs().max() == 0 and entropy[out].abs().max() == 0
    alone = linear_logprobs_reference(hidden[~out], weight, tokens[~out])
    torch.testing.assert_close((logprobs[~out], entropy[~out]), alone)
    grads = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert grads[0][out].abs().max() == 0 and grads[0][~out].abs().min() > 0
    assert grads[0].isfinite().all() and grads[1].isfinite().all()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("memory_budget", [0, None])
def test_no_live_row_gives_zeros_that_can_still_be_differentiated(
    rows: int, memory_budget: int | None
) -> None:
    hidden, weight, bias, _ = problem(rows=rows)
    tokens = torch.full((rows,), -100)
    outputs = linear_logprobs(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
    assert all(torch.equal(o, torch.zeros(rows, dtype=torch.float64)) for o in outputs)
    grads = torch.autograd.grad((outputs[0] + outputs[1]).sum(), (hidden, weight, bias))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("margin", [12.0, 30.0, 60.0])
@pytest.mark.parametrize("memory_budget", [0, 16, 10**12])
@pytest.mark.usefixtures("tiles")
def test_a_confident_token_keeps_the_bits_of_its_gradient(
    run, margin: float, memory_budget: int
) -> None:
    # The head is the identity: d logp / d hidden is d logp / d logits.
    hidden = torch.zeros(1, 7).index_fill(1, torch.tensor([5]), margin).requires_grad_()
    logprobs, _ = run(hidden, torch.eye(7), torch.tensor([5]), memory_budget=memory_budget)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    s = 6 * math.exp(-margin)
    assert logprobs.item() == pytest.approx(-math.log1p(s), rel=5e-6, abs=0)
    assert grad[0, 5].item() == pytest.approx(s / (1 + s), rel=5e-6, abs=0)
    assert grad[0, 0].item() == pytest.approx(-s / 6 / (1 + s), rel=5e-6, abs=0)


@pytest.mark.parametrize("memory_budget", [0, None])
def test_weight_gradient_is_summed_in_fp32(
    run_long, monkeypatch: pytest.MonkeyPatch, memory_budget: int | None
) -> None:
    small_tiles(monkeypatch, 2, 32)
    hidden, weight, bias, tokens = problem(64, 16, 31, torch.bfloat16)
    upstream = torch.randn(64)

    def gradients(function: Any, h: Tensor, w: Tensor, b: Tensor, **options: Any) -> Any:
        logprobs, entropy = function(h, w, tokens, bias=b, **options)
        return torch.autograd.grad((upstream * (logprobs + entropy)).sum(), (h, w, b))

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    truth = gradients(linear_logprobs_reference, *wide)
    got = gradients(run_long, hidden, weight, bias, memory_budget=memory_budget)
    for one, want in zip(got, truth, strict=True):
        assert one.dtype == torch.bfloat16
        # One rounding of the sum to bf16 (2^-8 of it at most); on a GPU one of each factor, too.
        factor = 2**-8 if run_long.case.device == "cpu" else 2**-6
        assert ((one - want).abs() <= factor * want.abs() + 1e-3 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_errors_stay_within_those_of_naive_pytorch(
    run, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, frozen: bool
) -> None:
    rows, dim, vocab = 24, 64, 257
    small_tiles(monkeypatch, 7, 64)
    hidden, weight, _, tokens = problem(rows, dim, vocab, dtype)
    live = (tokens != -100).nonzero().squeeze(1)
    upstream = torch.randn(2, rows)

    def results(h: Tensor, w: Tensor, ours: bool) -> list[Tensor]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(not frozen)
        if ours:
            outputs = run(h, w, tokens, memory_budget=rows * dim * 4)
        else:
            logp = (h @ w.T).log_softmax(-1)
            chosen = logp.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
            outputs = (chosen, -(logp.exp() * logp).sum(-1))
        lp, ent = outputs[0][live], outputs[1][live]
        weights = upstream[:, live].to(lp.dtype)
        loss = (weights[0] * lp).sum() + (0.0 if frozen else (weights[1] * ent).sum())
        grads = torch.autograd.grad(loss, (h,) if frozen else (h, w))
        return [t.detach().double() for t in (lp, ent, *grads)]

    truth = results(hidden.double(), weight.double(), ours=False)
    got, naive = results(hidden, weight, ours=True), results(hidden, weight, ours=False)
    eps = torch.finfo(torch.float32).eps
    for want, a, b in zip(truth, got, naive, strict=True):
        assert (a - want).abs().max() <= (b - want).abs().max() + 4 * eps * want.abs().max()


@pytest.mark.parametrize("memory_budget", [0, None])
def test_autocast_rounds_the_inputs_once_and_nothing_else(run, memory_budget: int | None) -> None:
    hidden, weight, bias, tokens = problem(dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]

    def results(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = run(h, w, tokens, bias=bias, memory_budget=memory_budget)
        loss = (logprobs + entropy).sum()
        return logprobs, entropy, *torch.autograd.grad(loss, (h, w, bias))

    with torch.autocast(run.case.device, torch.bfloat16):
        cast = results(hidden, weight)
    assert [x.dtype for x in cast] == [torch.float32] * 5
    for one, other in zip(cast, results(*rounded), strict=True):
        assert torch.equal(one.to(other.dtype), other)


def test_strided_inputs_and_mixed_dtypes(run) -> None:
    hidden = torch.randn(8, 12, dtype=torch.bfloat16).T[::2]
    weight, tokens = torch.randn(8, 9).T, torch.randint(0, 9, (6, 2))[:, 1]
    got = run(hidden, weight, tokens)
    torch.testing.assert_close(got, linear_logprobs_reference(hidden.float(), weight, tokens))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("case", cases(OP, interpreter=False))
@pytest.mark.parametrize("memory_budget", [None, 10**9])
def test_compiles_as_one_graph(case, memory_budget: int | None) -> None:
    tensors = problem(dtype=torch.float32)
    hidden, weight, bias, tokens = (
        x.detach().to(case.device).requires_grad_(x.requires_grad) for x in tensors
    )

    def gradients(function: Any) -> tuple[Tensor, ...]:
        logprobs, entropy = function(hidden, weight, tokens, bias)
        loss = (logprobs - 0.3 * entropy).sum()
        return logprobs, *torch.autograd.grad(loss, (hidden, weight, bias))

    def op(h: Tensor, w: Tensor, t: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        options = {"memory_budget": memory_budget, "backend": case.backend}
        return linear_logprobs(h, w, t, bias=b, temperature=0.7, **options)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled), gradients(op), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kept_tiles", [0, 2])  # full ones: nothing of the buffer is unwritten
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(True, False, True), (True, False, False), (False, True, False)])
def test_registered_ops_pass_opcheck(
    kept_tiles: int, dtype: torch.dtype, needs: tuple[bool, ...]
) -> None:
    *inputs, tokens = problem(dtype=dtype)
    hidden, weight, bias = (x.detach() for x in inputs)
    options = (None, 0.7, 0.0, 1.0, -100, dtype, kept_tiles)
    forward = (hidden, weight, bias, tokens, *options, False, "reference")
    torch.library.opcheck(_logprob_tiles.forward, forward)
    *outputs, stats, kept, _ = _logprob_tiles.forward(*forward)
    backward = (*outputs, hidden, weight, bias, tokens, stats, kept, *options)
    torch.library.opcheck(_logprob_tiles.backward, (*backward, True, list(needs), "reference"))


def test_one_graph_serves_all_lengths_and_temperatures() -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def op(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        return linear_logprobs(hidden, weight, tokens, temperature=temperature)[0].sum()

    compiled = torch.compile(op, fullgraph=True, backend=count)
    for rows in range(4, 16):
        hidden, weight, _, tokens = (x.detach() for x in problem(rows, dtype=torch.float32))
        got = compiled(hidden, weight, tokens, 0.5 + rows / 16)
        torch.testing.assert_close(got, op(hidden, weight, tokens, 0.5 + rows / 16))
    assert len(graphs) <= 3  # one for the first shape, then one for all


def test_id_outside_the_vocabulary_is_named() -> None:
    hidden, weight, _, tokens = problem()
    tokens[3] = 11
    with pytest.raises(IndexError, match=r"linear_logprobs: tokens holds the id 11, .*\[0, 11\)"):
        linear_logprobs(hidden, weight, tokens)


def test_wrong_arguments_are_named() -> None:
    hidden, weight, bias, tokens = problem(rows=6, vocab=7)
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 3, 4\]; expected \[N, D\]"):
        linear_logprobs(hidden.view(2, 3, 4), weight, tokens.view(2, 3))
    with pytest.raises(ValueError, match=r"weight has shape \[4, 7\]; expected \[V, 4\]"):
        linear_logprobs(hidden, weight.T, tokens)
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; expected \[7\]"):
        linear_logprobs(hidden, weight, tokens, bias=bias[:3])
    with pytest.raises(ValueError, match=r"tokens has shape \[5\]; expected \[6\]"):
        linear_logprobs(hidden, weight, tokens[:5])
    with pytest.raises(TypeError, match="hidden has dtype torch.int64"):
        linear_logprobs(hidden.long(), weight, tokens)
    with pytest.raises(TypeError, match="tokens has dtype torch.float32"):
        linear_logprobs(hidden, weight, tokens.float())
    with pytest.raises(ValueError, match="memory_budget=-1"):
        linear_logprobs(hidden, weight, tokens, memory_budget=-1)
    with pytest.raises(ValueError, match="logit_scale=inf"):
        linear_logprobs(hidden, weight, tokens, logit_scale=math.inf)
    with pytest.raises(ValueError, match=r"temperature has shape \[2\]"):
        linear_logprobs(hidden, weight, tokens, temperature=torch.ones(2))
    with pytest.raises(TypeError, match="live_rows has dtype torch.bool; expected int64"):
        linear_logprobs(hidden, weight, tokens, live_rows=tokens >= 0)
    for wrong in ([0, 6], [-1, 2], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match=r"live_rows must rise.*within \[0, 6\)"):
            linear_logprobs(hidden, weight, tokens, live_rows=torch.tensor(wrong))
