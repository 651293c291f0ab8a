/* Attention over the cache against plain double precision over the same pages, both paths: every pair of bits, head sizes, groups,
 * ranks, owner offsets, windows, sinks, keys of pages rotated and without their mean, and positions around the edges of blocks, with NaN in
 * everything that a rank does not own or must not read. Then a million keys far below the max, shifted scores, padding, threads and batches.
 *
 * Tolerances are derived. u = 2^-24. A score is a sum of d products (each off by 2u, added one after the other, plus the constant of
 * the page): off by at most (d + 8) u A, A = scale * sum |q| (|code * scale| + |zero|). Rotated keys and mean keys are further sums of the
 * same kind: 16u more of A with each |key| replaced by the absolute terms that it becomes a sum of. e^x passes that on as a relative error of
 * twice it (the score and the max), plus 4u of its own. A sum over a block adds at most 128 terms in a row, then block by block with
 * a factor each: (128 + 3 * blocks) u of the sum of absolute terms. */
#include <omp.h>

#include <cblas.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page.h"
#include "test.h"

enum { SEQS = 3, SEQ = 1, GUARD = 64, MAX_BLOCKS = 8 };

struct setup {
    struct page_format format;
    struct cache_layout layout;
    int group, owner_offset;
    int64_t first, n_rows; /* positions of the rows */
    float key_shift;       /* moves all scores by about this much */
    bool rotate, mean;     /* layer.rotate_k, layer.mean */
    uint64_t seed;
};

struct world { /* one rank's memory and the truth */
    struct setup s;
    int n_heads;
    int64_t n_tokens, n_pages, table_stride;
    double *k, *v, *k_abs, *v_abs; /* [token][kv_head][d]: values, and sums of absolute parts */
    uint8_t *pages, *window, *sink;
    int32_t *table;
    float *mean, inv_freq[KV_MAX_HEAD_DIM / 2];
    void *q;
    float *qf;
    struct step_input *in;
    struct seq_params *params;
    struct attend_args args;
};

static void *fresh(size_t bytes, int fill) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!p)
        exit(1);
    memset(p, fill, (bytes + 127) / 64 * 64);
    return p;
}

static size_t at(const struct world *w, int64_t token, int head, int c) {
    return (size_t)((token * w->s.layout.n_kv_heads + head) * w->s.format.head_dim + c);
}

/* One part of a page with random codes, scales and zeros; groups before `begin` of V stay NaN. Writes the truth. */
static void put_codes(struct world *w, uint8_t *part, int bits, bool key, int64_t block, int head, int begin) {
    int d = w->s.format.head_dim, n_i = key ? d : KV_BLOCK, n_o = key ? KV_BLOCK : d;
    uint16_t *scale = (uint16_t *)(void *)(part + cpu_page_codes_bytes(d, bits)), *zero = scale + n_i;
    uint32_t *words = (uint32_t *)(void *)part;
    memset(part, 0, cpu_page_codes_bytes(d, bits));
    for (int i = 0; i < n_i; i++) {
        uint64_t id = (uint64_t)((block * 8 + head) * 2 + key) * 1024 + (uint64_t)i;
        if (key || i >= begin) {
            scale[i] = dtype_to_f16((1.1f + test_uniform(w->s.seed, id)) / (float)((1 << bits) - 1));
            zero[i] = dtype_to_f16(test_uniform(w->s.seed + 1, id) - 1.0f);
        }
        for (int o = 0; o < n_o; o++) {
            uint32_t code = (uint32_t)(test_hash(w->s.seed + 2, id * 256 + (uint64_t)o) >> 20) & ((1u << bits) - 1);
            size_t word;
            int bit;
            cpu_page_code_place(bits, n_o, i, o, &word, &bit);
            words[word] |= code << bit;
            int token = key ? o : i, c = key ? i : o;
            if (token < begin)
                continue;
            double product = (double)code * (double)dtype_from_f16(scale[i]), offset = (double)dtype_from_f16(zero[i]);
            size_t index = at(w, block * KV_BLOCK + token, head, c);
            (key ? w->k : w->v)[index] = product + offset;
            (key ? w->k_abs : w->v_abs)[index] = fabs(product) + fabs(offset);
        }
    }
}

