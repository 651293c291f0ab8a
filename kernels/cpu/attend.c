/* Attention over the cache while decoding: every row by itself, blocks read as they are stored.
 *
 * Scales never enter the inner loop. For a page, K's channel scale goes into q and q.zero is a constant of the page; V's token scale
 * goes into p and sum p zero is added to every channel. The max runs along with the blocks, so it is exact at the end.
 * A row's work is cut by its own length alone, into at most MAX_SPLITS ranges of pages and one for the 16-bit tokens, and their
 * sums are merged in order: bits depend neither on threads nor on other rows. Sums go up in steps (a block, SPLIT_PAGES blocks, a
 * range, the row), so that a million small terms beside a large one are not rounded away one by one. */
#include "kernels/cpu/attend.h"

#include "kernels/cpu/code_dot.h"

enum {
    UNIT_HEADS = 8,    /* query heads that share one pass over a block */
    SPLIT_PAGES = 16,  /* pages worth another split */
    MAX_SPLITS = 32,   /* ranges of pages of a row */
    WAVE_SLOTS = 128,  /* splits in flight: 0.5 MiB of the caller's stack */
};

struct sums { /* shifted by m */
    float m[UNIT_HEADS], l[UNIT_HEADS];
    float y[UNIT_HEADS][KV_MAX_HEAD_DIM];
};

struct unit { /* one row, one KV head, some of its query heads */
    struct attend_view view;
    int64_t row;
    int head, n_heads;
    int slot, n_splits; /* where its splits' sums lie; the last one is the 16-bit tokens */
};

static void sums_clear(struct sums *sums, int n_heads, int d) {
    for (int h = 0; h < n_heads; h++) {
        sums->m[h] = -INFINITY;
        sums->l[h] = 0.0f;
        memset(sums->y[h], 0, (size_t)d * sizeof(float));
    }
}

static void sums_merge(struct sums *into, const struct sums *from, int n_heads, int d) {
    for (int h = 0; h < n_heads; h++) {
        if (from->m[h] == -INFINITY)
            continue;
        float m = fmaxf(into->m[h], from->m[h]);
        float a = simd_exp(into->m[h] - m), b = simd_exp(from->m[h] - m);
        into->m[h] = m;
        into->l[h] = into->l[h] * a + from->l[h] * b;
        for (int c = 0; c < d; c += V16)
            v16_store(into->y[h] + c, v16_fma(v16_load(from->y[h] + c), v16_set(b), v16_mul(v16_load(into->y[h] + c), v16_set(a))));
    }
}

/* s[h][t] of tokens 0 .. end-1; those before begin, and lanes up to the next multiple of 16, are -inf. */
static void piece_scores(const struct attend_piece *piece, enum dtype window, int n_heads, int d, const float *q, float *s) {
    if (piece->k_bits == 16) {
        for (int h = 0; h < n_heads; h += DOT_HEADS)
            row_scores(window, (int)min_i64(DOT_HEADS, n_heads - h), piece->end, d, piece->k, q + h * DOT_STRIDE, s + h * DOT_STRIDE);
    } else {
        struct cpu_page_part k = cpu_page_part_of(piece->k, d, piece->k_bits, d);
        float coef[UNIT_HEADS * DOT_STRIDE];
        for (int h = 0; h < n_heads; h++) {
            for (int c = 0; c < d; c += V16)
                v16_store(coef + h * DOT_STRIDE + c, v16_mul(v16_load(q + h * DOT_STRIDE + c), v16_load_f16(k.scale + c)));
        }
        for (int h = 0; h < n_heads; h += DOT_HEADS)
            code_dot(piece->k_bits, KV_BLOCK, (int)min_i64(DOT_HEADS, n_heads - h), d, k.codes, coef + h * DOT_STRIDE, s + h * DOT_STRIDE);
        for (int h = 0; h < n_heads; h++) {
            struct v16 constant = v16_set(0.0f);
            for (int c = 0; c < d; c += V16)
                constant = v16_fma(v16_load(q + h * DOT_STRIDE + c), v16_load_f16(k.zero + c), constant);
            constant = v16_set(v16_sum(constant));
            for (int t = 0; t < KV_BLOCK; t += V16)
                v16_store(s + h * DOT_STRIDE + t, v16_add(v16_load(s + h * DOT_STRIDE + t), constant));
        }
    }
    for (int h = 0; h < n_heads; h++) {
        for (int t = 0; t < piece->begin; t++)
            s[h * DOT_STRIDE + t] = -INFINITY;
        for (int t = piece->end; t % V16; t++)
            s[h * DOT_STRIDE + t] = -INFINITY;
    }
}

