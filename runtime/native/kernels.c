#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC target("avx2,fma,f16c")

int padded_width(int k) { return (k + CHUNK - 1) / CHUNK * CHUNK; }

/* Sums are read eight at a time, a weight's block each, which is a GROUP at the least. */
int sum_width(int k) { return (padded_width(k) / GROUP + 15) / 8 * 8; }

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

/* 32 floats as 32 codes in their order; returns the sum of the codes and the scale. */
static inline int quantize_group(const float *x, __m256i *codes, float *scale) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 v[4], top;
    for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(x + 8 * i);
    top = _mm256_max_ps(_mm256_max_ps(_mm256_and_ps(v[0], no_sign), _mm256_and_ps(v[1], no_sign)),
                        _mm256_max_ps(_mm256_and_ps(v[2], no_sign), _mm256_and_ps(v[3], no_sign)));
    const float largest = largest_lane(top);
    *scale = largest / 127.0f;
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m256i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    const __m256i total = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    *codes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm_cvtsi128_si32(sum);
}

void quantize_row(const float *x, const Rows8 *to, int row) {
    const __m256i pairs = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10,
                                           12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    int8_t *plain = to->plain + (size_t)row * to->padded, *split = to->split + (size_t)row * to->padded;
    float *scales = to->scales + (size_t)row * (to->padded / 8), *sums = to->sums + (size_t)row * to->sum_width;
    memset(sums, 0, sizeof(float) * to->sum_width);
    for (int at = 0; at < to->padded; at += GROUP) {
        float last[GROUP];
        const float *from = x + at;
        if (at + GROUP > to->k) {
            memset(last, 0, sizeof last);
            if (at < to->k) memcpy(last, x + at, sizeof(float) * (to->k - at));
            from = last;
        }
        __m256i codes;
        float scale;
        const int sum = quantize_group(from, &codes, &scale);
        _mm256_storeu_si256((__m256i *)(plain + at), codes);
        /* even places of each 16 first, then the halves of even and odd ones side by side */
        const __m256i parted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(codes, pairs), 0xd8);
        int8_t *chunk = split + at / CHUNK * CHUNK + at % CHUNK / 2;
        _mm_storeu_si128((__m128i *)chunk, _mm256_castsi256_si128(parted));
        _mm_storeu_si128((__m128i *)(chunk + CHUNK / 2), _mm256_extracti128_si256(parted, 1));
        _mm_storeu_ps(scales + at / 8, _mm_set1_ps(scale));
        sums[at / GROUP] = scale * (float)sum;
    }
}

/* Where a row of weights lies: the last one in a copy of its own with zeros behind it, so that whole vectors can
 * be read everywhere. */
typedef struct {
    const uint8_t *codes, *zeros, *scales;
} Row;

static inline Row row_of(const Weights *w, int n) {
    const uint8_t *const scales = w->scales;
    if (n == w->n - 1) return (Row){w->last_codes, w->zeros ? w->last_zeros : NULL, w->last_scales};
    return (Row){w->codes + n * w->row_bytes, w->zeros ? w->zeros + n * w->zero_bytes : NULL,
                 scales + n * w->scale_bytes};
}

/* Eight scales of a row from its block `at` on. */
static inline __m256 eight_scales(const Weights *w, Row row, int at) {
    if (w->half_scales) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row.scales + 2 * at)));
    return _mm256_loadu_ps((const float *)(row.scales + 4 * at));
}

/* Eight zero points of a row from its block `at` on. */
static inline __m256 eight_zeros(const Weights *w, Row row, int at) {
    if (!row.zeros) return _mm256_set1_ps(w->bits == 4 ? 8.0f : 128.0f);
    if (w->bits == 8)
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(row.zeros + at))));
    int32_t four;
    memcpy(&four, row.zeros + at / 2, 4);
    const __m128i bytes = _mm_cvtsi32_si128(four), low = _mm_set1_epi8(15);
    const __m128i halves =
        _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(halves));
}

/* GCC would add sums up in another order, for which registers do not suffice. */
#define KEEP(v) __asm__("" : "+x"(v))

/* The sums of eight blocks of activations, those from the block `at` on. */
static inline __m256 eight_sums(const float *sums, int at, int per_block, int width) {
    if (per_block == 1) return _mm256_loadu_ps(sums + at);
    float some[8] = {0};
    for (int i = 0; i < 8; i++)
        for (int g = (at + i) * per_block; g < (at + i + 1) * per_block && g < width; g++) some[i] += sums[g];
    return _mm256_loadu_ps(some);
}

