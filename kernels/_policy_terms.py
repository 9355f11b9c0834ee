"""What a token adds to a policy loss, and how its terms are summed: for kernels/policy_loss.py."""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels._losses import sum_of_lanes
from rlhf_fast.kernels._prims import exp_excess, exp_of_any

# Codes of the options, as in rlhf_fast/ops/_policy_loss_kernel.py and _reduce.py.
SEQUENCE, NONE, CISPO = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM = tl.constexpr(1), tl.constexpr(2)
K1, K2 = tl.constexpr(0), tl.constexpr(1)
RATIO_MAX, COUNT = tl.constexpr(8), tl.constexpr(9)  # places among the values; the rest are sums
TERMS = tl.constexpr(10)
HUGE = tl.constexpr(1e18)
MAX_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def bounded(x, limit):
    """`x` between -limit and limit; a NaN stays one."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def k3_estimate(u):
    """exp(-u) - 1 + u of a log-ratio, and its derivative."""
    near = tl.abs(u) < 1.0
    small, e = exp_excess(u), exp_of_any(-u)
    return tl.where(near, small, (e - 1.0) + u), tl.where(near, u - small, 1.0 - e)


@triton.jit
def surrogate(
    new,
    advantage,
    exponent,
    lower,
    upper,
    dual_clip,
    RATIO: tl.constexpr,
):
    """rho, a token's loss and its derivative by `new`, whether rho lies below or above its bounds.

    The last two only where the bound decides the loss.
    """
    rho = exp_of_any(bounded(exponent, MAX_LOG_RATIO))
    below, above = rho < lower, rho > upper
    clipped = tl.where(below, lower, tl.where(above, upper, rho))
    if RATIO == NONE:
        slope = -advantage
        loss = slope * new
        below, above = tl.zeros(below.shape, tl.int1), tl.zeros(above.shape, tl.int1)
    elif RATIO == CISPO:
        slope = -advantage * clipped
        loss = slope * new
    else:
        free, held = -advantage * rho, -advantage * clipped
        loss = tl.maximum(free, held, propagate_nan=tl.PropagateNan.ALL)
        # Of a maximum of equals each has half of the gradient; inside the bounds both are free.
        kept = tl.where(free > held, 1.0, tl.where(free == held, 0.5, 0.0))
        slope = free * tl.where(below | above, kept, 1.0)
        slope = tl.where(tl.abs(exponent) <= MAX_LOG_RATIO, slope, 0.0)
        below, above = below & (advantage < 0.0), above & (advantage > 0.0)
        if dual_clip is not None:
            most = -advantage * dual_clip
            over = (advantage < 0.0) & (loss > most)
            loss, slope = tl.where(over, most, loss), tl.where(over, 0.0, slope)
    return rho, loss, slope, below, above


@triton.jit
def kl_estimate(new, old, ref, KL_KIND: tl.constexpr, UNBIASED: tl.constexpr):
    """The KL estimate of a token and its derivative by `new`."""
    u = new - ref
    if KL_KIND == K1:
        value = u
        slope = tl.full(u.shape, 1.0, tl.float32)
    elif KL_KIND == K2:
        value = 0.5 * u * u
        slope = u
    else:
        value, slope = k3_estimate(tl.where(u < -MAX_LOG_RATIO, -MAX_LOG_RATIO, u))
        slope = tl.where(u >= -MAX_LOG_RATIO, slope, 0.0)
    if UNBIASED:
        weight = new - old
        slope = u * exp_of_any(tl.where(weight > MAX_LOG_RATIO, MAX_LOG_RATIO, weight))
        # A weight that is not a number shows in the value, too.
        value += 0.0 * slope
    return value, slope


@triton.jit
def counted(X, stride, row, column, owner, counts, PER_TOKEN: tl.constexpr):
    """An operand of the tokens that count, or their sequences' own; infinities become huge."""
    if PER_TOKEN:
        x = tl.load(X + row * stride + column, mask=counts, other=0.0)
    else:
        x = tl.load(X + (owner * stride + tl.zeros_like(column)), mask=counts, other=0.0)
    return bounded(x, HUGE)


@triton.jit
def summed(t0, t1, t2, t3, t4, t5, t6, t7, t9, zero):
    """[16] sums of [BLOCK] terms, at the places of their numbers: one exchange between threads."""
    t04 = tl.join(tl.join(t0, zero), tl.join(t4, zero))
    t26 = tl.join(tl.join(t2, zero), tl.join(t6, zero))
    t15 = tl.join(tl.join(t1, t9), tl.join(t5, zero))
    t37 = tl.join(tl.join(t3, zero), tl.join(t7, zero))
    even, odd = tl.join(t04, t26), tl.join(t15, t37)
    return tl.reshape(sum_of_lanes(tl.join(even, odd)), [16])
