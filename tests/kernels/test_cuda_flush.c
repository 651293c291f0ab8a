/* The cache's writes on the GPU against the CPU: append and flush step by step, flush_exact of a whole prompt, unpack, and the reordering
 * of prefill rows. Pages must hold the same codes, scales and zeros (each side's record taken apart by its own layout's rule) and decode
 * to the same floats; slots, sinks and page tables the same bytes; states lie within a bound. Whatever is not owned
 * is poison and stays so. */
#include <float.h>

#include "kernels/cpu/page.h"
#include "kernels/cuda/page.cuh"
#include "kernels/cuda_rig.h"

enum {
    N_SEQS = 3, N_USED = 2, /* the slot between the two is nobody's */
    MAX_HEADS = 2, N_SLOTS = 3, N_KINDS = 10, LOCAL_BLOCKS = 3,
};
static const int used_seqs[N_USED] = {2, 0};
static struct rig rig;

struct world {
    char name[160];
    struct cache_layout layout;
    struct cache_layer layer; /* pointers unset */
    int number, n_blocks, tail, n_local, n_pages, table_stride;
    bool special, gated, write_table; /* special: odd values of all kinds, else normal ones */
    int64_t n;                        /* tokens of each sequence: n_blocks * KV_BLOCK + tail */
    int owner_offset[N_USED];
    uint16_t *kv[N_USED]; /* [head][K, V][n][d] */
    float *phi_k, *begin; /* begin: states before */
    double z[MAX_HEADS], vmax[MAX_HEADS]; /* largest sum_c |E_c| max_f |W_cf| of a token; largest |V| that enters S */
    struct twin pages, window, sink, states, table, in, params, k, v, kv_twin[N_USED], phi, gate, out_k, out_v;
};

static void *new_array(size_t n, size_t size) {
    void *out;
    REQUIRE(base_alloc(&out, n, size));
    return out;
}

static size_t row_bytes(const struct world *w) { return (size_t)w->layout.head_dim * 2; }
static size_t states_count(const struct world *w) {
    return (size_t)w->layer.features * (size_t)w->layout.head_dim + (size_t)w->layer.features;
}

static bool owns(const struct world *w, int used, int64_t block) { return cache_owns(&w->layout, block, w->owner_offset[used]); }

static int64_t block_of(const struct world *w, int used, int64_t local) {
    int cp = w->layout.cp_size;
    return ((w->layout.cp_rank - w->owner_offset[used]) % cp + cp) % cp + local * cp;
}

static int page_of(int used, int64_t local) { return (int)(1 + 2 * local) + used; } /* page 0 and the last are never used */

/* ---- inputs ------------------------------------------------------------------------------------------------------------ */

static double bell(uint64_t u) {
    int64_t sum = -131070;
    for (int i = 0; i < 4; i++)
        sum += (int64_t)(u >> (16 * i) & 0xffff);
    return (double)sum / 32768.0;
}

/* group: what shares a scale (K: channel, V: token); u: random bits of the value. */
static double special_value(int kind, uint64_t u, uint64_t seed, int group, int channel, int bits, bool half) {
    double normal = bell(u);
    int64_t top = bits == 16 ? 15 : (1 << bits) - 1;
    switch (kind) {
    case 1: return group % 3 == 0 ? bell(test_hash(seed, (uint64_t)group)) : group % 3 == 1 ? 0.0 : normal;         /* constant */
    case 2: return group % 16 == 3 || u % 16 == 0 ? NAN : normal;                                                   /* NaN */
    case 3: return group % 16 == 5 ? INFINITY : u % 32 == 1 ? INFINITY : u % 32 == 2 ? -INFINITY : normal;          /* infinities */
    case 4: return group % 4 == 0 ? copysign(FLT_MAX, normal) : ldexp(normal, 14 + (int)(u % (half ? 4 : 112)));    /* huge */
    case 5: return u % 3 == 0 ? -0.0 : u % 3 == 1 ? 0.0 : group % 3 == 0 ? -0.0 : group % 3 == 1 ? -1e-9 : 1.0;     /* zeros */
    case 6: return normal * (channel == 5 ? 1000.0 : 1.0);                                                          /* an outlier channel */
    case 7: return ldexp((double)((int64_t)(u % 2047) - 1023), half ? -24 : -(149 - group % 130));                  /* tiny */
    case 8: return ldexp((double)(u % (uint64_t)(2 * top + 1)) * 0.5 - group % 8, group % 5 - 2);                   /* ties */
    case 9: return ldexp(normal, group % 40 - 20);                                                                  /* all sizes */
    default: return normal;
    }
}

