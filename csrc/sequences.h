// Sequences of tokens on the CPU, cut into segments for the threads.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"
#include "tokens.h"

namespace rlhf {

// Rows of padded tensors, or slices of packed ones.
struct Layout {
  int64_t sequences, length;
  const int32_t* offsets;  // null: `sequences` rows of `length` tokens; else `length` tokens in all

  Layout(const char* op, int64_t sequences, int64_t length, uint64_t offsets)
      : sequences(sequences), length(length), offsets(reinterpret_cast<const int32_t*>(offsets)) {
    if (!packed()) return;
    bool good = this->offsets[0] == 0 && this->offsets[sequences] == length;
    for (int64_t i = 0; i < sequences; ++i) good &= this->offsets[i] <= this->offsets[i + 1];
    if (!good)
      throw std::invalid_argument(std::string(op) + ": cu_seqlens must rise from 0 to the " +
                                  std::to_string(length) +
                                  " packed tokens, not fall, and end there");
  }
  bool packed() const { return offsets != nullptr; }
  int64_t total() const { return packed() ? length : sequences * length; }
  int64_t length_of(int64_t i) const { return packed() ? offsets[i + 1] - offsets[i] : length; }
  int64_t start(int64_t i, int64_t stride) const { return packed() ? offsets[i] : i * stride; }

  // All tokens as one sequence, for what does not ask which one a token is of; if they lie side by
  // side in all operands.
  template <typename... Operands>
  void flatten(const Operands&... operands) {
    const int64_t rows = packed() ? 1 : sequences;
    if (!(operands.is_flat(rows, length) && ...)) return;
    length = total();
    sequences = 1;
    offsets = nullptr;
  }

  // By shape alone, never by the number of threads: so what is summed per segment does not depend
  // on it.
  std::vector<Segment> segments(int64_t longest) const {
    std::vector<Segment> all;
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t end = packed() ? offsets[i + 1] : length;
      for (int64_t begin = packed() ? offsets[i] : 0; begin < end; begin += longest)
        all.push_back({i, begin, std::min(begin + longest, end)});
    }
    return all;
  }

  // Where the segment begins in a contiguous output.
  int64_t out(const Segment& s) const { return (packed() ? 0 : s.sequence * length) + s.begin; }
};

}  // namespace rlhf
