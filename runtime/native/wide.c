/* Products for processors with AVX-512 VNNI, which multiply unsigned by signed bytes and add four of them to a sum of
 * 32 bits in one instruction. Of weights in blocks the codes are the unsigned ones, and activations the signed ones,
 * four of which the instruction itself spreads over all rows of weights; of weights with a scale a column it is the
 * other way round. Eight rows of activations fill the registers. */
#include <immintrin.h>
#include <string.h>

#include "channels.h"
#include "kernels.h"
#include "vectors.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

enum { AHEAD = 4096 };         /* bytes, by measurement: how far ahead of their use codes are asked for */
enum { MOST_ROWS = 8 };        /* of activations that are multiplied together */
enum { TILES = WIDE_CHANNELS / 16, WORD = 4 };

static inline __m512i four_of(const void *codes) {
    int32_t word;
    memcpy(&word, codes, sizeof word);
    return _mm512_set1_epi32(word);
}

/* Sixteen results and their bias (NULL: none), or the first `count` of them. */
static inline void store_some(__m512 results, const float *bias, size_t count, float *to) {
    const __mmask16 some = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
    if (bias) results = _mm512_add_ps(results, _mm512_maskz_loadu_ps(some, bias));
    _mm512_mask_storeu_ps(to, some, results);
}

static inline __m512 scales_of(const Weights *w, size_t place) {
    if (w->half_scales) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w->tile_scales + 2 * place)));
    return _mm512_loadu_ps((const float *)(w->tile_scales + 4 * place));
}

/* How far the zero points of a tile's rows are below the middle code, in the lower halves of 32 bits. */
static inline __m512i below_middle(const Weights *w, size_t place, int bits) {
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->tile_zeros + place)));
    return _mm512_and_si512(_mm512_sub_epi32(_mm512_set1_epi32(bits == 4 ? 8 : 128), zeros), _mm512_set1_epi32(0xffff));
}

/* A tile of weights by up to eight rows of activations. Up to the scales all are integers, and each row's floats are
 * added up by groups in their order, whatever rows it is computed with. */
static inline __attribute__((always_inline)) void tile_by_rows(const Weights *w, size_t tile, const Rows8 *x, int row,
                                                               const int rows, const int bits, const int zeros,
                                                               float *y, size_t stride) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t *codes = w->packed + tile * w->groups * group_bytes(w);
    const size_t first = (size_t)row * w->groups;
    __m512 totals[MOST_ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) totals[m] = _mm512_setzero_ps();
    for (int g = 0; g < w->groups; g++, codes += bits * 64) {
        __m512i words[8];
#pragma GCC unroll 8
        for (int i = 0; i < bits; i++) {
            const __m512i both = _mm512_loadu_si512(codes + i * 64);
            _mm_prefetch((const char *)codes + i * 64 + AHEAD, _MM_HINT_T1);
            words[i] = bits == 4 ? _mm512_and_si512(both, low) : both;
            if (bits == 4) words[i + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
        const size_t place = (tile * w->blocks + (g >> w->shift)) * WIDE_TILE;
        const __m512 scales = scales_of(w, place);
        const __m512i below = zeros ? below_middle(w, place, bits) : low;
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const size_t group = first + (size_t)m * w->groups + g;
            const int8_t *const a = x->codes + group * GROUP;
            __m512i sum = _mm512_set1_epi32((int)x->starts[group]);
            if (bits == 8) sum = _mm512_slli_epi32(sum, 4);
            if (zeros) sum = _mm512_dpwssd_epi32(sum, below, _mm512_set1_epi32(x->sums[group]));
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) /* written out, since GCC 12 loads and spreads the activations apart */
                __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(words[i]), "m"(*(const int32_t *)(a + 4 * i)));
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x->scales[group]));
            totals[m] = _mm512_fmadd_ps(scaled, scales, totals[m]);
        }
    }
    const size_t n = tile * WIDE_TILE;
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
        store_some(totals[m], w->bias ? w->bias + n : NULL, w->n - n, y + (row + m) * stride + n);
}

