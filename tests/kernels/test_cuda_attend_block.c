/* Attention over the cache of prompts that are fed through it: runs of 8 and more rows of one sequence (kernels/cuda/attend_block.cu),
 * mixed with decoding rows and padding, the GPU against the CPU on the same pages. Every pair of bits, head sizes, window types,
 * groups, ranks, owner offsets, windows, sinks, positions around the edges of blocks, rotated and mean keys, with NaN in
 * everything that a rank does not own or must not read.
 *
 * Limits are derived per record. u = 2^-24; a = the largest sum of absolute products of one of its scores, A = scale *
 * (sum |q'| (|code * scale| + |zero|) + sum |R q| |mean|). CPU: a sum of at most 2 d products in a row, and up to 16 roundings of a key or
 * query before: (2 d + 16) u a. GPU: parts of q and mean are good to 2^-22; a chain of at most 16 (codes) + 24 (mean) MMAs that may
 * each lose 2^-22 of the largest term; the sum of zeros 40 u: (44 * 4 + 40) u a. With d = 128 together: 500 u a = `delta`, also for
 * the max. e^x passes it on as a relative error of twice it, plus 32 u of its own and of m's conversion between base 2 and e. A weight
 * of the GPU is rounded once to 2^-11 of itself, or, far below a page's max, to 2^-32 of the largest value: 128 tokens a block. */
#include <stdlib.h>

#include "cuda_rig.h"
#include "kernels/cuda_pages.h"

enum { MAX_PIECES = 8, MAX_BLOCKS = 72, SAMPLES = 600 };

struct piece { /* of a step: rows of one sequence at successive positions; n < 0: padding rows */
    int n, position;
};

struct setup {
    const char *name;
    struct page_format format;
    struct cache_layout layout;
    struct piece pieces[MAX_PIECES]; /* up to the first with n = 0; piece i is the sequence of slot i */
    int n_beyond;                    /* rows of the buffer beyond those of the step */
    int group;
    int owner_offset;                /* of slot 0; each slot has another one */
    bool rotate, mean, correction, outliers;
    uint64_t seed;
};

struct block { /* what the double reference needs of one KV head's block: [KV_BLOCK][d], and sums of absolute parts */
    float *k, *v, *k_abs, *v_abs;
};

struct world {
    struct setup s;
    int n_heads, n_seqs, n_rows, n_live; /* n_rows: of the buffers */
    int n_pages, table_stride, stride;
    int64_t row_bytes;   /* of one token's K or V of a head */
    struct step_input in;
    struct seq_params *params;
    int32_t *table;
    uint8_t *pages[RIG_SIDES], *window, *sink;
    uint16_t *q;
    float *mean, inv_freq[KV_MAX_HEAD_DIM / 2];
    struct block *blocks; /* [seq][MAX_BLOCKS][kv_head] */
    struct attend_args args[RIG_SIDES];
    struct twin partial;
};

static void *fresh(size_t bytes, int fill) {
    void *p = malloc(bytes + 64);
    if (!p)
        exit(1);
    memset(p, fill, bytes + 64);
    return p;
}

static int offset_of(const struct world *w, int seq) { return (w->s.owner_offset + seq) % w->s.layout.cp_size; }

static struct block *block_at(const struct world *w, int seq, int64_t block, int head) {
    return &w->blocks[(seq * MAX_BLOCKS + block) * w->s.layout.n_kv_heads + head];
}

static float widen(const struct world *w, uint16_t bits) {
    return w->s.format.window == DTYPE_F16 ? dtype_from_f16(bits) : dtype_from_bf16(bits);
}

/* ---- contents ------------------------------------------------------------------------------------------------------ */

static void block_alloc(struct block *b, int d) {
    float **all[] = {&b->k, &b->v, &b->k_abs, &b->v_abs};
    for (int i = 0; i < 4; i++)
        *all[i] = fresh((size_t)(KV_BLOCK * d) * sizeof(float), 0);
}

