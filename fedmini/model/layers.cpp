// What a Llama computes between its matrix products, forward and backward: norms, rotations, softmax, gates, LoRA and loss.
// layer_kernels.py declares the same functions and says what each one gives.
//
// Each step reads its numbers once and rounds once, where torch would write every intermediate to memory. Sums are in
// float32, in an order that depends on the sizes alone: not on threads, nor on who else is in the batch.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

// A product that is added to may round once: the compiler is told not to elsewhere, where bits are compared.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace {

// Sixteen floats. The compiler makes of them what the processor has: one register with AVX-512, two with AVX2, four with NEON.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Signed __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t kRanks = 8;             // LoRA's rank is worked off in eights
constexpr int64_t kNumbersATask = 50000;  // fewer are done before a second thread has woken up

Floats all(float number) { return number - Floats{}; }

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a view of the same bytes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// bfloat16 is the upper half of a float32.
Floats to_floats(Halves halves) { return bits_of<Floats>(__builtin_convertvector(halves, Bits) << 16); }

// To the nearest, ties to even; what is no number stays none.
Halves to_halves(Floats floats) {
  const Bits bits = bits_of<Bits>(floats);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits is_number = bits_of<Bits>(floats == floats);
  return __builtin_convertvector((rounded & is_number) | (~is_number & 0x7fc0), Halves);
}

Floats load(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

Floats load(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return to_floats(halves);
}

void store(float* to, Floats floats) { std::memcpy(to, &floats, sizeof floats); }

void store(uint16_t* to, Floats floats) {
  const Halves halves = to_halves(floats);
  std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of them, at most kLanes; the others are zero, and stay as they are in memory.
template <class Number>
Floats load(const Number* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Number padded[kLanes] = {};
  std::copy_n(from, count, padded);
  return load(padded);
}

template <class Number>
void store(Number* to, Floats floats, int64_t count) {
  if (count >= kLanes) return store(to, floats);
  Number padded[kLanes];
  store(padded, floats);
  std::copy_n(padded, count, to);
}

Floats multiply_add(Floats left, Floats right, Floats added) { return left * right + added; }

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

// Halves of a vector, and what two of them come to, until one number is left.
template <class Join>
float folded(Floats floats, Join join) {
  Eight eights[2];
  std::memcpy(eights, &floats, sizeof eights);
  const Eight eight = join(eights[0], eights[1]);
  Four fours[2];
  std::memcpy(fours, &eight, sizeof fours);
  const Four four = join(fours[0], fours[1]);
  return join(join(four[0], four[2]), join(four[1], four[3]));
}

float sum(Floats floats) {
  return folded(floats, [](auto left, auto right) { return left + right; });
}

float largest_of(Floats floats) {
  return folded(floats, [](auto left, auto right) { return left > right ? left : right; });
}

// The first `count`, and `other` behind them.
Floats only(Floats floats, int64_t count, float other) {
  const Signed lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lanes < static_cast<int32_t>(std::min(count, kLanes)) ? floats : all(other);
}

// e^x to two units in the last place, between e^-87 and e^88. The polynomial is that of the Cephes library's expf.
Floats exp(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;  // so that what is no number stays none
  x = x > 88.0f ? all(88.0f) : x;
  const Floats shifted = multiply_add(x, all(1.44269504f), all(12582912.0f));  // 1.5 * 2^23: rounds to an integer
  const Floats whole = shifted - 12582912.0f;
  Floats rest = multiply_add(whole, all(-0.693359375f), x);
  rest = multiply_add(whole, all(2.12194440e-4f), rest);
  Floats result = all(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    result = multiply_add(result, rest, all(term));
  }
  result = multiply_add(result, rest * rest, rest + 1.0f);
  const Signed power = (bits_of<Signed>(shifted) - bits_of<Signed>(all(12582912.0f)) + 127) << 23;
  return result * bits_of<Floats>(power);
}

// Calls `task(index)` for each index, on torch's threads. Which thread does it changes no bit of what it writes.
template <class Task>
void for_each(int64_t count, int64_t numbers_each, Task task) {
  const int64_t grain = std::max<int64_t>(1, kNumbersATask / std::max<int64_t>(1, numbers_each));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(index);
  });
}