/* Which of eight scales each lane of a chunk takes: of two blocks of 32, or of one that is larger. */
static const int32_t OF_TWO[4][8] = {
    {0, 0, 0, 0, 1, 1, 1, 1}, {2, 2, 2, 2, 3, 3, 3, 3}, {4, 4, 4, 4, 5, 5, 5, 5}, {6, 6, 6, 6, 7, 7, 7, 7}};
static const int32_t OF_ONE[8][8] = {{0, 0, 0, 0, 0, 0, 0, 0}, {1, 1, 1, 1, 1, 1, 1, 1}, {2, 2, 2, 2, 2, 2, 2, 2},
                                     {3, 3, 3, 3, 3, 3, 3, 3}, {4, 4, 4, 4, 4, 4, 4, 4}, {5, 5, 5, 5, 5, 5, 5, 5},
                                     {6, 6, 6, 6, 6, 6, 6, 6}, {7, 7, 7, 7, 7, 7, 7, 7}};

/* Rows are short, and so are what the processor itself fetches ahead of them. Bytes, by measurement. */
enum { AHEAD = 1536 };

/* y of `many` rows of weights and `rows` rows of activations: sums over k in eight lanes, no weights rearranged.
 *
 * An unsigned and a signed byte make a product in 16 bits, two of them a sum (vpmaddubsw): codes of 4 bits stay
 * unsigned, of 8 bits the sign goes over to the activation, so that no sum leaves 16 bits. */
static inline __attribute__((always_inline)) void dot(const Weights *w, int n, const int many, const Rows8 *x, int row,
                                                      const int rows, const int bits, const int per_block,
                                                      float *y, size_t stride) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(-128);
    const int chunks = x->padded / CHUNK, last_chunk = per_block == 1 ? 4 : 4 * per_block;
    Row from[4];
#pragma GCC unroll 4
    for (int i = 0; i < many; i++) from[i] = row_of(w, n + i);
    __m256 totals[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < many; i++)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) totals[i][m] = _mm256_setzero_ps();

    for (int at = 0; at < w->blocks; at += 8) {
        __m256 scales[4];
#pragma GCC unroll 4
        for (int i = 0; i < many; i++) {
            scales[i] = eight_scales(w, from[i], at);
            if (bits == 8 && !w->zeros) continue;
            /* What zero points take away again: scale * zero point * sum of the block's activations. */
            __m256 zeros = eight_zeros(w, from[i], at);
            if (bits == 8) zeros = _mm256_sub_ps(zeros, _mm256_set1_ps(128.0f));
            const __m256 away = _mm256_mul_ps(scales[i], zeros);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const float *sums = x->sums + (size_t)(row + m) * x->sum_width;
                totals[i][m] = _mm256_fnmadd_ps(away, eight_sums(sums, at, per_block, x->sum_width), totals[i][m]);
            }
        }
        const int first = at * per_block / 2;
        for (int c = 0; c < last_chunk && first + c < chunks; c++) {
            const __m256i picks =
                _mm256_loadu_si256((const __m256i *)(per_block == 1 ? OF_TWO[c] : OF_ONE[c * 2 / per_block]));
            const int8_t *codes8 = (bits == 4 ? x->split : x->plain) + (size_t)row * x->padded + (first + c) * CHUNK;
            const float *scales8 = x->scales + (size_t)row * (x->padded / 8) + (first + c) * 8;
#pragma GCC unroll 4
            for (int i = 0; i < many; i++) {
                const __m256 own = _mm256_permutevar8x32_ps(scales[i], picks);
                const __m256i *codes = (const __m256i *)(from[i].codes + (first + c) * (8 * bits));
                if (bits == 4) {
                    const __m256i both = _mm256_loadu_si256(codes);
                    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
                    const __m256i even = _mm256_and_si256(both, low);
                    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
                    for (int m = 0; m < rows; m++) {
                        const __m256i *a = (const __m256i *)(codes8 + (size_t)m * x->padded);
                        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256(a)),
                                                               _mm256_maddubs_epi16(odd, _mm256_loadu_si256(a + 1)));
                        const __m256 dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                        const __m256 scaled =
                            _mm256_mul_ps(dots, _mm256_loadu_ps(scales8 + (size_t)m * (x->padded / 8)));
                        totals[i][m] = _mm256_fmadd_ps(scaled, own, totals[i][m]);
                    }
                } else {
#pragma GCC unroll 4
                    for (int half = 0; half < 2; half++) {
                        const __m256i code = _mm256_xor_si256(_mm256_loadu_si256(codes + half), middle);
                        _mm_prefetch((const char *)(codes + half) + 2 * AHEAD, _MM_HINT_T0);
                        const __m256i size = _mm256_abs_epi8(code);
                        const __m256 its = per_block > 1 ? own : (half ? _mm256_permute2f128_ps(own, own, 0x11) : _mm256_permute2f128_ps(own, own, 0));
#pragma GCC unroll 4
                        for (int m = 0; m < rows; m++) {
                            const __m256i *a = (const __m256i *)(codes8 + (size_t)m * x->padded) + half;
                            const __m256i signs = _mm256_sign_epi8(_mm256_loadu_si256(a), code);
                            const __m256 dots =
                                _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(size, signs), ones));
                            const __m256 scaled = _mm256_mul_ps(
                                dots, _mm256_broadcast_ss(scales8 + (size_t)m * (x->padded / 8) + half * 4));
                            totals[i][m] = _mm256_fmadd_ps(scaled, its, totals[i][m]);
                        }
                    }
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < many; i++)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
            y[(row + m) * stride + n + i] = add_lanes(totals[i][m]) + (w->bias ? w->bias[n + i] : 0.0f);
}

