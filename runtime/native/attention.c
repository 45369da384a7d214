#include "attention.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "vectors.h"

enum { FEW_QUERIES = 4 };

void rotate(float *x, const float *cosines, const float *sines, int half, int interleaved) {
    for (int i = 0; i < half; i++) {
        float *const a = x + (interleaved ? 2 * i : i), *const b = interleaved ? a + 1 : a + half;
        const float before = *a;
        *a = before * cosines[i] - *b * sines[i];
        *b = *b * cosines[i] + before * sines[i];
    }
}

void round_to_codes(const float *x, const float *scales, int step, int width, int8_t *codes) {
    for (int i = 0; i < width; i++) {
        const float code = nearbyintf(x[i] / scales[i * step]);
        codes[i] = (int8_t)(code > 127 ? 127 : code < -128 ? -128 : code);
    }
}

void turn_eight(const float *x, size_t stride, float *to, size_t step) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(x + i * stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m256d low = _mm256_castps_pd(b[i + j]), high = _mm256_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

void narrow(const float *x, int width, uint16_t *halves) {
    for (int i = 0; i < width; i += 8)
        _mm_storeu_si128((__m128i *)(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
}

/* Eight numbers of what is kept, from number `at` on. */
static inline __m256 eight_of(const void *kept, enum Kept kind, size_t at) {
    if (kind == FLOATS) return _mm256_loadu_ps((const float *)kept + at);
    if (kind == HALVES) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)kept + at)));
    const __m128i codes = _mm_loadl_epi64((const __m128i *)((const int8_t *)kept + at));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

/* Floats of what is kept: itself, or a copy in `room`. */
static const float *widen(const void *kept, enum Kept kind, int count, float *room) {
    if (kind == FLOATS) return kept;
    for (int i = 0; i < count; i += 8) _mm256_storeu_ps(room + i, eight_of(kept, kind, i));
    return room;
}

/* The sums of the lanes of four vectors. */
static inline __m128 four_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

/* Asks for `bytes` of memory; what is kept of one token is short, and processors fetch ahead along longer runs. */
static inline void fetch(const void *from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) _mm_prefetch((const char *)from + at, _MM_HINT_T1);
}

/* Keys that come next; some are asked for between other work, `each` bytes at a time. */
typedef struct {
    const char *keys;
    size_t left, each;
} Soon;

static inline void fetch_some(Soon *soon) {
    const size_t some = soon->left < soon->each ? soon->left : soon->each;
    for (size_t at = 0; at < some; at += 64) _mm_prefetch(soon->keys + at, _MM_HINT_T1);
    soon->keys += some, soon->left -= some;
}

/* scores[q][j] of n queries, three at the most, and `count` keys; both have `dim` numbers in a row. */
static inline __attribute__((always_inline)) void score(const float *queries, const int n, const void *keys,
                                                        const enum Kept kind, int count, int dim,
                                                        float scores[3][KEYS], Soon *soon) {
    for (int j = 0; j < count; j += 4) {
        fetch_some(soon);
        size_t key[4];
        for (int i = 0; i < 4; i++) key[i] = (size_t)(j + i < count ? j + i : j) * dim;
        __m256 sums[3][4]; /* with three queries and a key, what there are registers for */
#pragma GCC unroll 3
        for (int q = 0; q < n; q++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[q][i] = _mm256_setzero_ps();
        for (int d = 0; d < dim; d += 8) {
            __m256 x[3];
#pragma GCC unroll 3
            for (int q = 0; q < n; q++) x[q] = _mm256_loadu_ps(queries + q * dim + d);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m256 k = eight_of(keys, kind, key[i] + d);
#pragma GCC unroll 3
                for (int q = 0; q < n; q++) sums[q][i] = _mm256_fmadd_ps(x[q], k, sums[q][i]);
            }
        }
#pragma GCC unroll 3
        for (int q = 0; q < n; q++)
            _mm_storeu_ps(scores[q] + j, four_sums(sums[q][0], sums[q][1], sums[q][2], sums[q][3]));
    }
}

