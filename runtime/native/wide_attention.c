/* Attention of encoders for processors with AVX-512 BF16, whose instruction multiplies pairs of bfloat16 numbers and
 * adds both to a float. Keys lie as pairs of their numbers, (dim / 2, stride, 2), values as pairs of tokens,
 * (stride / 2, dim, 2): sixteen keys, or sixteen numbers of a value, are a register, and a pair of a query's numbers,
 * or of its weights, is spread over them. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attention.h"
#include "vectors.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

enum { LANES = 16, AT_ONCE = 4 }; /* queries that are looked at together, and registers of keys */

/* e**x; 0 below 2**-126 and where x is no number. A polynomial of degree 5 of what is behind the point. */
static inline __m512 exponential_or_0(__m512 x) {
    x = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.33335581e-3f); /* (ln 2)**n / n! */
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ), p, whole);
}

static inline __m512bh pair_of(const uint16_t *pair) {
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

int attends_in_pairs(const Attention *a) {
    return a->dim % 32 == 0 && a->dim <= MOST_DIM && a->softcap == 0 && a->window == 0;
}

static void narrow_pairs(const float *x, int width, uint16_t *halves) {
    for (int i = 0; i < width; i += LANES)
        _mm256_storeu_si256((__m256i *)(halves + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
}

void keep_pairs(const float *keys, const float *values, size_t step, int dim, int count, int position, int end,
                uint16_t *kept_keys, uint16_t *kept_values, size_t stride) {
    uint16_t halves[8 * MOST_DIM];
    for (int at = 0, some; at < count; at += some) {
        some = count - at < 8 ? count - at : 8;
        for (int i = 0; i < some; i++) narrow_pairs(keys + (at + i) * step, dim, halves + i * dim);
        uint16_t *const to = kept_keys + 2 * (position + at);
        for (int d = 0; d < dim; d += 2 * 8) {
            if (some == 8) /* pairs are moved as floats are */
                turn_eight((const float *)(halves + d), dim / 2, (float *)(to + d * stride), stride);
            for (int i = 0; i < some && some < 8; i++)
                for (int j = 0; j < 16; j += 2) memcpy(to + (d + j) * stride + 2 * i, halves + i * dim + d + j, 4);
        }
    }
    for (int at = 0, some; at < count; at += some) {
        const int place = position + at, second = place % 2;
        const float *const from = values + at * step;
        uint16_t *const to = kept_values + (size_t)(place - second) * dim;
        const int alone = !second && at + 1 == count;
        some = second || alone ? 1 : 2;
        if (second || (alone && place + 1 < end)) { /* another call puts the other token there */
            narrow_pairs(from, dim, halves);
            for (int d = 0; d < dim; d++) to[2 * d + second] = halves[d];
            continue;
        }
        for (int d = 0; d < dim; d += LANES) {
            const __m512 next = alone ? _mm512_setzero_ps() : _mm512_loadu_ps(from + step + d);
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + d)));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(next));
            _mm512_storeu_si512(to + 2 * d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

/* Sums over the keys that were looked at, of each query. */
typedef struct {
    float largest[QUERIES], sums[QUERIES], factors[QUERIES]; /* factors: what sums up to this block are times */
} Sums;

/* Scores of four queries and up to 64 keys, and what their softmax weighs values with. */
static inline __attribute__((always_inline)) void weigh(const uint16_t *queries, const uint16_t *keys, size_t stride,
                                                        const int registers, int count, int dim,
                                                        const float *const masks[], int q, Sums *sums,
                                                        uint16_t weights[][KEYS]) {
    __m512 scores[AT_ONCE][4];
#pragma GCC unroll 4
    for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 4
        for (int r = 0; r < registers; r++) scores[i][r] = _mm512_setzero_ps();
    for (int d = 0; d < dim; d += 2, keys += 2 * stride) {
        __m512bh key[4];
#pragma GCC unroll 4
        for (int r = 0; r < registers; r++) key[r] = (__m512bh)_mm512_loadu_si512(keys + 2 * LANES * r);
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; i++) {
            const __m512bh x = pair_of(queries + i * dim + d);
#pragma GCC unroll 4
            for (int r = 0; r < registers; r++) scores[i][r] = _mm512_dpbf16_ps(scores[i][r], key[r], x);
        }
    }
    const __m512 unseen = _mm512_set1_ps(-INFINITY);
    const __mmask16 last = (__mmask16)(0xffffu >> (LANES * registers - count));
#pragma GCC unroll 4
    for (int i = 0; i < AT_ONCE; i++) {
#pragma GCC unroll 4
        for (int r = 0; r < registers; r++) {
            const __mmask16 some = r + 1 < registers ? 0xffff : last;
            if (masks) {
                const __m512 mask = _mm512_maskz_loadu_ps(some, masks[q + i] + LANES * r);
                scores[i][r] = _mm512_add_ps(scores[i][r], mask);
            }
            if (r + 1 == registers) scores[i][r] = _mm512_mask_mov_ps(unseen, some, scores[i][r]);
        }
        __m512 tops = scores[i][0];
#pragma GCC unroll 4
        for (int r = 1; r < registers; r++) tops = _mm512_max_ps(tops, scores[i][r]);
        const float top = _mm512_reduce_max_ps(tops), before = sums->largest[q + i];
        const __m512 largest = _mm512_set1_ps(top > before ? top : before);
        const float factor = _mm512_cvtss_f32(exponential_or_0(_mm512_sub_ps(_mm512_set1_ps(before), largest)));
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int r = 0; r < registers; r++) {
            scores[i][r] = exponential_or_0(_mm512_sub_ps(scores[i][r], largest));
            sum = _mm512_add_ps(sum, scores[i][r]);
            _mm256_storeu_si256((__m256i *)(weights[q + i] + LANES * r), (__m256i)_mm512_cvtneps_pbh(scores[i][r]));
        }
        sums->largest[q + i] = _mm512_cvtss_f32(largest), sums->factors[q + i] = factor;
        sums->sums[q + i] = sums->sums[q + i] * factor + _mm512_reduce_add_ps(sum);
    }
}

/* totals[q] = totals[q] * factors[q] + weights[q] * values, of four queries. */
static inline void mix_pairs(uint16_t weights[][KEYS], const uint16_t *values, int count, int dim,
                             const float *factors, float *totals) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        __m512 t[AT_ONCE][2];
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; i++) {
            const __m512 factor = _mm512_set1_ps(factors[i]);
            t[i][0] = _mm512_mul_ps(_mm512_loadu_ps(totals + i * dim + d), factor);
            t[i][1] = _mm512_mul_ps(_mm512_loadu_ps(totals + i * dim + d + LANES), factor);
        }
        for (int j = 0; j < count; j += 2) {
            const uint16_t *const pair = values + (size_t)j * dim + 2 * d;
            const __m512bh v0 = (__m512bh)_mm512_loadu_si512(pair);
            const __m512bh v1 = (__m512bh)_mm512_loadu_si512(pair + 2 * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++) {
                const __m512bh w = pair_of(&weights[i][j]);
                t[i][0] = _mm512_dpbf16_ps(t[i][0], v0, w);
                t[i][1] = _mm512_dpbf16_ps(t[i][1], v1, w);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; i++) {
            _mm512_storeu_ps(totals + i * dim + d, t[i][0]);
            _mm512_storeu_ps(totals + i * dim + d + LANES, t[i][1]);
        }
    }
}

