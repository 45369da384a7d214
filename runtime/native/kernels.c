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
    float *scales = to->scales + (size_t)row * to->groups;
    int32_t *sums = to->sums + (size_t)row * to->groups;
    uint32_t *starts = to->starts + (size_t)row * to->groups;
    const __m256i moved = _mm256_set1_epi8((char)(to->moved ? 0x80 : 0));
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
        sums[g] = to->wide ? sum : 8 * sum;
        starts[g] = to->wide ? (uint32_t)(-8 * sum) : (uint16_t)(-4 * sum) * 0x10001u;
        _mm256_storeu_si256((__m256i *)(codes + g * GROUP), _mm256_xor_si256(rounded, moved));
    }
}

/* ---- weights as the products read them ---- */

Weights weights_of(int k, int n, int bits, int block, int tile) {
    return (Weights){.k = k,
                     .n = n,
                     .bits = bits,
                     .block = block,
                     .blocks = (k + block - 1) / block,
                     .groups = (k + GROUP - 1) / GROUP,
                     .shift = __builtin_ctz(block / GROUP),
                     .tile = tile};
}

size_t packed_bytes(const Weights *w) {
    return tile_bytes(w) + tile_blocks(w) * ((w->half_scales ? 2 : 4) + (w->zeros ? 1 : 0));
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

/* Four words of each of eight rows become four vectors of eight words, `step` vectors apart. */
static inline void columns_of(const __m128i rows[8], __m256i *to, int step) {
    __m256i both[4], pairs[4];
    for (int i = 0; i < 4; i++) both[i] = _mm256_set_m128i(rows[i + 4], rows[i]);
    pairs[0] = _mm256_unpacklo_epi32(both[0], both[1]), pairs[1] = _mm256_unpackhi_epi32(both[0], both[1]);
    pairs[2] = _mm256_unpacklo_epi32(both[2], both[3]), pairs[3] = _mm256_unpackhi_epi32(both[2], both[3]);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(pairs[0], pairs[2]));
    _mm256_storeu_si256(to + step, _mm256_unpackhi_epi64(pairs[0], pairs[2]));
    _mm256_storeu_si256(to + 2 * step, _mm256_unpacklo_epi64(pairs[1], pairs[3]));
    _mm256_storeu_si256(to + 3 * step, _mm256_unpackhi_epi64(pairs[1], pairs[3]));
}

size_t row_bytes(const Weights *w) { return (size_t)w->blocks * w->block * w->bits / 8; }

void pack_codes(const Weights *w, size_t first, size_t last) {
    const size_t bytes = row_bytes(w);
    const int eights = w->tile / 8; /* rows that a vector takes */
    __m256i *to = (__m256i *)(w->packed + first * w->groups * group_bytes(w));
    for (size_t tile = first; tile < last; tile++)
        for (int g = 0; g < w->groups; g++, to += w->bits * eights)
            for (int eight = 0; eight < eights; eight++) {
                __m128i words[8][2], part[8];
                for (int i = 0; i < 8; i++)
                    words_of(w, bytes, ((int)tile * eights + eight) * 8 + i, g, words[i]);
                for (int half = 0; half < w->bits / 4; half++) {
                    for (int i = 0; i < 8; i++) part[i] = words[i][half];
                    columns_of(part, to + half * 4 * eights + eight, eights);
                }
            }
}

void begin_packing(Weights *w, void *memory) {
    const size_t all = tile_blocks(w), scale = w->half_scales ? 2 : 4;
    const size_t zero_bytes = w->bits == 8 ? (size_t)w->blocks : (size_t)(w->blocks + 1) / 2;
    w->packed = memory;
    w->tile_scales = w->packed + tile_bytes(w);
    w->tile_zeros = w->zeros ? w->tile_scales + all * scale : NULL;
    memset(w->tile_scales, 0, all * (scale + (w->zeros ? 1 : 0)));
    for (int n = 0; n < w->n; n++)
        for (int b = 0; b < w->blocks; b++) {
            const size_t place = ((size_t)n / w->tile * w->blocks + b) * w->tile + n % w->tile;
            const size_t at = (size_t)n * w->blocks + b;
            if (w->half_scales) ((uint16_t *)w->tile_scales)[place] = ((const uint16_t *)w->scales)[at];
            else ((float *)w->tile_scales)[place] = ((const float *)w->scales)[at];
            if (!w->zeros) continue;
            const uint8_t *zeros = w->zeros + n * zero_bytes;
            w->tile_zeros[place] = w->bits == 8 ? zeros[b] : b % 2 ? zeros[b / 2] >> 4 : zeros[b / 2] & 15;
        }
}