static void make_kv(struct world *w, int used) {
    int d = w->layout.head_dim;
    bool half = w->layer.format.window == DTYPE_F16;
    uint64_t seed = (uint64_t)(100 * w->number + used);
    int64_t n_values = (int64_t)w->layout.n_kv_heads * 2 * w->n * d;
    float *values = new_array((size_t)n_values, sizeof *values);
    for (int i = 0; i < 2 * w->layout.n_kv_heads; i++) {
        int head = i / 2, part = i % 2, bits = part ? w->layer.format.v_bits : w->layer.format.k_bits;
        for (int64_t t = 0; t < w->n; t++) {
            int64_t at = (i * w->n + t) * d, local = t / KV_BLOCK / w->layout.cp_size;
            int kind = w->special ? (int)((2 * local + head + 3 * used + w->number) % N_KINDS) : 0;
            for (int c = 0; c < d; c++) {
                uint64_t u = test_hash(seed, (uint64_t)(at + c));
                values[at + c] = (float)special_value(kind, u, seed, part ? (int)(t % KV_BLOCK) : c, c, bits, half);
            }
        }
    }
    w->kv[used] = new_array((size_t)n_values, sizeof *w->kv[used]);
    dtype_narrow(w->layer.format.window, values, w->kv[used], n_values);
    free(values);
}

static const uint16_t *row_at(const struct world *w, int used, int head, int part, int64_t position) {
    return w->kv[used] + ((int64_t)(head * 2 + part) * w->n + position) * w->layout.head_dim;
}

static void make_correction(struct world *w) {
    int n_heads = w->layout.n_kv_heads, d = w->layout.head_dim, features = w->layer.features;
    size_t n_phi = (size_t)(n_heads * d * features), n_states = N_SEQS * (size_t)n_heads * states_count(w);
    float gate[MAX_HEADS] = {-0.7f, 1.3f};
    w->phi_k = new_array(n_phi, sizeof *w->phi_k);
    for (size_t i = 0; i < n_phi; i++)
        w->phi_k[i] = 0.25f * test_uniform((uint64_t)w->number + 5000, i);
    w->phi = rig_make(&rig, n_phi * sizeof(float), w->phi_k);
    w->gate = rig_make(&rig, sizeof gate, gate);
    w->begin = new_array(n_states, sizeof *w->begin);
    memset(w->begin, 0xff, n_states * sizeof *w->begin);
    for (size_t i = 0; i < n_states; i++) { /* the used slots begin at 0, or with something where all terms are positive */
        int seq = (int)(i / states_count(w) / (size_t)n_heads);
        if (seq == used_seqs[0] || seq == used_seqs[1])
            w->begin[i] = w->gated ? 0.0f : i % states_count(w) < (size_t)(features * d) ? 0.5f : 1.0f;
    }
    w->states = rig_make(&rig, n_states * sizeof(float), w->begin);
}

static void world_make(struct world *w) {
    struct cache_layout *l = &w->layout;
    size_t heads = (size_t)l->n_kv_heads, record = page_record_bytes(&w->layer.format);
    w->n = (int64_t)w->n_blocks * KV_BLOCK + w->tail;
    w->n_local = (w->n_blocks + l->cp_size - 1) / l->cp_size;
    w->n_pages = 2 * w->n_local + 2;
    w->table_stride = w->n_local + 2;
    w->layer.page_stride = (int64_t)(heads * record);
    snprintf(w->name, sizeof w->name, "world %d: K%d V%d %s d %d, cp %d/%d, sink %d, D %d, %d blocks + %d", w->number,
             w->layer.format.k_bits, w->layer.format.v_bits, dtype_name(w->layer.format.window),
             l->head_dim, l->cp_rank, l->cp_size, l->sink, w->layer.features,
             w->n_blocks, w->tail);
    struct seq_params *params = new_array(N_SEQS, sizeof *params);
    for (int used = 0; used < N_USED; used++) {
        make_kv(w, used);
        params[used_seqs[used]].owner_offset = w->owner_offset[used];
        w->kv_twin[used] = rig_make(&rig, heads * 2 * (size_t)w->n * row_bytes(w), w->kv[used]);
    }
    w->params = rig_make(&rig, N_SEQS * sizeof *params, params);
    free(params);
    w->pages = rig_make(&rig, (size_t)w->n_pages * heads * record, NULL);
    w->window = rig_make(&rig, N_SEQS * N_SLOTS * heads * 2 * KV_BLOCK * row_bytes(w), NULL);
    w->sink = rig_make(&rig, N_SEQS * heads * 2 * (size_t)l->sink * row_bytes(w), NULL);
    w->table = rig_make(&rig, (size_t)(N_SEQS * w->table_stride) * sizeof(int32_t), NULL);
    w->in = rig_make(&rig, sizeof(struct step_input), NULL);
    w->k = rig_make(&rig, STEP_MAX_ROWS * heads * row_bytes(w), NULL);
    w->v = rig_make(&rig, STEP_MAX_ROWS * heads * row_bytes(w), NULL);
    w->out_k = rig_make(&rig, (size_t)(KV_BLOCK * l->head_dim) * sizeof(float), NULL);
    w->out_v = rig_make(&rig, (size_t)(KV_BLOCK * l->head_dim) * sizeof(float), NULL);
    if (w->layer.features)
        make_correction(w);
}

