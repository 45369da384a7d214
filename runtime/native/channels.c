#include "channels.h"

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum { MOST_SUM = INT16_MAX / 127 };     /* of codes of weights whose products are added up in 16 bits */
enum { TILES = CHANNELS / 8, WORD = 4 }; /* vectors of a word of all columns; codes of a word */
enum { CACHED = 64 };                    /* rows that are gone through again for the next columns */

void quantize_whole_row(const float *x, const WholeRows *to, int row) {
    __m256 lows = _mm256_setzero_ps(), highs = lows;
    int i = 0;
    for (; i + 8 <= to->k; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        lows = _mm256_min_ps(v, lows), highs = _mm256_max_ps(v, highs);
    }
    float low = -largest_lane(_mm256_sub_ps(_mm256_setzero_ps(), lows)), high = largest_lane(highs);
    for (; i < to->k; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    const float scale = (high - low) / (float)to->levels, inverse = scale > 0 ? 1 / scale : 0;
    const int zero = (int)nearbyintf(-low * inverse);
    uint8_t *codes = to->codes + (size_t)row * to->words * WORD;
    const __m256 inverses = _mm256_set1_ps(inverse);
    const __m256i levels = _mm256_set1_epi8((char)to->levels);
    const __m256i zeros = _mm256_set1_epi32(zero), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (i = 0; i + 32 <= to->k; i += 32) {
        __m256i q[4];
        for (int j = 0; j < 4; j++) {
            const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), inverses);
            q[j] = _mm256_add_epi32(_mm256_cvtps_epi32(v), zeros);
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, order);
        _mm256_storeu_si256((__m256i *)(codes + i), _mm256_min_epu8(ordered, levels));
    }
    for (; i < to->words * WORD; i++) {
        const float code = i < to->k ? nearbyintf(x[i] * inverse) + (float)zero : 0;
        codes[i] = (uint8_t)(code > (float)to->levels ? (float)to->levels : code > 0 ? code : 0);
    }
    to->scales[row] = scale, to->zeros[row] = zero;
}

static size_t panels_of(const Channels *w) { return ((size_t)w->n + w->side - 1) / w->side; }
static size_t panel_codes(const Channels *w) { return (size_t)w->words * w->side * WORD; }

size_t channel_bytes(const Channels *w) {
    const size_t grouping = w->side == CHANNELS ? w->words + MOST_TOGETHER : 0;
    return panels_of(w) * (panel_codes(w) + (2 * w->side + grouping) * sizeof(uint32_t));
}

/* Of each sum that a group of words makes in 16 bits, what its codes above 0 and below 0 come to: neither may be more
 * than MOST_SUM, whatever the activations are. */
typedef struct {
    int16_t above[CHANNELS * 2], below[CHANNELS * 2];
    int count;
    uint32_t words[MOST_TOGETHER];
} Group;

static int takes(const Group *group, const Group *word) {
    int most = 0;
    for (int i = 0; i < CHANNELS * 2; i++) {
        const int above = group->above[i] + word->above[i], below = group->below[i] + word->below[i];
        most = above > most ? above : most, most = below > most ? below : most;
    }
    return most <= MOST_SUM;
}

static Group word_of(const int8_t *codes, uint32_t place) {
    Group word = {.count = 1, .words = {place}};
    for (int i = 0; i < CHANNELS * 2; i++)
        for (int j = 0; j < 2; j++) {
            const int code = codes[i * 2 + j];
            if (code > 0) word.above[i] += code;
            else word.below[i] -= code;
        }
    return word;
}