/* The same with keys (dim, stride): no lanes to add up. Scores behind the last key are whatever. */
static inline __attribute__((always_inline)) void score_turned(const float *queries, const int n, const float *keys,
                                                               int stride, int count, int dim,
                                                               float scores[4][KEYS]) {
    for (int j = 0; j < count; j += TURNED) {
        __m256 a[4], b[4];
#pragma GCC unroll 4
        for (int q = 0; q < n; q++) a[q] = b[q] = _mm256_setzero_ps();
        const float *key = keys + j;
        for (int d = 0; d < dim; d++, key += stride) {
            const __m256 first = _mm256_loadu_ps(key), second = _mm256_loadu_ps(key + 8);
#pragma GCC unroll 4
            for (int q = 0; q < n; q++) {
                const __m256 x = _mm256_broadcast_ss(queries + q * dim + d);
                a[q] = _mm256_fmadd_ps(x, first, a[q]);
                b[q] = _mm256_fmadd_ps(x, second, b[q]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < n; q++) _mm256_storeu_ps(scores[q] + j, a[q]), _mm256_storeu_ps(scores[q] + j + 8, b[q]);
    }
}

/* totals[q] += weights[q][j] * values[j]. `next`: values that come next, which are asked for meanwhile, so that
 * memory is read all the time: some of them for every 16 numbers of one. NULL: none. */
static inline __attribute__((always_inline)) void mix(float weights[4][KEYS], const int n, const void *values,
                                                      const enum Kept kind, int count, int dim, float *totals,
                                                      const char *next) {
    int d = 0;
    for (; d + 16 <= dim; d += 16) {
        __m256 t[4][2];
#pragma GCC unroll 4
        for (int q = 0; q < n; q++)
            t[q][0] = _mm256_loadu_ps(totals + q * dim + d), t[q][1] = _mm256_loadu_ps(totals + q * dim + d + 8);
        for (int j = 0; j < count; j++) {
            const size_t at = (size_t)j * dim + d;
            if (next) _mm_prefetch(next, _MM_HINT_T1), next += 16 * size_of(kind);
            const __m256 v0 = eight_of(values, kind, at), v1 = eight_of(values, kind, at + 8);
#pragma GCC unroll 4
            for (int q = 0; q < n; q++) {
                const __m256 w = _mm256_broadcast_ss(&weights[q][j]);
                t[q][0] = _mm256_fmadd_ps(w, v0, t[q][0]);
                t[q][1] = _mm256_fmadd_ps(w, v1, t[q][1]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < n; q++)
            _mm256_storeu_ps(totals + q * dim + d, t[q][0]), _mm256_storeu_ps(totals + q * dim + d + 8, t[q][1]);
    }
    for (; d < dim; d += 8)
        for (int q = 0; q < n; q++) {
            __m256 t = _mm256_loadu_ps(totals + q * dim + d);
            for (int j = 0; j < count; j++) {
                const __m256 v = eight_of(values, kind, (size_t)j * dim + d);
                t = _mm256_fmadd_ps(_mm256_broadcast_ss(&weights[q][j]), v, t);
            }
            _mm256_storeu_ps(totals + q * dim + d, t);
        }
}

/* Scores of all queries, and what their weights make of values, for one kind of what is kept. */
static inline __attribute__((always_inline)) void score_all(const float *queries, int queries_count, const void *keys,
                                                            const enum Kept kind, int count, int dim,
                                                            float scores[QUERIES][KEYS], Soon *soon) {
    for (int q = 0; q < queries_count; q += 3) {
        const float *const from = queries + q * dim;
        if (queries_count - q >= 3) score(from, 3, keys, kind, count, dim, scores + q, soon);
        else if (queries_count - q == 2) score(from, 2, keys, kind, count, dim, scores + q, soon);
        else score(from, 1, keys, kind, count, dim, scores + q, soon);
    }
}

static inline __attribute__((always_inline)) void mix_all(float weights[QUERIES][KEYS], int queries_count,
                                                          const void *values, const enum Kept kind, int count, int dim,
                                                          float *totals, const char *next) {
    for (int q = 0; q < queries_count; q += 4) {
        float *const to = totals + q * dim;
        switch (queries_count - q) {
        case 1: mix(weights + q, 1, values, kind, count, dim, to, next); break;
        case 2: mix(weights + q, 2, values, kind, count, dim, to, next); break;
        case 3: mix(weights + q, 3, values, kind, count, dim, to, next); break;
        default: mix(weights + q, 4, values, kind, count, dim, to, next);
        }
    }
}

static inline void add_numbers(const float *numbers, int count, float *to) {
    int i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_add_ps(_mm256_loadu_ps(to + i), _mm256_loadu_ps(numbers + i)));
    for (; i < count; i++) to[i] += numbers[i];
}

void attend(const Attention *a, const Heads *heads, const float *const queries[], const int positions[],
            const float *const masks[], int count, int first, int last, const Partial out[]) {
    const int dim = a->dim;
    float wide[KEYS * MOST_DIM], query[QUERIES * MOST_DIM], totals[QUERIES * MOST_DIM];
    float scores[QUERIES][KEYS], largest[QUERIES], sums[QUERIES] = {0};
    for (int q = 0; q < count; q++) {
        const __m256 scale = _mm256_set1_ps(a->scale);
        for (int d = 0; d < dim; d += 8)
            _mm256_storeu_ps(query + q * dim + d, _mm256_mul_ps(_mm256_loadu_ps(queries[q] + d), scale));
        for (int d = 0; heads->key_scales && d < dim; d++)
            query[q * dim + d] *= heads->key_scales[d * heads->key_step];
        largest[q] = -INFINITY;
    }
    memset(totals, 0, sizeof(float) * count * dim);
    for (int at = first; at < last; at += KEYS) {
        const int some = last - at < KEYS ? last - at : KEYS;
        const size_t size = size_of(heads->kind), offset = size * at * dim;
        /* Of the first block keys come first, values while keys are looked at; of others both while the one
         * before is looked at. */
        if (at == first && !heads->fetched && !heads->turned) {
            fetch((const char *)heads->keys + offset, size * some * dim);
            fetch((const char *)heads->values + offset, size * some * dim);
        }
        const int last_one = at + KEYS >= last, next = last_one ? heads->soon_count : last - at - KEYS;
        const size_t row = size * dim, step = row * KEYS;
        Soon soon = {.keys = last_one ? heads->soon[0] : (const char *)heads->keys + offset + step,
                     .left = row * (next < KEYS ? next : KEYS),
                     .each = 4 * row};
        const char *const here = (const char *)heads->values + offset;
        const char *const soon_values = last_one ? heads->soon[1] : here + step;
        const float *const turned = heads->turned ? (const float *)heads->keys + at : NULL;
        if (turned) soon.left = 0;
        /* What many queries look at becomes floats once, and what few do, as they look at it. */
        const enum Kept kind = count > FEW_QUERIES ? FLOATS : heads->kind;
        const void *kept = (const char *)heads->keys + offset;
        if (turned) {
            for (int q = 0; q < count; q += 4) {
                const float *const from = query + q * dim;
                switch (count - q) {
                case 1: score_turned(from, 1, turned, heads->turned, some, dim, scores + q); break;
                case 2: score_turned(from, 2, turned, heads->turned, some, dim, scores + q); break;
                case 3: score_turned(from, 3, turned, heads->turned, some, dim, scores + q); break;
                default: score_turned(from, 4, turned, heads->turned, some, dim, scores + q);
                }
            }
        } else if (kind == HALVES) {
            score_all(query, count, kept, HALVES, some, dim, scores, &soon);
        } else if (kind == CODES) {
            score_all(query, count, kept, CODES, some, dim, scores, &soon);
        } else {
            score_all(query, count, widen(kept, heads->kind, some * dim, wide), FLOATS, some, dim, scores, &soon);
        }
        if (a->softcap > 0)
            for (int q = 0; q < count; q++)
                for (int j = 0; j < some; j++) scores[q][j] = a->softcap * tanhf(scores[q][j] / a->softcap);
        for (int q = 0; masks && q < count; q++) add_numbers(masks[q] + at, some, scores[q]);
        for (int q = 0; q < count; q++) {
            /* Keys [from, to) of these are what the query sees. */
            int to = positions[q] + 1 - at, from = a->window > 0 ? positions[q] + 1 - a->window - at : 0;
            to = to > some ? some : to < 0 ? 0 : to;
            from = from < 0 ? 0 : from > to ? to : from;
            const int whole = (some + 7) / 8 * 8;
            for (int j = 0; j < from; j++) scores[q][j] = -INFINITY;
            for (int j = to; j < whole; j++) scores[q][j] = -INFINITY;
            __m256 tops = _mm256_loadu_ps(scores[q]), sum = _mm256_setzero_ps();
            for (int j = 8; j < whole; j += 8) tops = _mm256_max_ps(tops, _mm256_loadu_ps(scores[q] + j));
            const float top = largest_lane(tops);
            if (top > largest[q]) {
                const __m256 factor = _mm256_set1_ps(expf(largest[q] - top)); /* 0 at first */
                for (int d = 0; d < dim; d += 8)
                    _mm256_storeu_ps(totals + q * dim + d,
                                     _mm256_mul_ps(_mm256_loadu_ps(totals + q * dim + d), factor));
                sums[q] *= _mm256_cvtss_f32(factor);
                largest[q] = top;
            }
            const __m256 unseen = _mm256_set1_ps(-INFINITY);
            tops = _mm256_set1_ps(largest[q]);
            for (int j = 0; j < whole; j += 8) {
                const __m256 v = _mm256_loadu_ps(scores[q] + j);
                const __m256 seen = _mm256_cmp_ps(v, unseen, _CMP_NEQ_OQ);
                const __m256 p = _mm256_and_ps(exponential(_mm256_sub_ps(v, tops)), seen);
                _mm256_storeu_ps(scores[q] + j, p);
                sum = _mm256_add_ps(sum, p);
            }
            sums[q] += add_lanes(sum);
        }
        kept = here;
        if (kind == HALVES) mix_all(scores, count, kept, HALVES, some, dim, totals, soon_values);
        else if (kind == CODES) mix_all(scores, count, kept, CODES, some, dim, totals, soon_values);
        else mix_all(scores, count, widen(kept, heads->kind, some * dim, wide), FLOATS, some, dim, totals, NULL);
    }
    for (int q = 0; q < count; q++) {
        *out[q].largest = largest[q];
        *out[q].sum = sums[q];
        memcpy(out[q].total, totals + q * dim, sizeof(float) * dim);
        for (int d = 0; heads->value_scales && d < dim; d++)
            out[q].total[d] *= heads->value_scales[d * heads->value_step];
    }
}

void combine(const float *largest, const float *sums, const float *totals, int parts, int dim, float *out) {
    float top = -INFINITY, sum = 0;
    if (parts == 1) {
        const __m256 inverse = _mm256_set1_ps(sums[0] > 0 ? 1 / sums[0] : 0);
        for (int d = 0; d < dim; d += 8)
            _mm256_storeu_ps(out + d, _mm256_mul_ps(_mm256_loadu_ps(totals + d), inverse));
        return;
    }
    for (int i = 0; i < parts; i++) top = largest[i] > top ? largest[i] : top;
    memset(out, 0, sizeof(float) * dim);
    for (int i = 0; i < parts; i++) {
        if (sums[i] == 0) continue;
        const float factor = expf(largest[i] - top);
        sum += factor * sums[i];
        for (int d = 0; d < dim; d++) out[d] += factor * totals[(size_t)i * dim + d];
    }
    const float inverse = sum > 0 ? 1 / sum : 0;
    for (int d = 0; d < dim; d++) out[d] *= inverse;
}