static void world_free(struct world *w) {
    rig_drop(&rig, 0);
    for (int used = 0; used < N_USED; used++)
        free(w->kv[used]);
    free(w->phi_k);
    free(w->begin);
}

static struct cache_layer layer_of(const struct world *w, int side) {
    struct cache_layer layer = w->layer;
    layer.pages = w->pages.at[side];
    layer.window = w->window.at[side];
    layer.sink = w->layout.sink ? w->sink.at[side] : NULL;
    if (layer.features) {
        layer.states = w->states.at[side];
        layer.phi_k = layer.phi_q = w->phi.at[side];
        layer.gate = w->gated ? w->gate.at[side] : NULL;
    }
    return layer;
}

static void poison_cache(struct world *w) {
    rig_poison(&rig, &w->pages);
    rig_poison(&rig, &w->window);
    rig_poison(&rig, &w->sink);
    rig_poison(&rig, &w->table);
    if (w->layer.features)
        rig_fill(&rig, &w->states, w->begin);
}

/* ---- filling it step by step --------------------------------------------------------------------------------------------- */

/* Events for both sequences: block by block, so that two blocks of a sequence in one step have another's between them. */
static void add_events(const struct world *w, struct step_input *in, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        for (int used = 0; used < N_USED; used++) {
            int64_t local = block / w->layout.cp_size;
            int page = owns(w, used, block) ? page_of(used, local) : -1;
            in->flush[in->n_flush++] = (struct step_flush){used_seqs[used], (int32_t)block, page, (int32_t)local};
        }
    }
}

/* A padding row, then a block's rows. */
static void add_rows(const struct world *w, struct step_input *in, int used, int64_t block, uint8_t *k, uint8_t *v) {
    int64_t n = min_i64(KV_BLOCK, w->n - block * KV_BLOCK);
    size_t heads = (size_t)w->layout.n_kv_heads;
    in->row[in->n_rows++] = (struct step_row){-1, 0, 3, 0};
    for (int64_t t = 0; t < n; t++) {
        int i = in->n_rows++;
        int64_t position = block * KV_BLOCK + t;
        in->row[i] = (struct step_row){used_seqs[used], 0, (int32_t)position, 1};
        for (size_t h = 0; h < heads; h++) {
            memcpy(k + ((size_t)i * heads + h) * row_bytes(w), row_at(w, used, (int)h, 0, position), row_bytes(w));
            memcpy(v + ((size_t)i * heads + h) * row_bytes(w), row_at(w, used, (int)h, 1, position), row_bytes(w));
        }
    }
}

static void launch_step(struct world *w, struct step_input *in, const void *k, const void *v, int first_side) {
    if (in->n_rows < STEP_MAX_ROWS) /* beyond what counts: would be seen if it were read */
        in->row[in->n_rows] = (struct step_row){1, 0, 0, 0};
    in->flush[in->n_flush] = (struct step_flush){1, 0, 0, 0};
    rig_fill(&rig, &w->in, in);
    rig_fill(&rig, &w->k, k);
    rig_fill(&rig, &w->v, v);
    for (int side = first_side; side < RIG_SIDES; side++) {
        struct stream *s = rig.stream[side];
        struct cache_layer layer = layer_of(w, side);
        REQUIRE(op_flush(s, &(struct flush_args){w->in.at[side], w->params.at[side], w->layout, layer, w->table.at[side], w->table_stride,
                                                 w->write_table}));
        REQUIRE(op_append(s, &(struct append_args){w->in.at[side], w->params.at[side], w->layout, layer, w->k.at[side], w->v.at[side]}));
        REQUIRE(stream_sync(s));
    }
}