/* x = value and |value - zero| + |zero| of each element of one part. */
static void part_abs(const struct world *w, const uint8_t *part, bool key, const float *x, float *x_abs) {
    int d = w->s.format.head_dim, bits = key ? w->s.format.k_bits : w->s.format.v_bits;
    struct cpu_page_part p = cpu_page_part_of(part, d, bits < 16 ? bits : 8, key ? d : KV_BLOCK);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) {
            float zero = bits < 16 ? dtype_from_f16(p.zero[key ? c : t]) : 0.0f;
            x_abs[t * d + c] = fabsf(x[t * d + c] - zero) + fabsf(zero);
        }
}

/* Keys of two channels that lie far off, as Qwen2.5's do. */
static void part_outliers(const struct world *w, uint8_t *cpu, uint8_t *cuda) {
    int d = w->s.format.head_dim, bits = w->s.format.k_bits;
    for (int c = 3; c < d && bits < 16; c += 64) {
        uint16_t scale = dtype_to_f16(10.0f / (float)((1 << bits) - 1)), zero = dtype_to_f16(c == 3 ? 75.0f : -85.0f);
        pages_put_half(cpu + cpu_page_codes_bytes(d, bits) + 2 * c, scale);
        pages_put_half(cpu + cpu_page_codes_bytes(d, bits) + 2 * (d + c), zero);
        pages_put_half(cuda + page_codes_bytes(d, bits) + page_k_parameter(c), scale);
        pages_put_half(cuda + page_codes_bytes(d, bits) + page_k_parameter(c) + 8, zero);
    }
}

static void fill_page(struct world *w, int seq, int64_t block, int page, int begin) {
    const struct page_format *f = &w->s.format;
    size_t bytes = page_record_bytes(f);
    for (int head = 0; head < w->s.layout.n_kv_heads; head++) {
        size_t at = ((size_t)page * (size_t)w->s.layout.n_kv_heads + (size_t)head) * bytes;
        uint8_t *cpu = w->pages[RIG_CPU] + at, *cuda = w->pages[RIG_CUDA] + at;
        struct block *b = block_at(w, seq, block, head);
        pages_make_record(f, w->s.seed * 1000 + (uint64_t)(page * 16 + head), begin, cpu, cuda);
        if (w->s.outliers)
            part_outliers(w, cpu, cuda);
        block_alloc(b, f->head_dim);
        cpu_page_decode_k(f, cpu, b->k);
        cpu_page_decode_v(f, cpu, b->v);
        part_abs(w, cpu, true, b->k, b->k_abs);
        part_abs(w, cpu + cpu_page_v_offset(f), false, b->v, b->v_abs);
    }
}

/* Tokens 0 .. n-1 of a block of one head as rows of K or V, and what the reference reads. */
static void fill_rows(struct world *w, uint8_t *rows, bool key, int n, uint64_t seed, float *x, float *x_abs) {
    int d = w->s.format.head_dim;
    for (int i = 0; i < n * d; i++) {
        uint16_t bits = pages_narrow(w->s.format.window, (key ? 1.5f : 2.0f) * test_uniform(seed, (uint64_t)i));
        memcpy(rows + 2 * i, &bits, 2);
        x[i] = widen(w, bits);
        x_abs[i] = fabsf(x[i]);
    }
}

static void fill_window(struct world *w, int seq, int64_t block, int n) {
    const struct cache_layout *l = &w->s.layout;
    int64_t slot = block / l->cp_size % l->n_slots, part = KV_BLOCK * w->row_bytes;
    for (int head = 0; head < l->n_kv_heads; head++) {
        struct block *b = block_at(w, seq, block, head);
        uint8_t *rows = w->window + (((int64_t)seq * l->n_slots + slot) * l->n_kv_heads + head) * 2 * part;
        uint64_t seed = w->s.seed * 77 + (uint64_t)((seq * MAX_BLOCKS + block) * 64 + head * 2);
        block_alloc(b, l->head_dim);
        fill_rows(w, rows, true, n, seed, b->k, b->k_abs);
        fill_rows(w, rows + part, false, n, seed + 1, b->v, b->v_abs);
    }
}