// Calls `task(pointer)` with the pointers' own type. Gives 1 where memory ran out, else 0: nothing may be thrown through C.
template <class Task>
int64_t typed(int64_t is_bfloat16, Task task) noexcept {
  try {
    if (is_bfloat16) {
      task(static_cast<uint16_t*>(nullptr));
    } else {
      task(static_cast<float*>(nullptr));
    }
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

template <class Number>
Number* as(Number*, void* pointer) {
  return static_cast<Number*>(pointer);
}

template <class Number>
const Number* as(Number*, const void* pointer) {
  return static_cast<const Number*>(pointer);
}

// ---- RMS norm

template <class Number>
void norm_row(const Number* x, const Number* weight, Number* out, float* scale, int64_t size, float epsilon) {
  Floats squares = {};
  for (int64_t at = 0; at < size; at += kLanes) {
    const Floats numbers = load(x + at, size - at);
    squares = multiply_add(numbers, numbers, squares);
  }
  *scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon);
  for (int64_t at = 0; at < size; at += kLanes) {
    store(out + at, load(x + at, size - at) * *scale * load(weight + at, size - at), size - at);
  }
}

// `past`: the gradient that comes past the norm, or null.
template <class Number>
void norm_row_backward(const Number* gradient, const Number* x, const Number* weight, float scale, const Number* past,
                       Number* to_x, int64_t size) {
  Floats products = {};
  for (int64_t at = 0; at < size; at += kLanes) {
    const Floats weighted = load(gradient + at, size - at) * load(weight + at, size - at);
    products = multiply_add(weighted, load(x + at, size - at), products);
  }
  const float pull = sum(products) / static_cast<float>(size) * scale * scale;
  for (int64_t at = 0; at < size; at += kLanes) {
    const Floats weighted = load(gradient + at, size - at) * load(weight + at, size - at);
    const Floats own = (weighted - load(x + at, size - at) * pull) * scale;
    store(to_x + at, past == nullptr ? own : load(past + at, size - at) + own, size - at);
  }
}

// ---- Heads

// One token's head, half by half: (left, right) turned by the angle of each pair; a null table copies it.
template <class Number>
void turn(const Number* from, Number* to, const float* cosines, const float* sines, float direction, int64_t half) {
  for (int64_t at = 0; at < half; at += kLanes) {
    const int64_t count = half - at;
    const Floats left = load(from + at, count), right = load(from + half + at, count);
    if (cosines == nullptr) {
      store(to + at, left, count);
      store(to + half + at, right, count);
      continue;
    }
    const Floats cosine = load(cosines + at, count), sine = load(sines + at, count) * direction;
    store(to + at, left * cosine - right * sine, count);
    store(to + half + at, right * cosine + left * sine, count);
  }
}

// ---- Causal softmax

// exp(scores - their largest) of the first `count`, as they are scaled, to `powers`; gives one over their sum.
template <class Number>
float powers_of(const Number* scores, int64_t count, float scaling, float* powers) {
  Floats most = all(-std::numeric_limits<float>::infinity());
  for (int64_t at = 0; at < count; at += kLanes) {
    const Floats numbers = only(load(scores + at, count - at) * scaling, count - at, -std::numeric_limits<float>::infinity());
    store(powers + at, numbers);
    most = numbers > most ? numbers : most;
  }
  const float largest = largest_of(most);
  Floats total = {};
  for (int64_t at = 0; at < count; at += kLanes) {
    const Floats raised = only(exp(load(powers + at) - largest), count - at, 0.0f);
    store(powers + at, raised);
    total += raised;
  }
  return 1.0f / sum(total);
}

template <class Number>
void softmax_row(const Number* scores, Number* out, int64_t count, int64_t size, float scaling, float* powers) {
  const float share = powers_of(scores, count, scaling, powers);
  for (int64_t at = 0; at < count; at += kLanes) store(out + at, load(powers + at) * share, count - at);
  std::fill(out + count, out + size, Number(0));
}

// The probabilities again, to `out`; `gradient`, which is about them, becomes that of the scores.
template <class Number>
void softmax_row_backward(const Number* scores, Number* gradient, Number* out, int64_t count, int64_t size,
                          float scaling, float* powers) {
  const float share = powers_of(scores, count, scaling, powers);
  Floats products = {};
  for (int64_t at = 0; at < count; at += kLanes) {
    const Floats probabilities = load(powers + at) * share;
    store(powers + at, probabilities);
    store(out + at, probabilities, count - at);
    products = multiply_add(probabilities, load(gradient + at, count - at), products);
  }
  const float mean = sum(products);
  for (int64_t at = 0; at < count; at += kLanes) {
    const Floats moved = (load(gradient + at, count - at) - mean) * load(powers + at) * scaling;
    store(gradient + at, moved, count - at);
  }
  std::fill(out + count, out + size, Number(0));
  std::fill(gradient + count, gradient + size, Number(0));
}

// ---- Gate

Floats sigmoid(Floats x) { return 1.0f / (exp(-x) + 1.0f); }

// ---- Loss

// One position's loss; its logits become its probabilities, less one at the target: the gradient for the logits.
template <class Number>
float loss_row(Number* logits, int64_t size, int64_t target) {
  Floats most = all(-std::numeric_limits<float>::infinity());
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) {
    const Floats numbers = load(logits + at);
    most = numbers > most ? numbers : most;
  }
  float largest = largest_of(most);
  for (; at < size; ++at) largest = std::max(largest, load(logits + at, 1)[0]);
  const float chosen = load(logits + target, 1)[0] - largest;
  Floats total = {};
  for (at = 0; at + kLanes <= size; at += kLanes) total += exp(load(logits + at) - largest);
  float sum_of_powers = sum(total);
  for (; at < size; ++at) sum_of_powers += exp(load(logits + at, 1) - largest)[0];
  const float share = 1.0f / sum_of_powers;
  const float at_target = exp(all(chosen))[0] * share - 1.0f;
  for (at = 0; at < size; at += kLanes) {
    store(logits + at, exp(load(logits + at, size - at) - largest) * share, size - at);
  }
  store(logits + target, all(at_target), 1);
  return std::log(sum_of_powers) - chosen;
}

}  // namespace