/* All tokens of both sequences; block j - 2 is flushed before block j comes, the last ones together at the end. Sides from
 * `first_side` on. */
static void fill_by_steps(struct world *w, int first_side) {
    static struct step_input in;
    uint8_t *k = new_array(w->k.bytes, 1), *v = new_array(w->v.bytes, 1);
    int64_t flushed = 0;
    for (int64_t block = 0; block * KV_BLOCK < w->n; block++) {
        for (int used = 0; used < N_USED; used++) {
            in.n_rows = in.n_flush = 0;
            if (used == 0 && block >= 2) {
                add_events(w, &in, flushed, block - 1);
                flushed = block - 1;
            }
            add_rows(w, &in, used, block, k, v);
            launch_step(w, &in, k, v, first_side);
        }
    }
    in.n_rows = in.n_flush = 0;
    add_events(w, &in, flushed, w->n_blocks);
    launch_step(w, &in, k, v, first_side);
    free(k);
    free(v);
}

static void fill_exact(struct world *w, int first_side) {
    int32_t *table = new_array((size_t)(N_SEQS * w->table_stride), sizeof *table);
    memset(table, 0xff, w->table.bytes);
    for (int used = 0; used < N_USED; used++)
        for (int64_t local = 0; block_of(w, used, local) < w->n_blocks; local++)
            table[used_seqs[used] * w->table_stride + local] = page_of(used, local);
    rig_fill(&rig, &w->table, table);
    free(table);
    for (int side = first_side; side < RIG_SIDES; side++) {
        for (int used = 0; used < N_USED; used++) {
            const int32_t *row = (const int32_t *)w->table.at[side] + used_seqs[used] * w->table_stride;
            struct flush_exact_args args = {used_seqs[used], w->n, w->n_blocks, w->owner_offset[used], w->layout, layer_of(w, side), row,
                                            w->kv_twin[used].at[side]};
            REQUIRE(op_flush_exact(rig.stream[side], &args));
        }
        REQUIRE(stream_sync(rig.stream[side]));
    }
}

/* ---- comparing ------------------------------------------------------------------------------------------------------------ */

static uint16_t half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return bits;
}

static unsigned field_at(const uint8_t *codes, size_t word, int bit, int bits) {
    uint32_t x;
    memcpy(&x, codes + 4 * word, sizeof x);
    return x >> bit & ((1u << bits) - 1);
}

/* K (is_k) or V part of one record on both sides, each taken apart by its own rule. */
static void check_part(const struct world *w, bool is_k, const uint8_t *cpu, const uint8_t *cuda, const char *where) {
    int d = w->layout.head_dim, bits = is_k ? w->layer.format.k_bits : w->layer.format.v_bits, groups = is_k ? d : KV_BLOCK;
    if (bits == 16) {
        CHECK(memcmp(cpu, cuda, (size_t)KV_BLOCK * row_bytes(w)) == 0, "%s: 16-bit rows differ", where);
        return;
    }
    struct cpu_page_part part = cpu_page_part_of(cpu, d, bits, groups);
    const uint8_t *parameters = cuda + page_codes_bytes(d, bits);
    for (int g = 0; g < groups; g++) {
        const uint8_t *scale = parameters + (is_k ? page_k_parameter(g) : page_v_parameter(g)), *zero = scale + (is_k ? 8 : 2);
        CHECK(part.scale[g] == half_at(scale), "%s, scale %d: cpu %04x, cuda %04x", where, g, part.scale[g], half_at(scale));
        CHECK(part.zero[g] == half_at(zero), "%s, zero %d: cpu %04x, cuda %04x", where, g, part.zero[g], half_at(zero));
    }
    int n_wrong = 0, wrong = 0;
    unsigned expected = 0, got = 0;
    for (int i = KV_BLOCK * d; i-- > 0;) {
        int t = i / d, c = i % d, step, column, word, bit, cpu_bit;
        size_t cpu_word;
        if (is_k) {
            page_k_column(c, &step, &column);
            page_code_place(bits, d / 16, t, step, column, &word, &bit);
            cpu_page_code_place(bits, KV_BLOCK, c, t, &cpu_word, &cpu_bit);
        } else {
            page_code_place(bits, KV_BLOCK / 16, c, t / 16, t % 16, &word, &bit);
            cpu_page_code_place(bits, d, t, c, &cpu_word, &cpu_bit);
        }
        unsigned a = field_at(cpu, cpu_word, cpu_bit, bits), b = field_at(cuda, (size_t)word, bit, bits);
        if (a != b) {
            n_wrong++;
            wrong = i;
            expected = a;
            got = b;
        }
    }
    CHECK(n_wrong == 0, "%s: %d of %d codes differ, the first at token %d, channel %d: cpu %u, cuda %u", where, n_wrong, KV_BLOCK * d,
          wrong / d, wrong % d, expected, got);
}