/* The sink's tokens replace those of block 0's page in the reference. */
static void fill_sink(struct world *w, int seq) {
    const struct cache_layout *l = &w->s.layout;
    int64_t part = l->sink * w->row_bytes;
    for (int head = 0; head < l->n_kv_heads; head++) {
        struct block *b = block_at(w, seq, 0, head);
        uint8_t *rows = w->sink + ((int64_t)seq * l->n_kv_heads + head) * 2 * part;
        uint64_t seed = w->s.seed * 99 + (uint64_t)(seq * 64 + head * 2);
        fill_rows(w, rows, true, l->sink, seed, b->k, b->k_abs);
        fill_rows(w, rows + part, false, l->sink, seed + 1, b->v, b->v_abs);
    }
}

static void fill_sequence(struct world *w, int seq, int last) {
    const struct cache_layout *l = &w->s.layout;
    int64_t n_flushed = cache_n_flushed(l, last), local = 0;
    w->params[seq].owner_offset = offset_of(w, seq);
    for (int64_t block = 0; block <= last / KV_BLOCK; block++) {
        if (!cache_owns(l, block, offset_of(w, seq)))
            continue;
        if (block >= n_flushed) {
            fill_window(w, seq, block, (int)min_i64(KV_BLOCK, last - block * KV_BLOCK + 1));
            continue;
        }
        int page = w->n_pages++;
        w->table[seq * w->table_stride + local++] = page;
        fill_page(w, seq, block, page, block == 0 ? l->sink : 0);
        if (block == 0 && l->sink)
            fill_sink(w, seq);
    }
}

static void make_rows(struct world *w) {
    memset(&w->in, 0xff, sizeof w->in);
    int row = 0;
    for (int seq = 0; seq < w->n_seqs; seq++) {
        struct piece p = w->s.pieces[seq];
        for (int i = 0; i < abs(p.n); i++)
            w->in.row[row + i] = p.n < 0 ? (struct step_row){-1, -1, 0, row + i} : (struct step_row){seq, 1, p.position + i, row};
        row += abs(p.n);
    }
    w->in.step = 1;
    w->in.n_rows = w->n_live = row;
    w->in.n_flush = w->in.n_logits = w->in.n_sample = 0;
    w->n_rows = row + w->s.n_beyond;
}

static void make_queries(struct world *w) {
    int d = w->s.layout.head_dim;
    size_t n = (size_t)(w->n_live * w->n_heads * d);
    w->q = fresh((size_t)(w->n_rows * w->n_heads * d) * 2, 0xff);
    for (size_t i = 0; i < n; i++) {
        float x = 1.5f * test_uniform(w->s.seed + 5, i);
        if (w->s.outliers && i % 64 == 3)
            x = 60.0f + x;
        w->q[i] = pages_narrow(w->s.format.window, x);
    }
}

static void make_mean(struct world *w) {
    int d = w->s.layout.head_dim;
    size_t n = (size_t)(w->s.layout.n_kv_heads * KV_BLOCK * d);
    w->mean = fresh(n * sizeof(float), 0);
    for (size_t i = 0; i < n; i++)
        w->mean[i] = (i % 16 == 5 ? 6.0f : 1.0f) * test_uniform(w->s.seed + 6, i);
    for (int i = 0; i < d / 2; i++)
        w->inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)d);
}

/* ---- both sides ---------------------------------------------------------------------------------------------------- */

