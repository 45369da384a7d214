/* The operator Fused of the domain gemini: a run of products and of what stands between them, as one node.
 *
 * onnxruntime hands each node to its threads anew, and most of what a decoder does for one token is too short for
 * that. Here the threads stay for a whole list of stages. Stages are grouped into phases: in some every row of
 * activations goes its own way (norms, activations, rounding to codes), in the others columns of products are
 * shared out. A thread takes pieces of a phase until none is left and goes on when all are done; since nobody
 * waits for a piece that no running thread has taken, it does not matter how many threads come, or when.
 *
 * `gemini.export.stages` writes the attributes:
 *   widths   (values): last dimension of each value; the first ones are the node's inputs
 *   outputs  which values are the node's outputs, in their order
 *   stages   (stages, 7): kind, two values read (-1: none), value written, second value written (-1: none), and
 *            for a product its place in `weights` and the first column that it writes (what several products write
 *            side by side they write one after the other), for a norm or gain the inputs that hold its gain and bias
 *            (-1: none), for a lookup its place in `weights` and the first token that is looked up there
 *   weights  (products, 8): inputs that hold codes, scales, zero points, bias (-1: none), K, N, bits, block size (0:
 *            one scale a column, codes as DynamicQuantizeMatMul has them)
 *   epsilons (stages): of norms
 *   attentions (attentions, 13): heads, heads of keys, a head's size, rotary (0 none, 1 halves, 2 pairs), window (0
 *            none), how many frequencies (0: tables), inputs that hold past keys and values (-1: nothing is kept, and
 *            every token sees all of its row), cosines and sines or frequencies (-1: none), scales of codes (-1:
 *            none), what is added to scores where nothing is kept (-1: nothing)
 *   factors  (attentions, 3): scale of scores, what they are capped at (0: nothing), what cosines and sines of
 *            positions times frequencies are times
 *   ids      the input that holds the tokens that lookups are for, (batch, sequence) int64, or nothing
 *   lengths  inputs that hold seqlens_k and total_sequence_length, as GroupQueryAttention has them; none where
 *            attentions keep nothing
 * The outputs after those of `outputs` are keys and values with the new ones, two an attention that keeps them. A
 * value that attention reads is queries, keys and values side by side, and is turned in place.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "channels.h"
#include "kernels.h"
#include "ort.h"

enum Kind { PRODUCT, NORM, CENTRED_NORM, TIMES, PLUS, SILU, GELU, GELU_TANH, RELU, ATTENTION, LOOKUP, GAIN, KINDS };
enum { STAGE_INTS = 7, WEIGHT_INTS = 8, ATTENTION_INTS = 13, FACTORS = 3, MOST = 4096 };
enum { MOST_WIDTH = 1 << 24 }; /* of weights and activations, so that no product of sizes leaves 64 bits */
enum { MOST_PARTS = 8 };       /* that the keys of one token's attention are shared out in */
enum { AT_A_TIME = 1 << 17 };  /* bytes, times a tile, of codes that are packed before their pages are let go of */
enum { AT_ONCE = 512 };        /* rows that go through all stages together, where others do not matter to them */
enum { BY_ROWS = 32, LEAST_BY_ROWS = 24 }; /* rows of a piece where they are shared out; from how many a thread on */
enum { PIECES = 2 };           /* of a product, for each thread */
enum { ALONE = 1 << 17 };      /* products of fewer multiplications are not worth a second thread */

typedef struct {
    enum Kind kind;
    int a, b, out, second; /* values */
    int place;             /* of a product or lookup in the weights, of an attention among those */
    int column;            /* of a product: the first that it writes; of a lookup: the first token */
    const float *gain, *bias;
    float epsilon;
} Stage;

/* What a phase shares out: rows, columns of products, or heads and queries. */
enum Share { ROWS, COLUMNS, ATTEND };
typedef struct {
    enum Share share;
    int first, count; /* of its steps */
} Phase;

/* What is done in a phase: a stage, one end of an attention, or the rounding of a value, in groups or by rows. */
enum Part { WHOLE, STORE, COMBINE, ROUND, ROUND_ROWS };
typedef struct {
    enum Part part;
    int stage, rounded; /* the value, where it is rounded */
} Step;

/* Frequencies that positions are turned by (Su et al. 2021), and what cosines and sines are times. */
typedef struct {
    const float *frequencies;
    int half;
    float factor;
} Turning;

/* Where an attention finds what it needs. */
typedef struct {
    Attention shape;
    int past[2], tables[2]; /* inputs: keys and values, cosines and sines */
    int turning;            /* instead of tables; -1: none */
    const float *scales[2]; /* of codes: keys, values */
    int step[2];            /* 1: a scale a channel, 0: one in all */
    int mask;               /* input that is added to scores; -1: none */
} Keeping;

/* Weights that several nodes read: where they were before they were packed tells that they are the same, and some
 * of their bytes, as another session's may come to lie where those of one that is ending were. */
typedef struct Table {
    struct Table *next;
    const uint8_t *codes;
    uint64_t sample;
    Weights weights;
    void *memory;
    int users;
} Table;

typedef struct {
    Api api;
    int inputs, values, output_count, stages, products, steps, phases;
    int *widths, *outputs;
    int *rounded, *rounded_rows; /* whether a value is wanted in codes by groups, by whole rows */
    /* Scratch memory: the places of values, of their codes by groups, and by whole rows, three a value; -1: none. */
    int *slot, slots;
    size_t *slot_size; /* bytes a row */
    int *passing;      /* of places: whether rows do not need each other's from when they are written to when read */
    Stage *stage;
    Weights *weights;
    Channels *channels; /* instead of weights with block 0 */
    uint8_t *packed; /* weights, one behind the other, but for tables */
    Table **table;   /* of those that lookups read and products of other nodes, too; else NULL */
    int ids;         /* the input; -1: none */
    Step *step;
    Phase *phase;
    size_t panel;
    int64_t per_row; /* multiplications */
    int wide;        /* whether products are those of AVX-512 VNNI */
    int pairs;       /* whether attentions that keep nothing may be those of AVX-512 BF16 */
    int attentions, keeps, lengths[2]; /* keeps: whether attentions do, all of them or none */
    Keeping *keeping;
    int turnings;
    Turning *turning;
} Program;

/* Keys and values of one attention in a run: (batch, heads, capacity, dim). */
typedef struct {
    uint8_t *kept[2];
    const float *tables[2]; /* a row a position, or a row a token */
    enum Kept kind;
    int half; /* numbers a row of a table has */
    int64_t capacity;
    int turned;           /* whether a key lies in a column: (batch, heads, dim, capacity) */
    const float *mask;    /* (batch, heads, queries, keys), each or but the last as one for all; NULL: none */
    int64_t mask_step[3]; /* from one of each to the next; 0: it is the same */
} Cache;

typedef struct {
    const Program *program;
    int rows;
    float **value;
    Rows8 *rows8;
    WholeRows *whole_rows;
    uint8_t *rooms; /* for each thread: a panel and, where rows are shared out, what passes */
    size_t room;
    atomic_int *next, *done, *rooms_taken;
    int *pieces;
    /* of attention: rows of the batch, tokens of each, the most tokens of one with those before */
    const int64_t *ids;
    int batch, length, total, first_batch;
    int parts; /* that the keys of one token are shared out in, where every row has one; else 0 */
    int offered, shares; /* threads, and how many shares each phase has: so many, or one */
    int by_rows; /* whether products are shared out by rows, too, together with what stands between them */
    int unit;    /* rows that are not shared out */
    const int32_t *lengths;
    Cache *caches;
    float *largest, *sums, *totals; /* (rows, heads, parts[, dim]) */
} Run;

/* ---- memory that one run after the other uses ---- */

typedef struct Arena {
    struct Arena *next;
    size_t size;
    uint8_t *bytes;
} Arena;

static pthread_mutex_t arenas_lock = PTHREAD_MUTEX_INITIALIZER;
static Arena *arenas;
static atomic_int threads = 1;

/* How many threads a run is offered to at the most; what onnxruntime has fewer of does no harm. */
__attribute__((visibility("default"))) void gemini_use_threads(int count) {
    if (count > atomic_load(&threads)) atomic_store(&threads, count);
}

/* 0: sessions that are made from now on do without AVX-512, as on a processor without it. */
static atomic_int vnni_allowed = 1;
__attribute__((visibility("default"))) void gemini_allow_vnni(int allowed) { atomic_store(&vnni_allowed, allowed); }