/* Tokens begin .. end-1 of a block as rows of the window's type from `rows` on, row `begin` first at index begin - shift. */
static void put_rows(struct world *w, uint8_t *rows, bool key, int64_t block, int head, int begin, int end) {
    int d = w->s.format.head_dim;
    float shift = key ? w->s.key_shift : 0.0f;
    for (int t = begin; t < end; t++)
        for (int c = 0; c < d; c++) {
            size_t index = at(w, block * KV_BLOCK + t, head, c);
            float x = 0.7f * test_normal(w->s.seed + (key ? 3 : 4), index), back;
            if (key) /* q of every head leans the same way: see make_queries */
                x += shift * sqrtf((float)d) / (0.5f * (float)d) * (c % 2 ? 1.0f : -1.0f);
            size_t bytes = dtype_bytes(w->s.format.window, 1);
            uint8_t *place = rows + (size_t)(t * d + c) * bytes;
            dtype_narrow(w->s.format.window, &x, place, 1);
            dtype_widen(w->s.format.window, place, &back, 1);
            (key ? w->k : w->v)[index] = (double)back;
            (key ? w->k_abs : w->v_abs)[index] = fabs((double)back);
        }
}

static bool owned(const struct world *w, int64_t block) { return cache_owns(&w->s.layout, block, w->s.owner_offset); }

static void fill_blocks(struct world *w) {
    const struct cache_layout *l = &w->s.layout;
    const struct page_format *f = &w->s.format;
    int64_t last = w->s.first + w->s.n_rows - 1, n_flushed = cache_n_flushed(l, last), local = 0;
    size_t rows_bytes = dtype_bytes(f->window, (int64_t)KV_BLOCK * f->head_dim);
    size_t sink_bytes = dtype_bytes(f->window, (int64_t)l->sink * f->head_dim);
    for (int64_t block = 0; block <= last / KV_BLOCK; block++) {
        if (!owned(w, block))
            continue;
        int begin = block == 0 && block < n_flushed ? l->sink : 0, end = (int)min_i64(KV_BLOCK, last + 1 - block * KV_BLOCK);
        if (block < n_flushed)
            w->table[SEQ * w->table_stride + local++] = (int32_t)(w->n_pages - 1 - 2 * block);
        for (int h = 0; h < l->n_kv_heads; h++) {
            if (block >= n_flushed) {
                int64_t slot = block / l->cp_size % l->n_slots;
                uint8_t *k = w->window + (size_t)((SEQ * l->n_slots + slot) * l->n_kv_heads + h) * 2 * rows_bytes;
                put_rows(w, k, true, block, h, 0, end);
                put_rows(w, k + rows_bytes, false, block, h, 0, end);
                continue;
            }
            uint8_t *record = w->pages + (size_t)(w->n_pages - 1 - 2 * block) * (size_t)w->args.layer.page_stride + page_record_bytes(f) * (size_t)h;
            uint8_t *sink = w->sink + (size_t)(SEQ * l->n_kv_heads + h) * 2 * sink_bytes;
            for (int key = 0; key < 2; key++) {
                uint8_t *part = key ? record : record + cpu_page_v_offset(f);
                int bits = key ? f->k_bits : f->v_bits;
                if (bits == 16)
                    put_rows(w, part, key, block, h, begin, KV_BLOCK);
                else
                    put_codes(w, part, bits, key, block, h, begin);
                if (begin)
                    put_rows(w, key ? sink : sink + sink_bytes, key, 0, h, 0, begin);
            }
        }
    }
}