#define DOT(bits, per_block)                                                     \
    do {                                                                         \
        if (rows == 1) {                                                         \
            for (; bits == 4 && n + 4 <= last; n += 4) dot(w, n, 4, x, row, 1, bits, per_block, y, stride); \
            for (; n < last; n++) dot(w, n, 1, x, row, 1, bits, per_block, y, stride);         \
        } else if (rows == 2) {                                                  \
            for (; n + 2 <= last; n += 2) dot(w, n, 2, x, row, 2, bits, per_block, y, stride); \
            for (; n < last; n++) dot(w, n, 1, x, row, 2, bits, per_block, y, stride);         \
        } else if (rows == 3) {                                                  \
            for (; n < last; n++) dot(w, n, 1, x, row, 3, bits, per_block, y, stride);         \
        } else {                                                                 \
            for (; n + 2 <= last; n += 2) dot(w, n, 2, x, row, 4, bits, per_block, y, stride); \
            for (; n < last; n++) dot(w, n, 1, x, row, 4, bits, per_block, y, stride);         \
        }                                                                        \
    } while (0)

static void few_rows(const Weights *w, const Rows8 *x, int row, int rows, int first, int last, float *y,
                     size_t stride) {
    const int per_block = w->block / GROUP;
    int n = first;
    if (w->bits == 4 && per_block == 1) DOT(4, 1);
    else if (w->bits == 4 && per_block == 2) DOT(4, 2);
    else if (w->bits == 4) DOT(4, per_block);
    else if (per_block == 1) DOT(8, 1);
    else if (per_block == 2) DOT(8, 2);
    else DOT(8, per_block);
}

/* Sixteen rows of 4-bit codes, or eight of 8-bit ones as a low and a high half, and their scales by groups:
 * what stays in the first cache while all rows of activations pass. */
typedef struct {
    uint8_t *codes;  /* (k / 4, 2, 8, 4): four codes along k of eight rows, twice */
    float *scales;   /* (k / GROUP, 2, 8): for 8-bit codes both the same */
    float *zeros;    /* the same of scale * zero point */
} Panel;

/* 8 rows of 8 words of 32 bits become 8 columns; `step` vectors of 32 bytes lie between two of them. */
static inline void transpose(const __m256i r[8], __m256i *to, int step) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256(to + i * step, _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
        _mm256_storeu_si256(to + (i + 4) * step, _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
    }
}

