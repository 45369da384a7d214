#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "vectors.h"

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
    int8_t *codes = to->codes + (size_t)row * to->groups * GROUP;
    float *scales = to->scales + (size_t)row * to->groups, *sums = to->sums + (size_t)row * to->groups;
    for (int g = 0; g < to->groups; g++) {
        float last[GROUP];
        const float *from = x + g * GROUP;
        if ((g + 1) * GROUP > to->k) {
            memset(last, 0, sizeof last);
            memcpy(last, from, sizeof(float) * (to->k - g * GROUP));
            from = last;
        }
        __m256i rounded;
        const int sum = quantize_group(from, &rounded, &scales[g]);
        _mm256_storeu_si256((__m256i *)(codes + g * GROUP), rounded);
        sums[g] = scales[g] * (float)sum;
    }
}

/* ---- weights as the products read them ---- */

static size_t group_bytes(const Weights *w) { return (size_t)TILE * GROUP * w->bits / 8; }

size_t packed_bytes(const Weights *w) {
    const size_t tiles = (w->n + TILE - 1) / TILE, scale = w->half_scales ? 2 : 4;
    return tiles * w->groups * group_bytes(w) + tiles * w->blocks * TILE * (scale + (w->zeros ? 1 : 0));
}

/* The words of a group of one row in the order of `packed`. */
static inline void words_of(const Weights *w, size_t bytes, int n, int group, __m128i words[2]) {
    if (n >= w->n) {
        words[0] = words[1] = _mm_setzero_si128();
        return;
    }
    const __m128i *from = (const __m128i *)(w->codes + n * bytes + (size_t)group * GROUP * w->bits / 8);
    words[0] = _mm_loadu_si128(from);
    if (w->bits == 8) {
        words[1] = _mm_loadu_si128(from + 1);
        return;
    }
    const __m128i low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(words[0], low), odd = _mm_and_si128(_mm_srli_epi16(words[0], 4), low);
    const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
    words[0] = _mm_or_si128(first, _mm_slli_epi16(second, 4));
}

/* Four words of each of eight rows become four vectors of eight words. */
static inline void columns_of(const __m128i rows[TILE], __m256i *to) {
    __m256i both[4], pairs[4];
    for (int i = 0; i < 4; i++) both[i] = _mm256_set_m128i(rows[i + 4], rows[i]);
    pairs[0] = _mm256_unpacklo_epi32(both[0], both[1]), pairs[1] = _mm256_unpackhi_epi32(both[0], both[1]);
    pairs[2] = _mm256_unpacklo_epi32(both[2], both[3]), pairs[3] = _mm256_unpackhi_epi32(both[2], both[3]);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(pairs[0], pairs[2]));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(pairs[0], pairs[2]));
    _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(pairs[1], pairs[3]));
    _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(pairs[1], pairs[3]));
}

size_t row_bytes(const Weights *w) { return (size_t)w->blocks * w->block * w->bits / 8; }

void pack_codes(const Weights *w, size_t first, size_t last) {
    const size_t bytes = row_bytes(w);
    __m256i *to = (__m256i *)(w->packed + first * w->groups * group_bytes(w));
    for (size_t tile = first; tile < last; tile++)
        for (int g = 0; g < w->groups; g++, to += w->bits) {
            __m128i words[TILE][2], part[TILE];
            for (int i = 0; i < TILE; i++) words_of(w, bytes, (int)tile * TILE + i, g, words[i]);
            for (int half = 0; half < w->bits / 4; half++) {
                for (int i = 0; i < TILE; i++) part[i] = words[i][half];
                columns_of(part, to + half * 4);
            }
        }
}

void begin_packing(Weights *w, void *memory) {
    const size_t tiles = (w->n + TILE - 1) / TILE, scale = w->half_scales ? 2 : 4, all = tiles * w->blocks * TILE;
    const size_t zero_bytes = w->bits == 8 ? (size_t)w->blocks : (size_t)(w->blocks + 1) / 2;
    w->packed = memory;
    w->tile_scales = w->packed + tiles * w->groups * group_bytes(w);
    w->tile_zeros = w->zeros ? w->tile_scales + all * scale : NULL;
    memset(w->tile_scales, 0, all * (scale + (w->zeros ? 1 : 0)));
    for (int n = 0; n < w->n; n++)
        for (int b = 0; b < w->blocks; b++) {
            const size_t place = ((size_t)n / TILE * w->blocks + b) * TILE + n % TILE, at = (size_t)n * w->blocks + b;
            if (w->half_scales) ((uint16_t *)w->tile_scales)[place] = ((const uint16_t *)w->scales)[at];
            else ((float *)w->tile_scales)[place] = ((const float *)w->scales)[at];
            if (!w->zeros) continue;
            const uint8_t *zeros = w->zeros + n * zero_bytes;
            w->tile_zeros[place] = w->bits == 8 ? zeros[b] : b % 2 ? zeros[b / 2] >> 4 : zeros[b / 2] & 15;
        }
}