/* (q H) . k = q . (H k), and (R_-jG q) . mean[o] = q . (R_jG mean[o]): what a page's key is to the query as it is given. */
static void make_whole(const struct world *w, int64_t block, int token, int head) {
    int d = w->s.format.head_dim, half = d / 2;
    double *k = w->k + at(w, block * KV_BLOCK + token, head, 0), *k_abs = w->k_abs + at(w, block * KV_BLOCK + token, head, 0);
    double turned[KV_MAX_HEAD_DIM] = {0}, sum_abs = 0.0;
    for (int i = 0; w->s.rotate && i < d; i++) {
        sum_abs += k_abs[i] / sqrt((double)d);
        for (int j = 0; j < d; j++)
            turned[i] += (__builtin_popcount((unsigned)(i & j)) % 2 ? -k[j] : k[j]) / sqrt((double)d);
    }
    for (int i = 0; w->s.rotate && i < d; i++)
        k[i] = turned[i], k_abs[i] = sum_abs;
    const float *mean = w->mean + (head * KV_BLOCK + token) * d;
    for (int i = 0; w->s.mean && i < half; i++) {
        double angle = (double)((float)(block * KV_BLOCK) * w->inv_freq[i]), a = (double)mean[i], b = (double)mean[i + half];
        k[i] += a * cos(angle) - b * sin(angle);
        k[i + half] += b * cos(angle) + a * sin(angle);
        k_abs[i] += fabs(a) + fabs(b);
        k_abs[i + half] += fabs(a) + fabs(b);
    }
}

static void make_whole_keys(struct world *w) {
    const struct cache_layout *l = &w->s.layout;
    int64_t n_flushed = cache_n_flushed(l, w->s.first + w->s.n_rows - 1);
    for (int64_t block = 0; block < n_flushed; block++)
        for (int t = block ? 0 : l->sink; t < KV_BLOCK && owned(w, block); t++)
            for (int h = 0; h < l->n_kv_heads; h++)
                make_whole(w, block, t, h);
}

static void make_means(struct world *w) {
    int d = w->s.format.head_dim, n = w->s.layout.n_kv_heads * KV_BLOCK * d;
    w->mean = fresh((size_t)n * sizeof *w->mean, 0);
    for (int i = 0; i < n; i++)
        w->mean[i] = test_normal(w->s.seed + 6, (uint64_t)i);
    for (int i = 0; i < d / 2; i++)
        w->inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)d);
    w->args.layer.rotate_k = w->s.rotate;
    if (w->s.mean) {
        w->args.layer.mean = w->mean;
        w->args.layer.inv_freq = w->inv_freq;
    }
}

static void make_queries(struct world *w) {
    int d = w->s.format.head_dim;
    int64_t n = w->s.n_rows * w->n_heads * d;
    w->q = fresh(dtype_bytes(w->s.format.window, n), 0);
    w->qf = fresh((size_t)n * 4, 0);
    for (int64_t i = 0; i < n; i++) {
        float x = 0.6f * test_normal(w->s.seed + 5, (uint64_t)i);
        if (w->s.key_shift != 0.0f)
            x = 0.5f * (i % 2 ? 1.0f : -1.0f) + 0.1f * x;
        w->qf[i] = x;
    }
    dtype_narrow(w->s.format.window, w->qf, w->q, n);
    dtype_widen(w->s.format.window, w->q, w->qf, n);
}