/* Scores to weights in place; moves the sums to the new max. */
static void piece_weights(int end, int n_heads, int d, float *s, struct sums *sums) {
    for (int h = 0; h < n_heads; h++, s += DOT_STRIDE) {
        struct v16 top = v16_load(s), total = v16_set(0.0f);
        for (int t = V16; t < end; t += V16)
            top = v16_max(top, v16_load(s + t));
        float m = fmaxf(sums->m[h], v16_top(top));
        for (int t = 0; t < end; t += V16) {
            struct v16 p = v16_exp(v16_sub(v16_load(s + t), v16_set(m)));
            total = v16_add(total, p);
            v16_store(s + t, p);
        }
        float old = sums->m[h] == m ? 1.0f : simd_exp(sums->m[h] - m);
        sums->m[h] = m;
        sums->l[h] = sums->l[h] * old + v16_sum(total);
        if (old != 1.0f)
            for (int c = 0; c < d; c += V16)
                v16_store(sums->y[h] + c, v16_mul(v16_load(sums->y[h] + c), v16_set(old)));
    }
}

static void piece_values(const struct attend_piece *piece, enum dtype window, int n_heads, int d, float *p, struct sums *sums) {
    float y[UNIT_HEADS * DOT_STRIDE], constant[UNIT_HEADS] = {0};
    if (piece->v_bits == 16) {
        const uint8_t *rows = piece->v + dtype_bytes(window, (int64_t)piece->begin * d);
        for (int h = 0; h < n_heads; h += DOT_HEADS)
            row_values(window, (int)min_i64(DOT_HEADS, n_heads - h), piece->end - piece->begin, d, rows,
                       p + h * DOT_STRIDE + piece->begin, y + h * DOT_STRIDE);
    } else {
        struct cpu_page_part v = cpu_page_part_of(piece->v, d, piece->v_bits, KV_BLOCK);
        for (int h = 0; h < n_heads; h++) { /* weights before begin are 0 and stay 0: the sink's scales are not read */
            struct v16 sum = v16_set(0.0f);
            for (int t = piece->begin; t < KV_BLOCK; t += V16) {
                struct v16 weight = v16_load(p + h * DOT_STRIDE + t);
                sum = v16_fma(weight, v16_load_f16(v.zero + t), sum);
                v16_store(p + h * DOT_STRIDE + t, v16_mul(weight, v16_load_f16(v.scale + t)));
            }
            constant[h] = v16_sum(sum);
        }
        for (int h = 0; h < n_heads; h += DOT_HEADS)
            code_dot(piece->v_bits, d, (int)min_i64(DOT_HEADS, n_heads - h), KV_BLOCK, v.codes, p + h * DOT_STRIDE, y + h * DOT_STRIDE);
    }
    for (int h = 0; h < n_heads; h++)
        for (int c = 0; c < d; c += V16) {
            struct v16 add = v16_add(v16_load(y + h * DOT_STRIDE + c), v16_set(constant[h]));
            v16_store(sums->y[h] + c, v16_add(v16_load(sums->y[h] + c), add));
        }
}

/* `turn`: q whose mean keys the piece leaves out, or NULL; it is page `block`. */
static void attend_piece(const struct unit *unit, const struct attend_piece *piece, const float *q, const float *turn, int64_t block,
                         struct sums *sums) {
    float s[UNIT_HEADS * DOT_STRIDE];
    int d = unit->view.args->layout.head_dim;
    enum dtype window = unit->view.args->layer.format.window;
    if (piece->begin >= piece->end)
        return;
    piece_scores(piece, window, unit->n_heads, d, q, s);
    for (int h = 0; turn && h < unit->n_heads; h++)
        attend_add_mean(unit->view.args, unit->view.kv_head, block, turn + h * DOT_STRIDE, s + h * DOT_STRIDE);
    piece_weights(piece->end, unit->n_heads, d, s, sums);
    piece_values(piece, window, unit->n_heads, d, s, sums);
}

/* q of the unit's heads as float, scaled. */
static void unit_queries(const struct unit *unit, float *q) {
    const struct attend_args *args = unit->view.args;
    int d = args->layout.head_dim;
    enum dtype window = args->layer.format.window;
    for (int h = 0; h < unit->n_heads; h++) {
        int64_t at = (unit->row * args->n_heads + unit->head + h) * d;
        for (int c = 0; c < d; c += V16)
            v16_store(q + h * DOT_STRIDE + c, v16_mul(v16_load_as(window, args->q, at + c), v16_set(args->scale)));
    }
}

static void attend_exact_tokens(const struct unit *unit, const float *q, struct sums *sums) {
    const struct attend_view *view = &unit->view;
    struct attend_piece piece = attend_sink_of(view);
    attend_piece(unit, &piece, q, NULL, 0, sums);
    for (int64_t block = view->n_flushed; block <= view->position / KV_BLOCK; block++)
        if (cache_owns(&view->args->layout, block, view->owner_offset)) {
            piece = attend_window_at(view, block);
            attend_piece(unit, &piece, q, NULL, 0, sums);
        }
}