static int has_vnni(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

static int has_bf16(void) { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }

static Arena *take_arena(size_t size) {
    pthread_mutex_lock(&arenas_lock);
    Arena *arena = arenas;
    if (arena) arenas = arena->next;
    pthread_mutex_unlock(&arenas_lock);
    if (!arena) arena = calloc(1, sizeof *arena);
    if (!arena) return NULL;
    if (arena->size < size) {
        free(arena->bytes);
        arena->size = (size + 4095) / 4096 * 4096;
        arena->bytes = aligned_alloc(64, arena->size);
        if (!arena->bytes) {
            free(arena);
            return NULL;
        }
    }
    return arena;
}

static void give_back(Arena *arena) {
    pthread_mutex_lock(&arenas_lock);
    arena->next = arenas;
    arenas = arena;
    pthread_mutex_unlock(&arenas_lock);
}

static size_t aligned(size_t size) { return (size + 63) / 64 * 64; }

/* ---- a run ---- */

/* How many tokens stand before the first of this call in a row of the batch. */
static int tokens_before(const Run *run, int batch) {
    return run->length == run->total ? 0 : run->lengths[batch] + 1 - run->length;
}

static uint8_t *kept_at(const Cache *cache, int which, const Attention *a, int batch, int head, int64_t token) {
    const int64_t place = ((int64_t)batch * a->kv_heads + head) * cache->capacity + token;
    return cache->kept[which] + place * a->dim * size_of(cache->kind);
}

/* Turns a row's queries and keys by its position and puts keys and values where they are kept. */
static void store(const Run *run, const Stage *s, int row) {
    const Keeping *keeping = &run->program->keeping[s->place];
    const Cache *cache = &run->caches[s->place];
    const Attention *a = &keeping->shape;
    const int batch = row / run->length, position = tokens_before(run, batch) + row % run->length;
    float *x = run->value[s->a] + (size_t)row * run->program->widths[s->a];
    if (a->rotary) {
        const size_t line = (size_t)(keeping->turning < 0 ? position : row) * cache->half;
        const float *c = cache->tables[0] + line, *t = cache->tables[1] + line;
        for (int head = 0; head < a->heads + a->kv_heads; head++)
            rotate(x + head * a->dim, c, t, cache->half, a->rotary == 2);
    }
    if (cache->kind == PAIRS) return; /* `store_rows` puts several rows there, and turned keys */
    for (int which = 0; which < 2; which++) {
        const float *from = x + (a->heads + which * a->kv_heads) * a->dim;
        for (int head = 0; head < a->kv_heads; head++, from += a->dim) {
            if (cache->turned && which == 0) continue;
            uint8_t *to = kept_at(cache, which, a, batch, head, position);
            if (cache->kind == FLOATS) memcpy(to, from, sizeof(float) * a->dim);
            else if (cache->kind == HALVES) narrow(from, a->dim, (uint16_t *)to);
            else {
                const int step = keeping->step[which];
                round_to_codes(from, keeping->scales[which] + head * a->dim * step, step, a->dim, (int8_t *)to);
            }
        }
    }
}

/* Puts keys, and values where they are paired, of some rows where nothing is kept: they lie otherwise than rows do. */
static void store_rows(const Run *run, const Stage *s, int first, int last) {
    const Attention *a = &run->program->keeping[s->place].shape;
    const Cache *cache = &run->caches[s->place];
    const size_t width = run->program->widths[s->a];
    for (int row = first, some; row < last; row += some) {
        const int batch = row / run->length, position = row % run->length, left = run->length - position;
        some = last - row < left ? last - row : left;
        if (cache->kind == PAIRS) {
            for (int head = 0; head < a->kv_heads; head++) {
                const float *keys = run->value[s->a] + row * width + (a->heads + head) * a->dim;
                keep_pairs(keys, keys + a->kv_heads * a->dim, width, a->dim, some, position, run->length,
                           (uint16_t *)kept_at(cache, 0, a, batch, head, 0),
                           (uint16_t *)kept_at(cache, 1, a, batch, head, 0), cache->capacity);
            }
            continue;
        }
        some = some >= 8 ? 8 : some;
        for (int head = 0; head < a->kv_heads; head++) {
            const float *from = run->value[s->a] + row * width + (a->heads + head) * a->dim;
            float *to = (float *)kept_at(cache, 0, a, batch, head, 0) + position;
            for (int d = 0; d < a->dim && some == 8; d += 8, to += 8 * cache->capacity)
                turn_eight(from + d, width, to, cache->capacity);
            for (int d = 0; d < a->dim && some < 8; d++, to += cache->capacity)
                for (int i = 0; i < some; i++) to[i] = from[i * width + d];
        }
    }
}

/* Cosines and sines for each row's position: two tables a turning, one behind the other in `room`. */
static void turn(const Run *run, float *room) {
    const Program *p = run->program;
    for (int i = 0; i < p->turnings; i++) {
        const Turning *t = &p->turning[i];
        float *const cosines = room, *const sines = room + (size_t)run->rows * t->half;
        for (int row = 0; row < run->rows; row++) {
            const float position = (float)(tokens_before(run, row / run->length) + row % run->length);
            for (int j = 0; j < t->half; j++) {
                const float angle = position * t->frequencies[j];
                cosines[(size_t)row * t->half + j] = cosf(angle) * t->factor;
                sines[(size_t)row * t->half + j] = sinf(angle) * t->factor;
            }
        }
        for (int j = 0; j < p->attentions; j++)
            if (p->keeping[j].turning == i) {
                run->caches[j].tables[0] = cosines, run->caches[j].tables[1] = sines;
                run->caches[j].half = t->half;
            }
        room = sines + (size_t)run->rows * t->half;
    }
}

/* How many keys of so many are a part: whole blocks, MOST_PARTS parts at the most. What a token makes of its keys
 * depends on this alone, and so not on the tokens and rows that it is computed with, to the last bit. */
static int keys_a_part(int total) {
    return ((total + MOST_PARTS - 1) / MOST_PARTS + KEYS - 1) / KEYS * KEYS;
}

/* Queries of one head, or of one token, over one part of the keys of a head. */
static void attend_part(const Attention *a, const Heads *kept, const float *const queries[], const int positions[],
                        int count, int part, const Partial out[]) {
    const int seen = positions[count - 1] + 1, each = keys_a_part(seen);
    int first = part * each, last = first + each < seen ? first + each : seen;
    const int nearest = a->window > 0 ? (positions[0] + 1 - a->window) / KEYS * KEYS : 0;
    if (first < nearest) first = nearest;
    attend(a, kept, queries, positions, NULL, count, first, last, out);
}

static Heads heads_of(const Keeping *keeping, const Cache *cache, int batch, int kv) {
    const Attention *a = &keeping->shape;
    Heads kept = {.kind = cache->kind, .key_step = keeping->step[0], .value_step = keeping->step[1]};
    kept.keys = kept_at(cache, 0, a, batch, kv, 0), kept.values = kept_at(cache, 1, a, batch, kv, 0);
    kept.turned = cache->turned ? (int)cache->capacity : 0;
    if (cache->kind == CODES) {
        kept.key_scales = keeping->scales[0] + kv * a->dim * keeping->step[0];
        kept.value_scales = keeping->scales[1] + kv * a->dim * keeping->step[1];
    }
    return kept;
}

/* Into how many parts an attention falls where every row of the batch has one token, and how many of them a thread
 * takes in a row: it asks for the memory of the next one while it is at one. */
static int token_parts(const Run *run, const Stage *s) {
    return run->batch * run->program->keeping[s->place].shape.kv_heads * run->parts;
}

static int in_a_row(const Run *run, int parts) {
    const int each = parts / (4 * run->offered);
    return each > 1 ? each : 1;
}

/* A part of an attention where every row of the batch has one token: a part of the keys of one head of keys, for
 * all heads that look at them. COMBINE puts parts together. */
static void run_token(const Run *run, const Stage *s, int piece, int fetched, int next) {
    const Program *p = run->program;
    const Keeping *keeping = &p->keeping[s->place];
    const Attention *a = &keeping->shape;
    const Cache *cache = &run->caches[s->place];
    const int part = piece % run->parts, kv = piece / run->parts % a->kv_heads, row = piece / run->parts / a->kv_heads;
    const int group = a->heads / a->kv_heads, position = tokens_before(run, row);
    Heads kept = heads_of(keeping, cache, row, kv);
    kept.fetched = fetched;
    if (next >= 0) {
        const int batch = next / run->parts / a->kv_heads, seen = tokens_before(run, batch) + 1;
        const int each = keys_a_part(seen), first = next % run->parts * each;
        for (int which = 0; which < 2; which++)
            kept.soon[which] = kept_at(cache, which, a, batch, next / run->parts % a->kv_heads, first);
        kept.soon_count = seen - first < 0 ? 0 : seen - first < each ? seen - first : each;
    }
    for (int at = 0; at < group; at += 4) {
        const int count = group - at < 4 ? group - at : 4, positions[4] = {position, position, position, position};
        const float *queries[4];
        Partial out[4];
        for (int i = 0; i < count; i++) {
            const int head = kv * group + at + i;
            const size_t place = ((size_t)row * a->heads + head) * run->parts + part;
            queries[i] = run->value[s->a] + (size_t)row * p->widths[s->a] + head * a->dim;
            out[i] = (Partial){run->largest + place, run->sums + place, run->totals + place * a->dim};
        }
        attend_part(a, &kept, queries, positions, count, part, out);
        kept.fetched = 1;
    }
}

/* A piece of an attention over several tokens: some of them, of one head. */
static void run_tokens(const Run *run, const Stage *s, int piece) {
    const Program *p = run->program;
    const Keeping *keeping = &p->keeping[s->place];
    const Attention *a = &keeping->shape;
    const int blocks = (run->length + QUERIES - 1) / QUERIES, block = piece % blocks;
    const int head = piece / blocks % a->heads, batch = piece / blocks / a->heads, before = tokens_before(run, batch);
    const Cache *cache = &run->caches[s->place];
    const Heads kept = heads_of(keeping, cache, batch, head / (a->heads / a->kv_heads));
    const float *mask = cache->mask;
    if (mask) mask += (run->first_batch + batch) * cache->mask_step[0] + head * cache->mask_step[1];
    const int end = (block + 1) * QUERIES < run->length ? (block + 1) * QUERIES : run->length;
    if (cache->kind == PAIRS) {
        const size_t row = (size_t)batch * run->length + block * QUERIES;
        attend_pairs(a, kept.keys, kept.values, cache->capacity, run->length,
                     run->value[s->a] + row * p->widths[s->a] + head * a->dim, p->widths[s->a],
                     mask ? mask + block * QUERIES * cache->mask_step[2] : NULL, cache->mask_step[2],
                     end - block * QUERIES, run->value[s->out] + row * p->widths[s->out] + head * a->dim,
                     p->widths[s->out]);
        return;
    }
    float largest[QUERIES][MOST_PARTS], sums[QUERIES][MOST_PARTS], totals[QUERIES][MOST_PARTS * MOST_DIM];
    for (int at = block * QUERIES, count; at < end; at += count) {
        const int each = p->keeps ? keys_a_part(before + at + 1) : run->length;
        const float *queries[QUERIES], *masks[QUERIES];
        int positions[QUERIES];
        for (count = 0; at + count < end; count++) {
            const int row = batch * run->length + at + count;
            positions[count] = p->keeps ? before + at + count : run->length - 1;
            masks[count] = mask ? mask + (at + count) * cache->mask_step[2] : NULL;
            if (p->keeps && keys_a_part(positions[count] + 1) != each) break;
            queries[count] = run->value[s->a] + (size_t)row * p->widths[s->a] + head * a->dim;
        }
        const int parts = (positions[count - 1] + each) / each;
        for (int part = 0; part < parts; part++) {
            Partial out[QUERIES];
            for (int i = 0; i < count; i++)
                out[i] = (Partial){&largest[i][part], &sums[i][part], totals[i] + part * a->dim};
            if (p->keeps) attend_part(a, &kept, queries, positions, count, part, out);
            else attend(a, &kept, queries, positions, mask ? masks : NULL, count, 0, run->length, out);
        }
        for (int i = 0; i < count; i++) {
            const size_t row = (size_t)batch * run->length + at + i;
            combine(largest[i], sums[i], totals[i], parts, a->dim,
                    run->value[s->out] + row * p->widths[s->out] + head * a->dim);
        }
    }
}

static void run_step(const Run *run, const Step *step, int row) {
    const Program *p = run->program;
    if (step->part == ROUND) {
        const int v = step->rounded;
        quantize_row(run->value[v] + (size_t)row * p->widths[v], &run->rows8[v], row);
        return;
    }
    if (step->part == ROUND_ROWS) {
        const int v = step->rounded;
        quantize_whole_row(run->value[v] + (size_t)row * p->widths[v], &run->whole_rows[v], row);
        return;
    }
    const Stage *s = &p->stage[step->stage];
    const size_t width = p->widths[s->out];
    if (s->kind == LOOKUP) {
        const Weights *w = &p->weights[s->place];
        const int64_t token = run->ids[row] - s->column;
        float *to = run->value[s->out] + row * width;
        if (token >= 0 && token < w->n) lookup_row(w, (int)token, to);
        else if (s->column == 0) memset(to, 0, sizeof(float) * width); /* unless it is in another part */
        return;
    }
    const float *a = run->value[s->a] + row * width, *b = s->b < 0 ? NULL : run->value[s->b] + row * width;
    float *out = run->value[s->out] + row * width;
    switch (s->kind) {
    case NORM:
        rms_norm(a, b, s->gain, s->epsilon, (int)width, s->second < 0 ? NULL : run->value[s->second] + row * width,
                 out);
        break;
    case CENTRED_NORM: layer_norm(a, s->gain, s->bias, s->epsilon, (int)width, out); break;
    case GAIN: times(a, s->gain, (int)width, out); break;
    case TIMES: times(a, b, (int)width, out); break;
    case PLUS: plus(a, b, (int)width, out); break;
    case SILU: silu(a, (int)width, out); break;
    case GELU: gelu(a, (int)width, out); break;
    case GELU_TANH: gelu_tanh(a, (int)width, out); break;
    case RELU: relu(a, (int)width, out); break;
    case ATTENTION:
        if (step->part == STORE) store(run, s, row);
        else if (run->parts) {
            const Attention *shape = &p->keeping[s->place].shape;
            for (int h = 0; h < shape->heads; h++) {
                const size_t place = ((size_t)row * shape->heads + h) * run->parts;
                combine(run->largest + place, run->sums + place, run->totals + place * shape->dim, run->parts,
                        shape->dim, out + h * shape->dim);
            }
        }
        break;
    default: break;
    }
}

/* How many columns of a product are a piece of work: whole panels, and few pieces for a thread, since each begins with
 * memory that nobody has asked for. */
static int piece_of(const Run *run, const Weights *w) {
    const int wide = w->tile == WIDE_TILE, pieces = PIECES * run->shares, each = (w->n + pieces - 1) / pieces;
    const int panel = w->block ? (wide ? WIDE_TILE : PANEL_COLUMNS) : (wide ? WIDE_CHANNELS : CHANNELS);
    return (each + panel - 1) / panel * panel;
}

/* Some columns of a product, of the rows [row, row + rows). */
static void run_product(const Run *run, const Stage *s, int row, int rows, int first, int last, void *panel) {
    const Program *p = run->program;
    const Weights *w = &p->weights[s->place];
    const size_t stride = p->widths[s->out];
    float *y = run->value[s->out] + row * stride + s->column;
    if (w->block) {
        const Rows8 x = rows8_from(&run->rows8[s->a], row);
        multiply(w, &x, rows, first, last, y, stride, panel);
    } else {
        const WholeRows x = whole_rows_from(&run->whole_rows[s->a], row);
        multiply_channels(&p->channels[s->place], &x, rows, first, last, y, stride);
    }
}

/* Columns of the products of a phase are numbered one product after the other, in pieces of whole panels. */
static void run_columns(const Run *run, const Phase *phase, int piece, void *panel) {
    const Program *p = run->program;
    int before = 0;
    for (int i = 0; i < phase->count; i++) {
        const Stage *s = &p->stage[p->step[phase->first + i].stage];
        const Weights *w = &p->weights[s->place];
        const int size = piece_of(run, w), pieces = (w->n + size - 1) / size;
        if (piece < before + pieces) {
            const int first = (piece - before) * size, last = first + size < w->n ? first + size : w->n;
            run_product(run, s, 0, run->rows, first, last, panel);
            return;
        }
        before += pieces;
    }
}

/* A phase for some rows alone. */
static void run_phase(const Run *run, const Phase *phase, int first, int last, void *panel) {
    const Step *steps = run->program->step + phase->first;
    if (phase->share == ROWS) {
        for (int row = first; row < last; row++)
            for (int j = 0; j < phase->count; j++) run_step(run, &steps[j], row);
        for (int j = 0; j < phase->count; j++) {
            const Stage *s = steps[j].part == STORE ? &run->program->stage[steps[j].stage] : NULL;
            if (s && !run->program->keeps) store_rows(run, s, first, last);
        }
        return;
    }
    for (int j = 0; j < phase->count; j++) {
        const Stage *s = &run->program->stage[steps[j].stage];
        run_product(run, s, first, last - first, 0, run->program->weights[s->place].n, panel);
    }
}

static void run_attention(const Run *run, const Phase *phase, int piece) {
    const Stage *s = &run->program->stage[run->program->step[phase->first].stage];
    if (!run->parts) {
        run_tokens(run, s, piece);
        return;
    }
    const int all = token_parts(run, s), each = in_a_row(run, all), first = piece * each;
    const int end = first + each < all ? first + each : all;
    for (int j = first; j < end; j++) run_token(run, s, j, j > first, j + 1 < end ? j + 1 : -1);
}

/* Phases that are shared out together: where rows are, all up to the next attention. */
static int phases_from(const Run *run, int phase) {
    const Program *p = run->program;
    int end = phase + 1;
    if (run->by_rows && p->phase[phase].share != ATTEND)
        while (end < p->phases && p->phase[end].share != ATTEND) end++;
    return end;
}

/* Says where values and their codes lie: in `slot`, whose places have room for `rows` of them, the first one being
 * row `first`. Places that are NULL are left as they are. */
static void place_values(Run *run, uint8_t *const slot[], size_t rows, size_t first) {
    const Program *p = run->program;
    for (int v = 0; v < p->values; v++) {
        uint8_t *at[3];
        for (int i = 0; i < 3; i++) at[i] = p->slot[3 * v + i] < 0 ? NULL : slot[p->slot[3 * v + i]];
        const size_t width = p->widths[v];
        if (at[0]) run->value[v] = (float *)at[0] - first * width;
        if (at[1]) {
            Rows8 *x = &run->rows8[v];
            *x = (Rows8){.k = (int)width, .groups = (int)(width + GROUP - 1) / GROUP, .wide = p->wide};
            x->moved = run->rows >= PANEL_ROWS && !p->wide;
            const size_t groups = x->groups, before = first * groups;
            x->codes = (int8_t *)at[1] - before * GROUP;
            x->scales = (float *)(at[1] + rows * groups * GROUP) - before;
            x->sums = (int32_t *)x->scales + rows * groups, x->starts = (uint32_t *)x->sums + rows * groups;
        }
        if (at[2]) {
            WholeRows *x = &run->whole_rows[v];
            *x = (WholeRows){.k = (int)width, .words = (int)(width + 3) / 4, .levels = p->wide ? 255 : 127};
            x->codes = at[2] - first * x->words * 4;
            x->scales = (float *)(at[2] + rows * x->words * 4) - first, x->zeros = (int32_t *)x->scales + rows;
        }
    }
}

/* Some rows of a run, with what passes in a thread's own room. */
typedef struct {
    Run run;
    uint8_t *panel, *slot[MOST];
} Own;

/* Memory behind `base`, one piece after the other; with NULL `at` alone counts. */
#define TAKE(bytes) (at += aligned(bytes), base ? base + at - aligned(bytes) : NULL)

/* Lays out an Own behind `base`, and says how many bytes that takes; with NULL it says this alone. */
static size_t lay_out_own(const Run *run, uint8_t *base) {
    const Program *p = run->program;
    const size_t rows8_size = p->values * sizeof(Rows8), whole_rows_size = p->values * sizeof(WholeRows);
    const size_t value_size = p->values * sizeof(float *);
    size_t at = 0;
    Own *own = (Own *)TAKE(sizeof *own);
    void *const rows8 = TAKE(rows8_size), *const whole_rows = TAKE(whole_rows_size), *const value = TAKE(value_size);
    uint8_t *const panel = TAKE(p->panel);
    if (own) {
        own->run = *run, own->panel = panel;
        own->run.rows8 = memcpy(rows8, run->rows8, rows8_size);
        own->run.whole_rows = memcpy(whole_rows, run->whole_rows, whole_rows_size);
        own->run.value = memcpy(value, run->value, value_size);
    }
    for (int i = 0; i < p->slots && run->by_rows; i++) {
        uint8_t *const place = p->passing[i] ? TAKE(BY_ROWS * p->slot_size[i]) : NULL;
        if (own) own->slot[i] = place;
    }
    return at;
}

/* The next piece of a phase for a thread; -1: all are taken. Every thread has pieces that lie side by side, in whose
 * memory one leads to the next, and helps with those of others when it has no more. `helped`: how many others yet. */
static int next_piece(const Run *run, int phase, int thread, int *helped) {
    const int pieces = run->pieces[phase], shares = run->shares;
    for (; *helped < shares; ++*helped) {
        const int share = (thread + *helped) % shares;
        const int first = (int)((int64_t)pieces * share / shares), last = (int)((int64_t)pieces * (share + 1) / shares);
        atomic_int *const taken = &run->next[phase * shares + share];
        const int piece = first + atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (piece < last) return piece;
    }
    return -1;
}

static void work(void *data, size_t task) {
    const Run *run = data;
    const Program *p = run->program;
    Own *own = NULL;
    for (int i = 0, end; i < p->phases; i = end) {
        const Phase *phase = &p->phase[i];
        const int pieces = run->pieces[i];
        int helped = 0, piece;
        end = phases_from(run, i);
        while ((piece = next_piece(run, i, (int)task, &helped)) >= 0) {
            if (!own && run->room) {
                own = (Own *)(run->rooms + run->room * atomic_fetch_add(run->rooms_taken, 1));
                lay_out_own(run, (uint8_t *)own);
            }
            if (phase->share == ATTEND) {
                run_attention(run, phase, piece);
            } else if (phase->share == COLUMNS && !run->by_rows) {
                run_columns(run, phase, piece, own ? own->panel : NULL);
            } else {
                const int units = (run->rows + run->unit - 1) / run->unit;
                const int first = (int)((int64_t)units * piece / pieces) * run->unit;
                const int most = (int)((int64_t)units * (piece + 1) / pieces) * run->unit;
                const int last = most < run->rows ? most : run->rows;
                if (run->by_rows) place_values(&own->run, own->slot, BY_ROWS, first);
                for (int j = i; j < end; j++)
                    run_phase(run->by_rows ? &own->run : run, &p->phase[j], first, last, own ? own->panel : NULL);
            }
            atomic_fetch_add_explicit(&run->done[i], 1, memory_order_release);
        }
        for (int turns = 0; atomic_load_explicit(&run->done[i], memory_order_acquire) < pieces; turns++) {
            __builtin_ia32_pause();
            if (turns > 20000) sched_yield(); /* whoever has the last piece may have lost its processor */
        }
    }
}

/* The bytes, type and dimensions of an input that has this rank. */
static Status tensor_of(Api api, void *context, int input, int64_t *dims, size_t rank, int *type, void **data) {
    const void *tensor;
    void *shape;
    size_t found = 0;
    Status status = CALL(api, CONTEXT_INPUT, context, (size_t)input, &tensor);
    if (status || !tensor) return status ? status : CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: no input");
    if ((status = CALL(api, TYPE_AND_SHAPE, tensor, &shape))) return status;
    status = CALL(api, DIMENSION_COUNT, shape, &found);
    if (!status) status = CALL(api, ELEMENT_TYPE, shape, type);
    if (!status && found == rank && rank) status = CALL(api, DIMENSIONS, shape, dims, rank);
    ((void (*)(void *))api[RELEASE_SHAPE])(shape);
    if (status) return status;
    if (found != rank) return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: an input has another rank");
    return CALL(api, TENSOR_DATA, tensor, data);
}

/* Looks up past keys and values, tables and lengths, makes room for the new ones, and checks that all fits. */
static Status find_caches(Run *run, void *context) {
    const Program *p = run->program;
    Api api = p->api;
    Status status;
    int64_t dims[8];
    int type;
    const int32_t *total;
    const char *const wrong = "Fused: keys, values or lengths have other shapes than the node says";
    if ((status = tensor_of(api, context, p->lengths[0], dims, 1, &type, (void **)&run->lengths))) return status;
    if (type != TYPE_INT32 || dims[0] != run->batch) return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, wrong);
    if ((status = tensor_of(api, context, p->lengths[1], dims, 0, &type, (void **)&total))) return status;
    if (type != TYPE_INT32) return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, wrong);
    run->total = *total;
    int longest = 0;
    for (int b = 0; b < run->batch; b++) {
        const int before = tokens_before(run, b);
        if (before < 0 || before + run->length > run->total) return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, wrong);
        if (before + run->length > longest) longest = before + run->length;
    }
    for (int i = 0; i < p->attentions; i++) {
        const Keeping *keeping = &p->keeping[i];
        const Attention *a = &keeping->shape;
        Cache *cache = &run->caches[i];
        for (int which = 0; which < 2; which++) {
            void *past, *tensor, *present;
            if ((status = tensor_of(api, context, keeping->past[which], dims, 4, &type, &past))) return status;
            cache->kind = type == TYPE_INT8 ? CODES : type == TYPE_FLOAT16 ? HALVES : FLOATS;
            if ((type != TYPE_FLOAT && type != TYPE_FLOAT16 && type != TYPE_INT8) ||
                (type == TYPE_INT8) != (keeping->scales[which] != NULL) ||
                dims[0] != run->batch || dims[1] != a->kv_heads || dims[3] != a->dim ||
                (which && (dims[2] > run->total ? dims[2] : run->total) != cache->capacity))
                return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, wrong);
            const int64_t behind = dims[2], capacity = behind > run->total ? behind : run->total;
            dims[2] = cache->capacity = capacity;
            const size_t output = p->output_count + 2 * i + which, size = size_of(cache->kind) * a->dim;
            if ((status = CALL(api, CONTEXT_OUTPUT, context, output, dims, (size_t)4, &tensor))) return status;
            if ((status = CALL(api, TENSOR_DATA, tensor, &present))) return status;
            if (present != past)
                for (int64_t h = 0; h < (int64_t)run->batch * a->kv_heads; h++)
                    memcpy((uint8_t *)present + h * capacity * size, (uint8_t *)past + h * behind * size,
                           behind * size);
            cache->kept[which] = present;
            if (!a->rotary || keeping->turning >= 0) continue;
            void *table;
            if ((status = tensor_of(api, context, keeping->tables[which], dims, 2, &type, &table))) return status;
            if (type != TYPE_FLOAT || dims[0] < longest || dims[1] * 2 > a->dim || (which && dims[1] != cache->half))
                return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, wrong);
            cache->tables[which] = table, cache->half = (int)dims[1];
        }
    }
    return NULL;
}