/* The scales of a tile's rows for a group. */
static inline __m256 scales_of(const Weights *w, size_t tile, int group) {
    const size_t place = (tile * w->blocks + (group >> w->shift)) * TILE;
    if (w->half_scales) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w->tile_scales + 2 * place)));
    return _mm256_loadu_ps((const float *)(w->tile_scales + 4 * place));
}

/* How far the zero points of a tile's rows are below the middle code, which they are where there are none. */
static inline __m256i middle_minus_zeros(const Weights *w, size_t tile, int group, int bits) {
    const size_t place = (tile * w->blocks + (group >> w->shift)) * TILE;
    const __m128i zeros = _mm_loadl_epi64((const __m128i *)(w->tile_zeros + place));
    return _mm256_sub_epi32(_mm256_set1_epi32(bits == 4 ? 8 : 128), _mm256_cvtepu8_epi32(zeros));
}

/* Zero points as `middle_minus_zeros` gives them times sums of codes, which are given eight times. */
static inline __m256i zero_products(__m256i zeros, __m256i eight_sums) {
    return _mm256_srai_epi32(_mm256_mullo_epi32(zeros, eight_sums), 3);
}

/* What 32 products of eight rows of weights and one of activations add to y. Up to here all are integers, so that
 * the result does not depend on how they were added up. */
static inline __m256 add_group(__m256i sums, __m256 scales, const Rows8 *x, size_t group, __m256 y) {
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_broadcast_ss(x->scales + group)), scales, y);
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
 * there for all of a group: of the 32 activations that a sum of 16 products begins with, those in it count code - 4
 * times and the others -4 times, which is 16 * (11 + 4) * 127 < 2**15 at the most. Codes of 8 bits go in as two
 * halves of 4, and the middle is taken off the high one. */
static inline __attribute__((always_inline)) void few(const Weights *w, size_t tile, const Rows8 *x, int row,
                                                      const int rows, const int bits, const int zeros, float *y,
                                                      size_t stride) {
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16), low = _mm256_set1_epi8(15);
    const __m256i *codes = (const __m256i *)(w->packed + tile * w->groups * group_bytes(w));
    __m256 totals[4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) totals[m] = _mm256_setzero_ps();
    for (int g = 0; g < w->groups; g++, codes += bits) {
        __m256i sums[4], high[4];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const __m256i start = _mm256_set1_epi32((int)x->starts[(size_t)(row + m) * w->groups + g]);
            sums[m] = bits == 4 ? start : _mm256_setzero_si256(), high[m] = start;
        }
#pragma GCC unroll 8
        for (int i = 0; i < bits; i++) {
            const __m256i both = _mm256_loadu_si256(codes + i);
            if (i % 2 == 0) _mm_prefetch((const char *)(codes + i) + AHEAD, _MM_HINT_T0);
            const __m256i lower = _mm256_and_si256(both, low);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const int8_t *const a = x->codes + ((size_t)(row + m) * w->groups + g) * GROUP + 4 * i;
                ADD_16(sums[m], _mm256_maddubs_epi16(lower, four_codes(a)));
                ADD_16(*(bits == 4 ? &sums[m] : &high[m]),
                       _mm256_maddubs_epi16(upper, four_codes(bits == 4 ? a + 16 : a)));
            }
        }
        const __m256 scales = scales_of(w, tile, g);
        const __m256i below = zeros ? middle_minus_zeros(w, tile, g, bits) : sixteens;
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const size_t group = (size_t)(row + m) * w->groups + g;
            __m256i sum = _mm256_madd_epi16(sums[m], ones);
            if (bits == 8) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high[m], sixteens));
            if (zeros) sum = _mm256_add_epi32(sum, zero_products(below, _mm256_set1_epi32(x->sums[group])));
            totals[m] = add_group(sum, scales, x, group, totals[m]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) put(w, tile, totals[m], y + (row + m) * stride);
}

#define FEW(bits, zeros)                                                     \
    for (size_t tile = first; tile < last; tile++) {                         \
        if (rows == 1) few(w, tile, x, row, 1, bits, zeros, y, stride);      \
        else if (rows == 2) few(w, tile, x, row, 2, bits, zeros, y, stride); \
        else if (rows == 3) few(w, tile, x, row, 3, bits, zeros, y, stride); \
        else few(w, tile, x, row, 4, bits, zeros, y, stride);                \
    }

