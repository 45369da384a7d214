/* The operator Fused of the domain gemini: a run of products and of what stands between them, as one node.
 *
 * onnxruntime hands each node to its threads anew, and most of what a decoder does for one token is too short for
 * that. Here the threads stay for a whole list of stages. Stages are grouped into phases: in some every row of
 * activations goes its own way (norms, activations, rounding to 8 bits), in the others columns of products are
 * shared out. A thread takes pieces of a phase until none is left and goes on when all are done; since nobody
 * waits for a piece that no running thread has taken, it does not matter how many threads come, or when.
 *
 * `gemini.export.fusions.fuse_stages` writes the attributes:
 *   widths   (values): last dimension of each value; the first ones are the node's inputs
 *   outputs  which values are the node's outputs, in their order
 *   stages   (stages, 7): kind, two values read (-1: none), value written, second value written (-1: none), and
 *            for a product its place in `weights`, for a norm the inputs that hold its gain and bias (-1: none)
 *   weights  (products, 8): inputs that hold codes, scales, zero points, bias (-1: none), K, N, bits, block size
 *   epsilons (stages): of norms
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <sched.h>

#include "kernels.h"
#include "ort.h"

enum Kind { PRODUCT, NORM, CENTRED_NORM, TIMES, PLUS, SILU, GELU, GELU_TANH, RELU, KINDS };
enum { STAGE_INTS = 7, WEIGHT_INTS = 8, MOST = 4096 };
enum { ALONE = 1 << 17 }; /* products of fewer multiplications are not worth a second thread */

typedef struct {
    enum Kind kind;
    int a, b, out, second; /* values */
    int weights;
    const float *gain, *bias;
    float epsilon;
} Stage;

typedef struct {
    int products;          /* whether columns are shared out, or rows */
    int first, count;      /* in `order` */
} Phase;

/* What a phase of rows does: a stage, or the rounding of a value to 8 bits. */
typedef struct {
    int stage, rounded; /* one of them is -1 */
} Step;

typedef struct {
    Api api;
    int inputs, values, output_count, stages, products, steps, phases;
    int *widths, *outputs, *rounded; /* rounded[v]: whether v is wanted in 8 bits */
    int *slot, slots, *slot_width;   /* of values that lie in scratch memory; -1: an input or output */
    Stage *stage;
    Weights *weights;
    void **owned; /* what pad_last_row made */
    Step *step;
    Phase *phase;
    size_t panel;
    int64_t per_row; /* multiplications */
} Program;

