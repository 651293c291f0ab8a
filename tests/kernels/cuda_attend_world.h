/* What the tests of decode attention on GPUs attend over: a few sequences at positions around the edges of blocks, with pages of random codes
 * in the layouts of both backends, 16-bit blocks and sinks. What no row may read is NaN. */
#pragma once

#include "kernels/cuda_pages.h"
#include "kernels/cuda_rig.h"

enum {
    SEQS = 5,
    MAX_BLOCKS = 8,      /* of a sequence */
    POOL = 6,            /* kinds of pages; kind 0 is that of a first block */
    MAX_ROWS = 16,
    MAX_TOKENS = MAX_BLOCKS * KV_BLOCK,
};

struct setup {
    struct page_format format;
    struct cache_layout layout;
    int group, n_rows, n_beyond;
    bool rotate, mean, correction;
    struct step_row row[MAX_ROWS];
    int32_t owner_offset[SEQS];
    uint64_t seed;
};

/* Rows of K and V [tokens][d] as numbers, with the sum of the absolute parts of each. */
struct rows {
    float *k, *v, *k_abs, *v_abs;
};

struct world {
    struct setup s;
    int d, n_heads, n_pages;
    size_t record_bytes;
    struct rows page[POOL][2];       /* [kind][kv_head] */
    struct rows window[SEQS][2], sink[SEQS][2]; /* [slot][KV_BLOCK] rows of window one after the other */
    int32_t *table;                  /* kinds by [seq][local] */
    float *q, *mean, inv_freq[KV_MAX_HEAD_DIM / 2];
    struct attend_args args[RIG_SIDES];
    struct twin partial;
    size_t partial_floats;
};

static void *fresh(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p)
        exit(1);
    return p;
}

static struct rows rows_new(int tokens, int d) {
    size_t bytes = (size_t)tokens * (size_t)d * sizeof(float);
    return (struct rows){fresh(bytes), fresh(bytes), fresh(bytes), fresh(bytes)};
}

static void rows_free(struct rows *rows) { free(rows->k), free(rows->v), free(rows->k_abs), free(rows->v_abs); }

/* What a record of the CPU's layout holds. */
static void rows_of_record(const struct page_format *f, const uint8_t *record, struct rows *rows) {
    int d = f->head_dim;
    struct cpu_page_part k = cpu_page_part_of(record, d, f->k_bits, d);
    struct cpu_page_part v = cpu_page_part_of(record + cpu_page_v_offset(f), d, f->v_bits, KV_BLOCK);
    cpu_page_decode_k(f, record, rows->k);
    cpu_page_decode_v(f, record, rows->v);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) {
            float k_zero = f->k_bits == 16 ? 0.0f : dtype_from_f16(k.zero[c]), v_zero = f->v_bits == 16 ? 0.0f : dtype_from_f16(v.zero[t]);
            rows->k_abs[t * d + c] = fabsf(rows->k[t * d + c]) + 2.0f * fabsf(k_zero);
            rows->v_abs[t * d + c] = fabsf(rows->v[t * d + c]) + 2.0f * fabsf(v_zero);
        }
}

/* Pages of each kind at shuffled ids of even number; odd ids stay poison. The table's kinds become ids. */
static void make_pages(struct rig *rig, struct world *w) {
    const struct page_format *f = &w->s.format;
    int n_kv = w->s.layout.n_kv_heads;
    size_t stride = w->record_bytes * (size_t)n_kv, bytes = stride * (size_t)w->n_pages;
    uint8_t *host[RIG_SIDES] = {fresh(bytes), fresh(bytes)};
    int32_t *ids = fresh((size_t)SEQS * MAX_BLOCKS * sizeof *ids);
    for (int side = 0; side < RIG_SIDES; side++)
        memset(host[side], 0xff, bytes);
    for (int kind = 0; kind < POOL; kind++)
        for (int h = 0; h < n_kv; h++) {
            size_t at = stride * (size_t)(2 * (POOL - kind)) + w->record_bytes * (size_t)h;
            pages_make_record(f, w->s.seed + (uint64_t)(10 * kind + h), kind ? 0 : w->s.layout.sink, host[RIG_CPU] + at,
                              host[RIG_CUDA] + at);
            w->page[kind][h] = rows_new(KV_BLOCK, w->d);
            rows_of_record(f, host[RIG_CPU] + at, &w->page[kind][h]);
        }
    for (int i = 0; i < SEQS * MAX_BLOCKS; i++)
        ids[i] = w->table[i] < 0 ? -1 : 2 * (POOL - w->table[i]);
    struct twin pages = rig_make(rig, bytes, NULL), table = rig_make(rig, (size_t)SEQS * MAX_BLOCKS * sizeof *ids, ids);
    for (int side = 0; side < RIG_SIDES; side++) {
        rig_send(rig, side, pages.at[side], host[side], bytes);
        w->args[side].layer.pages = pages.at[side];
        w->args[side].page_table = table.at[side];
        free(host[side]);
    }
    free(ids);
}