static void world_make(struct world *w, const struct setup *s) {
    *w = (struct world){.s = *s};
    const struct cache_layout *l = &s->layout;
    int d = s->format.head_dim;
    w->n_heads = l->n_kv_heads * s->group;
    w->n_tokens = s->first + s->n_rows;
    w->n_pages = 2 * MAX_BLOCKS;
    w->table_stride = MAX_BLOCKS;
    size_t n = (size_t)(w->n_tokens * l->n_kv_heads * d) * sizeof(double);
    w->k = fresh(n, 0), w->v = fresh(n, 0), w->k_abs = fresh(n, 0), w->v_abs = fresh(n, 0);
    size_t stride = page_record_bytes(&s->format) * (size_t)l->n_kv_heads, bytes = dtype_bytes(s->format.window, d) * 2;
    w->pages = fresh(stride * (size_t)w->n_pages, 0xff);
    w->window = fresh(bytes * (size_t)(SEQS * l->n_slots * l->n_kv_heads * KV_BLOCK), 0xff);
    w->sink = fresh(bytes * (size_t)(SEQS * l->n_kv_heads * l->sink), 0xff);
    w->table = fresh(SEQS * (size_t)w->table_stride * 4, 0x7f);
    w->in = fresh(sizeof *w->in, 0xff);
    w->params = fresh(SEQS * sizeof *w->params, 0);
    w->params[SEQ].owner_offset = s->owner_offset;
    w->params[0].owner_offset = w->params[2].owner_offset = 5;
    w->args = (struct attend_args){.in = w->in, .params = w->params, .layout = *l, .n_heads = w->n_heads, .scale = 1.0f / sqrtf((float)d)};
    w->args.layer = (struct cache_layer){.format = s->format, .pages = w->pages, .page_stride = (int64_t)stride, .window = w->window,
                                         .sink = l->sink ? w->sink : NULL};
    w->args.page_table = w->table;
    w->args.table_stride = w->table_stride;
    fill_blocks(w);
    make_means(w);
    make_whole_keys(w);
    make_queries(w);
    w->args.q = w->q;
}

