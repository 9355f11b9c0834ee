// Count, mean and spread of numbers, for the C++ and the CUDA kernels.
#pragma once

#include "portable.h"

namespace rlhf {

// Sums of deviations from a pivot, one of the numbers: an offset that they have in common costs no
// digit, and equal numbers have a spread of exactly 0.
struct Moments {
  double count = 0, pivot = 0, sum = 0, squares = 0;

  RLHF_PORTABLE void merge(const Moments& other) {
    const double first = count > 0 ? pivot : other.pivot, gap = other.pivot - first;
    const double moved = other.count > 0 ? other.count * gap : 0;
    squares += other.squares + (other.count > 0 ? gap * (2 * other.sum + moved) : 0);
    sum += other.sum + moved;
    count += other.count;
    pivot = first;
  }
  RLHF_PORTABLE double mean() const { return count > 0 ? pivot + sum / count : 0; }
  // Sum of squared deviations from the mean.
  RLHF_PORTABLE double spread() const {
    const double centred = squares - (count > 0 ? sum * sum / count : 0);
    return centred < 0 ? 0 : centred;
  }
  RLHF_PORTABLE double variance() const { return spread() / (count > 1 ? count - 1 : 1); }
};

}  // namespace rlhf