/* Rows in eights, then what is left in powers of two. */
static inline int next_rows(int left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

static inline __attribute__((always_inline)) void by_tiles(const Weights *w, const Rows8 *x, int rows, size_t first,
                                                           size_t last, float *y, size_t stride, const int bits,
                                                           const int zeros) {
    for (size_t tile = first; tile < last; tile++)
        for (int row = 0, some; row < rows; row += some) {
            some = next_rows(rows - row);
            if (some == 8) tile_by_rows(w, tile, x, row, 8, bits, zeros, y, stride);
            else if (some == 4) tile_by_rows(w, tile, x, row, 4, bits, zeros, y, stride);
            else if (some == 2) tile_by_rows(w, tile, x, row, 2, bits, zeros, y, stride);
            else tile_by_rows(w, tile, x, row, 1, bits, zeros, y, stride);
        }
}

void multiply_wide(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride) {
    const size_t from = first / WIDE_TILE, to = ((size_t)last + WIDE_TILE - 1) / WIDE_TILE;
    if (w->bits == 4 && w->tile_zeros) by_tiles(w, x, rows, from, to, y, stride, 4, 1);
    else if (w->bits == 4) by_tiles(w, x, rows, from, to, y, stride, 4, 0);
    else if (w->tile_zeros) by_tiles(w, x, rows, from, to, y, stride, 8, 1);
    else by_tiles(w, x, rows, from, to, y, stride, 8, 0);
}

/* A panel by up to eight rows. */
static inline __attribute__((always_inline)) void panel_by_rows(const Channels *w, size_t panel, const WholeRows *x,
                                                                int row, const int rows, float *y, size_t stride) {
    const int8_t *codes = w->packed + panel * w->words * WIDE_CHANNELS * WORD;
    const size_t line = (size_t)x->words * WORD;
    const uint8_t *const first = x->codes + row * line;
    __m512i sums[MOST_ROWS][TILES];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int t = 0; t < TILES; t++) sums[m][t] = _mm512_setzero_si512();
    for (int i = 0; i < w->words; i++, codes += WIDE_CHANNELS * WORD) {
        __m512i words[TILES];
#pragma GCC unroll 3
        for (int t = 0; t < TILES; t++) words[t] = _mm512_loadu_si512(codes + t * 64);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const __m512i word = four_of(first + m * line + i * WORD);
#pragma GCC unroll 3
            for (int t = 0; t < TILES; t++) sums[m][t] = _mm512_dpbusd_epi32(sums[m][t], word, words[t]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        const __m512i zero = _mm512_set1_epi32(x->zeros[row + m]);
        const __m512 scale = _mm512_set1_ps(x->scales[row + m]);
#pragma GCC unroll 3
        for (int t = 0; t < TILES; t++) {
            const size_t n = panel * WIDE_CHANNELS + t * 16;
            if (n >= (size_t)w->n) break;
            const __m512i away = _mm512_mullo_epi32(zero, _mm512_loadu_si512(w->sums + n));
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[m][t], away));
            const __m512 result = _mm512_mul_ps(_mm512_mul_ps(whole, scale), _mm512_loadu_ps(w->panel_scales + n));
            store_some(result, w->bias ? w->bias + n : NULL, w->n - n, y + (row + m) * stride + n);
        }
    }
}

void multiply_wide_channels(const Channels *w, const WholeRows *x, int rows, int first, int last, float *y,
                            size_t stride) {
    const size_t from = first / WIDE_CHANNELS, to = ((size_t)last + WIDE_CHANNELS - 1) / WIDE_CHANNELS;
    for (size_t panel = from; panel < to; panel++)
        for (int row = 0, some; row < rows; row += some) {
            some = next_rows(rows - row);
            if (some == 8) panel_by_rows(w, panel, x, row, 8, y, stride);
            else if (some == 4) panel_by_rows(w, panel, x, row, 4, y, stride);
            else if (some == 2) panel_by_rows(w, panel, x, row, 2, y, stride);
            else panel_by_rows(w, panel, x, row, 1, y, stride);
        }
}
