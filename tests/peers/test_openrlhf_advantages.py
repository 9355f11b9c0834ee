"""Our rewards and advantages against OpenRLHF's `RemoteExperienceMaker`, called unmodified.

Its methods are called on an instance that was never initialised, which would take a cluster: only
the settings that they read are set. Where the two differ, the test says on which input, and derives
from the formula who is right.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from _peers import Batch, batch, load
from torch import Tensor

from rlhf_fast.ops import gae, group_advantages, masked_whiten, ppo_advantages

utils = load("openrlhf.models.utils")
RemoteExperienceMaker = load("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
Experience = load("openrlhf.trainer.ppo_utils.experience").Experience


def maker(
    estimator: str = "gae",
    *,
    kl_coef: float = 0.0,
    gamma: float = 1.0,
    lam: float = 1.0,
    group_size: int = 1,
    no_std_norm: bool = False,
):
    made = object.__new__(RemoteExperienceMaker)
    advantage = SimpleNamespace(
        estimator=estimator, gamma=gamma, lambd=lam, no_std_norm=no_std_norm
    )
    reward = SimpleNamespace(
        clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None
    )
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=group_size),
        reward=reward,
    )
    made.strategy, made.kl_ctl = SimpleNamespace(args=args), SimpleNamespace(value=kl_coef)
    made.advantage_estimator = estimator
    return made


def experience(b: Batch, estimate: str = "k1") -> object:
    return Experience(
        index=list(range(len(b.scores))),
        rewards=b.scores.clone(),
        kl=utils.compute_approx_kl(b.old, b.ref, kl_estimator=estimate).double() * b.ones,
        action_mask=b.mask,
        values=b.values,
        response_length=b.mask.sum(1),
        info={},
    )


def from_scores(b: Batch, estimator: str, **options: object) -> tuple[Tensor, Tensor]:
    """OpenRLHF's advantages and returns of a batch, from its scores on."""
    made = maker(estimator, **options).compute_advantages_and_returns([experience(b)])[0]
    return made.advantages, made.returns


def biased_whitening(x: Tensor, mask: Tensor) -> Tensor:
    """What OpenRLHF does: divisor n, and a floor under the variance instead of an addend."""
    counted = x[mask]
    variance = counted.var(correction=0).clamp(min=1e-8)
    return torch.where(mask, (x - counted.mean()) * variance.rsqrt(), 0.0)


def deleted(f, x: Tensor, mask: Tensor, *others: Tensor) -> Tensor:
    """`f` of each row without the tokens that don't count, put back where they were."""
    result = torch.zeros_like(x)
    for row, keep in enumerate(mask):
        result[row, keep] = f(*(y[row, keep] for y in (x, *others)))
    return result