// LoRA's tensors of one layer, as layer_kernels.py declares them too.
struct Lora {
  const float* weight;    // of each owner: (rank, size), or (size, rank) where `is_upright`
  int64_t owner_stride;   // numbers from one owner's to the next's
  int64_t num_owners;     // one: everybody's
  const int64_t* owners;  // of each example; null: the first
  int64_t rank;
  int64_t size;
  int64_t is_upright;
};

namespace {

// Each owner's weight as (rank, size), both filled up with zeros to whole eights and vectors.
class Rows {
 public:
  Rows(const Lora& lora)
      : lora_(lora),
        padded_rank((lora.rank + kRanks - 1) / kRanks * kRanks),
        padded_size((lora.size + kLanes - 1) / kLanes * kLanes),
        is_as_given_(!lora.is_upright && padded_rank == lora.rank && padded_size == lora.size) {
    if (is_as_given_) return;
    held_.assign(lora.num_owners * padded_rank * padded_size, 0.0f);
    for (int64_t owner = 0; owner < lora.num_owners; ++owner) {
      const float* from = lora.weight + owner * lora.owner_stride;
      float* to = held_.data() + owner * padded_rank * padded_size;
      for (int64_t row = 0; row < lora.rank; ++row) {
        for (int64_t at = 0; at < lora.size; ++at) {
          to[row * padded_size + at] = lora.is_upright ? from[at * lora.rank + row] : from[row * lora.size + at];
        }
      }
    }
  }

  const float* of(int64_t example) const {
    const int64_t owner = lora_.owners == nullptr ? 0 : lora_.owners[example];
    return is_as_given_ ? lora_.weight + owner * lora_.owner_stride
                        : held_.data() + owner * padded_rank * padded_size;
  }

 private:
  const Lora& lora_;

 public:
  const int64_t padded_rank, padded_size;

 private:
  const bool is_as_given_;
  std::vector<float> held_;
};

// Tokens first to last, (size) each, times eight rows: to (rank) each.
template <class Number>
void down_eight(const Number* x, const float* rows, int64_t padded_size, int64_t size, int64_t num_tokens, float* out,
                int64_t rank, int64_t num_rows) {
  for (int64_t token = 0; token < num_tokens; token += 2) {
    const bool is_pair = token + 1 < num_tokens;
    const Number *one = x + token * size, *other = is_pair ? one + size : one;
    Floats first[kRanks] = {}, second[kRanks] = {};
    for (int64_t at = 0; at < size; at += kLanes) {
      const Floats left = load(one + at, size - at), right = load(other + at, size - at);
#pragma GCC unroll 8
      for (int64_t row = 0; row < kRanks; ++row) {
        const Floats weights = load(rows + row * padded_size + at);
        first[row] = multiply_add(left, weights, first[row]);
        second[row] = multiply_add(right, weights, second[row]);
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      out[token * rank + row] = sum(first[row]);
      if (is_pair) out[(token + 1) * rank + row] = sum(second[row]);
    }
  }
}

// To tokens (size) each, eight rows times the factor and the tokens' own numbers (rank) are added.
template <class Number>
void up_rows(Number* y, const float* rows, const Rows& shape, int64_t size, int64_t num_tokens, const float* hidden,
             int64_t rank, float factor) {
  std::vector<float> scaled(num_tokens * shape.padded_rank, 0.0f);
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t row = 0; row < rank; ++row) {
      scaled[token * shape.padded_rank + row] = hidden[token * rank + row] * factor;
    }
  }
  for (int64_t at = 0; at < size; at += kLanes) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      Floats total = {};
      for (int64_t eight = 0; eight < shape.padded_rank; eight += kRanks) {
        const float* own = scaled.data() + token * shape.padded_rank + eight;
#pragma GCC unroll 8
        for (int64_t row = 0; row < kRanks; ++row) {
          total = multiply_add(load(rows + (eight + row) * shape.padded_size + at), all(own[row]), total);
        }
      }
      store(y + token * size + at, load(y + token * size + at, size - at) + total, size - at);
    }
  }
}