/* Looks up what is added to the scores of attentions that keep nothing. */
static Status find_masks(Run *run, void *context) {
    const Program *p = run->program;
    Api api = p->api;
    run->total = run->length;
    for (int i = 0; i < p->attentions; i++) {
        const Attention *a = &p->keeping[i].shape;
        Cache *cache = &run->caches[i];
        cache->kind = p->pairs && attends_in_pairs(a) ? PAIRS : FLOATS;
        cache->turned = cache->kind == FLOATS;
        cache->capacity = (run->length + TURNED - 1) / TURNED * TURNED;
        if (p->keeping[i].mask < 0) continue;
        int64_t dims[8];
        int type;
        void *mask;
        Status status = tensor_of(api, context, p->keeping[i].mask, dims, 4, &type, &mask);
        if (status) return status;
        if (type != TYPE_FLOAT || (dims[0] != 1 && dims[0] != run->batch) || (dims[1] != 1 && dims[1] != a->heads) ||
            (dims[2] != 1 && dims[2] != run->length) || dims[3] != run->length)
            return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: a mask has another shape than the scores");
        cache->mask = mask;
        int64_t size = dims[3];
        for (int j = 2; j >= 0; size *= dims[j--]) cache->mask_step[j] = dims[j] == 1 ? 0 : size;
    }
    return NULL;
}

