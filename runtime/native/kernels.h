/* Products with weights in blocks of 4 or 8 bits, norms and activations, for x86-64 with AVX2. */
#ifndef GEMINI_KERNELS_H
#define GEMINI_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { GROUP = 32 };  /* activations that share a scale */
enum { CHUNK = 64 };  /* activations that a step of a product takes; rows are padded to whole chunks */

/* Weights as the operator MatMulNBits of com.microsoft stores them: codes (N, blocks, block * bits / 8), the
 * first of two 4-bit codes in the low half of a byte; a scale a block, float32 or float16; a zero point a
 * block, 4-bit ones in pairs, or none: then it is 8 or 128. */
typedef struct {
    const uint8_t *codes;
    const void *scales;
    const uint8_t *zeros;
    const float *bias;
    int k, n, bits, block, blocks, half_scales;
    /* what pad_last_row fills in */
    size_t row_bytes, scale_bytes, zero_bytes;
    const uint8_t *last_codes, *last_scales, *last_zeros;
} Weights;

/* Completes weights whose other fields are set, with a copy of the last row that has room behind it: whole
 * vectors are read everywhere. Returns what is to be freed after them, NULL where there is no memory. */
void *pad_last_row(Weights *w);

/* Rows of activations in 8 bits: round(x / scale) with scale = max|x| / 127 over GROUP of them. */
typedef struct {
    int8_t *plain;  /* (rows, padded): as they come */
    int8_t *split;  /* (rows, padded): in each chunk those at even places, then those at odd places */
    float *scales;  /* (rows, padded / 8): each scale four times, as a step of a product uses them */
    float *sums;    /* (rows, sum_width): scale * sum of codes, a GROUP each, zeros behind them */
    int k, padded, sum_width;
} Rows8;

int padded_width(int k);
int sum_width(int k);

/* One row of k floats becomes row `row` of `to`. */
void quantize_row(const float *x, const Rows8 *to, int row);

/* From so many rows on weights are rearranged, sixteen rows at a time, and all activations pass over them. */
enum { PANEL_ROWS = 8 };
size_t panel_bytes(int k);

/* y[m, n] = sum over k of x[m, k] * weight[n, k], plus bias, for n in [first, last); rows of y lie `stride`
 * floats apart; `scratch` has panel_bytes(k). */
void multiply(const Weights *w, const Rows8 *x, int rows, int first, int last, float *y, size_t stride,
              void *scratch);

/* How many columns of a product are a piece of work. */
int column_piece(int n, int rows);

void rms_norm(const float *x, const float *skip, const float *gain, float epsilon, int width, float *sum, float *y);
void layer_norm(const float *x, const float *gain, const float *bias, float epsilon, int width, float *y);
void gelu(const float *x, int width, float *y);
void gelu_tanh(const float *x, int width, float *y);
void relu(const float *x, int width, float *y);
void silu(const float *x, int width, float *y);
void times(const float *a, const float *b, int width, float *y);
void plus(const float *a, const float *b, int width, float *y);

#endif
