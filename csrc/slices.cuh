// Sequences of tokens on the GPU, dealt out to blocks.
#pragma once

#include "reduce.cuh"
#include "tokens.h"

namespace rlhf {

// Follows from shapes alone, never from the GPU: so do the results.
struct Slices {
  const int32_t* offsets;  // null: rows of `length` tokens; else `length` tokens in all
  int64_t sequences, length, parts, part;

  // `whole`: a segment is a sequence; else as much of one as keeps all blocks busy.
  Slices(uint64_t offsets, int64_t sequences, int64_t length, bool whole)
      : offsets(pointer<const int32_t>(offsets)), sequences(sequences), length(length) {
    constexpr int64_t kLeast = 2 * kBlock;
    const int64_t share = (sequences * length + kMostBlocks - 1) / kMostBlocks;
    whole = whole || offsets != 0;
    part = whole ? length : std::max(kLeast, (share + kBlock - 1) / kBlock * kBlock);
    parts = part > 0 ? (length + part - 1) / part : 0;
  }
  int64_t count() const { return sequences * parts; }
  int64_t blocks() const { return std::clamp<int64_t>(count(), 1, kMostBlocks); }
  // No more warps than a segment, of packed ones the average, has use for.
  int threads() const {
    const int64_t tokens = offsets ? length / std::max<int64_t>(sequences, 1) : part;
    const int64_t warps = (tokens + kWarp - 1) / kWarp;
    return kWarp * static_cast<int>(std::clamp<int64_t>(warps, 1, kBlockWarps));
  }

  RLHF_PORTABLE bool packed() const { return offsets != nullptr; }
  RLHF_PORTABLE Segment segment(int64_t i) const {
    if (packed()) {
      const int64_t begin = bounded_offset(i);
      return {i, begin, max(begin, bounded_offset(i + 1))};
    }
    const int64_t sequence = i / parts, begin = (i - sequence * parts) * part;
    return {sequence, begin, min(begin + part, length)};
  }
  // Where the segment begins in a contiguous output.
  RLHF_PORTABLE int64_t out(const Segment& s) const {
    return (packed() ? 0 : s.sequence * length) + s.begin;
  }
  // Writes 0 to tokens before the first sequence and after the last: with malformed offsets, too,
  // every token of an output is then written by someone.
  template <typename F>
  RLHF_PORTABLE void clear_outside(F* out) const {
    if (!packed() || blockIdx.x > 0 || out == nullptr) return;
    const int64_t begin = bounded_offset(0), end = bounded_offset(sequences);
    for (int64_t t = threadIdx.x; t < begin; t += blockDim.x) out[t] = 0;
    for (int64_t t = end + threadIdx.x; t < length; t += blockDim.x) out[t] = 0;
  }

 private:
  // Whatever the offsets are, nothing is read or written out of bounds.
  RLHF_PORTABLE int64_t bounded_offset(int64_t i) const {
    return max(int64_t(0), min(int64_t(offsets[i]), length));
  }
};

// All tokens as one row, for what does not ask which sequence one is of; if they lie side by side
// in all operands.
template <typename... Operands>
Slices flat_slices(uint64_t offsets, int64_t sequences, int64_t length,
                   const Operands&... operands) {
  const bool packed = offsets != 0;
  const bool flat = (operands.is_flat(packed ? 1 : sequences, length) && ...);
  if (!flat) return {offsets, sequences, length, false};
  return {0, 1, packed ? length : sequences * length, false};
}

}  // namespace rlhf