static void world_send(struct world *w, struct rig *rig) {
    const struct cache_layout *l = &w->s.layout;
    size_t heads = (size_t)l->n_kv_heads, part = (size_t)w->row_bytes * 2 * heads;
    size_t page_bytes = page_record_bytes(&w->s.format) * heads;
    struct twin in = rig_make(rig, sizeof w->in, &w->in), params = rig_make(rig, (size_t)w->n_seqs * sizeof *w->params, w->params);
    struct twin table = rig_make(rig, (size_t)(w->n_seqs * w->table_stride) * 4, w->table);
    struct twin window = rig_make(rig, (size_t)(w->n_seqs * l->n_slots * KV_BLOCK) * part, w->window);
    struct twin sink = rig_make(rig, (size_t)(w->n_seqs * l->sink) * part, w->sink);
    struct twin pages = rig_make(rig, (size_t)(w->n_pages + 1) * page_bytes, NULL);
    struct twin q = rig_make(rig, (size_t)(w->n_rows * w->n_heads * l->head_dim) * 2, w->q);
    struct twin mean = rig_make(rig, heads * (size_t)(KV_BLOCK * l->head_dim) * 4, w->mean);
    struct twin inv_freq = rig_make(rig, (size_t)l->head_dim / 2 * 4, w->inv_freq);
    w->partial = rig_make(rig, (size_t)(w->n_rows * w->n_heads * w->stride) * 4, NULL);
    for (int side = 0; side < RIG_SIDES; side++) {
        rig_send(rig, side, pages.at[side], w->pages[side], (size_t)w->n_pages * page_bytes);
        struct cache_layer layer = {.format = w->s.format, .pages = pages.at[side], .page_stride = (int64_t)page_bytes};
        layer.window = window.at[side];
        layer.sink = l->sink ? sink.at[side] : NULL;
        layer.rotate_k = w->s.rotate;
        layer.mean = w->s.mean ? mean.at[side] : NULL;
        layer.inv_freq = w->s.mean ? inv_freq.at[side] : NULL;
        w->args[side] = (struct attend_args){.in = in.at[side], .n_rows = w->n_rows, .params = params.at[side], .layout = *l};
        w->args[side].layer = layer;
        w->args[side].page_table = table.at[side];
        w->args[side].table_stride = w->table_stride;
        w->args[side].n_heads = w->n_heads;
        w->args[side].scale = 1.0f / sqrtf((float)l->head_dim);
        w->args[side].q = q.at[side];
        w->args[side].partial = w->partial.at[side];
        w->args[side].stride = w->stride;
    }
}

static void world_make(struct world *w, const struct setup *s, struct rig *rig) {
    const struct cache_layout *l = &s->layout;
    *w = (struct world){.s = *s, .n_heads = s->group * l->n_kv_heads, .row_bytes = 2 * l->head_dim};
    while (w->n_seqs < MAX_PIECES && s->pieces[w->n_seqs].n)
        w->n_seqs++;
    make_rows(w);
    size_t heads = (size_t)l->n_kv_heads, part = (size_t)w->row_bytes * 2 * heads, n_blocks = 0;
    for (int seq = 0; seq < w->n_seqs; seq++)
        n_blocks += (size_t)(s->pieces[seq].position + abs(s->pieces[seq].n) - 1) / KV_BLOCK + 1;
    w->table_stride = MAX_BLOCKS;
    w->stride = partial_stride(l->head_dim, s->correction);
    w->params = fresh((size_t)w->n_seqs * sizeof *w->params, 0);
    w->table = fresh((size_t)(w->n_seqs * w->table_stride) * 4, 0x7f);
    w->window = fresh((size_t)(w->n_seqs * l->n_slots * KV_BLOCK) * part, 0xff);
    w->sink = fresh((size_t)(w->n_seqs * l->sink) * part, 0xff);
    for (int side = 0; side < RIG_SIDES; side++)
        w->pages[side] = fresh(n_blocks * heads * page_record_bytes(&s->format), 0xff);
    w->blocks = fresh((size_t)w->n_seqs * MAX_BLOCKS * heads * sizeof *w->blocks, 0);
    for (int seq = 0; seq < w->n_seqs; seq++)
        if (s->pieces[seq].n > 0)
            fill_sequence(w, seq, s->pieces[seq].position + s->pieces[seq].n - 1);
    make_queries(w);
    make_mean(w);
    world_send(w, rig);
}