/* Memory for keys, or for values, of this run alone, which all attentions use one after the other. */
static size_t passing_size(const Run *run) {
    const Program *p = run->program;
    size_t most = 0;
    for (int i = 0; i < p->attentions && !p->keeps; i++) {
        const size_t width = (size_t)p->keeping[i].shape.kv_heads * p->keeping[i].shape.dim;
        if (width > most) most = width;
    }
    return most ? most * run->batch * run->caches[0].capacity * sizeof(float) : 0;
}

/* Into how many pieces a phase falls. */
static int pieces_of(const Run *run, const Phase *phase) {
    const Program *p = run->program;
    if (phase->share == ATTEND) {
        const Stage *s = &p->stage[p->step[phase->first].stage];
        const int blocks = (run->length + QUERIES - 1) / QUERIES, parts = token_parts(run, s);
        const int each = in_a_row(run, parts);
        return run->parts ? (parts + each - 1) / each : run->batch * p->keeping[s->place].shape.heads * blocks;
    }
    if (run->by_rows) {
        const int pieces = (run->rows + BY_ROWS - 1) / BY_ROWS;
        return (pieces + run->offered - 1) / run->offered * run->offered;
    }
    if (phase->share == ROWS) return (run->rows + run->unit - 1) / run->unit;
    int pieces = 0;
    for (int i = 0; i < phase->count; i++) {
        const Weights *w = &p->weights[p->stage[p->step[phase->first + i].stage].place];
        const int piece = piece_of(run, w);
        pieces += (w->n + piece - 1) / piece;
    }
    return pieces;
}

/* Lays out what a run needs behind `base`, and says how many bytes that takes; with NULL it says this alone. */
static size_t lay_out(Run *run, uint8_t *base) {
    const Program *p = run->program;
    const size_t rows = run->rows, passing = passing_size(run);
    size_t at = 0, heads = 0, head_numbers = 0, turned = 0;
    for (int i = 0; i < p->attentions; i++) {
        const Attention *a = &p->keeping[i].shape;
        if ((size_t)a->heads > heads) heads = a->heads;
        if ((size_t)a->heads * a->dim > head_numbers) head_numbers = (size_t)a->heads * a->dim;
    }
    heads *= rows * run->parts, head_numbers *= rows * run->parts;
    for (int i = 0; i < p->turnings; i++) turned += 2 * rows * p->turning[i].half;
    run->rows8 = (Rows8 *)TAKE(sizeof(Rows8) * p->values);
    run->whole_rows = (WholeRows *)TAKE(sizeof(WholeRows) * p->values);
    uint8_t *const keys = TAKE(passing), *const values = TAKE(passing);
    for (int i = 0; i < p->attentions && !p->keeps; i++) run->caches[i].kept[0] = keys, run->caches[i].kept[1] = values;
    run->next = (atomic_int *)TAKE(sizeof(int) * p->phases * run->shares);
    run->done = (atomic_int *)TAKE(sizeof(int) * p->phases);
    run->rooms_taken = (atomic_int *)TAKE(sizeof(int));
    run->pieces = (int *)TAKE(sizeof(int) * p->phases);
    run->largest = (float *)TAKE(heads * sizeof(float)), run->sums = (float *)TAKE(heads * sizeof(float));
    run->totals = (float *)TAKE(head_numbers * sizeof(float));
    float *const angles = (float *)TAKE(turned * sizeof(float));
    uint8_t *slot[MOST];
    for (int i = 0; i < p->slots; i++) slot[i] = p->passing[i] && run->by_rows ? NULL : TAKE(rows * p->slot_size[i]);
    run->rooms = TAKE(run->room * run->shares);
    if (base) turn(run, angles), place_values(run, slot, rows, 0);
    return at;
}