/* n rows of K, then of V, of the window's type from `seed` on; those not below n_known stay NaN. */
static void make_rows(const struct world *w, uint64_t seed, int n, int n_known, uint16_t *out, struct rows *rows) {
    for (int part = 0; part < 2; part++)
        for (int i = 0; i < n_known * w->d; i++) {
            uint16_t bits = pages_narrow(w->s.format.window, 0.8f * test_normal(seed + (uint64_t)part, (uint64_t)i));
            out[part * n * w->d + i] = bits;
            (part ? rows->v : rows->k)[i] = w->s.format.window == DTYPE_F16 ? dtype_from_f16(bits) : dtype_from_bf16(bits);
            (part ? rows->v_abs : rows->k_abs)[i] = fabsf((part ? rows->v : rows->k)[i]);
        }
}

/* 16-bit slots and sinks of all sequences that have a row, up to its last position; everything else NaN. */
static void make_exact(struct rig *rig, struct world *w) {
    const struct cache_layout *l = &w->s.layout;
    size_t block = (size_t)2 * KV_BLOCK * (size_t)w->d, sink = (size_t)2 * (size_t)l->sink * (size_t)w->d;
    size_t n_window = (size_t)(SEQS * l->n_slots * l->n_kv_heads) * block, n_sink = (size_t)(SEQS * l->n_kv_heads) * sink;
    uint16_t *window = fresh(2 * n_window), *sinks = fresh(2 * n_sink);
    memset(window, 0xff, 2 * n_window), memset(sinks, 0xff, 2 * n_sink);
    for (int i = 0; i < w->s.n_rows; i++) { /* a sequence's last row comes last */
        const struct step_row *row = &w->s.row[i];
        if (row->seq < 0)
            continue;
        int64_t n_flushed = cache_n_flushed(l, row->position);
        for (int h = 0; h < l->n_kv_heads; h++) {
            struct rows *rows = &w->window[row->seq][h];
            uint64_t seed = w->s.seed + 1000 + (uint64_t)(row->seq * 2 + h) * 64;
            if (!rows->k) {
                *rows = rows_new(l->n_slots * KV_BLOCK, w->d);
                w->sink[row->seq][h] = rows_new(l->sink, w->d);
            }
            for (int64_t b = n_flushed; b <= row->position / KV_BLOCK; b++) {
                if (!cache_owns(l, b, w->s.owner_offset[row->seq]))
                    continue;
                int64_t slot = b / l->cp_size % l->n_slots, offset = slot * KV_BLOCK * w->d;
                struct rows part = {rows->k + offset, rows->v + offset, rows->k_abs + offset, rows->v_abs + offset};
                int n = (int)min_i64(KV_BLOCK, row->position - b * KV_BLOCK + 1);
                make_rows(w, seed + 4 * (uint64_t)b, KV_BLOCK, n,
                          window + (size_t)((row->seq * l->n_slots + slot) * l->n_kv_heads + h) * block, &part);
            }
            if (n_flushed > 0 && cache_owns(l, 0, w->s.owner_offset[row->seq]))
                make_rows(w, seed + 2, l->sink, l->sink, sinks + (size_t)(row->seq * l->n_kv_heads + h) * sink, &w->sink[row->seq][h]);
        }
    }
    struct twin a = rig_make(rig, 2 * n_window, window), b = rig_make(rig, 2 * n_sink, sinks);
    for (int side = 0; side < RIG_SIDES; side++) {
        w->args[side].layer.window = a.at[side];
        w->args[side].layer.sink = l->sink ? b.at[side] : NULL;
    }
    free(window), free(sinks);
}