static void world_free(struct world *w) {
    for (int64_t i = 0; i < (int64_t)w->n_seqs * MAX_BLOCKS * w->s.layout.n_kv_heads; i++) {
        free(w->blocks[i].k), free(w->blocks[i].v);
        free(w->blocks[i].k_abs), free(w->blocks[i].v_abs);
    }
    free(w->params), free(w->table), free(w->window), free(w->sink), free(w->pages[0]), free(w->pages[1]);
    free(w->blocks), free(w->q), free(w->mean);
}

/* ---- the reference, for the limits ----------------------------------------------------------------------------------- */

/* Outlier channels, where every score is large and known well by the CPU: the GPU's own share of `delta`, 32 MMAs of both parts of q that
 * each cut off 2^-23 of the sum, and 2^-22 of the parts; (64 + 4) u a. */
static const double outlier_share = 68.0 / 500.0;

struct limits { /* of one record, and the truth */
    double m, l, y[KV_MAX_HEAD_DIM];           /* truth */
    double delta, l_limit, y_limit[KV_MAX_HEAD_DIM];
};

static void query_of(const struct world *w, int row, int head, double *q, double *rotated) {
    int d = w->s.layout.head_dim;
    for (int c = 0; c < d; c++)
        q[c] = rotated[c] = (double)widen(w, w->q[((int64_t)row * w->n_heads + head) * d + c]);
    for (int span = 1; span < d && w->s.rotate; span *= 2)
        for (int c = 0; c < d; c++)
            if (!(c & span)) {
                double a = rotated[c], b = rotated[c + span];
                rotated[c] = a + b;
                rotated[c + span] = a - b;
            }
    for (int c = 0; c < d && w->s.rotate; c++)
        rotated[c] /= sqrt((double)d);
}

/* out = R_-jG q; identity where there is no mean, so that it is cheap. */
static void query_turned(const struct world *w, const double *q, int64_t block, double *out) {
    int half = w->s.layout.head_dim / 2;
    for (int i = 0; i < half && w->s.mean; i++) {
        double angle = (double)((float)(block * KV_BLOCK) * w->inv_freq[i]);
        out[i] = q[i] * cos(angle) + q[i + half] * sin(angle);
        out[i + half] = q[i + half] * cos(angle) - q[i] * sin(angle);
    }
}

/* Score of token t of a block, and the sum of its absolute products. */
static double score_of(const struct world *w, const struct block *b, int head, int t, const double *q, const double *turned, double *a) {
    int d = w->s.layout.head_dim;
    const float *mean = w->mean + ((int64_t)head * KV_BLOCK + t) * d;
    double s = 0.0;
    *a = 0.0;
    for (int c = 0; c < d; c++) {
        s += q[c] * (double)b->k[t * d + c];
        *a += fabs(q[c]) * (double)b->k_abs[t * d + c];
    }
    for (int c = 0; c < d && turned; c++) {
        s += turned[c] * (double)mean[c];
        *a += fabs(turned[c] * (double)mean[c]);
    }
    *a /= sqrt((double)d);
    return s / sqrt((double)d);
}