/* Words of a panel in groups: each goes to the first of the open groups that takes it. */
static void group_words(Channels *w, size_t panel, int8_t *room) {
    enum { OPEN = 16 };
    int8_t *const codes = w->packed + panel * panel_codes(w);
    uint32_t *const order = w->order + panel * w->words, *const groups = w->groups + panel * MOST_TOGETHER;
    Group *const all = (Group *)(room + panel_codes(w));
    int count = 0, oldest = 0;
    for (uint32_t i = 0; i < (uint32_t)w->words; i++) {
        const Group word = word_of(codes + (size_t)i * CHANNELS * WORD, i);
        int at = oldest;
        while (at < count && (all[at].count == MOST_TOGETHER || !takes(&all[at], &word))) at++;
        if (at == count) {
            all[count++] = word;
            if (count - oldest > OPEN) oldest++;
        } else {
            Group *const group = &all[at];
            for (int j = 0; j < CHANNELS * 2; j++) group->above[j] += word.above[j], group->below[j] += word.below[j];
            group->words[group->count++] = i;
        }
        while (oldest < count && all[oldest].count == MOST_TOGETHER) oldest++;
    }
    memcpy(room, codes, panel_codes(w));
    int placed = 0;
    for (int size = MOST_TOGETHER; size > 0; size--)
        for (int i = 0; i < count; i++) {
            if (all[i].count != size) continue;
            groups[MOST_TOGETHER - size]++;
            for (int j = 0; j < size; j++, placed++) {
                const size_t from = all[i].words[j];
                memcpy(codes + (size_t)placed * CHANNELS * WORD, room + from * CHANNELS * WORD, CHANNELS * WORD);
                order[placed] = (uint32_t)from * WORD;
            }
        }
}

static void lay_out(Channels *w, void *memory) {
    const size_t panels = panels_of(w);
    w->packed = memory;
    w->panel_scales = (float *)(w->packed + panels * panel_codes(w));
    w->sums = (int32_t *)(w->panel_scales + panels * w->side);
    if (w->side != CHANNELS) return;
    w->groups = (uint32_t *)(w->sums + panels * w->side), w->order = w->groups + panels * MOST_TOGETHER;
}

int use_packed_channels(Channels *w, const void *memory) {
    lay_out(w, (void *)memory);
    for (size_t panel = 0; w->order && panel < panels_of(w); panel++) {
        const uint32_t *const groups = w->groups + panel * MOST_TOGETHER, *const order = w->order + panel * w->words;
        uint64_t words = 0;
        for (int size = MOST_TOGETHER; size > 0; size--) words += (uint64_t)size * groups[MOST_TOGETHER - size];
        if (words != (uint64_t)w->words) return 0;
        for (int i = 0; i < w->words; i++)
            if (order[i] > ((uint32_t)w->words - 1) * WORD) return 0;
    }
    return 1;
}

int pack_channels(Channels *w, void *memory) {
    const size_t panels = panels_of(w), side = w->side;
    const int grouped = side == CHANNELS;
    int8_t *const room = grouped ? malloc(panel_codes(w) + w->words * sizeof(Group)) : NULL;
    if (grouped && !room) return 0;
    lay_out(w, memory);
    memset(memory, 0, channel_bytes(w));
    for (size_t panel = 0; panel < panels; panel++) {
        const int first = (int)(panel * side), count = w->n - first < (int)side ? w->n - first : (int)side;
        int8_t *to = w->packed + panel * panel_codes(w);
        for (int k = 0; k < w->k; k++) {
            const int8_t *from = w->codes + (size_t)k * w->n + first;
            int8_t *at = to + (size_t)(k / WORD) * side * WORD + k % WORD;
            for (int c = 0; c < count; c++) at[c * WORD] = from[c], w->sums[first + c] += from[c];
        }
        memcpy(w->panel_scales + first, w->scales + first, sizeof(float) * count);
        if (grouped) group_words(w, panel, room);
    }
    free(room);
    w->codes = NULL, w->scales = NULL; /* nothing reads them again */
    return 1;
}