/* The scales of a tile's rows for a group, and minus their zero points. */
static inline __m256 scales_of(const Weights *w, size_t tile, int group, int per_block) {
    const size_t place = (tile * w->blocks + group / per_block) * TILE;
    if (w->half_scales) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w->tile_scales + 2 * place)));
    return _mm256_loadu_ps((const float *)(w->tile_scales + 4 * place));
}

static inline __m256 minus_zeros_of(const Weights *w, size_t tile, int group, int per_block, int bits) {
    if (!w->tile_zeros) return _mm256_set1_ps(bits == 4 ? -8.0f : -128.0f);
    const size_t place = (tile * w->blocks + group / per_block) * TILE;
    const __m128i zeros = _mm_loadl_epi64((const __m128i *)(w->tile_zeros + place));
    return _mm256_sub_ps(_mm256_setzero_ps(), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(zeros)));
}

/* GCC would add integer sums up in another order, for which registers do not suffice. */
#define KEEP(v) __asm__("" : "+x"(v))

static inline __m256i four_codes(const int8_t *codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return _mm256_set1_epi32(word);
}

/* What 32 products of eight rows of weights and one of activations add to y:
 * scale of weights * (scale of activations * sum of codes * codes - zero point * sum of activations). */
static inline __m256 add_group(__m256i sums, __m256 scales, __m256 zeros, const Rows8 *x, size_t group, __m256 y) {
    const __m256 away = _mm256_mul_ps(zeros, _mm256_broadcast_ss(x->sums + group));
    const __m256 scaled = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_broadcast_ss(x->scales + group), away);
    return _mm256_fmadd_ps(scaled, scales, y);
}

static inline void put(const Weights *w, size_t tile, __m256 results, float *y) {
    const size_t n = tile * TILE;
    store_with(results, w->bias ? w->bias + n : NULL, w->n - n, y + n);
}

/* Bytes, by measurement: how far ahead of their use codes are asked for. */
enum { AHEAD = 4096 };

/* A tile of weights by `rows` rows of activations, four at the most.
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds pairs of them in 16 bits. Codes of 4 bits leave room
 * there for all of a group: 8 * 2 * 15 * 127 < 2**15. Codes of 8 bits go in as two halves of 4. */
static inline __attribute__((always_inline)) void few(const Weights *w, size_t tile, const Rows8 *x, int row,
                                                      const int rows, const int bits, const int per_block, float *y,
                                                      size_t stride) {
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16), low = _mm256_set1_epi8(15);
    const __m256i *codes = (const __m256i *)(w->packed + tile * w->groups * group_bytes(w));
    __m256 totals[4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) totals[m] = _mm256_setzero_ps();
    for (int g = 0; g < w->groups; g++, codes += bits) {
        __m256i sums[4], high[4];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) sums[m] = high[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < bits; i++) {
            const __m256i both = _mm256_loadu_si256(codes + i);
            if (i % 2 == 0) _mm_prefetch((const char *)(codes + i) + AHEAD, _MM_HINT_T0);
            const __m256i lower = _mm256_and_si256(both, low);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const int8_t *a = x->codes + ((size_t)(row + m) * w->groups + g) * GROUP + 4 * i;
                sums[m] = _mm256_add_epi16(sums[m], _mm256_maddubs_epi16(lower, four_codes(a)));
                KEEP(sums[m]);
                __m256i *other = bits == 4 ? &sums[m] : &high[m];
                *other = _mm256_add_epi16(*other, _mm256_maddubs_epi16(upper, four_codes(bits == 4 ? a + 16 : a)));
                KEEP(*other);
            }
        }
        const __m256 scales = scales_of(w, tile, g, per_block);
        const __m256 zeros = minus_zeros_of(w, tile, g, per_block, bits);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            __m256i sum = _mm256_madd_epi16(sums[m], ones);
            if (bits == 8) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high[m], sixteens));
            totals[m] = add_group(sum, scales, zeros, x, (size_t)(row + m) * w->groups + g, totals[m]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) put(w, tile, totals[m], y + (row + m) * stride);
}

