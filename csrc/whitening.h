// What whitening multiplies by, on the CPU and the GPU.
#pragma once

#include <cmath>

#include "portable.h"

namespace rlhf {

// `squares` is the sum of squared deviations from the mean; rlhf_fast/ops/masked.py has the same eps.
RLHF_PORTABLE double whitening_scale(double count, double squares) {
  return 1 / ::sqrt(squares / (count > 1 ? count - 1 : 1) + 1e-8);
}

}  // namespace rlhf