static void limits_of(const struct world *w, int row, int head, struct limits *out) {
    const struct cache_layout *l = &w->s.layout;
    const struct step_row *r = &w->in.row[row];
    int d = l->head_dim, kv_head = head / w->s.group;
    int64_t n_flushed = cache_n_flushed(l, r->position);
    double q[KV_MAX_HEAD_DIM], rotated[KV_MAX_HEAD_DIM], turned[KV_MAX_HEAD_DIM], a, worst = 0.0, v_max = 0.0;
    static double s[MAX_BLOCKS * KV_BLOCK];
    query_of(w, row, head, q, rotated);
    *out = (struct limits){.m = -INFINITY};
    for (int pass = 0; pass < 2; pass++)
        for (int64_t block = 0; block <= r->position / KV_BLOCK; block++) {
            if (!cache_owns(l, block, offset_of(w, r->seq)))
                continue;
            const struct block *b = block_at(w, r->seq, block, kv_head);
            query_turned(w, q, block, turned);
            for (int t = 0; t < KV_BLOCK && block * KV_BLOCK + t <= r->position; t++) {
                double *at = &s[block * KV_BLOCK + t], p;
                bool in_page = block < n_flushed && block * KV_BLOCK + t >= l->sink;
                if (pass == 0) {
                    *at = score_of(w, b, kv_head, t, in_page ? rotated : q, in_page && w->s.mean ? turned : NULL, &a);
                    out->m = fmax(out->m, *at);
                    worst = fmax(worst, a);
                    continue;
                }
                out->l += p = exp(*at - out->m);
                for (int c = 0; c < d; c++) {
                    out->y[c] += p * (double)b->v[t * d + c];
                    out->y_limit[c] += p * (double)b->v_abs[t * d + c];
                    v_max = fmax(v_max, (double)b->v_abs[t * d + c]);
                }
            }
        }
    const double u = 0x1p-24;
    out->delta = 500.0 * u * worst + 8.0 * u * fabs(out->m);
    double relative = 2.0 * out->delta + 32.0 * u;
    out->l_limit = relative * out->l;
    for (int c = 0; c < d; c++)
        out->y_limit[c] = out->y_limit[c] * (relative + 0x1p-11) + v_max * 0x1p-32 * (double)(r->position + KV_BLOCK);
}

/* ---- checks -------------------------------------------------------------------------------------------------------- */

static void check_value(const struct world *w, int row, int head, const char *what, int c, const float *got, double truth, double limit) {
    bool good = fabs((double)got[RIG_CUDA] - (double)got[RIG_CPU]) <= limit && fabs((double)got[RIG_CPU] - truth) <= limit;
    CHECK(good,
          "%s d %d k%d v%d %s group %d cp %d/%d window %d sink %d%s%s: row %d (position %d) head %d %s[%d]: cpu %.9g, cuda %.9g, "
          "double %.9g, limit %.3g",
          w->s.name, w->s.format.head_dim, w->s.format.k_bits, w->s.format.v_bits, dtype_name(w->s.format.window), w->s.group,
          w->s.layout.cp_rank, w->s.layout.cp_size, w->s.layout.window_blocks, w->s.layout.sink, w->s.rotate ? " rotate" : "",
          w->s.mean ? " mean" : "", row, w->in.row[row].position, head, what, c, (double)got[RIG_CPU], (double)got[RIG_CUDA], truth, limit);
}

/* What is exact: padding, absent tokens, and what attention must leave alone. */
static void check_exact(const struct world *w, int row, int head, const float *cpu, const float *cuda, bool empty) {
    int d = w->s.layout.head_dim, tail = partial_tail(d, w->s.correction);
    bool same = memcmp(cpu + d, cuda + d, (size_t)(tail - d) * 4) == 0 && memcmp(cpu + tail + 2, cuda + tail + 2, 8) == 0;
    if (empty)
        same = same && memcmp(cpu, cuda, (size_t)d * 4) == 0 && memcmp(cpu + tail, cuda + tail, 8) == 0;
    CHECK(same, "%s: row %d head %d%s: C_n, C_d or the rest is not the CPU's; m %g %g, l %g %g, C_d %g %g", w->s.name, row, head,
          empty ? " (no token)" : "", (double)cpu[tail], (double)cuda[tail], (double)cpu[tail + 1], (double)cuda[tail + 1],
          (double)cpu[tail + 2], (double)cuda[tail + 2]);
}

