// Packed weights as numbers, for native.py: the layouts are those of packing.py, the numbers those of plain.py, bit for bit.
//
// A number is level * scale + minimum. Of a 4-bit value the level is a lookup among sixteen, of an 8-bit one the integer
// itself. Where there is no minimum, -0.0 is added: it changes nothing, not even the sign of a zero. Where there is one,
// level * scale is exact in float32 (4 bits times 11), so that a fused addition rounds as a separate one does.
//
// What comes of this file runs on the processors that it was built for: native.py passes the flags of the level that torch
// itself runs at, and keeps one library for each.

#include <ATen/Parallel.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.h"

// native.py declares the same.
struct Packed {
  const uint8_t* values;
  const void* scales;        // float16 or float32
  const uint16_t* minimums;  // float16, or null
  const float* levels;       // sixteen, or null where the values are int8
  int64_t num_blocks;
  int64_t num_outputs;
  int64_t stored;  // bytes that a block has of each output
  int64_t scales_are_half;
};

namespace {

constexpr int64_t kChunk = 1024;           // scales held as floats at once: 8 KiB with the minimums, inside L1
constexpr int64_t kNumbersATask = 100000;  // fewer are done before a second thread has woken up

void put(float* out, float number) { *out = number; }

// bfloat16: to the nearest, ties to even. A NaN without payload stays one; others never come here.
void put(uint16_t* out, float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  *out = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The values come from far away, and once: 4 KiB ahead they are on their way in time. Beyond the end it does nothing.
void fetch_ahead(const uint8_t* values) {
#if defined(__GNUC__)
  __builtin_prefetch(values + 4096);
#else
  static_cast<void>(values);
#endif
}

// The scales and minimums from some place on, as floats.
class Affine {
 public:
  float scales[kChunk];
  float minimums[kChunk];

  void load(const Packed& packed, int64_t first, int64_t count) {
    if (packed.scales_are_half) {
      from_halves(static_cast<const uint16_t*>(packed.scales) + first, count, scales);
    } else {
      std::copy_n(static_cast<const float*>(packed.scales) + first, count, scales);
      drop_payloads(count, scales);
    }
    if (packed.minimums != nullptr) {
      from_halves(packed.minimums + first, count, minimums);
    } else {
      std::fill_n(minimums, count, -0.0f);
    }
  }

 private:
  static void from_halves(const uint16_t* halves, int64_t count, float* floats) {
    int64_t index = 0;
#if WITH_LANES
    for (; index + 2 * lanes::kNum <= count; index += 2 * lanes::kNum) {
      lanes::put(floats + index, lanes::halves(halves + index), lanes::halves(halves + index + lanes::kNum));
    }
#endif
    for (; index < count; ++index) floats[index] = c10::detail::fp16_ieee_to_fp32_value(halves[index]);
    drop_payloads(count, floats);
  }

  static void drop_payloads(int64_t count, float* floats) {
    for (int64_t index = 0; index < count; ++index) {
      floats[index] = std::isnan(floats[index]) ? std::numeric_limits<float>::quiet_NaN() : floats[index];
    }
  }
};

// The nibbles of a row of bytes: the low ones to one row of numbers, the high ones to another.
template <class Number>
void row_of_nibbles(const uint8_t* values, const float* levels, const Affine& affine, int64_t count, Number* low,
                    Number* high) {
  int64_t index = 0;
#if WITH_LANES
  const lanes::Levels level(levels);
  for (; index + 2 * lanes::kNum <= count; index += 2 * lanes::kNum) {
    const int64_t next = index + lanes::kNum;
    fetch_ahead(values + index);
    const auto numbers = [&](lanes::Integers nibbles, int64_t at) {
      return lanes::multiply_add(level(nibbles), lanes::load(affine.scales + at), lanes::load(affine.minimums + at));
    };
    const lanes::Integers left = lanes::bytes(values + index), right = lanes::bytes(values + next);
    lanes::put(low + index, numbers(left, index), numbers(right, next));
    lanes::put(high + index, numbers(lanes::upper_nibbles(left), index), numbers(lanes::upper_nibbles(right), next));
  }
#endif
  for (; index < count; ++index) {
    put(low + index, levels[values[index] & 15] * affine.scales[index] + affine.minimums[index]);
    put(high + index, levels[values[index] >> 4] * affine.scales[index] + affine.minimums[index]);
  }
}

template <class Number>
void row_of_bytes(const uint8_t* values, const Affine& affine, int64_t count, Number* out) {
  int64_t index = 0;
#if WITH_LANES
  const auto numbers = [&](int64_t at) {
    return lanes::multiply_add(lanes::signed_bytes(values + at), lanes::load(affine.scales + at),
                               lanes::load(affine.minimums + at));
  };
  for (; index + 2 * lanes::kNum <= count; index += 2 * lanes::kNum) {
    fetch_ahead(values + index);
    lanes::put(out + index, numbers(index), numbers(index + lanes::kNum));
  }
#endif
  for (; index < count; ++index) {
    put(out + index, static_cast<int8_t>(values[index]) * affine.scales[index] + affine.minimums[index]);
  }
}

template <class Number>
void block_of_columns(const Packed& packed, int64_t block, Number* out) {
  Affine affine;
  const int64_t outputs = packed.num_outputs, stored = packed.stored;
  for (int64_t first = 0; first < outputs; first += kChunk) {
    const int64_t count = std::min(kChunk, outputs - first);
    affine.load(packed, block * outputs + first, count);
    for (int64_t row = 0; row < stored; ++row) {
      const uint8_t* values = packed.values + (block * stored + row) * outputs + first;
      if (packed.levels == nullptr) {
        row_of_bytes(values, affine, count, out + (block * stored + row) * outputs + first);
      } else {
        Number* low = out + (2 * block * stored + row) * outputs + first;
        row_of_nibbles(values, packed.levels, affine, count, low, low + stored * outputs);
      }
    }
  }
}

// Blocks one after the other, each with one scale: what an embedding has of a word.
template <class Number>
void row_of_blocks(const Packed& packed, int64_t row, Number* out) {
  Affine affine;
  const int64_t stored = packed.stored;
  for (int64_t first = 0; first < packed.num_blocks; first += kChunk) {
    const int64_t count = std::min(kChunk, packed.num_blocks - first);
    affine.load(packed, row * packed.num_blocks + first, count);
    for (int64_t index = 0; index < count; ++index) {
      const float scale = affine.scales[index], minimum = affine.minimums[index];
      const int64_t at = (row * packed.num_blocks + first + index) * stored;
      const uint8_t* values = packed.values + at;
      if (packed.levels == nullptr) {
        for (int64_t byte = 0; byte < stored; ++byte) {
          put(out + at + byte, static_cast<int8_t>(values[byte]) * scale + minimum);
        }
      } else {
        for (int64_t byte = 0; byte < stored; ++byte) {
          put(out + 2 * at + byte, packed.levels[values[byte] & 15] * scale + minimum);
          put(out + 2 * at + stored + byte, packed.levels[values[byte] >> 4] * scale + minimum);
        }
      }
    }
  }
}

// Calls `task(index, numbers)` for each index, on torch's threads. Which thread does it changes no bit of what it writes.
template <class Task>
void for_each(int64_t count, int64_t numbers_each, void* out, int64_t as_bfloat16, Task task) {
  const int64_t grain = std::max<int64_t>(1, kNumbersATask / std::max<int64_t>(1, numbers_each));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (as_bfloat16) {
        task(index, static_cast<uint16_t*>(out));
      } else {
        task(index, static_cast<float*>(out));
      }
    }
  });
}

}  // namespace

// A matrix, values (num_blocks, stored, num_outputs), to (num_inputs, num_outputs).
extern "C" void dequantise_columns(const Packed* packed, void* out, int64_t as_bfloat16) {
  for_each(packed->num_blocks, packed->num_outputs * packed->stored, out, as_bfloat16,
           [packed](int64_t block, auto* numbers) { block_of_columns(*packed, block, numbers); });
}

// Rows, values (num_outputs, num_blocks, stored), to (num_outputs, num_inputs).
extern "C" void dequantise_rows(const Packed* packed, void* out, int64_t as_bfloat16) {
  for_each(packed->num_outputs, packed->num_blocks * packed->stored, out, as_bfloat16,
           [packed](int64_t row, auto* numbers) { row_of_blocks(*packed, row, numbers); });
}