static bool is_poison(const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bytes[i] != 0xff)
            return false;
    return true;
}

/* The sequence and local block of a page; false: nobody's. */
static bool page_owner(const struct world *w, int page, int *used, int64_t *local) {
    *used = (page + 1) % 2;
    *local = (page - 1) / 2;
    return page > 0 && block_of(w, *used, *local) < w->n_blocks;
}

static void check_pages(struct world *w, const char *how) {
    uint8_t *cpu = rig_fetch(&rig, RIG_CPU, w->pages.at[RIG_CPU], w->pages.bytes);
    uint8_t *cuda = rig_fetch(&rig, RIG_CUDA, w->pages.at[RIG_CUDA], w->pages.bytes);
    size_t record = page_record_bytes(&w->layer.format);
    char where[300];
    for (int page = 0; page < w->n_pages; page++) {
        int used;
        int64_t local;
        bool is_used = page_owner(w, page, &used, &local);
        for (int h = 0; h < w->layout.n_kv_heads; h++) {
            size_t at = ((size_t)page * (size_t)w->layout.n_kv_heads + (size_t)h) * record;
            if (!is_used) {
                CHECK(is_poison(cuda + at, record), "%s, %s: page %d, head %d was written", w->name, how, page, h);
                continue;
            }
            snprintf(where, sizeof where, "%s, %s: seq %d, block %ld, head %d, K", w->name, how, used_seqs[used],
                     (long)block_of(w, used, local), h);
            check_part(w, true, cpu + at, cuda + at, where);
            where[strlen(where) - 1] = 'V';
            check_part(w, false, cpu + at + cpu_page_v_offset(&w->layer.format), cuda + at + page_v_offset(&w->layer.format), where);
        }
    }
    free(cpu);
    free(cuda);
}

/* The same bits, or a NaN on both sides: a 16-bit page keeps NaNs, whose payload widening may change. */
static void check_floats(const float *cpu, const float *cuda, int n, const char *where, const char *part) {
    for (int i = 0; i < n; i++) {
        bool same = memcmp(&cpu[i], &cuda[i], sizeof *cpu) == 0 || (cpu[i] != cpu[i] && cuda[i] != cuda[i]);
        CHECK(same, "%s, %s value %d: cpu %a, cuda %a", where, part, i, (double)cpu[i], (double)cuda[i]);
        if (!same)
            return;
    }
}

/* Largest logit that E = K - K^q of a token can have, and largest |V|. */
static void note_sizes(struct world *w, int used, int64_t block, int head, const float *k, const float *v) {
    int d = w->layout.head_dim, half = w->layer.features / 2;
    float x[KV_MAX_HEAD_DIM];
    double largest[KV_MAX_HEAD_DIM] = {0};
    for (int i = 0; i < 2 * d * half; i++) {
        double a = fabs((double)w->phi_k[(int64_t)head * 2 * d * half + i]);
        int c = i / half % d;
        largest[c] = a > largest[c] ? a : largest[c];
    }
    for (int t = block == 0 ? w->layout.sink : 0; t < KV_BLOCK; t++) {
        double z = 0;
        dtype_widen(w->layer.format.window, row_at(w, used, head, 0, block * KV_BLOCK + t), x, d);
        for (int c = 0; c < d; c++)
            z += fabs((double)x[c] - (double)k[t * d + c]) * largest[c];
        w->z[head] = fmax(w->z[head], z);
        dtype_widen(w->layer.format.window, row_at(w, used, head, 1, block * KV_BLOCK + t), x, d);
        for (int c = 0; c < d; c++)
            w->vmax[head] = fmax(w->vmax[head], fabs((double)(w->layer.states_exact_v ? x[c] : v[t * d + c])));
    }
}