static void fill_panel(const Weights *w, int n, int last, int padded, const Panel *panel) {
    const __m256i low = _mm256_set1_epi8(15);
    const int per_block = w->block / GROUP, groups = padded / GROUP;
    for (int part = 0; part < 2; part++) {
        if (w->bits == 8 && part) break;
        const int base = n + part * 8;
        for (int at = 0; at < padded; at += CHUNK) {
            __m256i lower[8], upper[8];
            __m256i *to = (__m256i *)panel->codes + at / 4 * 2 + part;
            for (int i = 0; i < 8; i++) {
                const Row row = row_of(w, base + i < last ? base + i : last - 1);
                const __m256i *from = (const __m256i *)(row.codes + at * w->bits / 8);
                if (w->bits == 4) {
                    const __m256i both = _mm256_loadu_si256(from);
                    const __m256i even = _mm256_and_si256(both, low);
                    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                    const __m256i a = _mm256_unpacklo_epi8(even, odd), b = _mm256_unpackhi_epi8(even, odd);
                    lower[i] = _mm256_permute2x128_si256(a, b, 0x20);
                    upper[i] = _mm256_permute2x128_si256(a, b, 0x31);
                } else {
                    lower[i] = _mm256_loadu_si256(from);
                    upper[i] = _mm256_loadu_si256(from + 1);
                }
            }
            if (w->bits == 4) {
                transpose(lower, to, 2);
                transpose(upper, to + 16, 2);
            } else {
                __m256i columns[8];
                for (int half = 0; half < 2; half++) {
                    transpose(half ? upper : lower, columns, 1);
                    for (int i = 0; i < 8; i++) {
                        _mm256_storeu_si256(to + half * 16 + i * 2, _mm256_and_si256(columns[i], low));
                        _mm256_storeu_si256(to + half * 16 + i * 2 + 1,
                                            _mm256_and_si256(_mm256_srli_epi16(columns[i], 4), low));
                    }
                }
            }
        }
    }
    const int rows = w->bits == 4 ? 16 : 8;
    for (int i = 0; i < rows; i++) {
        const Row row = row_of(w, n + i < last ? n + i : last - 1);
        for (int at = 0; at < w->blocks; at += 8) {
            float scales[8], zeros[8];
            const __m256 eight = eight_scales(w, row, at);
            _mm256_storeu_ps(scales, eight);
            _mm256_storeu_ps(zeros, eight_zeros(w, row, at));
            for (int b = 0; b < 8 && at + b < w->blocks; b++)
                for (int g = (at + b) * per_block; g < (at + b + 1) * per_block && g < groups; g++) {
                    panel->scales[g * 16 + i] = scales[b];
                    panel->zeros[g * 16 + i] = -zeros[b];
                    if (rows == 8) {
                        panel->scales[g * 16 + 8 + i] = scales[b];
                        panel->zeros[g * 16 + 8 + i] = -zeros[b];
                    }
                }
        }
        for (int g = w->blocks * per_block; g < groups; g++)
            for (int twice = 0; twice < 2; twice++) panel->scales[g * 16 + i % 8 + 8 * (rows == 8 ? twice : i / 8)] = 0;
    }
}

/* Four rows of activations by a panel. For 32 activations eight sums of 16 bits hold: 8 * 2 * 15 * 127 < 2**15. */
static inline __attribute__((always_inline)) void four_rows(const Panel *panel, const Rows8 *x, const int rows[4],
                                                            const int bits, float out[4][16]) {
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    const int8_t *a[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) a[m] = x->plain + (size_t)rows[m] * x->padded;
    __m256 totals[4][2];
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) totals[m][0] = totals[m][1] = _mm256_setzero_ps();
    for (int g = 0; g < x->padded / GROUP; g++) {
        const __m256i *codes = (const __m256i *)panel->codes + g * 16;
        __m256i sums[4][2];
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            int32_t word;
            memcpy(&word, a[m] + g * GROUP, 4);
            const __m256i four = _mm256_set1_epi32(word);
            sums[m][0] = _mm256_maddubs_epi16(codes[0], four);
            sums[m][1] = _mm256_maddubs_epi16(codes[1], four);
        }
        for (int q = 1; q < 8; q++)