static void world_free(struct world *w) {
    void *all[] = {w->k, w->v, w->k_abs, w->v_abs, w->pages, w->window, w->sink, w->table, w->mean, w->q, w->qf, w->in, w->params};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* Record of row i (position first + i) and head h in double; Y in y[d], its sum of absolute terms in y_abs. Returns whether any
 * token is here; *score_error bounds the error of a score. */
static bool truth(const struct world *w, int64_t i, int h, double *m, double *l, double *y, double *y_abs, double *score_error) {
    int d = w->s.format.head_dim, kv = h / w->s.group;
    const float *q = w->qf + (i * w->n_heads + h) * d;
    static double s[MAX_BLOCKS * KV_BLOCK];
    *m = -INFINITY, *l = 0.0, *score_error = 0.0;
    memset(y, 0, (size_t)d * sizeof *y), memset(y_abs, 0, (size_t)d * sizeof *y);
    for (int64_t t = 0; t <= w->s.first + i; t++) {
        double sum = 0.0, sum_abs = 0.0;
        if (!owned(w, t / KV_BLOCK))
            continue;
        for (int c = 0; c < d; c++) {
            sum += (double)q[c] * w->k[at(w, t, kv, c)];
            sum_abs += fabs((double)q[c]) * w->k_abs[at(w, t, kv, c)];
        }
        s[t] = sum * (double)w->args.scale;
        *m = fmax(*m, s[t]);
        *score_error = fmax(*score_error, (d + 8 + (w->s.rotate || w->s.mean ? 16 : 0)) * 0x1p-24 * sum_abs * (double)w->args.scale);
    }
    for (int64_t t = 0; t <= w->s.first + i; t++) {
        if (!owned(w, t / KV_BLOCK))
            continue;
        double p = exp(s[t] - *m);
        *l += p;
        for (int c = 0; c < d; c++) {
            y[c] += p * w->v[at(w, t, kv, c)];
            y_abs[c] += p * w->v_abs[at(w, t, kv, c)];
        }
    }
    return *l > 0.0;
}

static void check_record(const struct world *w, int64_t i, int h, const float *record) {
    double m, l, y[KV_MAX_HEAD_DIM], y_abs[KV_MAX_HEAD_DIM], score_error, worst = 0.0;
    int d = w->s.format.head_dim;
    const float *tail = record + partial_tail(d, false);
    bool any = truth(w, i, h, &m, &l, y, y_abs, &score_error);
    bool fine = tail[2] == 0.0f && tail[3] == 0.0f;
    if (any) {
        double tolerance = 2.0 * score_error + (4 + KV_BLOCK + 3 * MAX_BLOCKS) * 0x1p-24;
        double factor = exp((double)tail[0] - m); /* the record is shifted by its own max */
        fine = fine && fabs((double)tail[0] - m) <= score_error + 0x1p-23 * fabs(m);
        fine = fine && fabs((double)tail[1] * factor - l) <= (tolerance + score_error + 0x1p-23 * fabs(m)) * l;
        for (int c = 0; c < d; c++)
            worst = fmax(worst, fabs((double)record[c] * factor - y[c]) / ((tolerance + score_error + 0x1p-23 * fabs(m)) * y_abs[c]));
        fine = fine && worst <= 1.0; /* false for NaN as well */
        for (int c = 0; c < d; c++)
            fine = fine && isfinite(record[c]);
    } else {
        fine = fine && tail[0] == -INFINITY && tail[1] == 0.0f;
        for (int c = 0; c < d; c++)
            fine = fine && record[c] == 0.0f;
    }
    const struct cache_layout *y_l = &w->s.layout;
    CHECK(fine, "bits %d %d, d %d, group %d, cp %d of %d, offset %d, W %d, sink %d, rotate %d, mean %d, "
          "row %ld at %ld, head %d: m %g (%g) l %g (%g), Y off by %g of its bound",
          w->s.format.k_bits, w->s.format.v_bits, d, w->s.group, y_l->cp_rank, y_l->cp_size, w->s.owner_offset, y_l->window_blocks, y_l->sink, w->s.rotate, w->s.mean,
          (long)i, (long)(w->s.first + i), h, (double)tail[0], m, (double)tail[1], l, worst);
}

/* Runs with two padding rows, in front and behind, and rows beyond in->n_rows; `take`: only rows take .. of the world, n of them. */
static float *run_rows(struct world *w, int64_t take, int64_t n, int n_threads) {
    int d = w->s.format.head_dim, extra = 2;
    int64_t n_buffer = n + 2 + extra, row_floats = (int64_t)w->n_heads * partial_stride(d, false);
    float *partial = fresh((size_t)(n_buffer * row_floats + GUARD) * 4, 0xee);
    size_t q_row = dtype_bytes(w->s.format.window, (int64_t)w->n_heads * d);
    uint8_t *q = fresh(q_row * (size_t)n_buffer, 0xff);
    memcpy(q + q_row, (uint8_t *)w->q + q_row * (size_t)take, q_row * (size_t)n);
    w->in->n_rows = (int32_t)n + 2;
    for (int64_t i = 0; i < n; i++)
        w->in->row[1 + i] = (struct step_row){SEQ, 7, (int32_t)(w->s.first + take + i), 1};
    w->in->row[0] = w->in->row[n + 1] = (struct step_row){-1, -1, 0, 0};
    struct attend_args args = w->args;
    args.n_rows = (int)n_buffer;
    args.q = q;
    args.partial = partial;
    args.stride = partial_stride(d, false);
    omp_set_num_threads(n_threads);
    cpu_attend(&args);
    free(q);
    for (int64_t row = 0; row < n_buffer; row++)
        for (int h = 0; h < w->n_heads && (row == 0 || row > n); h++) {
            const float *record = partial + (row * w->n_heads + h) * args.stride;
            bool empty = record[d] == -INFINITY && record[d + 1] == 0.0f && record[d + 2] == 0.0f && record[d + 3] == 0.0f;
            for (int c = 0; c < d; c++)
                empty = empty && record[c] == 0.0f;
            CHECK(empty, "padding row %ld", (long)row);
        }
    for (int i = 0; i < GUARD * 4; i++)
        CHECK(((uint8_t *)(partial + n_buffer * row_floats))[i] == 0xee, "written beyond the end");
    return partial;
}

static void check_setup(const struct setup *s, bool repeat) {
    struct world w;
    world_make(&w, s);
    int64_t stride = partial_stride(s->format.head_dim, false), row_floats = w.n_heads * stride;
    float *got = run_rows(&w, 0, s->n_rows, 2);
    for (int64_t i = 0; i < s->n_rows; i++)
        for (int h = 0; h < w.n_heads; h++)
            check_record(&w, i, h, got + row_floats + (i * w.n_heads + h) * stride);
    if (repeat) {
        for (int threads = 1; threads <= 5; threads += 2) {
            float *again = run_rows(&w, 0, s->n_rows, threads);
            CHECK(memcmp(got, again, (size_t)((s->n_rows + 4) * row_floats) * 4) == 0, "bits differ with %d threads", threads);
            free(again);
        }
        for (int64_t i = 0; i < s->n_rows; i += 7) { /* the other path, or the same row alone */
            float *alone = run_rows(&w, i, 1, 1);
            for (int h = 0; h < w.n_heads; h++)
                check_record(&w, i, h, alone + row_floats + h * stride);
            if (s->n_rows * s->group < 24)
                CHECK(memcmp(got + (1 + i) * row_floats, alone + row_floats, (size_t)row_floats * 4) == 0, "a row depends on its batch");
            free(alone);
        }
    }
    free(got);
    world_free(&w);
}

static struct setup setup_of(int k_bits, int v_bits, int d, uint64_t seed) {
    static const enum dtype windows[] = {DTYPE_F16, DTYPE_BF16, DTYPE_F32};
    struct setup s = {.format = {d, k_bits, v_bits, windows[seed % 3]}, .group = 1 + (int)(seed % 9), .seed = 100 * seed, .n_rows = 1};
    s.layout = (struct cache_layout){.cp_size = 1 + (int)(seed / 2 % 3), .window_blocks = (int)(seed / 3 % 3), .n_kv_heads = 1 + (int)(seed % 2),
                                     .sink = seed / 5 % 2 ? 16 : 0, .head_dim = d};
    s.layout.n_slots = (int)ceil_div(s.layout.window_blocks + 1, s.layout.cp_size);
    s.owner_offset = (int)(seed % 4);
    s.rotate = seed / 2 % 3 == 1;
    s.mean = seed / 4 % 3 == 1;
    return s;
}

static void check_all_ranks(struct setup s, bool repeat) {
    for (s.layout.cp_rank = 0; s.layout.cp_rank < s.layout.cp_size; s.layout.cp_rank++)
        check_setup(&s, repeat);
}

static void check_formats(void) {
    static const int bits[] = {2, 4, 8, 16}, positions[] = {0, 127, 128, 255, 256, 257, 383, 384, 385};
    uint64_t seed = 1;
    for (int d = 64; d <= 128; d += 64)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < 4; v++)
                for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) {
                    struct setup s = setup_of(bits[k], bits[v], d, seed++);
                    s.first = positions[p];
                    check_all_ranks(s, seed % 8 == 0);
                }
}