static void few_rows(const Weights *w, const Rows8 *x, int row, int rows, size_t first, size_t last, float *y,
                     size_t stride) {
    if (w->bits == 4 && w->tile_zeros) FEW(4, 1)
    else if (w->bits == 4) FEW(4, 0)
    else if (w->tile_zeros) FEW(8, 1)
    else FEW(8, 0)
}

/* ---- many rows of activations: codes of some tiles are unpacked once for all ----
 *
 * In a panel codes of weights have their middle at 0, so that vpmaddubsw reads them from memory as the signed ones,
 * and those of activations are moved by 128. What that adds to each 16-bit sum is taken away before: sums may leave
 * 16 bits on the way, but |sum| <= 16 * 8 * 127 in the end. Codes of 8 bits are 16 * (high - 8) + (low - 8) + 136. */

/* Tiles that a panel holds; halves of tiles of 8 bits, the high ones first. */
enum { SLOTS = PANEL_COLUMNS / TILE, SLOTS_8 = 4 };

typedef struct {
    __m256i *codes;  /* (groups, 8, slots): four codes along k of eight rows */
    __m256i *starts; /* (groups, slots) of 16-bit sums */
    __m256 *scales;  /* (groups, slots), of tiles */
    __m256i *zeros;  /* the same: the middle minus zero points */
} Panel;

size_t panel_bytes(int k) { return (size_t)((k + GROUP - 1) / GROUP) * SLOTS_8 * 11 * sizeof(__m256i); }

static Panel panel_in(void *memory, int groups, int slots) {
    Panel panel = {.codes = memory};
    panel.starts = panel.codes + (size_t)groups * 8 * slots;
    panel.zeros = panel.starts + (size_t)groups * slots;
    panel.scales = (__m256 *)(panel.zeros + (size_t)groups * slots);
    return panel;
}

/* Puts eight words of codes of 4 bits in a slot, with their middle at 0. */
static inline void fill_slot(const __m256i words[8], int slots, __m256i *codes, __m256i *start) {
    __m256i sums = words[0];
    for (int i = 1; i < 8; i++) sums = _mm256_add_epi8(sums, words[i]);
    for (int i = 0; i < 8; i++) codes[i * slots] = _mm256_sub_epi8(words[i], _mm256_set1_epi8(8));
    sums = _mm256_maddubs_epi16(sums, _mm256_set1_epi8(1)); /* of 16 codes */
    *start = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_set1_epi16(16 * 8), sums), 7);
}