#pragma GCC unroll 4
            for (int m = 0; m < 4; m++) {
                int32_t word;
                memcpy(&word, a[m] + g * GROUP + q * 4, 4);
                const __m256i four = _mm256_set1_epi32(word);
                sums[m][0] = _mm256_add_epi16(sums[m][0], _mm256_maddubs_epi16(codes[q * 2], four));
                sums[m][1] = _mm256_add_epi16(sums[m][1], _mm256_maddubs_epi16(codes[q * 2 + 1], four));
                KEEP(sums[m][0]);
                KEEP(sums[m][1]);
            }
        const __m256 s0 = _mm256_loadu_ps(panel->scales + g * 16), s1 = _mm256_loadu_ps(panel->scales + g * 16 + 8);
        const __m256 z0 = _mm256_loadu_ps(panel->zeros + g * 16), z1 = _mm256_loadu_ps(panel->zeros + g * 16 + 8);
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            const __m256 scale = _mm256_broadcast_ss(x->scales + (size_t)rows[m] * (x->padded / 8) + g * 4);
            const __m256 sum = _mm256_broadcast_ss(x->sums + (size_t)rows[m] * x->sum_width + g);
            if (bits == 4) {
                const __m256 d0 = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[m][0], ones));
                const __m256 d1 = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[m][1], ones));
                totals[m][0] = _mm256_fmadd_ps(_mm256_fmadd_ps(d0, scale, _mm256_mul_ps(z0, sum)), s0, totals[m][0]);
                totals[m][1] = _mm256_fmadd_ps(_mm256_fmadd_ps(d1, scale, _mm256_mul_ps(z1, sum)), s1, totals[m][1]);
            } else {
                const __m256 d = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sums[m][0], ones),
                                                                     _mm256_madd_epi16(sums[m][1], sixteens)));
                totals[m][0] = _mm256_fmadd_ps(_mm256_fmadd_ps(d, scale, _mm256_mul_ps(z0, sum)), s0, totals[m][0]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
        _mm256_storeu_ps(out[m], totals[m][0]);
        if (bits == 4) _mm256_storeu_ps(out[m] + 8, totals[m][1]);
    }
}

static void many_rows(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride,
                      void *scratch) {
    const int groups = x->padded / GROUP, width = w->bits == 4 ? 16 : 8;
    Panel panel = {.codes = scratch};
    panel.scales = (float *)(panel.codes + (size_t)x->padded * 16);
    panel.zeros = panel.scales + (size_t)groups * 16;
    for (int n = first; n < last; n += width) {
        fill_panel(w, n, last, x->padded, &panel);
        const int count = last - n < width ? last - n : width;
        for (int row = 0; row < rows; row += 4) {
            float out[4][16];
            int which[4];
            for (int m = 0; m < 4; m++) which[m] = row + m < rows ? row + m : rows - 1;
            if (w->bits == 4) four_rows(&panel, x, which, 4, out);
            else four_rows(&panel, x, which, 8, out);
            for (int m = 0; m < 4 && row + m < rows; m++) {
                float *to = y + (row + m) * stride + n;
                for (int i = 0; i < count; i++) to[i] = out[m][i] + (w->bias ? w->bias[n + i] : 0.0f);
            }
        }
    }
}

/* Copies the last row with room behind it; NULL where there is no memory. */
void *pad_last_row(Weights *w) {
    w->row_bytes = (size_t)w->blocks * w->block * w->bits / 8;
    w->scale_bytes = (size_t)w->blocks * (w->half_scales ? 2 : 4);
    w->zero_bytes = w->bits == 8 ? (size_t)w->blocks : (size_t)(w->blocks + 1) / 2;
    enum { ROOM = 64 };
    uint8_t *const copy = calloc(1, w->row_bytes + w->scale_bytes + w->zero_bytes + 3 * ROOM);
    if (!copy) return NULL;
    const size_t before = w->n - 1;
    uint8_t *const scales = copy + w->row_bytes + ROOM, *const zeros = scales + w->scale_bytes + ROOM;
    memcpy(copy, w->codes + before * w->row_bytes, w->row_bytes);
    memcpy(scales, (const uint8_t *)w->scales + before * w->scale_bytes, w->scale_bytes);
    if (w->zeros) memcpy(zeros, w->zeros + before * w->zero_bytes, w->zero_bytes);
    w->last_codes = copy, w->last_scales = scales, w->last_zeros = zeros;
    return copy;
}

size_t panel_bytes(int k) {
    const size_t padded = padded_width(k);
    return padded * 16 + padded / GROUP * 16 * 2 * sizeof(float);
}

void multiply(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride,
              void *scratch) {
    if (rows >= PANEL_ROWS) {
        many_rows(w, x, rows, first, last, y, stride, scratch);
        return;
    }
    for (int row = 0; row < rows; row += 4)
        few_rows(w, x, row, rows - row < 4 ? rows - row : 4, first, last, y, stride);
}