/* Takes memory for the rows of a run, and shares out what is to be done with them. */
static Status run_rows(Run *run, void *context) {
    const Program *p = run->program;
    Api api = p->api;
    run->by_rows = run->rows >= (int64_t)LEAST_BY_ROWS * run->offered;
    run->unit = run->rows < 16 ? 4 : 8;
    run->room = run->by_rows || (run->rows >= PANEL_ROWS && p->panel) ? lay_out_own(run, NULL) : 0;
    run->shares = p->per_row * run->rows < ALONE ? 1 : run->offered;
    Arena *arena = take_arena(lay_out(run, NULL));
    if (!arena) return CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
    lay_out(run, arena->bytes);
    for (int i = 0; i < p->phases; i++) {
        run->pieces[i] = pieces_of(run, &p->phase[i]);
        for (int j = 0; j < run->shares; j++) atomic_init(&run->next[i * run->shares + j], 0);
        atomic_init(&run->done[i], 0);
    }
    atomic_init(run->rooms_taken, 0);
    Status status = NULL;
    if (run->shares == 1) work(run, 0);
    else status = CALL(api, PARALLEL_FOR, context, work, (size_t)run->shares, (size_t)0, run);
    give_back(arena);
    return status;
}

static Status compute(void *kernel, void *context) {
    const Program *p = kernel;
    Api api = p->api;
    Status status = NULL;
    int64_t dims[8];
    size_t rank = 0;
    int64_t rows = -1;
    float *value[MOST], *some[MOST];
    for (int v = 0; v < p->values; v++) value[v] = NULL;
    int64_t *ids = NULL;
    if (p->ids >= 0) {
        int type;
        if ((status = tensor_of(api, context, p->ids, dims, 2, &type, (void **)&ids))) return status;
        if (type != TYPE_INT64) return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: tokens have another type");
        rows = dims[0] * dims[1], rank = 3;
    }
    for (int v = 0; v < p->inputs; v++) {
        const void *tensor;
        void *shape;
        size_t count;
        if ((status = CALL(api, CONTEXT_INPUT, context, (size_t)v, &tensor))) return status;
        if ((status = CALL(api, TYPE_AND_SHAPE, tensor, &shape))) return status;
        status = CALL(api, ELEMENT_COUNT, shape, &count);
        if (!status && rows < 0) {
            status = CALL(api, DIMENSION_COUNT, shape, &rank);
            if (!status && rank >= 1 && rank <= 8) status = CALL(api, DIMENSIONS, shape, dims, rank);
        }
        ((void (*)(void *))api[RELEASE_SHAPE])(shape);
        if (status) return status;
        if (rows < 0) rows = (int64_t)(count / p->widths[0]);
        if (rank < 1 || rank > 8 || (int64_t)count != rows * p->widths[v])
            return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: an input has another shape than the node says");
        if ((status = CALL(api, TENSOR_DATA, tensor, (void **)&value[v]))) return status;
    }
    if (rows > INT32_MAX / 2) return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: too many rows");
    for (int i = 0; i < p->output_count; i++) {
        void *tensor;
        dims[rank - 1] = p->widths[p->outputs[i]];
        if ((status = CALL(api, CONTEXT_OUTPUT, context, (size_t)i, dims, rank, &tensor))) return status;
        if ((status = CALL(api, TENSOR_DATA, tensor, (void **)&value[p->outputs[i]]))) return status;
    }
    Run run = {.program = p, .offered = atomic_load(&threads)};
    Cache *caches = NULL;
    if (p->attentions && rows) {
        if (rank != 3 || !(caches = calloc(p->attentions, sizeof *caches)))
            return CALL(api, CREATE_STATUS, FAIL, "Fused: attention needs memory and three dimensions");
        run.batch = (int)dims[0], run.length = (int)dims[1], run.caches = caches;
        status = p->keeps ? find_caches(&run, context) : find_masks(&run, context);
        if (status) {
            free(caches);
            return status;
        }
        if (p->keeps && run.length == 1) {
            const int parts = (run.total + KEYS - 1) / KEYS;
            run.parts = parts < MOST_PARTS ? parts : MOST_PARTS;
        }
    }
    /* Where rows do not depend on each other, or those of the batch do not, as many at once as caches hold. */
    int64_t each = p->keeps ? rows : AT_ONCE;
    if (p->attentions && !p->keeps) each = run.length > AT_ONCE ? run.length : AT_ONCE / run.length * run.length;
    for (int64_t first = 0; first < rows && !status; first += each) {
        run.rows = (int)(rows - first < each ? rows - first : each);
        run.value = some, run.ids = ids ? ids + first : NULL;
        for (int v = 0; v < p->values; v++) some[v] = value[v] ? value[v] + first * p->widths[v] : NULL;
        if (p->attentions && !p->keeps) run.batch = run.rows / run.length, run.first_batch = (int)first / run.length;
        status = run_rows(&run, context);
    }
    free(caches);
    return status;
}

/* ---- reading the node ---- */

static Status refuse(Api api, const char *why) { return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, why); }

static Status read_ints(Api api, const void *info, const char *name, int **out, int *count) {
    size_t size = 0;
    Status status = CALL(api, ATTRIBUTE_INTS, info, name, NULL, &size);
    if (status) return status;
    int64_t *wide = calloc(size + 1, sizeof *wide);
    *out = calloc(size + 1, sizeof **out);
    *count = (int)size;
    if (!wide || !*out || size > MOST * STAGE_INTS) {
        free(wide);
        return CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory for the attributes");
    }
    if (size) status = CALL(api, ATTRIBUTE_INTS, info, name, wide, &size);
    for (size_t i = 0; i < size; i++) (*out)[i] = (int)(wide[i] < -1 || wide[i] > INT32_MAX / 2 ? -2 : wide[i]);
    free(wide);
    return status;
}

/* The bytes of a constant input of so many elements of one of two types; `type` says of which. */
static Status constant(Api api, const void *info, int input, size_t wanted, int one, int other, const void **data,
                       int *type) {
    int is_constant = 0, found = 0;
    const void *tensor = NULL;
    void *shape;
    size_t count = 0;
    Status status = CALL(api, CONSTANT_INPUT, info, (size_t)input, &is_constant, &tensor);
    if (status) return status;
    if (!is_constant || !tensor) return refuse(api, "Fused: an input that has to be constant is not");
    if ((status = CALL(api, TYPE_AND_SHAPE, tensor, &shape))) return status;
    status = CALL(api, ELEMENT_COUNT, shape, &count);
    if (!status) status = CALL(api, ELEMENT_TYPE, shape, &found);
    ((void (*)(void *))api[RELEASE_SHAPE])(shape);
    if (status) return status;
    if (count != wanted || (found != one && found != other))
        return refuse(api, "Fused: a constant input has another size or type than the node says");
    if (type) *type = found;
    return CALL(api, TENSOR_DATA, tensor, data);
}

/* Ranges of memory that are data of files. */
typedef struct {
    uintptr_t (*range)[2];
    int count;
} Files;

static Files mapped_files(void) {
    Files files = {NULL, 0};
#ifdef __linux__
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long low, high, inode;
        char rights[5];
        /* address range, rights, offset, device, inode (0: no file), path; see proc(5) */
        if (sscanf(line, "%lx-%lx %4s %*s %*s %lu", &low, &high, rights, &inode) != 4) continue;
        if (!inode || rights[2] == 'x' || rights[3] != 'p') continue;
        void *more = realloc(files.range, (files.count + 1) * sizeof *files.range);
        if (!more) break;
        files.range = more;
        files.range[files.count][0] = low, files.range[files.count++][1] = high;
    }
    if (maps) fclose(maps);
#endif
    return files;
}

/* Lets go of all pages that a constant of a file was read from: nobody writes to constants, so they can be read
 * again, and so can what else lies on the first and last of them. Constants in other memory are left alone. */
static void forget(const Files *files, const void *data, size_t size) {
#ifdef __linux__
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)data;
    const uintptr_t first = at / page * page, end = (at + size + page - 1) / page * page;
    for (int i = 0; i < files->count; i++)
        if (files->range[i][0] <= first && end <= files->range[i][1]) {
            madvise((void *)first, end - first, MADV_DONTNEED);
            return;
        }
#else
    (void)files, (void)data, (void)size;
#endif
}

static const char *const disordered = "Fused: packed weights are not as the kernels pack them";

static int is_aligned(const void *data) { return (uintptr_t)data % 64 == 0; }

/* Weights with one scale a column, 8-bit codes (k, n); packed ones are the bytes that `pack_channels` makes. */
static Status read_channels(Api api, const void *info, const int *from, int wide, int packed, Channels *w) {
    const int k = from[4], n = from[5];
    if (k < 1 || n < 1 || k > MOST_FEATURES || n > MOST_WIDTH || from[6] != 8 || from[2] >= 0)
        return refuse(api, "Fused: weights of these sizes are not known");
    *w = (Channels){.k = k, .n = n, .words = (k + 3) / 4, .side = wide ? WIDE_CHANNELS : CHANNELS};
    const size_t count = packed ? channel_bytes(w) : (size_t)k * n;
    const int type = packed ? TYPE_UINT8 : TYPE_INT8;
    const void *data;
    Status status = constant(api, info, from[0], count, type, type, &data, NULL);
    if (status) return status;
    if (packed) {
        if (!is_aligned(data) || !use_packed_channels(w, data)) return refuse(api, disordered);
    } else {
        w->codes = data;
        if ((status = constant(api, info, from[1], n, TYPE_FLOAT, TYPE_FLOAT, &data, NULL))) return status;
        w->scales = data;
    }
    if (from[3] < 0) return NULL;
    if ((status = constant(api, info, from[3], n, TYPE_FLOAT, TYPE_FLOAT, &data, NULL))) return status;
    w->bias = data;
    return NULL;
}