/* Prompt chunks: rows of one block, on both sides of the choice of path. */
static void check_chunks(void) {
    static const int bits[] = {2, 4, 8, 16};
    uint64_t seed = 1000;
    for (int d = 64; d <= 128; d += 64)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < 4; v++, seed++) {
                struct setup s = setup_of(bits[k], bits[v], d, seed);
                s.first = 128 * (int64_t)(seed % 5) + (int64_t)(seed % 3 ? seed % 90 : 0);
                s.n_rows = 1 + (int64_t)(seed * 7 % 38);
                check_all_ranks(s, true);
            }
    struct setup whole = setup_of(2, 2, 64, 7);
    whole.first = 512;
    whole.n_rows = KV_BLOCK;
    check_all_ranks(whole, true);
}

static void check_shifts(void) {
    for (int sign = -1; sign <= 1; sign += 2)
        for (int rows = 1; rows <= 31; rows += 30) {
            struct setup s = setup_of(16, 16, 64, 3 + (uint64_t)rows % 4);
            s.key_shift = 50.0f * (float)sign;
            s.first = 600;
            s.n_rows = rows;
            struct world w;
            double m, l, y[KV_MAX_HEAD_DIM], y_abs[KV_MAX_HEAD_DIM], error;
            world_make(&w, &s);
            if (truth(&w, 0, 0, &m, &l, y, y_abs, &error))
                CHECK(fabs(m - 50.0 * sign) < 10.0, "max %g", m);
            world_free(&w);
            check_all_ranks(s, true);
        }
}