def gae_of(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Eq. 16 of the GAE paper as a double sum: A_t = sum over k of (gamma lam)^k delta_(t+k)."""
    ahead = torch.cat([values[1:], values.new_zeros(1)])
    delta = rewards + gamma * ahead - values
    place = torch.arange(len(delta), dtype=delta.dtype)
    apart = place - place[:, None]
    return torch.where(apart >= 0, (gamma * lam) ** apart.clamp(min=0), 0.0) @ delta


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8)])
def test_gae_without_gaps(gamma, lam):
    b = batch()
    expected = maker().get_advantages_and_returns(b.values, b.rewards, b.mask, gamma, lam)
    ours = gae(b.rewards, b.values, b.mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(ours, expected)
    truth = deleted(lambda r, v: gae_of(r, v, gamma, lam), b.rewards, b.mask, b.values)
    torch.testing.assert_close(ours[0], truth)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.9, 1.0)])
def test_gae_over_gaps_openrlhf_takes_a_tools_tokens_for_states_of_value_0(gamma, lam):
    """Tokens that nobody chose are no steps: without them the estimate must be the same."""
    b = batch(3, gaps=True)
    truth = deleted(lambda r, v: gae_of(r, v, gamma, lam), b.rewards, b.mask, b.values)
    ours, _ = gae(b.rewards, b.values, b.mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(ours, truth)
    theirs, _ = maker().get_advantages_and_returns(b.values, b.rewards, b.mask, gamma, lam)
    assert (theirs - truth)[b.mask].abs().max() > 0.02


def test_gae_over_gaps_agrees_where_the_sum_telescopes():
    b = batch(3, gaps=True)
    ours, _ = gae(b.rewards, b.values, b.mask, lam=1.0)
    theirs, _ = maker().get_advantages_and_returns(b.values, b.rewards, b.mask, 1.0, 1.0)
    torch.testing.assert_close(ours[b.mask], theirs[b.mask])
    assert (theirs[:, 2:4] != 0.0).any()  # in the gap itself, where ours are 0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_returns(gamma):
    from rlhf_fast.ops import discounted_returns

    b = batch()
    expected = maker().get_cumulative_returns(b.rewards, b.mask, gamma)
    torch.testing.assert_close(discounted_returns(b.rewards, b.mask, gamma=gamma), expected)


def test_discounted_returns_over_gaps_openrlhf_discounts_a_tools_tokens():
    from rlhf_fast.ops import discounted_returns

    b = batch(3, gaps=True)
    truth = deleted(lambda r: gae_of(r, 0.0 * r, 0.9, 1.0), b.rewards, b.mask)
    torch.testing.assert_close(discounted_returns(b.rewards, b.mask, gamma=0.9), truth)
    theirs = maker().get_cumulative_returns(b.rewards, b.mask, 0.9)
    assert (theirs - truth)[b.mask].abs().max() > 0.05


def test_token_rewards():
    b = batch(gaps=True)
    kl = utils.compute_approx_kl(b.old, b.ref)
    theirs = utils.compute_reward(b.scores, 0.1, kl, b.mask)
    ours = ppo_advantages(b.scores, b.old, b.ref, b.values, b.mask, kl_coef=0.1)[2]
    torch.testing.assert_close(ours[b.mask], theirs[b.mask].double(), rtol=1e-5, atol=1e-6)
    assert (theirs[~b.mask] != 0.0).all()  # left to whoever reads them


@pytest.mark.parametrize("estimate, right", [("k1", True), ("k2", False), ("k3", False)])
def test_in_the_reward_only_k1_trains_toward_the_optimum(estimate, right):
    """OpenRLHF puts whichever estimate it is told into the reward; we refuse all but k1.

    One step, three tokens, policy gradient by enumeration: sum of pi (r - b kl) d log pi must be
    the gradient of E[r] - b KL(pi || ref).
    """
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    score, coefficient = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64), 0.7
    logprobs = logits.log_softmax(0)
    kl = (logprobs.exp() * (logprobs - reference.log())).sum()
    (truth,) = torch.autograd.grad(
        (logprobs.exp() * score).sum() - coefficient * kl, logits, retain_graph=True
    )
    estimated = utils.compute_approx_kl(
        logprobs.detach()[:, None], reference.log()[:, None], kl_estimator=estimate
    )
    one = torch.ones(3, 1, dtype=torch.long)
    reward = utils.compute_reward(score, coefficient, estimated, one)[:, 0]
    surrogate = (logprobs.exp().detach() * reward * logprobs).sum()
    (gradient,) = torch.autograd.grad(surrogate, logits)
    assert torch.allclose(gradient, truth, rtol=1e-5, atol=1e-6) == right


def test_ppo_advantages_differ_by_the_variance_whose_divisor_is_n():
    """Whitening: a sample's variance has divisor n - 1; the two differ by sqrt(n / (n - 1))."""
    b = batch()
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.9}
    theirs, their_returns = from_scores(b, "gae", **options)
    plain, returns, _ = ppo_advantages(
        b.scores, b.old, b.ref, b.values, b.mask, whiten=False, **options
    )
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(returns, their_returns, **close)
    whitened = biased_whitening(plain, b.mask)
    torch.testing.assert_close(whitened[b.mask], theirs[b.mask], **close)
    ours = ppo_advantages(b.scores, b.old, b.ref, b.values, b.mask, **options)[0]
    n = b.mask.sum()
    torch.testing.assert_close(ours[b.mask], theirs[b.mask] * ((n - 1) / n).sqrt(), **close)
    assert theirs[~b.mask].abs().min() > 0.0 and (ours[~b.mask] == 0.0).all()


@pytest.mark.parametrize(
    "estimator, kind", [("rloo", "rloo"), ("dr_grpo", "dr_grpo"), ("group_norm", "grpo")]
)
def test_group_advantages(estimator, kind):
    b = batch(rows=8)
    theirs, _ = from_scores(b, estimator, group_size=4)
    ours = group_advantages(b.scores, 4, kind=kind)
    # The deviation's epsilon is 1e-9 there, 1e-6 here.
    torch.testing.assert_close(theirs[:, 0], ours, rtol=1e-5, atol=1e-9)


def test_equal_rewards_are_no_preference_even_in_fp32():
    """The mean of seven 0.1 is not 0.1 in fp32; over a deviation of 1e-8 + 1e-9 it is nearly 1."""
    b = batch(rows=7)._replace(scores=torch.full((7,), 0.1))
    assert (group_advantages(b.scores, 7, kind="grpo") == 0.0).all()
    theirs, _ = from_scores(b, "group_norm", group_size=7)
    assert theirs.abs().max() > 0.5


def test_reinforce_plus_plus_is_the_whitened_return():
    from rlhf_fast.ops import discounted_returns

    b = batch()
    theirs, _ = from_scores(b, "reinforce", gamma=0.9)
    at_end = ppo_advantages(b.scores, b.old, None, b.values, b.mask, kl_coef=0.0)[2]
    returns = discounted_returns(at_end, b.mask, gamma=0.9)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(biased_whitening(returns, b.mask)[b.mask], theirs[b.mask], **close)
    n = b.mask.sum()
    ours = masked_whiten(returns, b.mask)[b.mask]
    torch.testing.assert_close(ours, theirs[b.mask] * ((n - 1) / n).sqrt(), **close)


def test_reinforce_plus_plus_baseline_counts_sequences_here_tokens_in_openrlhf():
    """Both centre on the group, then whiten: we over the sequences, OpenRLHF over their tokens."""
    b = batch(rows=8)
    theirs, _ = from_scores(b, "reinforce_baseline", group_size=4)
    centred = group_advantages(b.scores, 4, kind="dr_grpo")
    tokens = biased_whitening(centred[:, None].expand_as(b.mask), b.mask)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(theirs[b.mask], tokens[b.mask], **close)
    ours = group_advantages(b.scores, 4, kind="reinforce++")
    assert (theirs[:, 0] - ours).abs().max() > 0.1
