"""Masked statistics and group advantages, in plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from loss_truth import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    NAN,
    LossRunner,
    numbers,
)
from truth import assert_budget, assert_same, gradients, leaf

from rlhf_fast.ops import group_advantages, masked_mean, masked_var, masked_whiten


def runner(op):
    @pytest.fixture(params=cases(op.__name__))
    def run(request, monkeypatch):
        return LossRunner(op, request.param, monkeypatch)

    return run


mean, var, whiten = map(runner, (masked_mean, masked_var, masked_whiten))
groups = runner(group_advantages)


def moments(x):
    n = max(len(x), 1)
    centre = math.fsum(x) / n
    return centre, math.fsum((y - centre) ** 2 for y in x) / max(len(x) - 1, 1)


def sample(*shape, offset=0.0, scale=1.0, dtype=F32, keep=0.7):
    x = torch.randn(shape, dtype=F64) * scale + offset
    return x.to(dtype), torch.rand(shape) < keep


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize(
    ("offset", "scale"), [(0, 1), (1e4, 1), (-1e4, 1e-2), (1e6, 10), (0, 1e-3)]
)
@pytest.mark.parametrize("shape", [(5, 37), (1,), (2,), (3, 7, 5), (20011,)])
def test_moments(mean, var, whiten, shape, offset, scale, dtype):
    x, mask = sample(*shape, offset=offset, scale=scale, dtype=dtype, keep=0.9)
    mask.view(-1)[0] = True
    if dtype == F16:
        x = x.clamp(-1e4, 1e4)
    held = numbers(x[mask])
    centre, variance = moments(held)
    size = max(map(abs, held))
    result = mean(x, mask)
    assert result.dtype == (F64 if dtype == F64 else F32)
    assert_budget("mean", result, torch.tensor(centre, dtype=F64), scale=size)
    naive = x[mask].float().var() if len(held) > 1 and dtype != F64 else None
    exact = torch.tensor(variance, dtype=F64)
    assert_budget("variance", var(x, mask), exact, naive, roundings=16)
    found = whiten(x, mask)
    expected = (x[mask].double() - centre) / math.sqrt(variance + 1e-8)
    rival = None
    if naive is not None:
        wide = x[mask].float()
        rival = (wide - wide.mean()) / (naive + 1e-8).sqrt()
    room = {"scale": size / math.sqrt(variance + 1e-8), "roundings": 16} if dtype == F64 else {}
    assert_budget("whitened", found[mask], expected, rival, **room)
    assert (found[~mask] == 0).all()
    rival = None if rival is None else rival + wide.mean()
    kept, room = whiten(x, mask, shift_mean=False), room or {"scale": size}
    assert_budget("rescaled", kept[mask], expected + centre, rival, **room)


@pytest.mark.parametrize("level", [0.0, 0.1, -1e4 / 3, 1e7 + 1, 1e-20, 1e15, 1 / 3])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000, 20011])
def test_equal_elements_have_no_spread(mean, var, whiten, level, n):
    x, mask = torch.full((n,), level), torch.rand(n) < 0.7
    mask[0] = True
    assert mean(x, mask) == x[0]
    assert var(x, mask) == 0
    assert (whiten(x, mask) == 0).all()
    assert_same("kept mean", [whiten(x, mask, shift_mean=False)], [x.where(mask, 0)])


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, F16, F64])
def test_what_lies_under_the_mask_is_not_read(mean, var, whiten, garbage, kind):
    x, mask = sample(4, 33)
    upstream = torch.randn(4, 33)
    for run, up in ((mean, torch.tensor(-1.3)), (var, torch.tensor(0.7)), (whiten, upstream)):
        results = []
        for fill in (0.0, garbage):
            held = leaf(x.masked_fill(~mask, fill))
            out = run(held, mask.to(kind) * (1 if kind == torch.bool else -1))
            results.append((out.detach(), *gradients(out, [held], up)))
        assert_same(run.op.__name__, results[1], results[0])
        assert (results[1][1][~mask] == 0).all()


def test_gradients_of_the_moments(mean, var, whiten):
    x, mask = sample(4, 33, offset=1e3)
    held, n = numbers(x[mask]), int(mask.sum())
    centre, variance = moments(held)
    rest = x.double() - centre
    upstream = torch.randn(4, 33)
    held = leaf(x)
    (found,) = gradients(mean(held, mask), [held], torch.tensor(-1.3))
    assert_budget("d mean", found, mask.double() * -1.3 / n)
    (found,) = gradients(var(held, mask), [held], torch.tensor(-1.3))
    assert_budget(
        "d variance", found, torch.where(mask, rest * 2 / (n - 1) * -1.3, 0), roundings=1e3 * 2
    )
    (found,) = gradients(whiten(held, mask), [held], upstream)
    up, deviation = upstream.double() * mask, math.sqrt(variance + 1e-8)
    along = (up * rest).sum() / ((n - 1) * deviation**3)
    exact = torch.where(mask, (up - up.sum() / n) / deviation - rest * along, 0)
    assert_budget("d whitened", found, exact, roundings=1e3 * 2)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (3, 5)])
def test_no_elements(mean, var, whiten, shape):
    x, mask = leaf(torch.full(shape, NAN)), torch.zeros(shape)
    for run in (mean, var, whiten):
        out = run(x, mask)
        assert (out == 0).all()
        assert (gradients(out, [x], torch.ones_like(out))[0] == 0).all()


def group_truth(rewards, sizes, kind):
    out, start, r = [], 0, numbers(rewards)
    for n in sizes:
        group = r[start : start + n]
        centre, variance = moments(group)
        scale = {
            "grpo": 1 / (math.sqrt(variance) + 1e-6),
            "rloo": n / (n - 1) if n > 1 else 0.0,
        }.get(kind, 1.0)
        equal = len(set(group)) == 1
        out += [0.0 if equal else (y - centre) * scale for y in group]
        start += n
    if kind == "reinforce++":
        centre, variance = moments(out)
        out = [(y - centre) / math.sqrt(variance + 1e-8) for y in out]
    return torch.tensor(out, dtype=F64)


def naive_groups(rewards, sizes, kind):
    """What people write, a group at a time, in fp32."""
    out = []
    for r in rewards.split(sizes):
        n = len(r)
        scale = {"grpo": 1 / (r.std() + 1e-6) if n > 1 else 0.0, "rloo": n / max(n - 1, 1)}
        out.append((r - r.mean()) * scale.get(kind, 1.0))
    out = torch.cat(out)
    return (out - out.mean()) / (out.var() + 1e-8).sqrt() if kind == "reinforce++" else out


KINDS = ("grpo", "rloo", "dr_grpo", "reinforce++")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [(4,) * 6, (1,) * 5, (1, 7, 2, 1, 30), (257,), (2,) * 500],
    ids=lambda x: f"{len(x)} groups",
)
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_groups(groups, sizes, kind, dtype):
    for offset in (0.0, 100.0):
        rewards = (torch.randn(sum(sizes), dtype=F64) + offset).to(dtype)
        rewards[: sizes[0]] = rewards[0]  # equal ones
        found = groups(rewards, torch.tensor(sizes), kind=kind)
        assert found.dtype == (F64 if dtype == F64 else F32)
        exact = group_truth(rewards, sizes, kind)
        if dtype == F64:
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
        else:
            naive = naive_groups(rewards.float(), sizes, kind)
            assert_budget("advantages", found, exact, naive, scale=offset, roundings=16)
        if kind != "reinforce++":
            assert (found[: sizes[0]] == 0).all()
        assert_same("sizes as a sequence", [groups(rewards, list(sizes), kind=kind)], [found])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.1, -1e4 / 3, 1e7 + 1, 1e30, 1 / 3])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_groups_of_equal_rewards_are_exactly_zero(groups, n, level, kind):
    assert (groups(torch.full((3 * n,), level), n, kind=kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_leak(groups, kind):
    rewards = leaf(torch.randn(12))
    (found,) = gradients(groups(rewards, 4, kind=kind), [rewards], torch.randn(12))
    assert found.isfinite().all()
    assert groups(torch.zeros(0), 4, kind=kind).shape == (0,)
    if kind == "reinforce++":
        return
    broken = rewards.detach().clone()
    broken[5] = NAN
    out, clean = groups(broken, 4, kind=kind), groups(rewards.detach(), 4, kind=kind)
    assert_same("other groups", [out[:4], out[8:]], [clean[:4], clean[8:]])
    assert out[4:8].isnan().all()


X = torch.zeros(3, 5)
WRONG = [
    ("mask", lambda: masked_mean(X, torch.zeros(3))),
    ("mask", lambda: masked_whiten(X, torch.zeros(3, 5, device="meta"))),
    ("x", lambda: masked_var(X.int(), X)),
    ("groups of 2", lambda: group_advantages(X[0], 2)),
    ("groups of 0", lambda: group_advantages(X[0], 0)),
    ("group_size", lambda: group_advantages(X[0], [6, -1])),
    ("group_size", lambda: group_advantages(X[0], 2.5)),
    ("rewards", lambda: group_advantages(X, 5)),
    ("rewards", lambda: group_advantages(X[0].int(), 5)),
    ("kind", lambda: group_advantages(X[0], 5, kind="ppo")),
]


@pytest.mark.parametrize(("name", "call"), WRONG)
def test_bad_arguments_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=name):
        call()