constexpr int64_t kTokensATask = 32;

template <class Task>
void for_each_piece(int64_t num_examples, int64_t length, int64_t numbers_a_token, Task task) {
  const int64_t pieces = (length + kTokensATask - 1) / kTokensATask;
  for_each(num_examples * pieces, numbers_a_token * std::min(length, kTokensATask), [&](int64_t index) {
    const int64_t example = index / pieces, first = index % pieces * kTokensATask;
    task(example, example * length + first, std::min(kTokensATask, length - first));
  });
}

}  // namespace

extern "C" int64_t norm_forward(const void* x, const void* weight, void* out, float* scales, int64_t num_rows, int64_t size,
                             float epsilon, int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      norm_row(as(type, x) + row * size, as(type, weight), as(type, out) + row * size, scales + row, size, epsilon);
    });
  });
}

extern "C" int64_t norm_backward(const void* gradient, const void* x, const void* weight, const float* scales,
                              const void* past, void* to_x, int64_t num_rows, int64_t size, int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      const auto* beside = past == nullptr ? nullptr : as(type, past) + row * size;
      norm_row_backward(as(type, gradient) + row * size, as(type, x) + row * size, as(type, weight), scales[row], beside,
                        as(type, to_x) + row * size, size);
    });
  });
}

// (examples, length, heads * head size) to (examples, heads, length, head size), or back; `table` is (positions, 2, half).
extern "C" int64_t turn_heads(const void* from, void* to, const float* table, int64_t first, int64_t num_examples,
                           int64_t length, int64_t num_heads, int64_t head_size, int64_t is_back, int64_t is_bfloat16) {
  const int64_t half = head_size / 2;
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_examples * length, num_heads * head_size, [&](int64_t index) {
      const int64_t example = index / length, place = index % length;
      const float* angles = table == nullptr ? nullptr : table + (first + place) * head_size;
      const float* sines = table == nullptr ? nullptr : angles + half;
      for (int64_t head = 0; head < num_heads; ++head) {
        const int64_t by_token = (index * num_heads + head) * head_size;
        const int64_t by_head = ((example * num_heads + head) * length + place) * head_size;
        const int64_t source = is_back ? by_head : by_token, goal = is_back ? by_token : by_head;
        turn(as(type, from) + source, as(type, to) + goal, angles, sines, is_back ? -1.0f : 1.0f, half);
      }
    });
  });
}

// Rows of `size` scores, whose query is the row modulo `length`, behind `prefix` tokens that all see.
extern "C" int64_t softmax_forward(const void* scores, void* out, int64_t num_rows, int64_t length, int64_t size,
                                float scaling, int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      thread_local std::vector<float> powers;
      powers.resize(size + kLanes);
      softmax_row(as(type, scores) + row * size, as(type, out) + row * size, size - length + row % length + 1, size,
                  scaling, powers.data());
    });
  });
}

extern "C" int64_t softmax_backward(const void* scores, void* gradient, void* out, int64_t num_rows, int64_t length,
                                 int64_t size, float scaling, int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      thread_local std::vector<float> powers;
      powers.resize(size + kLanes);
      softmax_row_backward(as(type, scores) + row * size, as(type, gradient) + row * size, as(type, out) + row * size,
                           size - length + row % length + 1, size, scaling, powers.data());
    });
  });
}

extern "C" int64_t gate_forward(const void* gate, const void* up, void* out, int64_t num_rows, int64_t size,
                             int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      const auto *gates = as(type, gate) + row * size, *ups = as(type, up) + row * size;
      auto* outs = as(type, out) + row * size;
      for (int64_t at = 0; at < size; at += kLanes) {
        const Floats x = load(gates + at, size - at);
        store(outs + at, x * sigmoid(x) * load(ups + at, size - at), size - at);
      }
    });
  });
}

