// Where tokens lie, for the C++ and the CUDA kernels: in rows of a padded tensor, or one sequence
// after the other in a packed one.
#pragma once

#include <cstdint>

#include "portable.h"

namespace rlhf {

// Some tokens of a sequence: [begin, end) of its row, or of all tokens in packed form.
struct Segment {
  int64_t sequence, begin, end;
};

// What an op reads: a value a token, or one a sequence.
template <typename T>
struct Operand {
  const T* data;   // or null
  int64_t stride;  // elements from one sequence to the next; of no use to tokens in packed form
  bool per_sequence;

  Operand(uint64_t data, int64_t stride, bool per_sequence = false)
      : data(reinterpret_cast<const T*>(data)), stride(stride), per_sequence(per_sequence) {}
  // The segment's first token, or its sequence's value.
  RLHF_PORTABLE const T* at(const Segment& s, bool packed) const {
    if (data == nullptr) return nullptr;
    if (per_sequence) return data + s.sequence * stride;
    return data + (packed ? 0 : s.sequence * stride) + s.begin;
  }
  // Whether the tokens of `sequences` rows lie side by side.
  bool is_flat(int64_t sequences, int64_t length) const {
    return data == nullptr || (!per_sequence && (sequences == 1 || stride == length));
  }
};

}  // namespace rlhf