static void attend_split(const struct unit *unit, int split, struct sums *sums) {
    const struct attend_view *view = &unit->view;
    const struct cache_layer *layer = &view->args->layer;
    int d = view->args->layout.head_dim, n_heads = unit->n_heads, n_ranges = unit->n_splits - 1;
    float q[UNIT_HEADS * DOT_STRIDE], plain[UNIT_HEADS * DOT_STRIDE];
    unit_queries(unit, q);
    sums_clear(sums, n_heads, d);
    if (split == n_ranges) {
        attend_exact_tokens(unit, q, sums);
        return;
    }
    if (layer->mean)
        memcpy(plain, q, sizeof(float) * (size_t)(n_heads * DOT_STRIDE));
    for (int h = 0; layer->rotate_k && h < n_heads; h++)
        attend_rotate(q + h * DOT_STRIDE, d);
    int64_t end = view->n_pages * (split + 1) / n_ranges;
    for (int64_t first = view->n_pages * split / n_ranges; first < end; first += SPLIT_PAGES) {
        struct sums step;
        sums_clear(&step, n_heads, d);
        for (int64_t page = first; page < min_i64(end, first + SPLIT_PAGES); page++) {
            struct attend_piece piece = attend_page_at(view, page);
            attend_piece(unit, &piece, q, layer->mean ? plain : NULL, attend_page_block(view, page), &step);
        }
        sums_merge(sums, &step, n_heads, d);
    }
}

static void unit_finish(const struct unit *unit, struct sums *splits) {
    const struct attend_args *args = unit->view.args;
    int d = args->layout.head_dim;
    for (int s = 1; s < unit->n_splits; s++)
        sums_merge(&splits[0], &splits[s], unit->n_heads, d);
    for (int h = 0; h < unit->n_heads; h++) {
        float *record = attend_record(args, unit->row, unit->head + h);
        memcpy(record, splits[0].y[h], (size_t)d * sizeof *record);
        attend_finish_record(args, record, splits[0].m[h], splits[0].l[h]);
    }
}

/* Units gathered until their splits fill the slots, then run together. */
struct wave {
    int n_units, n_slots;
    struct unit units[WAVE_SLOTS];
    int16_t unit_of[WAVE_SLOTS];
    struct sums sums[WAVE_SLOTS];
};

static void wave_run(struct wave *wave) {
#pragma omp parallel if (wave->n_slots > 1)
    {
#pragma omp for schedule(dynamic)
        for (int i = 0; i < wave->n_slots; i++) {
            const struct unit *unit = &wave->units[wave->unit_of[i]];
            attend_split(unit, i - unit->slot, &wave->sums[i]);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < wave->n_units; i++)
            unit_finish(&wave->units[i], &wave->sums[wave->units[i].slot]);
    }
    wave->n_units = wave->n_slots = 0;
}

static void wave_add(struct wave *wave, const struct unit *unit) {
    if (wave->n_slots + unit->n_splits > WAVE_SLOTS)
        wave_run(wave);
    wave->units[wave->n_units] = *unit;
    wave->units[wave->n_units].slot = wave->n_slots;
    for (int i = 0; i < unit->n_splits; i++)
        wave->unit_of[wave->n_slots++] = (int16_t)wave->n_units;
    wave->n_units++;
}

/* All heads of one row, cut into equal units of at most UNIT_HEADS heads of a group. */
static void wave_add_row(struct wave *wave, const struct attend_args *args, int64_t row) {
    int group = args->n_heads / args->layout.n_kv_heads, n_units = (int)ceil_div(group, UNIT_HEADS);
    for (int kv_head = 0; kv_head < args->layout.n_kv_heads; kv_head++) {
        struct unit unit = {.view = attend_view_of(args, &args->in->row[row], kv_head), .row = row};
        unit.n_splits = (int)min_i64(MAX_SPLITS, ceil_div(unit.view.n_pages, SPLIT_PAGES)) + 1;
        for (int u = 0; u < n_units; u++) {
            int first = group * u / n_units;
            unit.head = kv_head * group + first;
            unit.n_heads = group * (u + 1) / n_units - first;
            wave_add(wave, &unit);
        }
    }
}

static void empty_records(const struct attend_args *args, int64_t row) {
    for (int h = 0; h < args->n_heads; h++) {
        float *record = attend_record(args, row, h);
        memset(record, 0, (size_t)args->stride * sizeof *record);
        attend_finish_record(args, record, -INFINITY, 0.0f);
    }
}

void cpu_attend(const struct attend_args *args) {
    const struct step_input *in = args->in;
    int64_t n_rows = min_i64(args->n_rows, in->n_rows);
    struct wave wave;
    wave.n_units = wave.n_slots = 0;
    for (int64_t row = 0, n; row < n_rows; row += n) {
        n = 1;
        if (in->row[row].seq < 0) {
            empty_records(args, row);
            continue;
        }
        while (row + n < n_rows && in->row[row + n].seq == in->row[row].seq && in->row[row + n].first == in->row[row].first)
            n++;
        if (n > 1 && n * args->n_heads / args->layout.n_kv_heads >= ATTEND_BLOCK_VECTORS)
            attend_block(args, row, n);
        else
            for (int64_t i = 0; i < n; i++)
                wave_add_row(&wave, args, row + i);
    }
    if (wave.n_slots)
        wave_run(&wave);
    for (int64_t row = n_rows; row < args->n_rows; row++)
        empty_records(args, row);
}
