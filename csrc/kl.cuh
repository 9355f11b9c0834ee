// KL of ranges of columns on the GPU: its terms, what a warp keeps, how two ranges become one.
#pragma once

#include "softmax.cuh"

namespace rlhf {

// e^-x - 1 + x in bits, for x = u ln 2 and |u| < kNear, is kLead u^2 times this: a minimax fit of
// relative error 9.4e-7, with its leading coefficient taken out.
constexpr float kNear = 0.75f, kLead = 2.2267149e-4f;
RLHF_DEVICE float series(float u) {
  return (((u - 8.7084255f) * u + 62.31756f) * u - 359.603f) * u + 1556.4344f;
}
RLHF_DEVICE float excess(float u) { return kLead * (u * u * series(u)); }

// One term of the sum in bits, >= 0: p u - p + q with u = log(p / q), without cancellation near 0.
RLHF_DEVICE float kl_term(float p, float q, float u) {
  return fabsf(u) < kNear ? p * excess(u) : p * (u - kLog2E) + q * kLog2E;
}

// log2(1 + t) for t >= 0, precise near 0: a minimax fit there, of relative error 1.9e-7.
RLHF_DEVICE float log2_1p(float t) {
  float y = 0.1788076f;
  y = y * t - 0.33922035f;
  y = y * t + 0.4790857f;
  y = y * t - 0.7212926f;
  y = y * t + 1.4426948f;
  return t < 0.25f ? t * y : log2_fast(1 + t);
}

// log2((1 + a) / (1 + b)), precise near 0.
RLHF_DEVICE float log2_ratio(float a, float b) {
  const float low = fminf(a, b), y = log2_1p((max_nan(a, b) - low) / (1 + low));
  return a < b ? -y : y;
}

struct KlState {
  float top, others, ref_top, ref_others;  // softmax sums of the policy and the reference
  float kl;                                // between the two distributions over the columns seen
};

RLHF_DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }
RLHF_DEVICE float softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }

// The chain rule: KL within each range, weighted by the policy, plus KL between the shares w and v
// that the ranges have in the two distributions. Nothing cancels.
RLHF_DEVICE KlState merge(const KlState& a, const KlState& b, float temperature) {
  const RowSums p = merge(RowSums{a.top, a.others, 0}, RowSums{b.top, b.others, 0}, temperature);
  const RowSums q =
      merge(RowSums{a.ref_top, a.ref_others, 0}, RowSums{b.ref_top, b.ref_others, 0}, temperature);
  // Log-odds of a against b in either distribution.
  const float odds = (a.top - b.top) / temperature + logf((1 + a.others) / (1 + b.others));
  const float ref_odds =
      (a.ref_top - b.ref_top) / temperature + logf((1 + a.ref_others) / (1 + b.ref_others));
  const float w[] = {sigmoid(odds), sigmoid(-odds)}, v[] = {sigmoid(ref_odds), sigmoid(-ref_odds)};
  float x[] = {softplus(-ref_odds) - softplus(-odds), softplus(ref_odds) - softplus(odds)};
  if (fabsf(odds - ref_odds) < 0.5f) {
    // x = log(w / v) from the difference of the log-odds, taken before anything is rounded.
    const double up = (1.0 + a.others) * (1.0 + b.ref_others);
    const double down = (1.0 + b.others) * (1.0 + a.ref_others);
    const double apart = (double(a.top) - b.top) - (double(a.ref_top) - b.ref_top);
    const float t = log2_1p(float(fabs(up - down)) / float(fmin(up, down))) * kLn2;
    const float delta = float(apart) / temperature + (up < down ? -t : t);
    x[0] = log1pf(w[1] * expm1f(delta));
    x[1] = log1pf(w[0] * expm1f(-delta));
  }
  float kl = 0;
  // Without a column that both allow there is nothing to compare yet.
  if (p.top > -kInf && q.top > -kInf) {
    const float kls[] = {a.kl, b.kl};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      kl += w[i] > 0 ? w[i] * kls[i] + kLn2 * kl_term(w[i], v[i], x[i] * kLog2E) : v[i];
  }
  if (a.kl == kInf || b.kl == kInf) kl = kInf;  // for good: the weight may have underflowed
  if (a.kl != a.kl || b.kl != b.kl) kl = kNaN;
  return {p.top, p.others, q.top, q.others, kl};
}