static void check_record(const struct world *w, int row, int head, const float *cpu, const float *cuda, double *worst) {
    int d = w->s.layout.head_dim, tail = partial_tail(d, w->s.correction);
    bool real = row < w->n_live && w->in.row[row].seq >= 0;
    struct limits limits = {.m = -INFINITY};
    if (real)
        limits_of(w, row, head, &limits);
    bool empty = limits.m == -INFINITY;
    check_exact(w, row, head, cpu, cuda, empty);
    if (empty)
        return;
    double m_limit = w->s.outliers ? outlier_share * limits.delta : limits.delta;
    check_value(w, row, head, "m", 0, (float[]){cpu[tail], cuda[tail]}, limits.m, m_limit);
    check_value(w, row, head, "l", 0, (float[]){cpu[tail + 1], cuda[tail + 1]}, limits.l, limits.l_limit);
    for (int c = 0; c < d; c++) {
        check_value(w, row, head, "Y", c, (float[]){cpu[c], cuda[c]}, limits.y[c], limits.y_limit[c]);
        *worst = fmax(*worst, fabs((double)cpu[c] - (double)cuda[c]) / limits.y_limit[c]);
    }
}

static int again(struct stream *stream, const void *args) { return op_attend(stream, args); }

static double worst_share; /* of the limit of Y, over all cases */

static void check_setup(struct rig *rig, const struct setup *s) {
    static struct world w;
    int n_twins = rig->n_twins;
    world_make(&w, s, rig);
    for (int side = 0; side < RIG_SIDES; side++)
        REQUIRE(op_attend(rig->stream[side], &w.args[side]));
    float *cpu = rig_fetch(rig, RIG_CPU, w.partial.at[RIG_CPU], w.partial.bytes);
    float *cuda = rig_fetch(rig, RIG_CUDA, w.partial.at[RIG_CUDA], w.partial.bytes);
    int n = w.n_rows * w.n_heads, step = n > SAMPLES ? (n / SAMPLES) | 1 : 1;
    for (int i = 0; i < n; i += step)
        check_record(&w, i / w.n_heads, i % w.n_heads, cpu + (int64_t)i * w.stride, cuda + (int64_t)i * w.stride, &worst_share);
    if (s->seed % 8 == 0)
        rig_expect_repeat(rig, &w.partial, again, &w.args[RIG_CUDA], s->name);
    free(cpu), free(cuda);
    world_free(&w);
    rig_drop(rig, n_twins);
}

static void check_all_ranks(struct rig *rig, struct setup s) {
    for (s.layout.cp_rank = 0; s.layout.cp_rank < s.layout.cp_size; s.layout.cp_rank++)
        check_setup(rig, &s);
}

/* ---- cases --------------------------------------------------------------------------------------------------------- */

static struct setup setup_of(const char *name, int k_bits, int v_bits, int d, uint64_t seed) {
    static const int groups[] = {1, 3, 4, 7, 8}, sinks[] = {0, 16, 128};
    struct setup s = {.name = name, .format = {d, k_bits, v_bits, seed % 2 ? DTYPE_BF16 : DTYPE_F16}, .group = groups[seed / 2 % 5]};
    s.layout = (struct cache_layout){.cp_size = 1 + (int)(seed / 3 % 3), .window_blocks = (int)(seed / 5 % 3), .head_dim = d};
    s.layout.n_kv_heads = 1 + (int)(seed / 7 % 2);
    s.layout.sink = sinks[seed / 4 % 3];
    s.layout.n_slots = (int)ceil_div(s.layout.window_blocks + 1, s.layout.cp_size);
    s.owner_offset = (int)(seed % 5);
    s.rotate = k_bits < 16 && test_hash(seed, 1) % 3 == 0;
    s.mean = k_bits < 16 && test_hash(seed, 2) % 3 == 0;
    s.correction = test_hash(seed, 3) % 3 == 0;
    s.n_beyond = (int)(seed % 3);
    s.seed = seed;
    return s;
}

static const int all_bits[] = {2, 4, 8, 16};

/* One run of a few rows, every format, positions around the edges of blocks. */
static void check_formats(struct rig *rig) {
    static const struct piece runs[] = {{8, 0}, {9, 119}, {8, 120}, {8, 128}, {16, 240}, {8, 256}, {9, 375}, {11, 384},
                                        {64, 448}, {8, 632}};
    uint64_t seed = 1;
    for (int d = 64; d <= 128; d += 64)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < 4; v++)
                for (int i = 0; i < 3; i++, seed++) {
                    struct setup s = setup_of("one run", all_bits[k], all_bits[v], d, seed);
                    s.pieces[0] = runs[seed % (sizeof runs / sizeof *runs)];
                    check_all_ranks(rig, s);
                }
}