/* One key at about 0 and 2^20 keys far below it: l is 1 plus a million terms that each lie below half a unit of it. At 14 below they
 * add up to as much again; at 22 below even the sum over a page would vanish beside 1 if pages were added one by one. */
enum { MANY = 1 << 20, MANY_D = 64, MANY_PAGES = MANY / KV_BLOCK - 1 };

struct many {
    float low;        /* 8 times the low scores */
    int64_t top_page; /* where the one key is */
};

static uint32_t many_code(const uint32_t *words, int n_o, int i, int o) {
    size_t word;
    int bit;
    cpu_page_code_place(2, n_o, i, o, &word, &bit);
    return words[word] >> bit & 3u;
}

static void many_page(const struct many *many, uint8_t *record, const struct page_format *f, int64_t page) {
    uint32_t *k = (uint32_t *)(void *)record, *v = (uint32_t *)(void *)(record + cpu_page_v_offset(f));
    size_t bytes = cpu_page_codes_bytes(MANY_D, 2);
    uint16_t *ks = (uint16_t *)(void *)(record + bytes), *vs = (uint16_t *)(void *)(record + cpu_page_v_offset(f) + bytes);
    for (size_t i = 0; i < bytes / 4; i++) {
        k[i] = (uint32_t)test_hash(1, (uint64_t)page * 4096 + i);
        v[i] = (uint32_t)test_hash(2, (uint64_t)page * 4096 + i);
    }
    for (int t = 0; t < KV_BLOCK; t++) { /* channel 0 is low for all tokens but one */
        size_t word;
        int bit;
        cpu_page_code_place(2, KV_BLOCK, 0, t, &word, &bit);
        k[word] &= ~(3u << bit);
        k[word] |= (page == many->top_page && t == 5 ? 3u : 0u) << bit;
    }
    for (int c = 0; c < MANY_D; c++) {
        ks[c] = dtype_to_f16(c ? 0.3f : -many->low / 3.0f);
        ks[MANY_D + c] = dtype_to_f16(c ? -0.45f : many->low);
    }
    for (int t = 0; t < KV_BLOCK; t++) {
        vs[t] = dtype_to_f16(0.5f + 0.3f * test_uniform(3, (uint64_t)(page * KV_BLOCK + t)));
        vs[KV_BLOCK + t] = dtype_to_f16(-0.2f);
    }
}

/* Adds a page to (l, y) in double, shifted by `m`. */
static void many_truth(const uint8_t *record, const struct page_format *f, const float *q, double m, double *l, double *y, double *y_abs) {
    const struct cpu_page_part k = cpu_page_part_of(record, MANY_D, 2, MANY_D);
    const struct cpu_page_part v = cpu_page_part_of(record + cpu_page_v_offset(f), MANY_D, 2, KV_BLOCK);
    for (int t = 0; t < KV_BLOCK; t++) {
        double s = 0.0, vs = (double)dtype_from_f16(v.scale[t]), vz = (double)dtype_from_f16(v.zero[t]);
        for (int c = 0; c < MANY_D; c++)
            s += (double)q[c] * (many_code(k.codes, KV_BLOCK, c, t) * (double)dtype_from_f16(k.scale[c]) + (double)dtype_from_f16(k.zero[c]));
        double p = exp(s / 8.0 - m);
        *l += p;
        for (int c = 0; c < MANY_D; c++) {
            double x = many_code(v.codes, MANY_D, t, c) * vs + vz;
            y[c] += p * x;
            y_abs[c] += p * fabs(x);
        }
    }
}

