/* Products with weights in blocks of 4 or 8 bits, norms and activations, for x86-64 with AVX2; products also for
 * AVX-512 VNNI (wide.c). */
#ifndef GEMINI_KERNELS_H
#define GEMINI_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { GROUP = 32 }; /* activations that share a scale */
enum { TILE = 8, WIDE_TILE = 16 }; /* rows of weights that lie side by side; wide ones are for AVX-512 VNNI */

/* Weights as the operator MatMulNBits of com.microsoft stores them: codes (n, blocks, block * bits / 8), the
 * first of two 4-bit codes in the low half of a byte; a scale a block, float32 or float16; a zero point a
 * block, 4-bit ones in pairs, or none: then it is 8 or 128. The products read another order of the same numbers:
 *   packed       (n / tile, groups, bits, tile, 4): a group's codes, four along k of each row of the tile; of 4-bit
 *                ones, those of the second half of the group in the high halves of the bytes
 *   tile_scales  (n / tile, blocks, tile), tile_zeros the same, a byte each
 */
typedef struct {
    const uint8_t *codes;
    const void *scales;
    const uint8_t *zeros;
    const float *bias;
    int k, n, bits, block, blocks, groups, half_scales;
    int shift; /* of a group's number to its block's */
    int tile;  /* TILE or WIDE_TILE */
    uint8_t *packed, *tile_scales, *tile_zeros; /* set by `begin_packing`, or read from a file */
} Weights;

Weights weights_of(int k, int n, int bits, int block, int tile);

static inline size_t group_bytes(const Weights *w) { return (size_t)w->tile * GROUP * w->bits / 8; } /* of a tile */
static inline size_t tiles_of(const Weights *w) { return ((size_t)w->n + w->tile - 1) / w->tile; }
static inline size_t tile_bytes(const Weights *w) { return tiles_of(w) * w->groups * group_bytes(w); }   /* of `packed` */
static inline size_t tile_blocks(const Weights *w) { return tiles_of(w) * w->blocks * w->tile; } /* of `tile_scales` */

size_t packed_bytes(const Weights *w);

/* Brings weights into the order of the products, in memory of `packed_bytes`: first scales and zero points, then
 * the codes of the tiles [first, last), which are read from rows of so many bytes. */
void begin_packing(Weights *w, void *memory);
void pack_codes(const Weights *w, size_t first, size_t last);
size_t row_bytes(const Weights *w);

/* From so many rows on codes of weights are unpacked once for all of them, into panels of so many columns. */
enum { PANEL_ROWS = 16, PANEL_COLUMNS = 24 };

/* Rows of activations in 8 bits: round(x / scale) with scale = max|x| / 127 over GROUP of them. */
typedef struct {
    int8_t *codes; /* (rows, groups, GROUP); 128 is added where `moved`, as products with panels want it */
    float *scales; /* (rows, groups) */
    int32_t *sums; /* (rows, groups): eight times the sum of the codes; the sum itself where `wide` */
    /* (rows, groups): where products of unsigned codes of weights begin, whose middle is 8: minus four times the sum,
     * twice in 16 bits; minus eight times it where `wide` */
    uint32_t *starts;
    int k, groups, moved, wide; /* wide: for tiles of WIDE_TILE rows; they need no panels */
} Rows8;

static inline Rows8 rows8_from(const Rows8 *x, int row) {
    const size_t group = (size_t)row * x->groups;
    Rows8 rest = *x;
    rest.codes += group * GROUP, rest.scales += group, rest.sums += group, rest.starts += group;
    return rest;
}

/* One row of k floats becomes row `row` of `to`. */
void quantize_row(const float *x, const Rows8 *to, int row);

size_t panel_bytes(int k);

/* y[m, n] = sum over k of x[m, k] * weight[n, k], plus bias, for n in [first, last), multiples of the tile or the end;
 * rows of y lie `stride` floats apart; `scratch` has panel_bytes(k), aligned to 32, if activations are moved. */
void multiply(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride,
              void *scratch);

/* The same for wide tiles. */
void multiply_wide(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride);

/* Row `row` of packed weights as k floats. */
void lookup_row(const Weights *w, int row, float *y);

void rms_norm(const float *x, const float *skip, const float *gain, float epsilon, int width, float *sum, float *y);
void layer_norm(const float *x, const float *gain, const float *bias, float epsilon, int width, float *y);
void gelu(const float *x, int width, float *y);
void gelu_tanh(const float *x, int width, float *y);
void relu(const float *x, int width, float *y);
void silu(const float *x, int width, float *y);
void times(const float *a, const float *b, int width, float *y);
void plus(const float *a, const float *b, int width, float *y);

#endif
