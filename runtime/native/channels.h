/* Products with weights in 8 bits and one scale a column, for x86-64 with AVX2, and with AVX-512 VNNI (wide.c). */
#ifndef GEMINI_CHANNELS_H
#define GEMINI_CHANNELS_H

#include <stddef.h>
#include <stdint.h>

/* Columns that lie side by side: sums and totals of two rows of them fill the registers; of eight rows for AVX-512. */
enum { CHANNELS = 24, WIDE_CHANNELS = 48 };
enum { MOST_TOGETHER = 4 };
enum { MOST_FEATURES = INT32_MAX / (255 * 128) }; /* whose products 32 bits hold, whatever they are */

/* Weights as the operator DynamicQuantizeMatMul of com.microsoft stores them, without zero points: codes (k, n), a
 * scale a column. The products read another order of the same numbers. A word is four codes along k. Without VNNI those
 * of a panel of columns come in groups of as many as can be multiplied and added up in 16 bits:
 *   packed  (panels, words, side, 4), first groups of MOST_TOGETHER words, then smaller ones; wide ones in their order
 *   order   (panels, words): where in a row of activations each word belongs, in bytes
 *   groups  (panels, MOST_TOGETHER): how many there are, of MOST_TOGETHER words, of one less, ... of one
 *   sums    (panels, side): of the codes of a column */
typedef struct {
    const int8_t *codes;
    const float *scales, *bias; /* (n) */
    int k, n, words, side;      /* side: CHANNELS or WIDE_CHANNELS */
    int8_t *packed; /* set by `pack_channels` or `use_packed_channels`, as what follows */
    float *panel_scales;
    int32_t *sums;
    uint32_t *order, *groups; /* NULL where wide */
} Channels;

size_t channel_bytes(const Channels *w);

/* Brings weights into the order of the products, in memory of `channel_bytes`, aligned to 32. 0: there is not enough
 * memory to do it. */
int pack_channels(Channels *w, void *memory);

/* Takes bytes that `pack_channels` made, aligned to 32. 0: their order leads out of a row of activations. */
int use_packed_channels(Channels *w, const void *memory);

/* Rows of activations: x = scale * (code - zero), the range from the smallest to the largest of a row, and 0 in it.
 * In 7 bits without VNNI, since eight would not leave room for the sums of two products with 8-bit weights. */
typedef struct {
    uint8_t *codes; /* (rows, words, 4) */
    float *scales;  /* (rows) */
    int32_t *zeros;
    int k, words, levels; /* levels: the largest code, 127 or 255 */
} WholeRows;

static inline WholeRows whole_rows_from(const WholeRows *x, int row) {
    WholeRows rest = *x;
    rest.codes += (size_t)row * x->words * 4, rest.scales += row, rest.zeros += row;
    return rest;
}

/* One row of k floats becomes row `row` of `to`. */
void quantize_whole_row(const float *x, const WholeRows *to, int row);

/* y[m, n] = sum over k of x[m, k] * weight[k, n], plus bias, for n in [first, last), multiples of the side or the
 * end; rows of y lie `stride` floats apart. */
void multiply_channels(const Channels *w, const WholeRows *x, int rows, int first, int last, float *y, size_t stride);

/* The same for wide panels. */
void multiply_wide_channels(const Channels *w, const WholeRows *x, int rows, int first, int last, float *y,
                            size_t stride);

#endif