#define FEW(bits, per_block)                                                                  \
    for (size_t tile = first; tile < last; tile++) {                                          \
        if (rows == 1) few(w, tile, x, row, 1, bits, per_block, y, stride);                   \
        else if (rows == 2) few(w, tile, x, row, 2, bits, per_block, y, stride);              \
        else if (rows == 3) few(w, tile, x, row, 3, bits, per_block, y, stride);              \
        else few(w, tile, x, row, 4, bits, per_block, y, stride);                             \
    }

static void few_rows(const Weights *w, const Rows8 *x, int row, int rows, size_t first, size_t last, float *y,
                     size_t stride) {
    const int per_block = w->block / GROUP;
    if (w->bits == 4) {
        if (per_block == 1) FEW(4, 1)
        else if (per_block == 2) FEW(4, 2)
        else FEW(4, per_block)
    } else {
        if (per_block == 1) FEW(8, 1)
        else if (per_block == 2) FEW(8, 2)
        else FEW(8, per_block)
    }
}

/* ---- many rows of activations: codes of two tiles, or both halves of one, are unpacked once for all ---- */

typedef struct {
    __m256i *codes; /* (groups, 8, 2): four codes along k of eight rows, of both tiles or halves */
    __m256 *scales; /* (groups, 2) */
    __m256 *zeros;  /* (groups, 2): minus zero points */
} Panel;

size_t panel_bytes(int k) { return (size_t)((k + GROUP - 1) / GROUP) * (16 + 2 + 2) * sizeof(__m256i); }

static void fill_panel(const Weights *w, size_t tile, size_t last, const Panel *panel) {
    const __m256i low = _mm256_set1_epi8(15);
    const int per_block = w->block / GROUP;
    const size_t step = group_bytes(w);
    for (int part = 0; part < 2; part++) {
        const size_t own = w->bits == 4 && tile + part < last ? tile + part : tile;
        const uint8_t *from = w->packed + own * w->groups * step;
        for (int g = 0; g < w->groups; g++, from += step) {
            panel->scales[g * 2 + part] = scales_of(w, own, g, per_block);
            panel->zeros[g * 2 + part] = minus_zeros_of(w, own, g, per_block, w->bits);
            __m256i *to = panel->codes + g * 16 + part;
            for (int i = 0; i < w->bits; i++) {
                const __m256i both = _mm256_loadu_si256((const __m256i *)from + i);
                const __m256i lower = _mm256_and_si256(both, low);
                const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                if (w->bits == 4) to[i * 2] = lower, to[(i + 4) * 2] = upper;
                else to[i * 2] = part ? upper : lower;
            }
        }
    }
}

static inline __attribute__((always_inline)) void four_rows(const Panel *panel, const Rows8 *x, const size_t rows[4],
                                                            const int bits, __m256 totals[4][2]) {
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) totals[m][0] = totals[m][1] = _mm256_setzero_ps();
    for (int g = 0; g < x->groups; g++) {
        const __m256i *codes = panel->codes + g * 16;
        __m256i sums[4][2];
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            const __m256i four = four_codes(x->codes + (rows[m] * x->groups + g) * GROUP);
            sums[m][0] = _mm256_maddubs_epi16(codes[0], four);
            sums[m][1] = _mm256_maddubs_epi16(codes[1], four);
        }
        for (int i = 1; i < 8; i++)
#pragma GCC unroll 4
            for (int m = 0; m < 4; m++) {
                const __m256i four = four_codes(x->codes + (rows[m] * x->groups + g) * GROUP + i * 4);
                sums[m][0] = _mm256_add_epi16(sums[m][0], _mm256_maddubs_epi16(codes[i * 2], four));
                sums[m][1] = _mm256_add_epi16(sums[m][1], _mm256_maddubs_epi16(codes[i * 2 + 1], four));
                KEEP(sums[m][0]);
                KEEP(sums[m][1]);
            }
        const __m256 *scales = panel->scales + g * 2, *zeros = panel->zeros + g * 2;
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            const size_t group = rows[m] * x->groups + g;
            const __m256i first = _mm256_madd_epi16(sums[m][0], ones);
            if (bits == 4) {
                totals[m][0] = add_group(first, scales[0], zeros[0], x, group, totals[m][0]);
                totals[m][1] =
                    add_group(_mm256_madd_epi16(sums[m][1], ones), scales[1], zeros[1], x, group, totals[m][1]);
            } else {
                const __m256i sum = _mm256_add_epi32(first, _mm256_madd_epi16(sums[m][1], sixteens));
                totals[m][0] = add_group(sum, scales[0], zeros[0], x, group, totals[m][0]);
            }
        }
    }
}