/* Weights in blocks; packed ones lie as the products read them, in three constants. */
static Status read_weights(Api api, const void *info, const int *from, int wide, int packed, Weights *w) {
    const int k = from[4], n = from[5], bits = from[6], block = from[7];
    if (k < 1 || n < 1 || k > MOST_WIDTH || n > MOST_WIDTH || (bits != 4 && bits != 8) || block < GROUP ||
        block > 1024 || (block & (block - 1)))
        return refuse(api, "Fused: weights of these sizes are not known");
    *w = weights_of(k, n, bits, block, wide ? WIDE_TILE : TILE);
    const size_t all = packed ? tile_blocks(w) : (size_t)n * w->blocks;
    const size_t bytes = packed ? tile_bytes(w) : (size_t)n * row_bytes(w);
    const size_t zeros = packed || bits == 8 ? all : (size_t)n * ((w->blocks + 1) / 2);
    int type;
    const void *codes, *scales, *data = NULL;
    Status status = constant(api, info, from[0], bytes, TYPE_UINT8, TYPE_UINT8, &codes, NULL);
    if (status) return status;
    if ((status = constant(api, info, from[1], all, TYPE_FLOAT, TYPE_FLOAT16, &scales, &type))) return status;
    w->half_scales = type == TYPE_FLOAT16;
    if (from[2] >= 0 && (status = constant(api, info, from[2], zeros, TYPE_UINT8, TYPE_UINT8, &data, NULL)))
        return status;
    if (packed && !is_aligned(codes)) return refuse(api, disordered);
    if (packed) w->packed = (uint8_t *)codes, w->tile_scales = (uint8_t *)scales, w->tile_zeros = (uint8_t *)data;
    else w->codes = codes, w->scales = scales, w->zeros = data;
    if (from[3] >= 0) {
        if ((status = constant(api, info, from[3], n, TYPE_FLOAT, TYPE_FLOAT, &data, NULL))) return status;
        w->bias = data;
    }
    return NULL;
}

/* Some codes at a time, so that a table of megabytes is not in memory twice. */
static void pack(Weights *w, const Files *files, void *memory) {
    begin_packing(w, memory);
    const size_t all = (size_t)w->n * w->blocks, bytes = row_bytes(w);
    forget(files, w->scales, all * (w->half_scales ? 2 : 4));
    if (w->zeros) forget(files, w->zeros, w->bits == 8 ? all : (size_t)w->n * ((w->blocks + 1) / 2));
    const size_t tiles = ((size_t)w->n + w->tile - 1) / w->tile, step = (AT_A_TIME + bytes - 1) / bytes;
    for (size_t tile = 0; tile < tiles; tile += step) {
        const size_t end = tile + step < tiles ? tile + step : tiles, first = tile * w->tile;
        const size_t last = end * w->tile < (size_t)w->n ? end * w->tile : (size_t)w->n;
        pack_codes(w, tile, end);
        forget(files, w->codes + first * bytes, (last - first) * bytes);
    }
    w->codes = NULL, w->scales = NULL, w->zeros = NULL; /* nothing reads them again */
}

static int pack_channels_of_file(Channels *w, const Files *files, void *memory) {
    const int8_t *const codes = w->codes;
    const int done = pack_channels(w, memory);
    forget(files, codes, (size_t)w->k * w->n);
    return done;
}

/* The place of these frequencies among those of the node; attentions share them. */
static int turning_of(Program *p, Turning wanted) {
    for (int i = 0; i < p->turnings; i++) {
        const Turning *t = &p->turning[i];
        if (t->frequencies == wanted.frequencies && t->half == wanted.half && t->factor == wanted.factor) return i;
    }
    p->turning[p->turnings] = wanted;
    return p->turnings++;
}

static Status read_attention(Program *p, const void *info, const int *from, const float *factors, Keeping *to) {
    Api api = p->api;
    Attention *a = &to->shape;
    const int half = from[5], *const inputs = from + 6;
    *a = (Attention){from[0], from[1], from[2], from[3], from[4], factors[0], factors[1]};
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || a->dim < 8 || a->dim > MOST_DIM || a->dim % 8 ||
        a->heads > MOST || a->rotary < 0 || a->rotary > 2 || a->window < 0 || (inputs[0] < 0) == p->keeps ||
        (inputs[1] < 0) == p->keeps || (!p->keeps && (a->rotary || a->window)) || half < 0 || half * 2 > a->dim ||
        (a->rotary && (inputs[2] < 0 || (!half && inputs[3] < 0))))
        return refuse(api, "Fused: an attention of these sizes is not known");
    to->turning = -1, to->mask = p->keeps ? -1 : inputs[6];
    if (a->rotary && half) {
        const void *frequencies;
        Status status = constant(api, info, inputs[2], half, TYPE_FLOAT, TYPE_FLOAT, &frequencies, NULL);
        if (status) return status;
        to->turning = turning_of(p, (Turning){frequencies, half, factors[2]});
    }
    for (int which = 0; which < 2; which++) {
        to->past[which] = inputs[which], to->tables[which] = inputs[2 + which];
        if (inputs[4 + which] < 0) continue;
        const void *scales;
        const size_t channels = (size_t)a->kv_heads * a->dim;
        Status status = constant(api, info, inputs[4 + which], channels, TYPE_FLOAT, TYPE_FLOAT, &scales, NULL);
        to->step[which] = 1;
        if (status) {
            ((void (*)(void *))api[RELEASE_STATUS])(status);
            status = constant(api, info, inputs[4 + which], 1, TYPE_FLOAT, TYPE_FLOAT, &scales, NULL);
            if (status) return status;
            to->step[which] = 0;
        }
        to->scales[which] = scales;
    }
    return NULL;
}

static pthread_mutex_t tables_lock = PTHREAD_MUTEX_INITIALIZER;
static Table *tables;

/* FNV-1a of 64 bytes at each of 16 places. */
static uint64_t sample_of(const uint8_t *codes, size_t size) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t place = 0; place < 16; place++)
        for (size_t i = 0, from = size / 16 * place; i < 64 && from + i < size; i++)
            hash = (hash ^ codes[from + i]) * 0x100000001b3u;
    return hash;
}

static int is_of(const Table *table, const Weights *w, const Files *files) {
    const Weights *own = &table->weights;
    if (table->codes != w->codes || own->k != w->k || own->n != w->n || own->bits != w->bits ||
        own->block != w->block || own->tile != w->tile)
        return 0;
    const size_t size = w->n * row_bytes(w);
    const uint64_t sample = sample_of(w->codes, size);
    forget(files, w->codes, size);
    return sample == table->sample;
}

/* The table of these weights, packed once for all nodes that read it; where no node has it yet it is made if
 * `wanted`. NULL: there is none. */
static Table *share_table(const Weights *w, int wanted, const Files *files) {
    pthread_mutex_lock(&tables_lock);
    Table *table = tables;
    while (table && !is_of(table, w, files)) table = table->next;
    if (table) table->users++;
    else if (wanted && (table = calloc(1, sizeof *table))) {
        const uint64_t sample = sample_of(w->codes, w->n * row_bytes(w));
        *table = (Table){tables, w->codes, sample, *w, aligned_alloc(64, aligned(packed_bytes(w))), 1};
        if (table->memory) {
            pack(&table->weights, files, table->memory);
            tables = table;
        } else {
            free(table);
            table = NULL;
        }
    }
    pthread_mutex_unlock(&tables_lock);
    return table;
}

static void leave_table(Table *table) {
    pthread_mutex_lock(&tables_lock);
    if (--table->users == 0) {
        Table **at = &tables;
        while (*at != table) at = &(*at)->next;
        *at = table->next;
        free(table->memory), free(table);
    }
    pthread_mutex_unlock(&tables_lock);
}

static void destroy(void *kernel) {
    Program *p = kernel;
    for (int i = 0; p->table && i < p->products; i++)
        if (p->table[i]) leave_table(p->table[i]);
    free(p->table);
    free(p->channels), free(p->rounded_rows);
    free(p->widths), free(p->outputs), free(p->rounded), free(p->stage);
    free(p->slot), free(p->passing), free(p->slot_size);
    free(p->weights), free(p->packed), free(p->step), free(p->phase), free(p->keeping),
        free(p->turning), free(p);
}

static int is_value(const Program *p, int v) { return v >= 0 && v < p->values; }

/* The column that the next stage has to begin with, where a product has written a part of a value; 0: none. */
static int next_column(const Program *p, const Stage *s) {
    if (!s || s->kind != PRODUCT) return 0;
    const int end = s->column + p->weights[s->place].n;
    return end < p->widths[s->out] ? end : 0;
}

/* Whether a stage's values are there and have the sizes that its kind asks for. What is read is an input or was
 * written before, and nothing is written twice: until `plan` needs them, `rounded` holds the marks. */
static int fits(Program *p, const Stage *s, const Stage *before) {
    if ((int)s->kind < 0 || s->kind >= KINDS || !is_value(p, s->out)) return 0;
    const int column = next_column(p, before);
    if (column && (s->kind != PRODUCT || s->a != before->a || s->out != before->out || s->column != column)) return 0;
    if (s->kind == LOOKUP) {
        if (s->a != -1 || s->b != -1 || s->second != -1 || s->place < 0 || s->place >= p->products || s->column < 0)
            return 0;
        const Weights *w = &p->weights[s->place];
        if (p->ids < 0 || !w->block || w->k != p->widths[s->out]) return 0;
        const int again = before && before->kind == LOOKUP && before->out == s->out;
        return again ? s->column > 0 : s->column == 0 && !p->rounded[s->out]++;
    }
    if (!is_value(p, s->a)) return 0;
    if ((s->b != -1 && !is_value(p, s->b)) || (s->second != -1 && !is_value(p, s->second))) return 0;
    if ((s->a >= p->inputs && !p->rounded[s->a]) || (s->b >= p->inputs && !p->rounded[s->b])) return 0;
    if (s->second == s->out || (p->rounded[s->out]++ && !column)) return 0;
    if (s->second >= 0 && p->rounded[s->second]++) return 0;
    const int in = p->widths[s->a], out = p->widths[s->out];
    if (s->kind == PRODUCT) {
        if (s->place < 0 || s->place >= p->products || s->b != -1 || s->second != -1) return 0;
        if (!column && s->column) return 0;
        return p->weights[s->place].k == in && p->weights[s->place].n <= out - s->column;
    }
    if (s->kind == ATTENTION) {
        if (s->place < 0 || s->place >= p->attentions || s->b != -1 || s->second != -1 || s->a < p->inputs) return 0;
        const Attention *a = &p->keeping[s->place].shape;
        return in == (a->heads + 2 * a->kv_heads) * a->dim && out == a->heads * a->dim;
    }
    if (in != out || (s->b >= 0 && p->widths[s->b] != out)) return 0;
    if (s->kind == NORM) return s->second < 0 || p->widths[s->second] == out;
    if (s->kind == GAIN && s->b >= 0) return 0;
    return s->second < 0 && (s->kind == TIMES || s->kind == PLUS) == (s->b >= 0);
}

