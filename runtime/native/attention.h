/* Attention of a few queries over keys and values that are kept, for x86-64 with AVX2. */
#ifndef GEMINI_ATTENTION_H
#define GEMINI_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

enum { KEYS = 64 };      /* keys that are looked at together */
enum { MOST_DIM = 256 }; /* a head's size at the most; a multiple of 8 */
enum { TURNED = 16 };    /* keys that are looked at together where they are turned */
enum { QUERIES = 16 };   /* of one head that are looked at together, so that keys and values become floats once */

/* GroupQueryAttention of com.microsoft, as far as its kernels here go: no bias, no sinks. */
typedef struct {
    int heads, kv_heads, dim, rotary, window; /* rotary: 0 none, 1 halves, 2 pairs; window: 0 none */
    float scale, softcap;                     /* softcap: 0 none */
} Attention;

/* What numbers are kept as: float32, float16, 8-bit codes, or bfloat16 in pairs (`keep_pairs`). */
enum Kept { FLOATS, HALVES, CODES, PAIRS };

static inline size_t size_of(enum Kept kind) { return kind == FLOATS ? 4 : kind == CODES ? 1 : 2; }

/* Keys and values (tokens, dim) of one head; codes are times a scale a channel (step 1) or one scale (step 0). */
typedef struct {
    const void *keys, *values;
    const float *key_scales, *value_scales; /* NULL: none */
    enum Kept kind;
    int key_step, value_step;
    int turned;           /* keys are (dim, turned) instead, floats; a multiple of TURNED. 0: they are not */
    int fetched;          /* whether the first keys were asked for already */
    const void *soon[2];  /* keys and values of another head that come next, and how many; NULL, 0: none */
    int soon_count;
} Heads;

/* Softmax over some of the keys: the largest score, the sum of e**(score - largest), and the sum of values with
 * those weights. */
typedef struct {
    float *largest, *sum, *total;
} Partial;

/* Su et al. 2021, "RoFormer", equation 34: the first 2 * half numbers of x turn by one position's angles. */
void rotate(float *x, const float *cosines, const float *sines, int half, int interleaved);

/* Eight rows of eight numbers become eight columns: to[d * step + i] = x[i * stride + d]. */
void turn_eight(const float *x, size_t stride, float *to, size_t step);

void narrow(const float *x, int width, uint16_t *halves);
void round_to_codes(const float *x, const float *scales, int step, int width, int8_t *codes);

/* `count` queries, QUERIES at the most, over the keys [first, last) as far as they see them: query i those up to
 * positions[i], with the numbers of masks[i] (NULL: none) added to their scores. The sums go on from one block of
 * keys to the next (Milakov and Gimelshein 2018, algorithm 3). */
void attend(const Attention *a, const Heads *heads, const float *const queries[], const int positions[],
            const float *const masks[], int count, int first, int last, const Partial out[]);

/* The same in bfloat16 where nothing is kept, for AVX-512 BF16 (`wide_attention.c`): keys as pairs of their numbers,
 * (dim / 2, stride, 2), values as pairs of tokens, (stride / 2, dim, 2), stride a multiple of TURNED. Scores, weights'
 * sums and results are floats. */

/* Whether such an attention can be computed like this. */
int attends_in_pairs(const Attention *a);

/* Puts keys and values of `count` tokens of one head, `step` apart, there, from token `position` of `end` on. */
void keep_pairs(const float *keys, const float *values, size_t step, int dim, int count, int position, int end,
                uint16_t *kept_keys, uint16_t *kept_values, size_t stride);

/* `count` queries, QUERIES at the most, over all `length` keys; mask (NULL: none) is added to their scores. */
void attend_pairs(const Attention *a, const uint16_t *keys, const uint16_t *values, size_t stride, int length,
                  const float *queries, size_t query_step, const float *mask, size_t mask_step, int count, float *out,
                  size_t out_step);

/* One result from `parts` ones over different keys; totals (parts, dim). */
void combine(const float *largest, const float *sums, const float *totals, int parts, int dim, float *out);

#endif