static void check_unpack(struct world *w) {
    size_t record = page_record_bytes(&w->layer.format);
    int n = KV_BLOCK * w->layout.head_dim;
    for (int i = 0; i < w->n_pages * w->layout.n_kv_heads; i++) {
        int page = i / w->layout.n_kv_heads, head = i % w->layout.n_kv_heads, used;
        int64_t local;
        float *k[RIG_SIDES], *v[RIG_SIDES];
        char where[260];
        if (!page_owner(w, page, &used, &local))
            continue;
        for (int side = 0; side < RIG_SIDES; side++) {
            const uint8_t *at = (const uint8_t *)w->pages.at[side] + (size_t)i * record;
            REQUIRE(op_unpack(rig.stream[side], &(struct unpack_args){w->layer.format, at, w->out_k.at[side], w->out_v.at[side]}));
            k[side] = rig_fetch(&rig, side, w->out_k.at[side], w->out_k.bytes);
            v[side] = rig_fetch(&rig, side, w->out_v.at[side], w->out_v.bytes);
        }
        snprintf(where, sizeof where, "%s: unpack page %d, head %d", w->name, page, head);
        check_floats(k[RIG_CPU], k[RIG_CUDA], n, where, "K");
        check_floats(v[RIG_CPU], v[RIG_CUDA], n, where, "V");
        if (w->layer.features)
            note_sizes(w, used, block_of(w, used, local), head, k[RIG_CPU], v[RIG_CPU]);
        for (int side = 0; side < RIG_SIDES; side++) {
            free(k[side]);
            free(v[side]);
        }
    }
}

/* How far the states of two fp32 computations may lie apart. u = 2^-24; E and V are the same bits on both sides, so a logit, d products
 * and sums, is off by (d + 1) u z; its distance from the maximum, at most 2 z, by 2 (d + 2) u z, and where a half is wider than a slice the
 * sum is rescaled by one more exponential: 2 (d + 3) u z. Exponentials are within 2 ulp (4 u). So a numerator is off by 2 (d + 3) u z + 4 u
 * in relation to itself, the denominator by that, its D / 2 additions and the rescaling's 6 u; a division and the gate: 2 u. Together
 * phi: u (4 (d + 3) z + D / 2 + 16). All terms of an entry of P have one sign; P adds 128 + blocks + segments (no more than blocks) + 2
 * roundings, S the same in relation to sum phi |V| <= |P| vmax. Twice that for two sides, a tenth for products of errors. */
struct bound {
    const struct world *w;
    const float *states; /* the CPU's */
};
static double states_bound(int64_t i, void *context) {
    const struct bound *b = context;
    const struct world *w = b->w;
    int64_t n = (int64_t)states_count(w), d = w->layout.head_dim, features = w->layer.features, r = i % n;
    int head = (int)(i / n % w->layout.n_kv_heads);
    int64_t f = r < features * d ? r / d : r - features * d;
    double p = fabs((double)b->states[i - r + features * d + f]);
    double phi = 4 * (double)(d + 3) * w->z[head] + (double)features / 2 + 16;
    double relative = 2 * 1.1 * 0x1p-24 * (phi + KV_BLOCK + 2 * w->n_blocks + 2);
    return relative * p * (r < features * d ? w->vmax[head] : 1) + 1e-35;
}

static void check_states(struct world *w, const char *how) {
    if (!w->layer.features)
        return;
    char where[260];
    snprintf(where, sizeof where, "%s, %s: states (z %.1f)", w->name, how, w->z[0]);
    struct bound bound = {w, rig_fetch(&rig, RIG_CPU, w->states.at[RIG_CPU], w->states.bytes)};
    rig_expect_close(&rig, &w->states, (int64_t)(w->states.bytes / sizeof(float)), states_bound, &bound, where);
    free((void *)(uintptr_t)bound.states);
}

static void check_equal(const struct world *w, const struct twin *twin, const char *how, const char *what) {
    char where[300];
    snprintf(where, sizeof where, "%s, %s: %s", w->name, how, what);
    rig_expect_equal(&rig, twin, where);
}

static void check_cache(struct world *w, const char *how) {
    check_equal(w, &w->window, how, "slots");
    check_equal(w, &w->sink, how, "sink");
    check_equal(w, &w->table, how, "page table");
    check_pages(w, how);
}

