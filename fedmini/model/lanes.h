// What dequantise.cpp asks of a processor's vectors: AVX-512, AVX2 or NEON, whichever the compiler was told of. Without one of
// them WITH_LANES is 0, and the plain loops do everything.

#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>
#define WITH_LANES 1

namespace lanes {

using Floats = __m512;
using Integers = __m512i;
constexpr int64_t kNum = 16;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m128i sixteen(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline Integers bytes(const uint8_t* from) { return _mm512_cvtepu8_epi32(sixteen(from)); }
inline Floats signed_bytes(const uint8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(from))); }
inline Integers upper_nibbles(Integers bytes) { return _mm512_srli_epi32(bytes, 4); }
inline Floats multiply_add(Floats left, Floats right, Floats added) { return _mm512_fmadd_ps(left, right, added); }

struct Levels {
  Floats all;
  explicit Levels(const float* from) : all(load(from)) {}
  Floats operator()(Integers index) const { return _mm512_permutexvar_ps(index, all); }  // heeds its lowest four bits
};

inline void put(float* out, Floats left, Floats right) {
  _mm512_storeu_ps(out, left);
  _mm512_storeu_ps(out + kNum, right);
}

alignas(64) constexpr uint16_t kLowerHalves[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                   32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

// The upper half goes up by one where the lower one, plus the upper one's last bit, is more than a half. This way round it
// takes two thirds of the instructions, and needs no AVX512_BF16, which would lose numbers below 2^-126.
inline void put(uint16_t* out, Floats left, Floats right) {
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i lower_of = _mm512_load_si512(kLowerHalves), upper_of = _mm512_add_epi16(lower_of, one);
  const __m512i lower = _mm512_permutex2var_epi16(_mm512_castps_si512(left), lower_of, _mm512_castps_si512(right));
  const __m512i upper = _mm512_permutex2var_epi16(_mm512_castps_si512(left), upper_of, _mm512_castps_si512(right));
  const __m512i weight = _mm512_adds_epu16(lower, _mm512_and_si512(upper, one));
  const __mmask32 goes_up = _mm512_cmpgt_epu16_mask(weight, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  _mm512_storeu_si512(out, _mm512_mask_add_epi16(upper, goes_up, upper, one));
}

}  // namespace lanes

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#define WITH_LANES 1

namespace lanes {

using Floats = __m256;
using Integers = __m256i;
constexpr int64_t kNum = 8;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Floats halves(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __m128i eight(const uint8_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); }
inline Integers bytes(const uint8_t* from) { return _mm256_cvtepu8_epi32(eight(from)); }
inline Floats signed_bytes(const uint8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(from))); }
inline Integers upper_nibbles(Integers bytes) { return _mm256_srli_epi32(bytes, 4); }
inline Floats multiply_add(Floats left, Floats right, Floats added) { return _mm256_fmadd_ps(left, right, added); }

struct Levels {
  Floats first, second;
  explicit Levels(const float* from) : first(load(from)), second(load(from + kNum)) {}
  Floats operator()(Integers index) const {  // each lookup heeds the lowest three bits, the choice between them the fourth
    const Floats fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index), fourth_bit);
  }
};

inline void put(float* out, Floats left, Floats right) {
  _mm256_storeu_ps(out, left);
  _mm256_storeu_ps(out + kNum, right);
}

inline __m256i rounded(Floats numbers) {
  const __m256i bits = _mm256_castps_si256(numbers);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

inline void put(uint16_t* out, Floats left, Floats right) {
  const __m256i mixed = _mm256_packus_epi32(rounded(left), rounded(right));  // 4 left, 4 right, 4 left, 4 right
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(mixed, 0xd8));
}

}  // namespace lanes

#elif defined(__ARM_NEON) && defined(__aarch64__)

#include <arm_neon.h>
#define WITH_LANES 1

namespace lanes {

struct Floats {
  float32x4_t first, second;
};
struct Integers {
  uint32x4_t first, second;
};
constexpr int64_t kNum = 8;

inline Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
inline Floats halves(const uint16_t* from) {
  const float16x8_t eight = vreinterpretq_f16_u16(vld1q_u16(from));
  return {vcvt_f32_f16(vget_low_f16(eight)), vcvt_high_f32_f16(eight)};
}
inline Integers bytes(const uint8_t* from) {
  const uint16x8_t eight = vmovl_u8(vld1_u8(from));
  return {vmovl_u16(vget_low_u16(eight)), vmovl_high_u16(eight)};
}
inline Floats signed_bytes(const uint8_t* from) {
  const int16x8_t eight = vmovl_s8(vreinterpret_s8_u8(vld1_u8(from)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(eight))), vcvtq_f32_s32(vmovl_high_s16(eight))};
}
inline Integers upper_nibbles(Integers bytes) { return {vshrq_n_u32(bytes.first, 4), vshrq_n_u32(bytes.second, 4)}; }
inline Floats multiply_add(Floats left, Floats right, Floats added) {
  return {vfmaq_f32(added.first, left.first, right.first), vfmaq_f32(added.second, left.second, right.second)};
}

struct Levels {
  uint8x16x4_t all;
  explicit Levels(const float* from) : all(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(from))) {}
  float32x4_t four(uint32x4_t index) const {  // the four bytes of level i begin at 4 i
    const uint32x4_t lowest = vandq_u32(index, vdupq_n_u32(15));
    const uint32x4_t byte_of = vmlaq_u32(vdupq_n_u32(0x03020100), lowest, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(all, vreinterpretq_u8_u32(byte_of)));
  }
  Floats operator()(Integers index) const { return {four(index.first), four(index.second)}; }
};

inline void put(float* out, Floats left, Floats right) {
  vst1q_f32(out, left.first);
  vst1q_f32(out + 4, left.second);
  vst1q_f32(out + 8, right.first);
  vst1q_f32(out + 12, right.second);
}

inline uint16x8_t rounded(Floats numbers) {
  const auto four = [](float32x4_t some) {
    const uint32x4_t bits = vreinterpretq_u32_f32(some);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  };
  return vcombine_u16(four(numbers.first), four(numbers.second));
}

inline void put(uint16_t* out, Floats left, Floats right) {
  vst1q_u16(out, rounded(left));
  vst1q_u16(out + kNum, rounded(right));
}

}  // namespace lanes

#else
#define WITH_LANES 0
#endif