extern "C" int64_t gate_backward(const void* gradient, const void* gate, const void* up, void* to_gate, void* to_up,
                              int64_t num_rows, int64_t size, int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      const int64_t first = row * size;
      for (int64_t at = 0; at < size; at += kLanes) {
        const Floats x = load(as(type, gate) + first + at, size - at);
        const Floats wanted = load(as(type, gradient) + first + at, size - at), share = sigmoid(x);
        const Floats slope = share * (x * (1.0f - share) + 1.0f);
        store(as(type, to_up) + first + at, wanted * x * share, size - at);
        store(as(type, to_gate) + first + at, wanted * load(as(type, up) + first + at, size - at) * slope, size - at);
      }
    });
  });
}

extern "C" int64_t loss_forward(void* logits, const int64_t* targets, float* losses, int64_t num_rows, int64_t size,
                             int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_rows, size, [&](int64_t row) {
      losses[row] = loss_row(as(type, logits) + row * size, size, targets[row]);
    });
  });
}

// (examples, length, size) times each example's weight: to float32 (examples, length, rank).
extern "C" int64_t lora_down(const void* x, const Lora* lora, float* out, int64_t num_examples, int64_t length,
                          int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    const Rows rows(*lora);
    for_each_piece(num_examples, length, lora->size * lora->rank, [&](int64_t example, int64_t token, int64_t count) {
      for (int64_t eight = 0; eight < rows.padded_rank; eight += kRanks) {
        down_eight(as(type, x) + token * lora->size, rows.of(example) + eight * rows.padded_size, rows.padded_size,
                   lora->size, count, out + token * lora->rank + eight, lora->rank,
                   std::min(kRanks, lora->rank - eight));
      }
    });
  });
}

// Adds to (examples, length, size) the factor times `hidden`, (examples, length, rank), times each example's weight.
extern "C" int64_t lora_up(void* y, const float* hidden, const Lora* lora, float factor, int64_t num_examples,
                        int64_t length, int64_t is_bfloat16) {
  return typed(is_bfloat16, [&](auto* type) {
    const Rows rows(*lora);
    for_each_piece(num_examples, length, lora->size * lora->rank, [&](int64_t example, int64_t token, int64_t count) {
      up_rows(as(type, y) + token * lora->size, rows.of(example), rows, lora->size, count,
              hidden + token * lora->rank, lora->rank, factor);
    });
  });
}

// Adds the factor times hidden^T wide, over an example's tokens, to the row of `flat` that is the example's: as (rank, size),
// or (size, rank) where it is upright. `wide` is (examples, length, size), `hidden` (examples, length, rank).
extern "C" int64_t lora_outer(const void* wide, const float* hidden, float* flat, int64_t row_stride, const int64_t* rows,
                           int64_t rank, int64_t size, int64_t is_upright, float factor, int64_t num_examples,
                           int64_t length, int64_t is_bfloat16) {
  constexpr int64_t kWidth = 2 * kLanes;
  const int64_t num_blocks = (size + kWidth - 1) / kWidth;
  return typed(is_bfloat16, [&](auto* type) {
    for_each(num_blocks, num_examples * length * kWidth, [&](int64_t block) {
      const int64_t first = block * kWidth, left = std::min(kWidth, size - first);
      const int64_t num_lower = std::min(kLanes, left), num_upper = std::max<int64_t>(0, left - kLanes);
      for (int64_t example = 0; example < num_examples; ++example) {
        float* goal = flat + (rows == nullptr ? example : rows[example]) * row_stride;
        for (int64_t eight = 0; eight < rank; eight += kRanks) {
          const int64_t num_rows = std::min(kRanks, rank - eight);
          Floats lower[kRanks] = {}, upper[kRanks] = {};
          for (int64_t token = example * length; token < (example + 1) * length; ++token) {
            const auto* numbers = as(type, wide) + token * size + first;
            const Floats one = load(numbers, num_lower);
            const Floats other = num_upper > 0 ? load(numbers + kLanes, num_upper) : Floats{};
            float own[kRanks] = {};
            std::copy_n(hidden + token * rank + eight, num_rows, own);
#pragma GCC unroll 8
            for (int64_t row = 0; row < kRanks; ++row) {
              lower[row] = multiply_add(one, all(own[row]), lower[row]);
              upper[row] = multiply_add(other, all(own[row]), upper[row]);
            }
          }
          for (int64_t row = 0; row < num_rows; ++row) {
            for (int64_t at = 0; at < left; ++at) {
              const float number = at < kLanes ? lower[row][at] : upper[row][at - kLanes];
              const int64_t place = is_upright ? (first + at) * rank + eight + row : (eight + row) * size + first + at;
              goal[place] += number * factor;
            }
          }
        }
      }
    });
  });
}