static void fill_panel(const Weights *w, size_t tile, size_t last, const int bits, const Panel *panel) {
    const __m256i low = _mm256_set1_epi8(15);
    const int slots = bits == 4 ? SLOTS : SLOTS_8, tiles = bits == 4 ? SLOTS : SLOTS_8 / 2;
    const size_t step = group_bytes(w);
    for (int t = 0; t < tiles; t++) {
        const size_t own = tile + t < last ? tile + t : tile;
        const uint8_t *from = w->packed + own * w->groups * step;
        for (int g = 0; g < w->groups; g++, from += step) {
            __m256i lower[8], upper[8];
            for (int i = 0; i < bits; i++) {
                const __m256i both = _mm256_loadu_si256((const __m256i *)from + i);
                lower[i] = _mm256_and_si256(both, low);
                (bits == 4 ? lower + 4 : upper)[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            }
            __m256i *const codes = panel->codes + (size_t)g * 8 * slots, *const starts = panel->starts + g * slots;
            panel->scales[g * slots + t] = scales_of(w, own, g);
            if (w->tile_zeros) panel->zeros[g * slots + t] = middle_minus_zeros(w, own, g, bits);
            if (bits == 4) {
                fill_slot(lower, slots, codes + t, starts + t);
            } else {
                fill_slot(upper, slots, codes + t, starts + t);
                fill_slot(lower, slots, codes + tiles + t, starts + tiles + t);
            }
        }
    }
}

/* A panel by one or two rows of activations; totals[m][t] are those of a tile. */
static inline __attribute__((always_inline)) void panel_by_rows(const Panel *panel, const Rows8 *x, size_t row,
                                                                const int rows, const int bits, const int zeros,
                                                                __m256 totals[2][SLOTS]) {
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    const int slots = bits == 4 ? SLOTS : SLOTS_8, tiles = bits == 4 ? SLOTS : SLOTS_8 / 2;
    __m256 own[2][SLOTS];
#pragma GCC unroll 2
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int t = 0; t < tiles; t++) own[m][t] = _mm256_setzero_ps();
    for (int g = 0; g < x->groups; g++) {
        const __m256i *codes = panel->codes + (size_t)g * 8 * slots, *starts = panel->starts + g * slots;
        const int8_t *const first = x->codes + (row * x->groups + g) * GROUP;
        const int8_t *const second = first + (size_t)x->groups * GROUP;
        __m256i sums[2][SLOTS_8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
            for (int m = 0; m < rows; m++) {
                const __m256i four = four_codes((m ? second : first) + 4 * i);
#pragma GCC unroll 4
                for (int t = 0; t < slots; t++) {
                    const __m256i both = pair_products(four, codes + i * slots + t);
                    if (i) ADD_16(sums[m][t], both);
                    else sums[m][t] = _mm256_add_epi16(both, starts[t]);
                }
            }
#pragma GCC unroll 2
        for (int m = 0; m < rows; m++) {
            const size_t group = (row + m) * x->groups + g;
#pragma GCC unroll 3
            for (int t = 0; t < tiles; t++) {
                __m256i sum = _mm256_madd_epi16(sums[m][t], bits == 4 ? ones : sixteens);
                const __m256i eight_sums = _mm256_set1_epi32(x->sums[group]);
                if (bits == 8)
                    sum = _mm256_add_epi32(_mm256_add_epi32(sum, eight_sums),
                                           _mm256_madd_epi16(sums[m][tiles + t], ones));
                if (zeros) sum = _mm256_add_epi32(sum, zero_products(panel->zeros[g * slots + t], eight_sums));
                own[m][t] = add_group(sum, panel->scales[g * slots + t], x, group, own[m][t]);
            }
        }
    }
#pragma GCC unroll 2
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int t = 0; t < tiles; t++) totals[m][t] = own[m][t];
}

static inline __attribute__((always_inline)) void by_panels(const Weights *w, const Rows8 *x, int rows, size_t first,
                                                            size_t last, float *y, size_t stride, void *scratch,
                                                            const int bits, const int zeros) {
    const int slots = bits == 4 ? SLOTS : SLOTS_8, tiles = bits == 4 ? SLOTS : SLOTS_8 / 2, most = bits == 4 ? 2 : 1;
    const Panel panel = panel_in(scratch, w->groups, slots);
    const size_t size = w->groups * group_bytes(w);
    for (size_t tile = first; tile < last; tile += tiles) {
        fill_panel(w, tile, last, bits, &panel);
        /* The codes of the next panel are asked for meanwhile, some with each row. */
        const size_t after = tile + tiles < last ? tile + tiles : last;
        const size_t behind = after + tiles < last ? after + tiles : last;
        const uint8_t *next = w->packed + after * size, *const end = w->packed + behind * size;
        const size_t each = ((end - next) * most / rows + 63) / 64 * 64;
        for (int row = 0; row < rows; row += most) {
            __m256 totals[2][SLOTS];
            for (size_t at = 0; at < each && next < end; at += 64, next += 64) _mm_prefetch(next, _MM_HINT_T1);
            const int some = row + most <= rows ? most : 1;
            if (some == 2) panel_by_rows(&panel, x, row, 2, bits, zeros, totals);
            else panel_by_rows(&panel, x, row, 1, bits, zeros, totals);
            for (int m = 0; m < some; m++)
                for (int t = 0; t < tiles && tile + t < last; t++)
                    put(w, tile + t, totals[m][t], y + (row + m) * stride);
        }
    }
}

static void many_rows(const Weights *w, const Rows8 *x, int rows, size_t first, size_t last, float *y, size_t stride,
                      void *scratch) {
    if (w->bits == 4 && w->tile_zeros) by_panels(w, x, rows, first, last, y, stride, scratch, 4, 1);
    else if (w->bits == 4) by_panels(w, x, rows, first, last, y, stride, scratch, 4, 0);
    else if (w->tile_zeros) by_panels(w, x, rows, first, last, y, stride, scratch, 8, 1);
    else by_panels(w, x, rows, first, last, y, stride, scratch, 8, 0);
}