static void make_step(struct rig *rig, struct world *w) {
    struct step_input *in = fresh(sizeof *in);
    struct seq_params *params = fresh(SEQS * sizeof *params);
    int n = w->s.n_rows + w->s.n_beyond;
    int64_t n_q = (int64_t)n * w->n_heads * w->d;
    uint16_t *q = fresh((size_t)n_q * 2);
    memset(in, 0xff, sizeof *in), memset(params, 0xff, SEQS * sizeof *params), memset(q, 0xff, (size_t)n_q * 2);
    in->n_rows = w->s.n_rows;
    memcpy(in->row, w->s.row, sizeof *in->row * (size_t)w->s.n_rows);
    for (int i = 0; i < SEQS; i++)
        params[i].owner_offset = w->s.owner_offset[i];
    w->q = fresh((size_t)n_q * sizeof *w->q);
    for (int64_t i = 0; i < (int64_t)w->s.n_rows * w->n_heads * w->d; i++) {
        if (w->s.row[i / (w->n_heads * w->d)].seq < 0)
            continue;
        q[i] = pages_narrow(w->s.format.window, 0.7f * test_normal(w->s.seed + 5, (uint64_t)i));
        w->q[i] = w->s.format.window == DTYPE_F16 ? dtype_from_f16(q[i]) : dtype_from_bf16(q[i]);
    }
    struct twin steps = rig_make(rig, sizeof *in, in), who = rig_make(rig, SEQS * sizeof *params, params);
    struct twin queries = rig_make(rig, (size_t)n_q * 2, q);
    int stride = partial_stride(w->d, w->s.correction);
    w->partial_floats = (size_t)(n * w->n_heads * stride);
    w->partial = rig_make(rig, w->partial_floats * sizeof(float), NULL);
    for (int side = 0; side < RIG_SIDES; side++) {
        struct attend_args *args = &w->args[side];
        args->in = steps.at[side], args->params = who.at[side], args->q = queries.at[side], args->partial = w->partial.at[side];
        args->n_rows = n, args->stride = stride;
    }
    free(in), free(params), free(q);
}

static void make_mean(struct rig *rig, struct world *w) {
    size_t n = (size_t)(w->s.layout.n_kv_heads * KV_BLOCK * w->d);
    w->mean = fresh(n * sizeof *w->mean);
    for (size_t i = 0; i < n; i++)
        w->mean[i] = 1.5f * test_normal(w->s.seed + 6, i);
    for (int i = 0; i < w->d / 2; i++)
        w->inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)w->d);
    struct twin mean = rig_make(rig, n * sizeof *w->mean, w->mean), inv_freq = rig_make(rig, (size_t)w->d / 2 * sizeof(float), w->inv_freq);
    for (int side = 0; side < RIG_SIDES; side++) {
        w->args[side].layer.mean = mean.at[side];
        w->args[side].layer.inv_freq = inv_freq.at[side];
    }
}

static void world_make(struct rig *rig, struct world *w, const struct setup *s) {
    *w = (struct world){.s = *s, .d = s->format.head_dim, .n_heads = s->group * s->layout.n_kv_heads, .n_pages = 2 * POOL + 2};
    w->record_bytes = page_record_bytes(&s->format);
    w->table = fresh((size_t)SEQS * MAX_BLOCKS * sizeof *w->table);
    for (int i = 0; i < SEQS * MAX_BLOCKS; i++)
        w->table[i] = -1;
    for (int i = 0; i < s->n_rows; i++) {
        if (s->row[i].seq < 0)
            continue;
        int32_t offset = s->owner_offset[s->row[i].seq];
        int64_t n = cache_n_owned(&s->layout, cache_n_flushed(&s->layout, s->row[i].position), offset);
        for (int64_t local = 0; local < n; local++) {
            bool first = local == 0 && cache_owns(&s->layout, 0, offset);
            uint64_t any = test_hash(s->seed, (uint64_t)(8 * s->row[i].seq + local));
            w->table[s->row[i].seq * MAX_BLOCKS + local] = first ? 0 : 1 + (int32_t)(any % (POOL - 1));
        }
    }
    for (int side = 0; side < RIG_SIDES; side++) {
        w->args[side] = (struct attend_args){.layout = s->layout, .n_heads = w->n_heads, .scale = 1.0f / sqrtf((float)w->d),
                                             .table_stride = MAX_BLOCKS};
        w->args[side].layer = (struct cache_layer){.format = s->format, .page_stride = (int64_t)w->record_bytes * s->layout.n_kv_heads,
                                                   .rotate_k = s->rotate};
    }
    make_pages(rig, w);
    make_exact(rig, w);
    make_step(rig, w);
    if (s->mean)
        make_mean(rig, w);
}