/* The GPU's bytes of a buffer are those that were kept. */
static void check_kept(const struct world *w, const struct twin *twin, const uint8_t *kept, const char *what) {
    uint8_t *now = rig_fetch(&rig, RIG_CUDA, twin->at[RIG_CUDA], twin->bytes);
    size_t i = 0;
    while (i < twin->bytes && now[i] == kept[i])
        i++;
    CHECK(i == twin->bytes, "%s: %s: byte %zu of %zu differs", w->name, what, i, twin->bytes);
    free(now);
}

static void run_world(struct world *w, bool repeat) {
    world_make(w);
    fill_by_steps(w, RIG_CPU);
    check_cache(w, "steps");
    check_unpack(w);
    check_states(w, "steps");
    uint8_t *pages = rig_fetch(&rig, RIG_CUDA, w->pages.at[RIG_CUDA], w->pages.bytes);
    uint8_t *sink = rig_fetch(&rig, RIG_CUDA, w->sink.at[RIG_CUDA], w->sink.bytes);
    if (repeat) {
        uint8_t *states = rig_fetch(&rig, RIG_CUDA, w->states.at[RIG_CUDA], w->states.bytes);
        poison_cache(w);
        fill_by_steps(w, RIG_CUDA);
        check_kept(w, &w->states, states, "states of a second run");
        check_kept(w, &w->pages, pages, "pages of a second run");
        free(states);
    }
    poison_cache(w);
    fill_exact(w, RIG_CPU);
    check_cache(w, "exact");
    check_states(w, "exact");
    check_kept(w, &w->pages, pages, "pages of both ways");
    check_kept(w, &w->sink, sink, "sinks of both ways");
    if (repeat) {
        uint8_t *states = rig_fetch(&rig, RIG_CUDA, w->states.at[RIG_CUDA], w->states.bytes);
        rig_fill(&rig, &w->states, w->begin);
        fill_exact(w, RIG_CUDA);
        check_kept(w, &w->states, states, "states of a second flush_exact");
        free(states);
    }
    free(pages);
    free(sink);
    world_free(w);
}

/* ---- the worlds ------------------------------------------------------------------------------------------------------------ */

static struct world world_of(int number, int k_bits, int v_bits, enum dtype window, int d, int sink, int n_kv_heads) {
    int cp = 1 + number % 3;
    struct world w = {.number = number, .write_table = number % 5 != 4};
    w.layout = (struct cache_layout){number / 3 % cp, cp, 1, N_SLOTS, sink, n_kv_heads, d};
    w.layer.format = (struct page_format){d, k_bits, v_bits, window};
    w.owner_offset[0] = number / 2 % cp;
    w.owner_offset[1] = (number + 1) % cp;
    w.n_blocks = LOCAL_BLOCKS * cp;
    w.tail = (const int[]){0, 1, 77, 127, 16}[number % 5];
    return w;
}

/* Every pair of bits, both head sizes and types, all sinks, values of all kinds. */
static void test_pages(void) {
    static const int bits[] = {2, 4, 8, 16}, sinks[] = {0, 16, 128};
    for (int i = 0; i < 4 * 4 * 2 * 2 * 3; i++) {
        enum dtype window = i / 16 % 2 ? DTYPE_BF16 : DTYPE_F16;
        struct world w = world_of(i, bits[i % 4], bits[i / 4 % 4], window, i / 32 % 2 ? 64 : 128, sinks[i / 64], 2);
        w.special = true;
        run_world(&w, false);
    }
}

/* Slices of one half (up to 256 features), halves wider than a slice, widths that fill no slice. */
static void test_states(void) {
    static const int features[] = {32, 256, 96, 512, 64, 288, 160, 480};
    static const int bits[][2] = {{2, 2}, {4, 2}, {2, 8}, {16, 16}, {8, 4}, {2, 16}};
    for (int i = 0; i < 24; i++) {
        const int *b = bits[i % 6];
        enum dtype window = i % 2 ? DTYPE_BF16 : DTYPE_F16;
        struct world w = world_of(i, b[0], b[1], window, i / 2 % 2 ? 64 : 128, (const int[]){0, 16, 128}[i / 3 % 3], 1 + i / 8 % 2);
        w.number += 1000;
        w.layer.features = features[i % 8];
        w.layer.states_exact_v = i % 5 == 1;
        w.gated = i % 3 == 1;
        run_world(&w, true);
    }
}