/* y = x * gain / sqrt(mean(x²) + epsilon), of x + skip where there is one, which goes to `sum`. */
void rms_norm(const float *x, const float *skip, const float *gain, float epsilon, int width, float *sum, float *y) {
    __m256 squares = _mm256_setzero_ps();
    float rest = 0;
    int i = 0;
    for (; i + 8 <= width; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (skip) v = _mm256_add_ps(v, _mm256_loadu_ps(skip + i));
        if (sum) _mm256_storeu_ps(sum + i, v);
        _mm256_storeu_ps(y + i, v);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    for (; i < width; i++) {
        const float v = skip ? x[i] + skip[i] : x[i];
        if (sum) sum[i] = v;
        y[i] = v;
        rest += v * v;
    }
    const float factor = 1.0f / sqrtf((add_lanes(squares) + rest) / (float)width + epsilon);
    const __m256 factors = _mm256_set1_ps(factor);
    for (i = 0; i + 8 <= width; i += 8)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(y + i), factors), _mm256_loadu_ps(gain + i)));
    for (; i < width; i++) y[i] = y[i] * factor * gain[i];
}

/* y = (x - mean(x)) * gain / sqrt(variance(x) + epsilon) + bias */
void layer_norm(const float *x, const float *gain, const float *bias, float epsilon, int width, float *y) {
    double sum = 0, squares = 0;
    for (int i = 0; i < width; i++) sum += x[i];
    const float mean = (float)(sum / width);
    for (int i = 0; i < width; i++) squares += (double)(x[i] - mean) * (x[i] - mean);
    const float factor = (float)(1.0 / sqrt(squares / width + epsilon));
    for (int i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * gain[i] + (bias ? bias[i] : 0.0f);
}

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

/* x / (1 + e**-x) */
void silu(const float *x, int width, float *y) {
    const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
    int i = 0;
    for (; i + 8 <= width; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        _mm256_storeu_ps(y + i, _mm256_div_ps(v, _mm256_add_ps(one, exponential(_mm256_sub_ps(zero, v)))));
    }
    for (; i < width; i++) y[i] = x[i] / (1.0f + expf(-x[i]));
}

/* x / 2 * (1 + erf(x / sqrt 2)), erf by Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at the most. */
void gelu(const float *x, int width, float *y) {
    const __m256 one = _mm256_set1_ps(1.0f), half = _mm256_set1_ps(0.5f), sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < width; i += 8) {
        float some[8] = {0};
        const int whole = i + 8 <= width;
        if (!whole) memcpy(some, x + i, sizeof(float) * (width - i));
        const __m256 v = _mm256_loadu_ps(whole ? x + i : some);
        const __m256 u = _mm256_mul_ps(v, _mm256_set1_ps(0.70710678f)), size = _mm256_andnot_ps(sign, u);
        const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(size, _mm256_set1_ps(0.3275911f), one));
        __m256 p = _mm256_set1_ps(1.061405429f);
        p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.453152027f));
        p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
        p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
        p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f));
        const __m256 power = exponential(_mm256_mul_ps(_mm256_xor_ps(size, sign), size));
        const __m256 erf = _mm256_fnmadd_ps(_mm256_mul_ps(p, t), power, one);
        const __m256 out = _mm256_mul_ps(_mm256_mul_ps(v, half), _mm256_add_ps(one, _mm256_or_ps(erf, _mm256_and_ps(u, sign))));
        _mm256_storeu_ps(some, out);
        if (whole) _mm256_storeu_ps(y + i, out);
        else memcpy(y + i, some, sizeof(float) * (width - i));
    }
}

/* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))), which is x / (1 + e**(-2 * what tanh is of)) */
void gelu_tanh(const float *x, int width, float *y) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (int i = 0; i < width; i += 8) {
        float some[8] = {0};
        const int whole = i + 8 <= width;
        if (!whole) memcpy(some, x + i, sizeof(float) * (width - i));
        const __m256 v = _mm256_loadu_ps(whole ? x + i : some);
        const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(v, v), _mm256_set1_ps(0.044715f), one);
        const __m256 u = _mm256_mul_ps(_mm256_mul_ps(v, cubic), _mm256_set1_ps(-1.59576912f));
        const __m256 out = _mm256_div_ps(v, _mm256_add_ps(one, exponential(u)));
        _mm256_storeu_ps(some, out);
        if (whole) _mm256_storeu_ps(y + i, out);
        else memcpy(y + i, some, sizeof(float) * (width - i));
    }
}

void relu(const float *x, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = x[i] > 0 ? x[i] : 0;
}

void times(const float *a, const float *b, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = a[i] * b[i];
}

void plus(const float *a, const float *b, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = a[i] + b[i];
}

/* Pieces of columns: many enough for threads to share them evenly, whole panels each. */
int column_piece(int n, int rows) {
    const int pieces = rows >= PANEL_ROWS ? 16 : 8;
    const int each = (n + pieces - 1) / pieces;
    return (each + 15) / 16 * 16;
}