typedef struct {
    const Program *program;
    int rows;
    float **value;
    Rows8 *rows8;
    uint8_t *panels;
    atomic_int *next, *done, panels_taken;
    int *pieces;
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

static void run_step(const Run *run, const Step *step, int row) {
    const Program *p = run->program;
    if (step->rounded >= 0) {
        const int v = step->rounded;
        quantize_row(run->value[v] + (size_t)row * p->widths[v], &run->rows8[v], row);
        return;
    }
    const Stage *s = &p->stage[step->stage];
    const size_t width = p->widths[s->out];
    const float *a = run->value[s->a] + row * width, *b = s->b < 0 ? NULL : run->value[s->b] + row * width;
    float *out = run->value[s->out] + row * width;
    switch (s->kind) {
    case NORM:
        rms_norm(a, b, s->gain, s->epsilon, (int)width, s->second < 0 ? NULL : run->value[s->second] + row * width,
                 out);
        break;
    case CENTRED_NORM: layer_norm(a, s->gain, s->bias, s->epsilon, (int)width, out); break;
    case SILU: silu(a, (int)width, out); break;
    case GELU: gelu(a, (int)width, out); break;
    case GELU_TANH: gelu_tanh(a, (int)width, out); break;
    case RELU: relu(a, (int)width, out); break;
    case TIMES: times(a, b, (int)width, out); break;
    case PLUS: plus(a, b, (int)width, out); break;
    default: break;
    }
}

/* Columns of the products of a phase are numbered one product after the other, in pieces of whole panels. */
static void run_columns(const Run *run, const Phase *phase, int piece, void *panel) {
    const Program *p = run->program;
    int before = 0;
    for (int i = 0; i < phase->count; i++) {
        const Stage *s = &p->stage[p->step[phase->first + i].stage];
        const Weights *w = &p->weights[s->weights];
        const int size = column_piece(w->n, run->rows), pieces = (w->n + size - 1) / size;
        if (piece < before + pieces) {
            const int first = (piece - before) * size, last = first + size < w->n ? first + size : w->n;
            multiply(w, &run->rows8[s->a], run->rows, first, last, run->value[s->out], w->n, panel);
            return;
        }
        before += pieces;
    }
}

static void work(void *data, size_t task) {
    Run *run = data;
    (void)task;
    const Program *p = run->program;
    void *panel = NULL;
    for (int i = 0; i < p->phases; i++) {
        const Phase *phase = &p->phase[i];
        const int pieces = run->pieces[i];
        int piece;
        while ((piece = atomic_fetch_add_explicit(&run->next[i], 1, memory_order_relaxed)) < pieces) {
            if (phase->products) {
                if (!panel) panel = run->panels + p->panel * atomic_fetch_add(&run->panels_taken, 1);
                run_columns(run, phase, piece, panel);
            } else {
                const int each = (run->rows + pieces - 1) / pieces, first = piece * each;
                const int last = first + each < run->rows ? first + each : run->rows;
                for (int row = first; row < last; row++)
                    for (int j = 0; j < phase->count; j++) run_step(run, &p->step[phase->first + j], row);
            }
            atomic_fetch_add_explicit(&run->done[i], 1, memory_order_release);
        }
        for (int turns = 0; atomic_load_explicit(&run->done[i], memory_order_acquire) < pieces; turns++) {
            __builtin_ia32_pause();
            if (turns > 20000) sched_yield(); /* whoever has the last piece may have lost its processor */
        }
    }
}

static Status compute(void *kernel, void *context) {
    const Program *p = kernel;
    Api api = p->api;
    Status status;
    int64_t dims[8];
    size_t rank = 0;
    int64_t rows = -1;
    const int offered = atomic_load(&threads);
    float *value[MOST];
    for (int v = 0; v < p->values; v++) value[v] = NULL;
    for (int v = 0; v < p->inputs; v++) {
        const void *tensor;
        void *shape;
        size_t count;
        if ((status = CALL(api, CONTEXT_INPUT, context, (size_t)v, &tensor))) return status;
        if ((status = CALL(api, TYPE_AND_SHAPE, tensor, &shape))) return status;
        status = CALL(api, ELEMENT_COUNT, shape, &count);
        if (!status && v == 0) {
            status = CALL(api, DIMENSION_COUNT, shape, &rank);
            if (!status && rank >= 1 && rank <= 8) status = CALL(api, DIMENSIONS, shape, dims, rank);
        }
        ((void (*)(void *))api[RELEASE_SHAPE])(shape);
        if (status) return status;
        if (v == 0) rows = (int64_t)(count / p->widths[0]);
        if (rank < 1 || rank > 8 || (int64_t)count != rows * p->widths[v] || rows > INT32_MAX / 2)
            return CALL(api, CREATE_STATUS, INVALID_ARGUMENT, "Fused: an input has another shape than the node says");
        if ((status = CALL(api, TENSOR_DATA, tensor, (void **)&value[v]))) return status;
    }
    for (int i = 0; i < p->output_count; i++) {
        void *tensor;
        dims[rank - 1] = p->widths[p->outputs[i]];
        if ((status = CALL(api, CONTEXT_OUTPUT, context, (size_t)i, dims, rank, &tensor))) return status;
        if ((status = CALL(api, TENSOR_DATA, tensor, (void **)&value[p->outputs[i]]))) return status;
    }
    if (rows == 0) return NULL;

    Run run = {.program = p, .rows = (int)rows, .value = value};
    const int many = rows >= PANEL_ROWS;
    size_t size = aligned(sizeof(Rows8) * p->values) + 3 * aligned(sizeof(int) * p->phases);
    for (int s = 0; s < p->slots; s++) size += aligned(rows * p->slot_width[s] * sizeof(float));
    for (int v = 0; v < p->values; v++)
        if (p->rounded[v]) {
            const size_t padded = padded_width(p->widths[v]);
            size += aligned(rows * padded) * 2 + aligned(rows * padded / 2) +
                    aligned(rows * sum_width(p->widths[v]) * sizeof(float));
        }
    size += many ? aligned(p->panel) * (offered + 1) : 0;
    Arena *arena = take_arena(size);
    if (!arena) return CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
    uint8_t *at = arena->bytes;
#define TAKE(bytes) (at += aligned(bytes), at - aligned(bytes))
    run.rows8 = (Rows8 *)TAKE(sizeof(Rows8) * p->values);
    run.next = (atomic_int *)TAKE(sizeof(int) * p->phases);
    run.done = (atomic_int *)TAKE(sizeof(int) * p->phases);
    run.pieces = (int *)TAKE(sizeof(int) * p->phases);
    float *slots[MOST];
    for (int s = 0; s < p->slots; s++) slots[s] = (float *)TAKE(rows * p->slot_width[s] * sizeof(float));
    for (int v = 0; v < p->values; v++) {
        if (p->slot[v] >= 0) value[v] = slots[p->slot[v]];
        if (!p->rounded[v]) continue;
        const int width = p->widths[v], padded = padded_width(width), sums = sum_width(width);
        run.rows8[v] = (Rows8){.k = width, .padded = padded, .sum_width = sums};
        run.rows8[v].plain = (int8_t *)TAKE(rows * padded);
        run.rows8[v].split = (int8_t *)TAKE(rows * padded);
        run.rows8[v].scales = (float *)TAKE(rows * padded / 2);
        run.rows8[v].sums = (float *)TAKE(rows * sums * sizeof(float));
    }
    run.panels = at;
    int most = 1;
    for (int i = 0; i < p->phases; i++) {
        const Phase *phase = &p->phase[i];
        int pieces = 0;
        if (phase->products)
            for (int j = 0; j < phase->count; j++) {
                const Weights *w = &p->weights[p->stage[p->step[phase->first + j].stage].weights];
                const int piece = column_piece(w->n, (int)rows);
                pieces += (w->n + piece - 1) / piece;
            }
        else
            pieces = rows < 16 ? (int)(rows + 3) / 4 : (int)(rows + 15) / 16;
        run.pieces[i] = pieces;
        if (pieces > most) most = pieces;
        atomic_init(&run.next[i], 0);
        atomic_init(&run.done[i], 0);
    }
    const int tasks = p->per_row * rows < ALONE ? 1 : most < offered ? most : offered;
    status = NULL;
    if (tasks == 1) work(&run, 0);
    else status = CALL(api, PARALLEL_FOR, context, work, (size_t)tasks, (size_t)0, &run);
    give_back(arena);
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

static Status read_weights(Program *p, const void *info, const int *from, Weights *w, void **owned) {
    Api api = p->api;
    const int k = from[4], n = from[5], bits = from[6], block = from[7];
    if (k < 1 || n < 1 || (bits != 4 && bits != 8) || block < GROUP || block > 1024 || (block & (block - 1)))
        return refuse(api, "Fused: weights of these sizes are not known");
    *w = (Weights){.k = k, .n = n, .bits = bits, .block = block, .blocks = (k + block - 1) / block};
    const size_t all = (size_t)n * w->blocks;
    const size_t zeros = bits == 8 ? all : (size_t)n * ((w->blocks + 1) / 2);
    int type;
    const void *data;
    Status status = constant(api, info, from[0], all * block * bits / 8, TYPE_UINT8, TYPE_UINT8, &data, NULL);
    if (status) return status;
    w->codes = data;
    if ((status = constant(api, info, from[1], all, TYPE_FLOAT, TYPE_FLOAT16, &w->scales, &type))) return status;
    w->half_scales = type == TYPE_FLOAT16;
    if (from[2] >= 0) {
        if ((status = constant(api, info, from[2], zeros, TYPE_UINT8, TYPE_UINT8, &data, NULL))) return status;
        w->zeros = data;
    }
    if (from[3] >= 0) {
        if ((status = constant(api, info, from[3], n, TYPE_FLOAT, TYPE_FLOAT, &data, NULL))) return status;
        w->bias = data;
    }
    *owned = pad_last_row(w);
    return *owned ? NULL : CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
}

static void destroy(void *kernel) {
    Program *p = kernel;
    for (int i = 0; p->owned && i < p->products; i++) free(p->owned[i]);
    free(p->widths), free(p->outputs), free(p->rounded), free(p->slot), free(p->slot_width), free(p->stage);
    free(p->weights), free(p->owned), free(p->step), free(p->phase), free(p);
}

static int is_value(const Program *p, int v) { return v >= 0 && v < p->values; }

/* Stages in their order become phases; before a product its activations are rounded, once. */
static void plan(Program *p) {
    int *written = calloc(p->values, sizeof *written); /* phase that makes each value; of inputs -1 */
    for (int v = 0; v < p->values; v++) written[v] = -1;
    for (int i = 0; i < p->stages; i++) {
        Stage *s = &p->stage[i];
        Phase *last = p->phases ? &p->phase[p->phases - 1] : NULL;
        if (s->kind == PRODUCT) {
            int fresh = 0; /* whether the rounding is a step of the last phase */
            if (!p->rounded[s->a]) {
                if (!last || last->products) {
                    last = &p->phase[p->phases++];
                    *last = (Phase){.products = 0, .first = p->steps};
                }
                p->step[p->steps++] = (Step){.stage = -1, .rounded = s->a};
                last->count++;
                p->rounded[s->a] = p->phases; /* one more than its phase */
                fresh = 1;
            }
            if (fresh || !last->products || p->rounded[s->a] == p->phases) {
                last = &p->phase[p->phases++];
                *last = (Phase){.products = 1, .first = p->steps};
            }
        } else if (!last || last->products) {
            last = &p->phase[p->phases++];
            *last = (Phase){.products = 0, .first = p->steps};
        }
        p->step[p->steps++] = (Step){.stage = i, .rounded = -1};
        last->count++;
        written[s->out] = p->phases - 1;
        if (s->second >= 0) written[s->second] = p->phases - 1;
    }
    /* Scratch memory: a value takes over the place of one that no phase from its own on reads. */
    int *until = calloc(p->values, sizeof *until), *free_from = calloc(p->values + 1, sizeof *free_from);
    for (int i = 0; i < p->phases; i++)
        for (int j = 0; j < p->phase[i].count; j++) {
            const Step *step = &p->step[p->phase[i].first + j];
            const Stage *s = step->stage < 0 ? NULL : &p->stage[step->stage];
            if (step->rounded >= 0) until[step->rounded] = i;
            if (s && s->kind != PRODUCT) until[s->a] = i;
            if (s && s->b >= 0) until[s->b] = i;
        }
    for (int v = 0; v < p->values; v++) p->slot[v] = -1;
    for (int i = 0; i < p->phases; i++)
        for (int v = p->inputs; v < p->values; v++) {
            if (written[v] != i) continue;
            int is_output = 0;
            for (int o = 0; o < p->output_count; o++) is_output |= p->outputs[o] == v;
            if (is_output) continue;
            int place = 0;
            while (place < p->slots && free_from[place] > i) place++;
            if (place == p->slots) p->slots++;
            p->slot[v] = place;
            free_from[place] = (until[v] > i ? until[v] : i) + 1;
            if (p->widths[v] > p->slot_width[place]) p->slot_width[place] = p->widths[v];
        }
    free(written), free(until), free(free_from);
}

static Status create(const CustomOp *op, Api api, const void *info, void **kernel) {
    (void)op;
    Program *p = calloc(1, sizeof *p);
    int *stages = NULL, *weights = NULL, stage_ints = 0, weight_ints = 0;
    float *epsilons = NULL;
    Status status;
    if (!p) return CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
    p->api = api;
    if ((status = read_ints(api, info, "widths", &p->widths, &p->values))) goto failed;
    if ((status = read_ints(api, info, "outputs", &p->outputs, &p->output_count))) goto failed;
    if ((status = read_ints(api, info, "stages", &stages, &stage_ints))) goto failed;
    if ((status = read_ints(api, info, "weights", &weights, &weight_ints))) goto failed;
    p->stages = stage_ints / STAGE_INTS, p->products = weight_ints / WEIGHT_INTS;
    size_t epsilon_count = p->stages;
    epsilons = calloc(p->stages + 1, sizeof *epsilons);
    p->rounded = calloc(p->values + 1, sizeof(int));
    p->slot = calloc(p->values + 1, sizeof(int)), p->slot_width = calloc(p->values + 1, sizeof(int));
    p->stage = calloc(p->stages + 1, sizeof *p->stage);
    p->weights = calloc(p->products + 1, sizeof *p->weights), p->owned = calloc(p->products + 1, sizeof(void *));
    p->step = calloc(2 * p->stages + 1, sizeof *p->step), p->phase = calloc(2 * p->stages + 1, sizeof *p->phase);
    if (!epsilons || !p->rounded || !p->slot || !p->slot_width || !p->stage || !p->weights || !p->owned || !p->step ||
        !p->phase) {
        status = CALL(api, CREATE_STATUS, FAIL, "Fused: there is not enough memory");
        goto failed;
    }
    if ((status = CALL(api, ATTRIBUTE_FLOATS, info, "epsilons", epsilons, &epsilon_count))) goto failed;
    status = refuse(api, "Fused: the node's attributes do not fit together");
    if (p->values < 2 || p->values > MOST || p->output_count < 1 || p->stages < 1 || p->stages > MOST ||
        stage_ints % STAGE_INTS || weight_ints % WEIGHT_INTS || epsilon_count != (size_t)p->stages)
        goto failed;
    for (int v = 0; v < p->values; v++)
        if (p->widths[v] < 1) goto failed;
    for (int i = 0; i < p->output_count; i++)
        if (!is_value(p, p->outputs[i])) goto failed;
    /* Values that no stage writes are inputs, and come first. */
    p->inputs = p->values;
    for (int i = 0; i < p->stages; i++) {
        const int *from = stages + i * STAGE_INTS;
        if (is_value(p, from[3]) && from[3] < p->inputs) p->inputs = from[3];
        if (is_value(p, from[4]) && from[4] < p->inputs) p->inputs = from[4];
    }
    for (int i = 0; i < p->output_count; i++)
        if (p->outputs[i] < p->inputs) goto failed;
    for (int i = 0; i < p->products; i++) {
        ((void (*)(void *))api[RELEASE_STATUS])(status);
        if ((status = read_weights(p, info, weights + i * WEIGHT_INTS, &p->weights[i], &p->owned[i]))) goto failed;
        const size_t panel = panel_bytes(p->weights[i].k);
        if (panel > p->panel) p->panel = aligned(panel);
        p->per_row += (int64_t)p->weights[i].k * p->weights[i].n;
        status = refuse(api, "Fused: the node's attributes do not fit together");
    }
    for (int i = 0; i < p->stages; i++) {
        const int *from = stages + i * STAGE_INTS;
        Stage *s = &p->stage[i];
        *s = (Stage){from[0], from[1], from[2], from[3], from[4], from[5], NULL, NULL, epsilons[i]};
        if (from[0] < 0 || from[0] >= KINDS || !is_value(p, s->a) || !is_value(p, s->out)) goto failed;
        if ((s->b != -1 && !is_value(p, s->b)) || (s->second != -1 && !is_value(p, s->second))) goto failed;
        const int width = p->widths[s->out];
        if (s->kind == PRODUCT) {
            if (s->weights < 0 || s->weights >= p->products || s->b != -1 || s->second != -1) goto failed;
            if (p->weights[s->weights].k != p->widths[s->a] || p->weights[s->weights].n != width) goto failed;
            continue;
        }
        if (p->widths[s->a] != width || (s->b >= 0 && p->widths[s->b] != width)) goto failed;
        if (s->second >= 0 && p->widths[s->second] != width) goto failed;
        if ((s->kind == TIMES || s->kind == PLUS) != (s->b >= 0) && s->kind != NORM) goto failed;
        if (s->kind != NORM && s->second >= 0) goto failed;
        if (s->kind == NORM || s->kind == CENTRED_NORM) {
            const void *gain, *bias = NULL;
            ((void (*)(void *))api[RELEASE_STATUS])(status);
            if ((status = constant(api, info, from[5], width, TYPE_FLOAT, TYPE_FLOAT, &gain, NULL))) goto failed;
            if (from[6] >= 0 && (status = constant(api, info, from[6], width, TYPE_FLOAT, TYPE_FLOAT, &bias, NULL)))
                goto failed;
            s->gain = gain, s->bias = bias;
            status = refuse(api, "Fused: the node's attributes do not fit together");
        }
    }
    ((void (*)(void *))api[RELEASE_STATUS])(status);
    plan(p);
    free(stages), free(weights), free(epsilons);
    *kernel = p;
    return NULL;
failed:
    free(stages), free(weights), free(epsilons);
    destroy(p);
    return status;
}

/* ---- the operator ---- */

static const char *op_name(const CustomOp *op) { return (void)op, "Fused"; }
static const char *op_provider(const CustomOp *op) { return (void)op, NULL; }
static int any_type(const CustomOp *op, size_t i) { return (void)op, (void)i, TYPE_ANY; }
static int float_type(const CustomOp *op, size_t i) { return (void)op, (void)i, TYPE_FLOAT; }
static size_t one(const CustomOp *op) { return (void)op, 1; }
static int variadic(const CustomOp *op, size_t i) { return (void)op, (void)i, VARIADIC; }
static int on_host(const CustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int at_least_one(const CustomOp *op) { return (void)op, 1; }
static int no(const CustomOp *op) { return (void)op, 0; }
static int yes(const CustomOp *op) { return (void)op, 1; }
static int any_version(const CustomOp *op) { return (void)op, 1; }
static int last_version(const CustomOp *op) { return (void)op, INT32_MAX; }

static const CustomOp FUSED = {
    .version = API_VERSION,
    .name = op_name,
    .provider = op_provider,
    .input_type = any_type,
    .input_count = one,
    .output_type = float_type,
    .output_count = one,
    .destroy = destroy,
    .input_kind = variadic,
    .output_kind = variadic,
    .memory = on_host,
    .inputs_at_least = at_least_one,
    .inputs_alike = no,
    .outputs_at_least = at_least_one,
    .outputs_alike = yes,
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

/* 0: this processor cannot run the kernels; 1: it can; 2: it can, and has instructions for sums of 8-bit products
 * that onnxruntime's kernels use and these do not. */
__attribute__((visibility("default"))) int gemini_processor(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni") ? 2 : 1;
}