static void world_free(struct world *w) {
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < POOL; i++)
            rows_free(&w->page[i][h]);
        for (int i = 0; i < SEQS; i++)
            rows_free(&w->window[i][h]), rows_free(&w->sink[i][h]);
    }
    free(w->table), free(w->q), free(w->mean);
}

static const char *describe(const struct world *w, int side, int row, int head) {
    static char text[400];
    const struct setup *s = &w->s;
    const struct cache_layout *l = &s->layout;
    snprintf(text, sizeof text,
             "%s: bits %d %d, d %d, %s, group %d, %d KV heads, cp %d of %d, W %d, sink %d, "
             "rotate %d, mean %d, correction %d, row %d (seq %d at %d, offset %d), head %d",
             side ? "cuda" : "cpu", s->format.k_bits, s->format.v_bits, w->d, dtype_name(s->format.window), s->group, l->n_kv_heads,
             l->cp_rank, l->cp_size, l->window_blocks, l->sink, s->rotate, s->mean, s->correction, row, s->row[row].seq, s->row[row].position,
             s->row[row].seq < 0 ? -1 : s->owner_offset[s->row[row].seq], head);
    return text;
}

/* ---- which --------------------------------------------------------------------------------------------------------------- */

/* Everything follows from the seed: a batch of up to five sequences at positions around the edges of blocks, padding between them. */
static struct setup setup_of(int k_bits, int v_bits, int d, enum dtype window, uint64_t seed) {
    static const int groups[] = {1, 3, 4, 7, 8, 16, 5, 2, 12}, sinks[] = {0, 16, 128, 64};
    static const int positions[] = {0, 15, 16, 127, 128, 255, 256, 257, 300, 383, 384, 511, 512, 650, 769, 900};
    struct setup s = {.format = {d, k_bits, v_bits, window}, .group = groups[seed % 9], .seed = 100000 * seed, .correction = seed % 3 == 0};
    s.layout = (struct cache_layout){.cp_size = 1 + (int)(seed / 2 % 3), .window_blocks = 1 + (int)(seed / 3 % 2),
                                     .n_kv_heads = 1 + (int)(seed / 4 % 2), .sink = sinks[seed / 5 % 4], .head_dim = d};
    s.layout.n_slots = (int)ceil_div(s.layout.window_blocks + 1, s.layout.cp_size);
    s.rotate = k_bits < 16 && seed % 4 == 1;
    s.mean = k_bits < 16 && seed % 5 == 1;
    for (int seq = 0; seq < SEQS; seq++) {
        int32_t position = positions[test_hash(seed, (uint64_t)seq) % 16], first = s.n_rows;
        s.owner_offset[seq] = (int32_t)(test_hash(seed + 1, (uint64_t)seq) % 4);
        if (seq >= 1 + (int)(seed % SEQS))
            continue;
        if (test_hash(seed + 2, (uint64_t)seq) % 4 == 0)
            s.row[s.n_rows++] = (struct step_row){-1, -1, 0, 0};
        first = s.n_rows;
        int n = seq == 0 ? 1 + (int)(seed / 7 % 3) : 1; /* a short run of a prompt's rows, in one block */
        for (int i = 0; i < n; i++)
            if (i == 0 || (position + i) / KV_BLOCK == position / KV_BLOCK)
                s.row[s.n_rows++] = (struct step_row){seq, 7, position + i, first};
    }
    s.n_beyond = (int)(seed % 3);
    return s;
}