// KL over the columns that a warp has seen.
struct WarpKl {
  WarpSums policy, reference;
  float mass = 0, ref_mass = 0;  // sums of 2^gap over the warp, the tops included
  float shift = 0;               // log2(mass / ref_mass), 0 while one of them is 0
  float between = 0, terms = 0;  // they add up to mass * KL: the warp's part, and the lanes'
  bool infinite = false;         // this lane has seen a column that only the policy allows

  template <int N>
  RLHF_DEVICE void add(const float (&y)[N], const float (&ref_y)[N], float unit, int lane) {
    const bool raised = policy.raise(y, unit, lane);
    const bool ref_raised = reference.raise(ref_y, unit, lane);
    if (raised) {
      const float weight = exp2_fast(policy.fall);
      mass *= weight, between *= weight, terms *= weight;
      shift += policy.fall;
    }
    if (ref_raised) {
      ref_mass *= exp2_fast(reference.fall);
      shift -= reference.fall;
    }
    // Differences of y, unlike gaps, were not rounded by a product: small log-ratios stay precise.
    float below[N], ref_below[N], apart[N], furthest = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      below[i] = policy.below(y[i]);
      ref_below[i] = reference.below(ref_y[i]);
      apart[i] = below[i] - ref_below[i];
      furthest = max_nan(furthest, fabsf(apart[i]));
    }
    if (!(furthest < -kFloor)) {  // one side, or with NaN both, is -inf or close to it
#pragma unroll
      for (int i = 0; i < N; ++i) {
        below[i] = max_nan(below[i], kFloor);
        ref_below[i] = max_nan(ref_below[i], kFloor);
        apart[i] = below[i] - ref_below[i];
        infinite |= below[i] > kFloor && ref_below[i] == kFloor;
      }
    }
    float powers[N], ref_powers[N], sum = 0, ref_sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      powers[i] = exp2_fast(below[i] * unit);
      ref_powers[i] = exp2_fast(ref_below[i] * unit);
      sum += powers[i];
      ref_sum += ref_powers[i];
    }
    policy.add(powers, sum, raised, lane);
    reference.add(ref_powers, ref_sum, ref_raised, lane);

    const float mass_before = mass, ref_mass_before = ref_mass;
    mass += warp_sum(sum);
    ref_mass += warp_sum(ref_sum);
    // While either side allows nothing, every term is 0.
    const bool comparable = mass > 0 && ref_mass > 0;
    const float low = fminf(mass, ref_mass);
    const float distance = log2_1p(__fdividef(fmaxf(mass, ref_mass) - low, low));
    const float shift_now = !comparable ? 0 : mass < ref_mass ? -distance : distance;
    const float to_mass = comparable ? exp2_fast(shift_now) : 0;
    // A mass of 0 leaves `shift` without meaning, and its term is that of the reference.
    between += mass_before > 0
                   ? kl_term(mass_before, ref_mass_before * to_mass, shift - shift_now)
                   : ref_mass_before * to_mass * kLog2E;
    shift = shift_now;
    float near = 0, far = 0, ref_far = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float u = apart[i] * unit - shift;
      if (fabsf(u) < kNear) {
        near += powers[i] * (u * u * series(u));
      } else {
        far += powers[i] * (u - kLog2E);
        ref_far += ref_powers[i];
      }
    }
    terms += kLead * near + far + ref_far * (to_mass * kLog2E);
  }

  RLHF_DEVICE KlState state() const {
    const float others = warp_sum(policy.others), ref_others = warp_sum(reference.others);
    const float kl = (warp_sum(terms) + between) / mass * kLn2;
    KlState state = {policy.top, others, reference.top, ref_others, mass > 0 ? kl : 0};
    if (__any_sync(~0u, infinite)) state.kl = kInf;
    if (others != others || ref_others != ref_others) state.kl = kNaN;
    return state;
  }
};

}  // namespace rlhf