static Phase *next_phase(Program *p, enum Share share) {
    p->phase[p->phases] = (Phase){.share = share, .first = p->steps};
    return &p->phase[p->phases++];
}

static void add_step(Program *p, Phase *phase, enum Part part, int stage, int rounded) {
    p->step[p->steps++] = (Step){part, stage, rounded};
    phase->count++;
}

/* Stages in their order become phases; before a product its activations are rounded, once. `written` says which phase
 * makes each value and its codes, three a value; of inputs -1. */
static void plan_phases(Program *p, int *written) {
    for (int v = 0; v < 3 * p->values; v++) written[v] = -1;
    for (int i = 0; i < p->stages; i++) {
        Stage *s = &p->stage[i];
        Phase *last = p->phases ? &p->phase[p->phases - 1] : NULL;
        if (s->kind == PRODUCT) {
            const int in_groups = p->weights[s->place].block > 0;
            int *const rounded = (in_groups ? p->rounded : p->rounded_rows) + s->a;
            if (!*rounded) {
                if (!last || last->share != ROWS) last = next_phase(p, ROWS);
                add_step(p, last, in_groups ? ROUND : ROUND_ROWS, -1, s->a);
                *rounded = p->phases; /* one more than its phase */
                written[3 * s->a + (in_groups ? 1 : 2)] = p->phases - 1;
            }
            if (last->share != COLUMNS || *rounded == p->phases) last = next_phase(p, COLUMNS);
        } else if (!last || last->share != ROWS) {
            last = next_phase(p, ROWS);
        }
        if (s->kind == ATTENTION) {
            add_step(p, last, STORE, i, -1);
            add_step(p, next_phase(p, ATTEND), WHOLE, i, -1);
            written[3 * s->out] = p->phases - 1;
            add_step(p, next_phase(p, ROWS), COMBINE, i, -1);
            continue;
        }
        add_step(p, last, WHOLE, i, -1);
        written[3 * s->out] = p->phases - 1;
        if (s->second >= 0) written[3 * s->second] = p->phases - 1;
    }
}

/* The last phase that reads each value and its codes; at the least that which writes them. */
static void plan_ends(const Program *p, const int *written, int *until) {
    memcpy(until, written, sizeof(int) * 3 * p->values);
    for (int i = 0; i < p->phases; i++)
        for (int j = 0; j < p->phase[i].count; j++) {
            const Step *step = &p->step[p->phase[i].first + j];
            const Stage *s = step->stage < 0 ? NULL : &p->stage[step->stage];
            if (!s) until[3 * step->rounded] = i;
            else if (s->kind == PRODUCT) until[3 * s->a + (p->weights[s->place].block ? 1 : 2)] = i;
            else if (s->a >= 0) until[3 * s->a] = i;
            if (s && s->b >= 0) until[3 * s->b] = i;
            if (step->part == COMBINE) until[3 * s->out] = i;
        }
}

/* Whether an attention lies between two phases, or one of them is. */
static int attention_within(const Program *p, int from, int until) {
    for (int i = from; i <= until; i++)
        if (p->phase[i].share == ATTEND) return 1;
    return 0;
}

static size_t bytes_a_row(const Program *p, int thing) {
    const size_t width = p->widths[thing / 3], groups = (width + GROUP - 1) / GROUP, words = (width + 3) / 4;
    if (thing % 3 == 0) return width * sizeof(float);
    return thing % 3 == 1 ? groups * (GROUP + 3 * sizeof(float)) : words * 4 + 2 * sizeof(float);
}

static int is_output(const Program *p, int value) {
    for (int i = 0; i < p->output_count; i++)
        if (p->outputs[i] == value) return 1;
    return 0;
}

/* Phases, and a place in scratch memory for all that they write: it takes over that of something that no phase from its
 * own on reads. Where rows are shared out, those of others may be several phases behind, up to the next attention, and
 * what is not in a thread's own room has to wait for that. 0: there is not enough memory to do it. */
static int plan(Program *p) {
    const int things = 3 * p->values;
    int *written = calloc(things, sizeof *written), *until = calloc(things, sizeof *until);
    int *free_from = calloc(things + 1, sizeof *free_from);
    const int enough = written && until && free_from;
    if (enough) {
        plan_phases(p, written);
        plan_ends(p, written, until);
    }
    for (int i = 0; enough && i < things; i++) p->slot[i] = -1;
    for (int i = 0; enough && i < p->phases; i++)
        for (int thing = 0; thing < things; thing++) {
            if (written[thing] != i || (thing % 3 == 0 && is_output(p, thing / 3))) continue;
            const int passing = !attention_within(p, i, until[thing]);
            int place = 0;
            while (place < p->slots && (free_from[place] > i || p->passing[place] != passing)) place++;
            if (place == p->slots) p->passing[p->slots++] = passing;
            p->slot[thing] = place;
            int end = until[thing];
            while (!passing && p->phase[end].share != ATTEND && end + 1 < p->phases) end++;
            free_from[place] = end + 1;
            if (bytes_a_row(p, thing) > p->slot_size[place]) p->slot_size[place] = bytes_a_row(p, thing);
        }
    free(written), free(until), free(free_from);
    return enough && p->slots <= MOST;
}