/* The last of n_rows rows of one sequence against (l, y), which are shifted by m. */
static void check_many_rows(int n_rows, struct attend_args args, double low, const float *q, double m, double l, const double *y, const double *y_abs) {
    float *queries = fresh((size_t)n_rows * MANY_D * 4, 0), *partial = fresh((size_t)n_rows * (MANY_D + 4) * 4, 0xff);
    struct step_input *in = fresh(sizeof *in, 0);
    for (int i = 0; i < n_rows; i++) {
        memcpy(queries + i * MANY_D, q, MANY_D * 4);
        in->row[i] = (struct step_row){0, 1, MANY - n_rows + i, 0};
    }
    in->n_rows = args.n_rows = n_rows;
    args.in = in, args.q = queries, args.partial = partial, args.stride = MANY_D + 4;
    omp_set_num_threads(2);
    cpu_attend(&args);
    const float *record = partial + (size_t)(n_rows - 1) * (MANY_D + 4);
    double worst = 0.0;
    /* The top score cancels two terms that are as large as the low scores. Sums are shifted by it whatever its own rounding was. */
    CHECK(fabs((double)record[MANY_D] - m) <= (MANY_D + 8) * 0x1p-24 * 2.0 * low, "m %g, truth %g", (double)record[MANY_D], m);
    CHECK(fabs((double)record[MANY_D + 1] - l) <= 1e-5 * l, "%d rows: l %.8g, truth %.8g", n_rows, (double)record[MANY_D + 1], l);
    for (int c = 0; c < MANY_D; c++)
        worst = fmax(worst, fabs((double)record[c] - y[c]) / y_abs[c]);
    CHECK(worst <= 1e-5, "%d rows: Y off by %g", n_rows, worst);
    free(queries), free(partial), free(in);
}

static void check_many(struct many many) {
    struct page_format f = {MANY_D, 2, 2, DTYPE_F32};
    size_t stride = page_record_bytes(&f), rows_bytes = (size_t)KV_BLOCK * MANY_D * 4;
    uint8_t *pages = fresh(stride * MANY_PAGES, 0);
    float *window = fresh(2 * rows_bytes, 0), q[MANY_D];
    int32_t *table = fresh(MANY_PAGES * 4, 0);
    struct seq_params *params = fresh(sizeof *params, 0);
    for (int c = 0; c < MANY_D; c++)
        q[c] = c ? 0.2f * test_uniform(4, (uint64_t)c) : 1.0f;
    for (int i = 0; i < MANY_PAGES; i++) {
        many_page(&many, pages + stride * (size_t)i, &f, i);
        table[i] = i;
    }
    for (int t = 0; t < KV_BLOCK; t++)
        window[t * MANY_D] = many.low; /* V of the window is 0 */
    struct attend_args args = {.params = params, .page_table = table, .table_stride = MANY_PAGES, .n_heads = 1, .scale = 0.125f};
    args.layout = (struct cache_layout){0, 1, 0, 1, 0, 1, MANY_D};
    args.layer = (struct cache_layer){.format = f, .pages = pages, .page_stride = (int64_t)stride, .window = window};
    const uint8_t *top = pages + stride * (size_t)many.top_page;
    const struct cpu_page_part k = cpu_page_part_of(top, MANY_D, 2, MANY_D);
    double m = 0.0, l, y[MANY_D] = {0}, y_abs[MANY_D] = {0};
    for (int c = 0; c < MANY_D; c++)
        m += 0.125 * (double)q[c] * (many_code(k.codes, KV_BLOCK, c, 5) * (double)dtype_from_f16(k.scale[c]) + (double)dtype_from_f16(k.zero[c]));
    l = KV_BLOCK * exp((double)many.low / 8.0 - m);
    for (int i = 0; i < MANY_PAGES; i++)
        many_truth(pages + stride * (size_t)i, &f, q, m, &l, y, y_abs);
    check_many_rows(1, args, (double)-many.low / 8.0, q, m, l, y, y_abs);
    check_many_rows(24, args, (double)-many.low / 8.0, q, m, l, y, y_abs); /* the path of many rows */
    free(pages), free(window), free(table), free(params);
}

int main(void) {
    openblas_set_num_threads(1);
    check_formats();
    check_chunks();
    check_shifts();
    check_many((struct many){-112.0f, 0});
    check_many((struct many){-176.0f, 4096});
    return test_report();
}