void multiply(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride,
              void *scratch) {
    const size_t from = first / TILE, to = (last + TILE - 1) / TILE;
    if (x->wide) {
        multiply_wide(w, x, rows, first, last, y, stride);
        return;
    }
    if (x->moved) {
        many_rows(w, x, rows, from, to, y, stride, scratch);
        return;
    }
    for (int row = 0; row < rows; row += 4)
        few_rows(w, x, row, rows - row < 4 ? rows - row : 4, from, to, y, stride);
}

void lookup_row(const Weights *w, int row, float *y) {
    const size_t tile = row / w->tile, lane = row % w->tile;
    const uint8_t *codes = w->packed + tile * w->groups * group_bytes(w) + lane * 4;
    for (int g = 0; g < w->groups; g++, codes += group_bytes(w)) {
        const size_t place = (tile * w->blocks + (g >> w->shift)) * w->tile + lane;
        const int zero = w->tile_zeros ? w->tile_zeros[place] : w->bits == 8 ? 128 : 8;
        const float scale = w->half_scales ? _cvtsh_ss(((const uint16_t *)w->tile_scales)[place])
                                           : ((const float *)w->tile_scales)[place];
        for (int i = 0; i < GROUP && g * GROUP + i < w->k; i++) {
            const int word = w->bits == 8 ? i / 4 : i % 16 / 4;
            const uint8_t byte = codes[(size_t)word * w->tile * 4 + i % 4];
            const int code = w->bits == 8 ? byte : i < 16 ? byte & 15 : byte >> 4;
            y[g * GROUP + i] = (float)(code - zero) * scale;
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
    for (i = 0; i + 8 <= width; i += 8) {
        const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(y + i), factors);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(v, _mm256_loadu_ps(gain + i)));
    }
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

/* x / 2 * (1 + erf(x / sqrt 2)), erf by Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at the most. */
static inline __m256 gelu_of(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    const __m256 u = _mm256_mul_ps(x, _mm256_set1_ps(0.70710678f)), size = _mm256_andnot_ps(sign, u);
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(size, _mm256_set1_ps(0.3275911f), one));
    __m256 p = _mm256_set1_ps(1.061405429f);
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.453152027f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f));
    const __m256 power = exponential(_mm256_mul_ps(_mm256_xor_ps(size, sign), size));
    const __m256 erf = _mm256_fnmadd_ps(_mm256_mul_ps(p, t), power, one);
    const __m256 half = _mm256_mul_ps(x, _mm256_set1_ps(0.5f));
    return _mm256_mul_ps(half, _mm256_add_ps(one, _mm256_or_ps(erf, _mm256_and_ps(u, sign))));
}

/* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))), which is x / (1 + e**(-2 * what tanh is of)) */
static inline __m256 gelu_tanh_of(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), one);
    const __m256 u = _mm256_mul_ps(_mm256_mul_ps(x, cubic), _mm256_set1_ps(-1.59576912f));
    return _mm256_div_ps(x, _mm256_add_ps(one, exponential(u)));
}

/* x / (1 + e**-x) */
static inline __m256 silu_of(__m256 x) {
    const __m256 power = exponential(_mm256_sub_ps(_mm256_setzero_ps(), x));
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), power));
}

/* y = what `of` makes of x, eight numbers at a time. */
static inline __attribute__((always_inline)) void each_eight(const float *x, int width, float *y,
                                                             __m256 (*of)(__m256)) {
    int i = 0;
    for (; i + 8 <= width; i += 8) _mm256_storeu_ps(y + i, of(_mm256_loadu_ps(x + i)));
    if (i == width) return;
    float last[8] = {0};
    memcpy(last, x + i, sizeof(float) * (width - i));
    _mm256_storeu_ps(last, of(_mm256_loadu_ps(last)));
    memcpy(y + i, last, sizeof(float) * (width - i));
}

void gelu(const float *x, int width, float *y) { each_eight(x, width, y, gelu_of); }
void gelu_tanh(const float *x, int width, float *y) { each_eight(x, width, y, gelu_tanh_of); }
void silu(const float *x, int width, float *y) { each_eight(x, width, y, silu_of); }

void relu(const float *x, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = x[i] > 0 ? x[i] : 0;
}

void times(const float *a, const float *b, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = a[i] * b[i];
}

void plus(const float *a, const float *b, int width, float *y) {
    for (int i = 0; i < width; i++) y[i] = a[i] + b[i];
}