static Status create(const CustomOp *op, Api api, const void *info, void **kernel) {
    (void)op;
    Program *p = calloc(1, sizeof *p);
    int *stages = NULL, *weights = NULL, *attentions = NULL, *lengths = NULL, *ids = NULL, *tiles = NULL;
    int stage_ints = 0, weight_ints = 0, attention_ints = 0, length_ints = 0, id_ints = 0, tile_ints = 0;
    float *epsilons = NULL, *factors = NULL;
    Files files = {NULL, 0};
    const char *const unfit = "Fused: the node's attributes do not fit together";
    Status status;
    if (!p) return CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
    p->api = api, p->wide = has_vnni() && atomic_load(&vnni_allowed);
    p->pairs = p->wide && has_bf16();
    if ((status = read_ints(api, info, "widths", &p->widths, &p->values))) goto failed;
    if ((status = read_ints(api, info, "outputs", &p->outputs, &p->output_count))) goto failed;
    if ((status = read_ints(api, info, "stages", &stages, &stage_ints))) goto failed;
    if ((status = read_ints(api, info, "weights", &weights, &weight_ints))) goto failed;
    if ((status = read_ints(api, info, "attentions", &attentions, &attention_ints))) goto failed;
    if ((status = read_ints(api, info, "lengths", &lengths, &length_ints))) goto failed;
    if ((status = read_ints(api, info, "ids", &ids, &id_ints))) goto failed;
    /* Rows of weights side by side in constants that are packed already; without the attribute none is. */
    if ((status = read_ints(api, info, "tile", &tiles, &tile_ints)))
        ((void (*)(void *))api[RELEASE_STATUS])(status);
    const int tile = tile_ints ? tiles[0] : 0;
    free(tiles);
    if (tile && tile != (p->wide ? WIDE_TILE : TILE)) {
        status = refuse(api, "Fused: the weights are packed for other instructions");
        goto failed;
    }
    p->ids = id_ints ? ids[0] : -1;
    p->attentions = attention_ints / ATTENTION_INTS;
    size_t factor_count = FACTORS * (size_t)p->attentions;
    factors = calloc(factor_count + 1, sizeof *factors);
    p->keeping = calloc(p->attentions + 1, sizeof *p->keeping);
    p->turning = calloc(p->attentions + 1, sizeof *p->turning);
    p->stages = stage_ints / STAGE_INTS, p->products = weight_ints / WEIGHT_INTS;
    size_t epsilon_count = p->stages;
    epsilons = calloc(p->stages + 1, sizeof *epsilons);
    p->rounded = calloc(p->values + 1, sizeof(int)), p->rounded_rows = calloc(p->values + 1, sizeof(int));
    p->slot = calloc(3 * p->values + 1, sizeof(int)), p->passing = calloc(3 * p->values + 1, sizeof(int));
    p->slot_size = calloc(3 * p->values + 1, sizeof *p->slot_size);
    p->stage = calloc(p->stages + 1, sizeof *p->stage);
    p->table = calloc(p->products + 1, sizeof *p->table);
    p->weights = calloc(p->products + 1, sizeof *p->weights);
    p->channels = calloc(p->products + 1, sizeof *p->channels);
    p->step = calloc(3 * p->stages + 1, sizeof *p->step), p->phase = calloc(3 * p->stages + 1, sizeof *p->phase);
    if (!factors || !p->keeping || !p->turning || !epsilons || !p->rounded || !p->slot || !p->passing ||
        !p->slot_size || !p->stage ||
        !p->table || !p->weights || !p->channels || !p->rounded_rows || !p->step || !p->phase) {
        status = CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
        goto failed;
    }
    if ((status = CALL(api, ATTRIBUTE_FLOATS, info, "epsilons", epsilons, &epsilon_count))) goto failed;
    if (p->attentions && (status = CALL(api, ATTRIBUTE_FLOATS, info, "factors", factors, &factor_count))) goto failed;
    status = refuse(api, unfit);
    if (attention_ints % ATTENTION_INTS || factor_count != FACTORS * (size_t)p->attentions) goto failed;
    p->keeps = length_ints > 0;
    if (p->keeps && (length_ints != 2 || lengths[0] < 0 || lengths[1] < 0)) goto failed;
    if (p->keeps) memcpy(p->lengths, lengths, sizeof p->lengths);
    if (id_ints > 1 || (id_ints && ids[0] < 0)) goto failed;
    if (p->values < 1 || p->values > MOST || p->output_count < 1 || p->stages < 1 || p->stages > MOST ||
        stage_ints % STAGE_INTS || weight_ints % WEIGHT_INTS || epsilon_count != (size_t)p->stages)
        goto failed;
    for (int v = 0; v < p->values; v++)
        if (p->widths[v] < 1 || p->widths[v] > MOST_WIDTH) goto failed;
    for (int i = 0; i < p->output_count; i++)
        if (!is_value(p, p->outputs[i])) goto failed;
    size_t node_inputs = 0, node_outputs = 0;
    ((void (*)(void *))api[RELEASE_STATUS])(status);
    if ((status = CALL(api, NODE_INPUT_COUNT, info, &node_inputs))) goto failed;
    if ((status = CALL(api, NODE_OUTPUT_COUNT, info, &node_outputs))) goto failed;
    status = refuse(api, unfit);
    if (node_outputs != (size_t)p->output_count + 2 * p->attentions * p->keeps) goto failed;
    for (int i = 0; i < attention_ints; i++) /* those from the seventh of each on are inputs */
        if (i % ATTENTION_INTS >= 6 && attentions[i] >= (int)node_inputs) goto failed;
    for (int i = 0; i < length_ints; i++)
        if (lengths[i] >= (int)node_inputs) goto failed;
    if (p->ids >= (int)node_inputs) goto failed;
    /* Values that no stage writes are inputs, and come first. */
    p->inputs = p->values;
    for (int i = 0; i < p->stages; i++) {
        const int *from = stages + i * STAGE_INTS;
        if (is_value(p, from[3]) && from[3] < p->inputs) p->inputs = from[3];
        if (is_value(p, from[4]) && from[4] < p->inputs) p->inputs = from[4];
    }
    if ((p->inputs < 1 && p->ids < 0) || (size_t)p->inputs > node_inputs) goto failed;
    for (int i = 0; i < p->output_count; i++)
        if (p->outputs[i] < p->inputs) goto failed;
    if (!tile) files = mapped_files();
    size_t packed = 0;
    for (int i = 0; i < p->products; i++) {
        ((void (*)(void *))api[RELEASE_STATUS])(status);
        Weights *w = &p->weights[i];
        const int *from = weights + i * WEIGHT_INTS;
        int looked_up = 0;
        if (from[7] == 0) {
            Channels *c = &p->channels[i];
            if ((status = read_channels(api, info, from, p->wide, tile > 0, c))) goto failed;
            *w = (Weights){.k = c->k, .n = c->n, .bits = 8, .tile = p->wide ? WIDE_TILE : TILE};
            if (!tile) packed += aligned(channel_bytes(c));
            p->per_row += (int64_t)w->k * w->n;
            status = refuse(api, unfit);
            continue;
        }
        if ((status = read_weights(api, info, from, p->wide, tile > 0, w))) goto failed;
        for (int j = 0; j < p->stages; j++)
            looked_up |= stages[j * STAGE_INTS] == LOOKUP && stages[j * STAGE_INTS + 5] == i;
        if (!tile && (p->table[i] = share_table(w, looked_up, &files))) {
            const float *bias = w->bias;
            *w = p->table[i]->weights, w->bias = bias;
        } else if (!tile) {
            packed += aligned(packed_bytes(w));
        }
        const size_t panel = p->wide ? 0 : panel_bytes(w->k);
        if (panel > p->panel) p->panel = aligned(panel);
        if (!looked_up) p->per_row += (int64_t)w->k * w->n;
        status = refuse(api, unfit);
    }
    if (packed && !(p->packed = aligned_alloc(64, packed))) {
        ((void (*)(void *))api[RELEASE_STATUS])(status);
        status = CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
        goto failed;
    }
    packed = 0;
    for (int i = 0; i < p->products && !tile; i++) {
        if (p->table[i]) continue;
        const Weights *w = &p->weights[i];
        const size_t size = aligned(w->block ? packed_bytes(w) : channel_bytes(&p->channels[i]));
        if (w->block) pack(&p->weights[i], &files, p->packed + packed);
        else if (!pack_channels_of_file(&p->channels[i], &files, p->packed + packed)) {
            status = CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
            goto failed;
        }
        packed += size;
    }
    for (int i = 0; i < p->attentions; i++) {
        ((void (*)(void *))api[RELEASE_STATUS])(status);
        if ((status = read_attention(p, info, attentions + i * ATTENTION_INTS, factors + FACTORS * i,
                                     &p->keeping[i])))
            goto failed;
        status = refuse(api, unfit);
    }
    for (int i = 0; i < p->stages; i++) {
        Stage *s = &p->stage[i];
        const int *from = stages + i * STAGE_INTS;
        *s = (Stage){from[0], from[1], from[2], from[3], from[4], from[5], from[6], NULL, NULL, epsilons[i]};
        if (!fits(p, s, i ? s - 1 : NULL)) goto failed;
        if (i == p->stages - 1 && next_column(p, s)) goto failed;
        if (s->kind != NORM && s->kind != CENTRED_NORM && s->kind != GAIN) continue;
        const void *gain, *bias = NULL;
        const size_t width = p->widths[s->out];
        ((void (*)(void *))api[RELEASE_STATUS])(status);
        if ((status = constant(api, info, from[5], width, TYPE_FLOAT, TYPE_FLOAT, &gain, NULL))) goto failed;
        if (from[6] >= 0 && (status = constant(api, info, from[6], width, TYPE_FLOAT, TYPE_FLOAT, &bias, NULL)))
            goto failed;
        s->gain = gain, s->bias = bias;
        status = refuse(api, unfit);
    }
    for (int v = p->inputs; v < p->values; v++)
        if (!p->rounded[v]) goto failed;
    memset(p->rounded, 0, sizeof(int) * p->values);
    ((void (*)(void *))api[RELEASE_STATUS])(status);
    if (!plan(p)) {
        status = CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
        goto failed;
    }
    free(files.range), free(stages), free(weights), free(epsilons), free(attentions), free(lengths), free(ids);
    free(factors);
    *kernel = p;
    return NULL;
failed:
    free(files.range), free(stages), free(weights), free(epsilons), free(attentions), free(lengths), free(ids);
    free(factors);
    destroy(p);
    return status;
}

/* ---- packing once and for all ---- */

/* Bytes of the codes, of the scales and of the zero points of packed weights, as gemini_pack writes them one behind the
 * other; with one scale a column the codes are all there is. 0: of such sizes there are none. */
__attribute__((visibility("default"))) int gemini_packed_bytes(int k, int n, int bits, int block, int tile, int half,
                                                               int zeros, size_t bytes[3]) {
    if (k < 1 || n < 1 || k > MOST_WIDTH || n > MOST_WIDTH || (tile != TILE && tile != WIDE_TILE)) return 0;
    bytes[1] = bytes[2] = 0;
    if (!block) {
        const Channels w = {.k = k, .n = n, .words = (k + 3) / 4, .side = tile == TILE ? CHANNELS : WIDE_CHANNELS};
        bytes[0] = channel_bytes(&w);
        return 1;
    }
    if ((bits != 4 && bits != 8) || block < GROUP || (block & (block - 1))) return 0;
    const Weights w = weights_of(k, n, bits, block, tile);
    bytes[0] = tile_bytes(&w), bytes[1] = tile_blocks(&w) * (half ? 2 : 4), bytes[2] = zeros ? tile_blocks(&w) : 0;
    return 1;
}

/* Weights of a graph as these kernels read them in tiles of so many rows, into `memory`, aligned to 64. 0: there is not
 * enough memory to do it. */
__attribute__((visibility("default"))) int gemini_pack(int k, int n, int bits, int block, int tile, int half,
                                                       const void *codes, const void *scales, const void *zeros,
                                                       void *memory) {
    if (!block) {
        Channels w = {.codes = codes, .scales = scales, .k = k, .n = n, .words = (k + 3) / 4};
        w.side = tile == TILE ? CHANNELS : WIDE_CHANNELS;
        return pack_channels(&w, memory);
    }
    Weights w = weights_of(k, n, bits, block, tile);
    w.codes = codes, w.scales = scales, w.zeros = zeros, w.half_scales = half;
    begin_packing(&w, memory);
    pack_codes(&w, 0, tiles_of(&w));
    return 1;
}

/* ---- the operator ---- */

static const char *op_name(const CustomOp *op) { return (void)op, "Fused"; }
static const char *op_provider(const CustomOp *op) { return (void)op, NULL; }
static int any_type(const CustomOp *op, size_t i) { return (void)op, (void)i, TYPE_ANY; }
static size_t one(const CustomOp *op) { return (void)op, 1; }
static int variadic(const CustomOp *op, size_t i) { return (void)op, (void)i, VARIADIC; }
static int on_host(const CustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int at_least_one(const CustomOp *op) { return (void)op, 1; }
static int no(const CustomOp *op) { return (void)op, 0; }
static int any_version(const CustomOp *op) { return (void)op, 1; }
static int last_version(const CustomOp *op) { return (void)op, INT32_MAX; }

static const CustomOp FUSED = {
    .version = API_VERSION,
    .name = op_name,
    .provider = op_provider,
    .input_type = any_type,
    .input_count = one,
    .output_type = any_type,
    .output_count = one,
    .destroy = destroy,
    .input_kind = variadic,
    .output_kind = variadic,
    .memory = on_host,
    .inputs_at_least = at_least_one,
    .inputs_alike = no,
    .outputs_at_least = at_least_one,
    .outputs_alike = no,
    .create_checked = create,
    .compute_checked = compute,
    .first_version = any_version,
    .last_version = last_version,
};

/* What onnxruntime calls when a session's options name this library. */
__attribute__((visibility("default"))) Status RegisterCustomOps(void *options, const ApiBase *base) {
    Api api = base->get_api(API_VERSION);
    void *domain;
    Status status = CALL(api, CREATE_DOMAIN, "gemini", &domain);
    if (!status) status = CALL(api, DOMAIN_ADD, domain, &FUSED);
    if (!status) status = CALL(api, ADD_DOMAIN, options, domain);
    return status; /* the domain stays for as long as the process: sessions refer to it */
}

/* 0: this processor cannot run the kernels; 1: it can; 2: it can, and has AVX-VNNI alone, which onnxruntime's kernels
 * use and these do not; 3: it can, with AVX-512 VNNI; 4: with that and AVX-512 BF16. */
__attribute__((visibility("default"))) int gemini_processor(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return has_bf16() ? 4 : has_vnni() ? 3 : __builtin_cpu_supports("avxvnni") ? 2 : 1;
}