void attend_pairs(const Attention *a, const uint16_t *keys, const uint16_t *values, size_t stride, int length,
                  const float *queries, size_t query_step, const float *mask, size_t mask_step, int count, float *out,
                  size_t out_step) {
    const int dim = a->dim, whole = (count + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    uint16_t query[QUERIES * MOST_DIM], weights[QUERIES][KEYS];
    float totals[QUERIES * MOST_DIM];
    const float *masks[QUERIES];
    const __m512 scale = _mm512_set1_ps(a->scale);
    Sums sums = {.sums = {0}};
    for (int q = 0; q < whole; q++) { /* the last query once more, where they are no fours */
        const int from = q < count ? q : count - 1;
        for (int d = 0; d < dim; d += LANES) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(queries + from * query_step + d), scale);
            _mm256_storeu_si256((__m256i *)(query + q * dim + d), (__m256i)_mm512_cvtneps_pbh(x));
        }
        sums.largest[q] = -INFINITY;
    }
    memset(totals, 0, sizeof(float) * whole * dim);
    for (int at = 0; at < length; at += KEYS) {
        const int some = length - at < KEYS ? length - at : KEYS;
        const uint16_t *const from = keys + 2 * at;
        for (int q = 0; q < count; q++) masks[q] = mask ? mask + q * mask_step + at : NULL;
        for (int q = count; q < whole; q++) masks[q] = masks[count - 1];
        const float *const *const added = mask ? masks : NULL;
        for (int q = 0; q < whole; q += AT_ONCE) {
            const uint16_t *const x = query + q * dim;
            switch ((some + LANES - 1) / LANES) {
            case 1: weigh(x, from, stride, 1, some, dim, added, q, &sums, weights); break;
            case 2: weigh(x, from, stride, 2, some, dim, added, q, &sums, weights); break;
            case 3: weigh(x, from, stride, 3, some, dim, added, q, &sums, weights); break;
            default: weigh(x, from, stride, 4, some, dim, added, q, &sums, weights);
            }
        }
        for (int q = 0; q < whole; q += AT_ONCE)
            mix_pairs(weights + q, values + (size_t)at * dim, some, dim, sums.factors + q, totals + q * dim);
    }
    for (int q = 0; q < count; q++) {
        const __m512 inverse = _mm512_set1_ps(sums.sums[q] > 0 ? 1 / sums.sums[q] : 0);
        for (int d = 0; d < dim; d += LANES)
            _mm512_storeu_ps(out + q * out_step + d, _mm512_mul_ps(_mm512_loadu_ps(totals + q * dim + d), inverse));
    }
}
