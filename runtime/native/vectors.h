/* What the kernels compute with eight floats at once. Including it lets a file use AVX2; only `gemini_processor`,
 * which stands in none of those, may run on every processor. */
#ifndef GEMINI_VECTORS_H
#define GEMINI_VECTORS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#pragma GCC target("avx2,fma,f16c")

static inline float add_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline float largest_lane(__m256 v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* Eight results and their bias (NULL: none), or the first `count` of them. */
static inline void store_with(__m256 results, const float *bias, size_t count, float *to) {
    if (count >= 8) {
        _mm256_storeu_ps(to, bias ? _mm256_add_ps(results, _mm256_loadu_ps(bias)) : results);
        return;
    }
    float some[8];
    _mm256_storeu_ps(some, results);
    for (size_t i = 0; i < count; i++) to[i] = some[i] + (bias ? bias[i] : 0.0f);
}

/* Four bytes in each of eight lanes. */
static inline __m256i four_codes(const void *codes) {
    int32_t word;
    memcpy(&word, codes, sizeof word);
    return _mm256_set1_epi32(word);
}

/* Instructions as they stand: GCC would load what two rows need first, move sums about, and add integers up in
 * another order, for which registers do not suffice. The products are those of unsigned by signed bytes, in pairs. */
static inline __m256i pair_products(__m256i codes, const void *others) {
    __m256i sums;
    __asm__("vpmaddubsw %2, %1, %0" : "=x"(sums) : "x"(codes), "m"(*(const __m256i *)others));
    return sums;
}
#define ADD_16(sum, more) __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(more))
#define ADD_32(sum, more) __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(more))

/* e**x for x in [-87, 88]: 2**round(x / ln 2) times a polynomial of degree 6 of the rest. */
static inline __m256 exponential(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
    const __m256 whole =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375f), x);
    rest = _mm256_fnmadd_ps(whole, _mm256_set1_ps(-2.12194440e-4f), rest);
    __m256 p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

#endif