/* More blocks than segments on any device: 2 slices and a head leave at most 80 segments on 160 multiprocessors. */
static void test_long(void) {
    struct world w = world_of(3, 2, 2, DTYPE_F16, 64, 16, 1);
    w.number = 2000;
    w.n_blocks = 180;
    w.layer.features = 64;
    run_world(&w, true);
}

/* A step without events and rows, and a prompt without tokens, change nothing. */
static void test_nothing(void) {
    static struct step_input in;
    struct world w = world_of(3000, 2, 2, DTYPE_BF16, 128, 16, 2);
    w.layer.features = 32;
    world_make(&w);
    uint8_t *zeros = new_array(w.k.bytes, 1);
    launch_step(&w, &in, zeros, zeros, RIG_CPU);
    for (int side = 0; side < RIG_SIDES; side++)
        REQUIRE(op_flush_exact(rig.stream[side], &(struct flush_exact_args){0, 0, 0, 0, w.layout, layer_of(&w, side), w.table.at[side],
                                                                            w.kv_twin[0].at[side]}));
    uint8_t *pages = rig_fetch(&rig, RIG_CUDA, w.pages.at[RIG_CUDA], w.pages.bytes);
    CHECK(is_poison(pages, w.pages.bytes), "an empty step wrote pages");
    check_equal(&w, &w.window, "an empty step", "slots");
    check_equal(&w, &w.sink, "an empty step", "sink");
    check_equal(&w, &w.table, "an empty step", "page table");
    check_equal(&w, &w.states, "an empty step", "states");
    free(pages);
    free(zeros);
    world_free(&w);
}

/* ---- rows of a prefill --------------------------------------------------------------------------------------------------------- */

static void test_place(int cp, int64_t n, int n_kv_heads, int d, enum dtype dtype) {
    int64_t chunk = ceil_div(n, 2 * cp), width = 4 * (1 + n % 7), n_gathered = cp * 2 * chunk;
    size_t kv_bytes = (size_t)(n * 2 * n_kv_heads * d) * 2, from_bytes = (size_t)(n_gathered * 2 * n_kv_heads * d) * 2;
    uint16_t *kv = new_array(from_bytes / 2 + 1, 2);
    float *rows = new_array((size_t)(n_gathered * width) + 1, sizeof *rows);
    for (size_t i = 0; i < from_bytes / 2; i++)
        kv[i] = (uint16_t)test_hash((uint64_t)n, i);
    for (int64_t i = 0; i < n_gathered * width; i++)
        rows[i] = test_uniform((uint64_t)n, (uint64_t)i);
    struct twin gathered = rig_make(&rig, from_bytes, kv), placed = rig_make(&rig, kv_bytes, NULL);
    struct twin from = rig_make(&rig, (size_t)(n_gathered * width) * sizeof *rows, rows);
    struct twin to = rig_make(&rig, (size_t)(n * width) * sizeof *rows, NULL);
    for (int side = 0; side < RIG_SIDES; side++) {
        struct kv_place_args args = {gathered.at[side], cp, chunk, n, n_kv_heads, d, dtype, placed.at[side]};
        REQUIRE(op_kv_place(rig.stream[side], &args));
        REQUIRE(op_rows_place(rig.stream[side], &(struct rows_place_args){from.at[side], cp, chunk, n, width, to.at[side]}));
    }
    char where[100];
    snprintf(where, sizeof where, "kv_place: cp %d, n %ld, %d heads, d %d", cp, (long)n, n_kv_heads, d);
    rig_expect_equal(&rig, &placed, where);
    snprintf(where, sizeof where, "rows_place: cp %d, n %ld, width %ld", cp, (long)n, (long)width);
    rig_expect_equal(&rig, &to, where);
    rig_drop(&rig, 0);
    free(kv);
    free(rows);
}

int main(void) {
    rig_open(&rig);
    static const int64_t lengths[] = {0, 1, 2, 3, 5, 6, 7, 8, 127, 128, 129, 1000, 4097};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int cp = 1; cp <= 4; cp++)
            test_place(cp, lengths[i], 1 + (int)i % 3, i % 2 ? 64 : 128, i % 3 ? DTYPE_F16 : DTYPE_BF16);
    test_nothing();
    test_pages();
    test_states();
    test_long();
    rig_close(&rig);
    return test_report();
}