/* What groups of so many words add to the totals of one or two rows. */
static inline __attribute__((always_inline)) void add_groups(const int8_t **codes, const uint32_t **order,
                                                             uint32_t groups, const int together,
                                                             const uint8_t *const x[2], const int rows,
                                                             __m256i totals[2][TILES]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int8_t *w = *codes;
    const uint32_t *place = *order;
    const uint8_t *const first = x[0], *const second = x[1];
    __m256i own[2][TILES]; /* in registers */
#pragma GCC unroll 2
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int t = 0; t < TILES; t++) own[m][t] = totals[m][t];
    for (; groups > 0; groups--, w += together * CHANNELS * WORD, place += together) {
        __m256i sums[2][TILES];
#pragma GCC unroll 4
        for (int i = 0; i < together; i++)
#pragma GCC unroll 2
            for (int m = 0; m < rows; m++) {
                const __m256i word = four_codes((m ? second : first) + place[i]);
#pragma GCC unroll 3
                for (int t = 0; t < TILES; t++) {
                    const __m256i both = pair_products(word, w + (i * TILES + t) * 32);
                    if (i) ADD_16(sums[m][t], both);
                    else sums[m][t] = both;
                }
            }
#pragma GCC unroll 2
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
            for (int t = 0; t < TILES; t++) ADD_32(own[m][t], _mm256_madd_epi16(sums[m][t], ones));
    }
#pragma GCC unroll 2
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 3
        for (int t = 0; t < TILES; t++) totals[m][t] = own[m][t];
    *codes = w, *order = place;
}

/* One panel by one or two rows. */
static inline __attribute__((always_inline)) void panel_by_rows(const Channels *w, size_t panel, const WholeRows *x,
                                                                int row, const int rows, float *y, size_t stride) {
    const int8_t *codes = w->packed + panel * panel_codes(w);
    const uint32_t *order = w->order + panel * w->words, *const groups = w->groups + panel * MOST_TOGETHER;
    const uint8_t *const first = x->codes + (size_t)row * x->words * WORD;
    const uint8_t *const both[2] = {first, first + (size_t)x->words * WORD};
    __m256i totals[2][TILES];
    for (int m = 0; m < rows; m++)
        for (int t = 0; t < TILES; t++) totals[m][t] = _mm256_setzero_si256();
    add_groups(&codes, &order, groups[0], 4, both, rows, totals);
    add_groups(&codes, &order, groups[1], 3, both, rows, totals);
    add_groups(&codes, &order, groups[2], 2, both, rows, totals);
    add_groups(&codes, &order, groups[3], 1, both, rows, totals);
    for (int m = 0; m < rows; m++) {
        const __m256i zero = _mm256_set1_epi32(x->zeros[row + m]);
        const __m256 scale = _mm256_set1_ps(x->scales[row + m]);
        for (int t = 0; t < TILES; t++) {
            const size_t n = panel * CHANNELS + t * 8;
            if (n >= (size_t)w->n) break;
            const __m256i away = _mm256_mullo_epi32(zero, _mm256_loadu_si256((const __m256i *)(w->sums + n)));
            const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(totals[m][t], away));
            const __m256 result = _mm256_mul_ps(_mm256_mul_ps(whole, scale), _mm256_loadu_ps(w->panel_scales + n));
            store_with(result, w->bias ? w->bias + n : NULL, w->n - n, y + (row + m) * stride + n);
        }
    }
}

void multiply_channels(const Channels *w, const WholeRows *x, int rows, int first_column, int last_column, float *y,
                       size_t stride) {
    if (w->side == WIDE_CHANNELS) {
        multiply_wide_channels(w, x, rows, first_column, last_column, y, stride);
        return;
    }
    const size_t from = first_column / CHANNELS, to = ((size_t)last_column + CHANNELS - 1) / CHANNELS;
    for (int first = 0; first < rows; first += CACHED) {
        const int last = first + CACHED < rows ? first + CACHED : rows;
        for (size_t panel = from; panel < to; panel++) {
            int row = first;
            for (; row + 2 <= last; row += 2) panel_by_rows(w, panel, x, row, 2, y, stride);
            if (row < last) panel_by_rows(w, panel, x, row, 1, y, stride);
        }
    }
}