/* Long runs, and several among decoding rows, short runs (below 8 rows) and padding. */
static void check_steps(struct rig *rig) {
    static const struct piece steps[][MAX_PIECES] = {
        {{127, 513}},
        {{128, 512}},
        {{1, 300}, {8, 128}, {1, 0}, {12, 260}, {7, 515}, {-2, 0}, {40, 640}, {1, 129}},
        {{-9, 0}, {65, 575}, {63, 384}, {9, 3}},
        {{64, 128}, {64, 192}, {1, 500}, {125, 256}},
    };
    uint64_t seed = 200;
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        for (int j = 0; j < 4; j++, seed++) {
            struct setup s = setup_of("step", j == 3 ? all_bits[i % 4] : 2, j == 3 ? all_bits[i / 2 % 4] : 2, j % 2 ? 64 : 128, seed);
            memcpy(s.pieces, steps[i], sizeof s.pieces);
            check_all_ranks(rig, s);
        }
}

/* Many pages, so that the range of a split holds several; and so many heads that there is one split only. */
static void check_many(struct rig *rig) {
    for (uint64_t i = 0; i < 6; i++) {
        struct setup s = setup_of("many pages", i == 3 ? 8 : i == 4 ? 16 : 2, i == 3 ? 8 : i == 5 ? 16 : 2, i % 2 ? 64 : 128, 304 + i * 8);
        s.pieces[0] = (struct piece){9, 8000 + (int)i * 13};
        s.pieces[1] = (struct piece){8, 130};
        s.mean = i == 2;
        check_all_ranks(rig, s);
    }
    struct setup wide = setup_of("many heads", 2, 2, 64, 408);
    wide.layout.n_kv_heads = 8;
    wide.group = 16;
    wide.pieces[0] = (struct piece){128, 640};
    wide.pieces[1] = (struct piece){120, 260};
    check_all_ranks(rig, wide);
}

/* More tiles than a run of all rows would have, so that a CTA takes several: eight runs of one head, 8 rows each. And runs in which the
 * 16-bit blocks are all that there is, or as much as the pages. */
static void check_short(struct rig *rig) {
    static const struct piece runs[][MAX_PIECES] = {
        {{8, 0}, {8, 120}, {9, 300}, {8, 512}, {10, 640}, {8, 128}, {8, 256}, {8, 700}},
        {{8, 1}, {12, 0}, {8, 1000}, {8, 1500}, {16, 2032}, {9, 17}, {8, 4000}, {8, 64}},
        {{128, 0}},
        {{120, 384}, {128, 128}},
    };
    for (uint64_t i = 0; i < 8; i++) {
        struct setup s = setup_of("short runs", 2, i < 4 ? 2 : 4, i % 2 ? 64 : 128, 600 + i * 8);
        s.group = i % 4 < 2 ? 1 : 4;
        memcpy(s.pieces, runs[i % 4], sizeof s.pieces);
        check_all_ranks(rig, s);
    }
}

static void check_outliers(struct rig *rig) {
    for (int k = 0; k < 3; k++) {
        struct setup s = setup_of("outliers", all_bits[k], 2, k == 1 ? 64 : 128, 500 + (uint64_t)k);
        s.outliers = true;
        s.rotate = s.mean = false;
        s.layout.window_blocks = 0;
        s.layout.n_slots = 1;
        s.pieces[0] = (struct piece){24, 650};
        check_all_ranks(rig, s);
    }
}

int main(void) {
    struct rig rig;
    rig_open(&rig);
    check_formats(&rig);
    check_steps(&rig);
    check_many(&rig);
    check_short(&rig);
    check_outliers(&rig);
    fprintf(stderr, "worst error of Y: %.3f of its limit\n", worst_share);
    rig_close(&rig);
    return test_report();
}