static void many_rows(const Weights *w, const Rows8 *x, int rows, size_t first, size_t last, float *y, size_t stride,
                      void *scratch) {
    const size_t tiles = w->bits == 4 ? 2 : 1;
    Panel panel = {.codes = scratch};
    panel.scales = (__m256 *)(panel.codes + (size_t)w->groups * 16);
    panel.zeros = panel.scales + (size_t)w->groups * 2;
    for (size_t tile = first; tile < last; tile += tiles) {
        fill_panel(w, tile, last, &panel);
        for (int row = 0; row < rows; row += 4) {
            __m256 totals[4][2];
            size_t which[4];
            for (int m = 0; m < 4; m++) which[m] = row + m < rows ? row + m : rows - 1;
            if (w->bits == 4) four_rows(&panel, x, which, 4, totals);
            else four_rows(&panel, x, which, 8, totals);
            for (int m = 0; m < 4 && row + m < rows; m++)
                for (size_t t = 0; t < tiles && tile + t < last; t++)
                    put(w, tile + t, totals[m][t], y + (row + m) * stride);
        }
    }
}

void multiply(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride,
              void *scratch) {
    const size_t from = first / TILE, to = (last + TILE - 1) / TILE;
    if (rows >= PANEL_ROWS) {
        many_rows(w, x, rows, from, to, y, stride, scratch);
        return;
    }
    for (int row = 0; row < rows; row += 4)
        few_rows(w, x, row, rows - row < 4 ? rows - row : 4, from, to, y, stride);
}

void lookup_row(const Weights *w, int row, float *y) {
    const size_t tile = row / TILE, lane = row % TILE;
    const uint8_t *codes = w->packed + tile * w->groups * group_bytes(w) + lane * 4;
    for (int g = 0; g < w->groups; g++, codes += group_bytes(w)) {
        float scales[TILE], zeros[TILE];
        const int per_block = w->block / GROUP;
        _mm256_storeu_ps(scales, scales_of(w, tile, g, per_block));
        _mm256_storeu_ps(zeros, minus_zeros_of(w, tile, g, per_block, w->bits));
        for (int i = 0; i < GROUP && g * GROUP + i < w->k; i++) {
            const int word = w->bits == 8 ? i / 4 : i % 16 / 4;
            const uint8_t byte = codes[(size_t)word * TILE * 4 + i % 4];
            const int code = w->bits == 8 ? byte : i < 16 ? byte & 15 : byte >> 4;
            y[g * GROUP + i] = ((float)code + zeros[lane]) * scales[lane];
        }
    }
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
    __m256 sums = _mm256_setzero_ps(), squares = sums;
    float rest = 0;
    int i = 0;
    for (; i + 8 <= width; i += 8) sums = _mm256_add_ps(sums, _mm256_loadu_ps(x + i));
    for (; i < width; i++) rest += x[i];
    const float mean = (add_lanes(sums) + rest) / (float)width;
    const __m256 means = _mm256_set1_ps(mean);
    for (rest = 0, i = 0; i + 8 <= width; i += 8) {
        const __m256 v = _mm256_sub_ps(_mm256_loadu_ps(x + i), means);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    for (; i < width; i++) rest += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / sqrtf((add_lanes(squares) + rest) / (float)width + epsilon);
    const __m256 factors = _mm256_set1_ps(factor);
    for (i = 0; i + 8 <= width; i += 8) {
        const __m256 v = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), means), factors);
        const __m256 away = bias ? _mm256_loadu_ps(bias + i) : _mm256_setzero_ps();
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(v, _mm256_loadu_ps(gain + i), away));
    }
    for (; i < width; i++) y[i] = (x[i] - mean) * factor * gain[i] + (bias ? bias[i] : 0.0f);
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

/* Pieces of columns: many enough for threads to share them evenly, whole pairs of tiles each. */
int column_piece(int n) {
    const int each = (n + 15) / 16;
    return (each + 2 * TILE - 1) / (2 * TILE) * (2 * TILE);
}
