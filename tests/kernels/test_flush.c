/* The cache's writes: append and flush step by step, flush_exact of a whole prompt, and the reordering of prefill rows. Every buffer
 * (guards included) is poison at first and compared whole with an image that the test builds by itself, so whatever a rank does not own
 * must stay as it was. Both ways to fill a cache must leave the same bits in pages, live 16-bit rows, sink and states. */
#include "kernels/cpu/correct.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/flush.h"
#include "kernels/cpu/page.h"
#include "test.h"

enum {
    GUARD = 256, POISON = 0xa5, N_SEQS = 4, N_USED = 2, TABLE_STRIDE = 8, N_PAGES = 3 * TABLE_STRIDE, FEATURES = 36,
    MAX_TOKENS = 6 * KV_BLOCK,
};
static const int used_seqs[N_USED] = {1, 3};

struct guarded {
    uint8_t *base;
    size_t bytes;
};

struct setup {
    struct cache_layout layout;
    struct cache_layer layer; /* buffers unset */
    int64_t n[N_USED];
    int owner_offset[N_USED];
    void *kv[N_USED]; /* [n_kv_heads][K, V][n][d] */
    float *phi;
};

/* All a rank writes to. */
struct cache {
    struct guarded pages, window, sink, states, table;
};
enum { N_BUFFERS = 5 };

static struct guarded guarded_new(size_t bytes) {
    struct guarded g = {NULL, bytes};
    REQUIRE(base_alloc(&g.base, bytes + 2 * GUARD, 1));
    memset(g.base, POISON, bytes + 2 * GUARD);
    return g;
}

static void check_same(const struct guarded *got, const struct guarded *expected, const char *what, const char *where) {
    size_t n = expected->bytes + 2 * GUARD, i = 0;
    while (i < n && got->base[i] == expected->base[i])
        i++;
    CHECK(i == n, "%s: %s differ at byte %ld of %zu", where, what, (long)i - GUARD, expected->bytes);
}

static void check_cache(struct cache *got, struct cache *expected, const char *where) {
    check_same(&got->pages, &expected->pages, "pages", where);
    check_same(&got->window, &expected->window, "16-bit blocks", where);
    check_same(&got->sink, &expected->sink, "sinks", where);
    check_same(&got->states, &expected->states, "states", where);
    check_same(&got->table, &expected->table, "page tables", where);
}

static size_t row_bytes(const struct setup *s) { return dtype_bytes(s->layer.format.window, s->layout.head_dim); }

static int64_t states_of(const struct setup *s, int seq, int head) {
    return ((int64_t)seq * s->layout.n_kv_heads + head) * cpu_correct_n_states(&s->layer);
}

static void cache_new(struct setup *s, struct cache *c) {
    size_t heads = (size_t)(N_SEQS * s->layout.n_kv_heads);
    c->pages = guarded_new((size_t)(N_PAGES * s->layer.page_stride));
    c->window = guarded_new(heads * (size_t)s->layout.n_slots * 2 * KV_BLOCK * row_bytes(s));
    c->sink = guarded_new(heads * 2 * (size_t)s->layout.sink * row_bytes(s));
    c->states = guarded_new((size_t)states_of(s, N_SEQS, 0) * sizeof(float));
    c->table = guarded_new(N_SEQS * TABLE_STRIDE * sizeof(int32_t));
    for (int i = 0; i < N_USED; i++)
        memset(c->states.base + GUARD + states_of(s, used_seqs[i], 0) * 4, 0, (size_t)(states_of(s, 1, 0) * 4));
}

static void cache_free(struct cache *c) {
    struct guarded *all[N_BUFFERS] = {&c->pages, &c->window, &c->sink, &c->states, &c->table};
    for (int i = 0; i < N_BUFFERS; i++)
        free(all[i]->base);
}

static struct cache_layer layer_of(const struct setup *s, const struct cache *c) {
    struct cache_layer layer = s->layer;
    layer.pages = c->pages.base + GUARD;
    layer.window = c->window.base + GUARD;
    layer.sink = s->layout.sink ? c->sink.base + GUARD : NULL;
    layer.states = s->layer.features ? (float *)(void *)(c->states.base + GUARD) : NULL;
    return layer;
}

/* Scattered, every third page never used. */
static int page_id(int used, int64_t local) { return (int)(1 + 3 * local) + used; }

static const uint8_t *row_at(const struct setup *s, int used, int head, int part, int64_t position) {
    return (const uint8_t *)s->kv[used] + (size_t)((head * 2 + part) * s->n[used] + position) * row_bytes(s);
}

/* ---- the image a rank should have ---------------------------------------------------------------------------------- */

static void expect_block(const struct setup *s, struct cache *c, int used, int64_t block, bool with_table) {
    struct cache_layer layer = layer_of(s, c);
    int64_t local = block / s->layout.cp_size;
    int seq = used_seqs[used], first = block == 0 ? s->layout.sink : 0;
    for (int h = 0; h < s->layout.n_kv_heads; h++) {
        uint8_t *record = layer.pages + page_id(used, local) * layer.page_stride + (size_t)h * page_record_bytes(&layer.format);
        const uint8_t *k = row_at(s, used, h, 0, block * KV_BLOCK), *v = row_at(s, used, h, 1, block * KV_BLOCK);
        cpu_page_encode_k(&layer.format, k, first, record);
        cpu_page_encode_v(&layer.format, v, first, record);
        size_t part_bytes = (size_t)first * row_bytes(s);
        for (int part = 0; part < 2 && first > 0; part++)
            memcpy((uint8_t *)layer.sink + (size_t)((seq * s->layout.n_kv_heads + h) * 2 + part) * part_bytes, part ? v : k, part_bytes);
        if (layer.features) {
            static float sums[FEATURES * (KV_MAX_HEAD_DIM + 1)];
            cpu_correct_block(&layer, h, k, v, first, record, sums);
            cpu_correct_add(&layer, sums, layer.states + states_of(s, seq, h));
        }
    }
    int32_t page = page_id(used, local);
    if (with_table)
        memcpy(c->table.base + GUARD + (size_t)(seq * TABLE_STRIDE + local) * sizeof page, &page, sizeof page);
}

static void expect_rows(const struct setup *s, struct cache *c, int used, int64_t begin) {
    const struct cache_layout *l = &s->layout;
    for (int64_t p = begin; p < s->n[used]; p++) {
        int64_t block = p / KV_BLOCK, slot = block / l->cp_size % l->n_slots;
        if ((block + s->owner_offset[used]) % l->cp_size != l->cp_rank)
            continue;
        for (int i = 0; i < 2 * l->n_kv_heads; i++) {
            int64_t row = ((used_seqs[used] * l->n_slots + slot) * l->n_kv_heads * 2 + i) * KV_BLOCK + p % KV_BLOCK;
            memcpy(c->window.base + GUARD + (size_t)row * row_bytes(s), row_at(s, used, i / 2, i % 2, p), row_bytes(s));
        }
    }
}

/* After all tokens; `exact`: by flush_exact, which leaves no older rows in the slots. */
static void expect_cache(const struct setup *s, struct cache *c, bool exact) {
    for (int used = 0; used < N_USED; used++) {
        int64_t last = (s->n[used] - 1) / KV_BLOCK, n_flush = last > s->layout.window_blocks ? last - s->layout.window_blocks : 0;
        for (int64_t j = 0; j < n_flush; j++) {
            if ((j + s->owner_offset[used]) % s->layout.cp_size == s->layout.cp_rank)
                expect_block(s, c, used, j, !exact);
        }
        expect_rows(s, c, used, exact ? n_flush * KV_BLOCK : 0);
    }
}

/* ---- the two ways to fill it ---------------------------------------------------------------------------------------- */

static void add_flush(const struct setup *s, struct step_input *in, int used, int64_t position) {
    int64_t n_before = position > 0 ? cache_n_flushed(&s->layout, position - 1) : 0;
    for (int64_t j = n_before; j < cache_n_flushed(&s->layout, position); j++) {
        bool owned = cache_owns(&s->layout, j, s->owner_offset[used]);
        int64_t local = j / s->layout.cp_size;
        in->flush[in->n_flush++] = (struct step_flush){used_seqs[used], (int32_t)j, owned ? page_id(used, local) : -1, (int32_t)local};
    }
}

/* Rows [used sequences, up to `size` tokens of one block each], a padding row after each sequence's. */
static void add_rows(const struct setup *s, struct step_input *in, int used, int64_t begin, int64_t end, uint8_t *k, uint8_t *v) {
    size_t width = row_bytes(s) * (size_t)s->layout.n_kv_heads;
    for (int64_t p = begin; p < end; p++) {
        int i = in->n_rows++;
        in->row[i] = (struct step_row){used_seqs[used], 0, (int32_t)p, 0};
        for (int h = 0; h < s->layout.n_kv_heads; h++) {
            memcpy(k + (size_t)i * width + (size_t)h * row_bytes(s), row_at(s, used, h, 0, p), row_bytes(s));
            memcpy(v + (size_t)i * width + (size_t)h * row_bytes(s), row_at(s, used, h, 1, p), row_bytes(s));
        }
    }
    in->row[in->n_rows++] = (struct step_row){-1, 0, 3, 0};
}

static void fill_by_steps(const struct setup *s, struct cache *c, int size) {
    static struct step_input in;
    static struct seq_params params[N_SEQS];
    static uint8_t k[STEP_MAX_ROWS * 3 * KV_MAX_HEAD_DIM * 4], v[sizeof k];
    struct cache_layer layer = layer_of(s, c);
    int32_t *table = (int32_t *)(void *)(c->table.base + GUARD);
    int64_t next[N_USED] = {0};
    for (int i = 0; i < N_USED; i++)
        params[used_seqs[i]].owner_offset = s->owner_offset[i];
    for (int step = 0; next[0] < s->n[0] || next[1] < s->n[1]; step++) {
        in.n_rows = in.n_flush = 0;
        for (int i = 0; i < N_USED; i++) {
            if (next[i] == s->n[i] || (i == 1 && step < 5)) /* the second joins later */
                continue;
            int64_t end = min_i64(min_i64(s->n[i], next[i] + size), (next[i] / KV_BLOCK + 1) * KV_BLOCK);
            add_flush(s, &in, i, next[i]);
            add_rows(s, &in, i, next[i], end, k, v);
            next[i] = end;
        }
        in.row[in.n_rows] = (struct step_row){0, 0, 0, 0}; /* beyond the live rows */
        in.flush[in.n_flush] = (struct step_flush){0, 0, 0, 0};
        cpu_flush(&(struct flush_args){&in, params, s->layout, layer, table, TABLE_STRIDE, true});
        cpu_append(&(struct append_args){&in, params, s->layout, layer, k, v});
    }
}

static void fill_exact(const struct setup *s, struct cache *c) {
    struct cache_layer layer = layer_of(s, c);
    for (int i = 0; i < N_USED; i++) {
        int32_t pages[TABLE_STRIDE];
        for (int local = 0; local < TABLE_STRIDE; local++)
            pages[local] = page_id(i, local);
        int64_t n_flush = cache_n_flushed(&s->layout, s->n[i] - 1);
        cpu_flush_exact(&(struct flush_exact_args){used_seqs[i], s->n[i], n_flush, s->owner_offset[i], s->layout, layer, pages, s->kv[i]});
    }
}

/* The rows that attention would read are the same in both. */
static void check_live_rows(const struct setup *s, const struct cache *a, const struct cache *b, const char *where) {
    struct cache_layer layer = layer_of(s, a);
    for (int used = 0; used < N_USED; used++) {
        for (int64_t p = cache_n_flushed(&s->layout, s->n[used] - 1) * KV_BLOCK; p < s->n[used]; p++) {
            if (!cache_owns(&s->layout, p / KV_BLOCK, s->owner_offset[used]))
                continue;
            for (int h = 0; h < s->layout.n_kv_heads; h++) {
                size_t at = GUARD + cpu_flush_slot_offset(&s->layout, &layer, used_seqs[used], p / KV_BLOCK, h);
                at += (size_t)(p % KV_BLOCK) * row_bytes(s);
                CHECK(memcmp(a->window.base + at, b->window.base + at, row_bytes(s)) == 0, "%s: row %ld", where, (long)p);
            }
        }
    }
}

static void run_rank(struct setup *s, const char *where) {
    struct cache by_steps, by_chunks, exact, expected, expected_exact;
    struct cache *all[] = {&by_steps, &by_chunks, &exact, &expected, &expected_exact};
    for (int i = 0; i < 5; i++)
        cache_new(s, all[i]);
    fill_by_steps(s, &by_steps, 1);
    fill_by_steps(s, &by_chunks, 41);
    fill_exact(s, &exact);
    expect_cache(s, &expected, false);
    expect_cache(s, &expected_exact, true);
    check_cache(&by_steps, &expected, where);
    check_cache(&by_chunks, &expected, where);
    check_cache(&exact, &expected_exact, where);
    check_same(&exact.pages, &by_steps.pages, "pages of both ways", where);
    check_same(&exact.sink, &by_steps.sink, "sinks of both ways", where);
    check_same(&exact.states, &by_steps.states, "states of both ways", where);
    check_live_rows(s, &exact, &by_steps, where);
    for (int i = 0; i < 5; i++)
        cache_free(all[i]);
}

/* ---- all small layouts ------------------------------------------------------------------------------------------------ */

static void setup_new(struct setup *s, int number, int cp, int window_blocks, int sink, int d) {
    static const int64_t lengths[] = {1, 127, 128, 129, 256, 257, 384, 385, 515, 640, 641, 700};
    static const int bits[] = {2, 4, 8, 16};
    static float values[MAX_TOKENS * 3 * 2 * KV_MAX_HEAD_DIM];
    memset(s, 0, sizeof *s);
    int n_kv_heads = 1 + number % 3;
    enum dtype window = (const enum dtype[]){DTYPE_F16, DTYPE_BF16, DTYPE_F32}[number / 2 % 3];
    s->layout = (struct cache_layout){0, cp, window_blocks, (window_blocks + cp) / cp, sink, n_kv_heads, d};
    s->layer.format = (struct page_format){d, bits[number % 4], bits[number / 3 % 4], window};
    s->layer.page_stride = (int64_t)page_record_bytes(&s->layer.format) * n_kv_heads;
    for (int i = 0; i < N_USED; i++) {
        s->n[i] = lengths[(5 * number + 7 * i + 3) % 12];
        s->owner_offset[i] = (number + 2 * i) % cp;
        int64_t n = n_kv_heads * 2 * s->n[i] * d;
        for (int64_t j = 0; j < n; j++)
            values[j] = test_uniform((uint64_t)(1000 * number + i), (uint64_t)j) * 3;
        REQUIRE(base_alloc(&s->kv[i], (size_t)n, 4));
        dtype_narrow(window, values, s->kv[i], n);
    }
    if (number % 2) {
        int64_t n = (int64_t)n_kv_heads * d * FEATURES;
        REQUIRE(base_alloc(&s->phi, (size_t)n, sizeof *s->phi));
        for (int64_t j = 0; j < n; j++)
            s->phi[j] = test_uniform(7, (uint64_t)j);
        s->layer.features = FEATURES;
        s->layer.phi_k = s->layer.phi_q = s->phi;
    }
}

static void test_layouts(void) {
    static const int sinks[] = {0, 16, 128};
    char where[128];
    for (int number = 0; number < 3 * 3 * 3 * 2; number++) {
        struct setup s;
        setup_new(&s, number, 1 + number % 3, number / 3 % 3, sinks[number / 9 % 3], number / 27 ? 128 : 64);
        for (int rank = 0; rank < s.layout.cp_size; rank++) {
            s.layout.cp_rank = rank;
            snprintf(where, sizeof where, "layout %d: cp %d/%d, window %d, sink %d, d %d, n %ld %ld", number, rank, s.layout.cp_size,
                     s.layout.window_blocks, s.layout.sink, s.layout.head_dim, (long)s.n[0], (long)s.n[1]);
            run_rank(&s, where);
        }
        for (int i = 0; i < N_USED; i++)
            free(s.kv[i]);
        free(s.phi);
    }
}

/* Without write_table (all layers but one) the table stays; a step without flush or rows writes nothing. */
static void test_nothing_to_do(void) {
    static struct step_input in;
    static struct seq_params params[N_SEQS];
    struct setup s;
    struct cache c, untouched;
    setup_new(&s, 8, 1, 1, 0, 64);
    cache_new(&s, &c);
    cache_new(&s, &untouched);
    struct cache_layer layer = layer_of(&s, &c);
    int32_t *table = (int32_t *)(void *)(c.table.base + GUARD);
    cpu_flush(&(struct flush_args){&in, params, s.layout, layer, table, TABLE_STRIDE, true});
    cpu_append(&(struct append_args){&in, params, s.layout, layer, s.kv[0], s.kv[0]});
    check_cache(&c, &untouched, "an empty step");
    in.n_flush = 1;
    in.flush[0] = (struct step_flush){1, 0, -1, 0};
    cpu_flush(&(struct flush_args){&in, params, s.layout, layer, table, TABLE_STRIDE, true});
    check_cache(&c, &untouched, "another rank's block");
    in.flush[0].page = 2;
    cpu_flush(&(struct flush_args){&in, params, s.layout, layer, table, TABLE_STRIDE, false});
    check_same(&c.table, &untouched.table, "page tables", "without write_table");
    CHECK(memcmp(c.pages.base, untouched.pages.base, c.pages.bytes + 2 * GUARD) != 0, "the block was not flushed");
    cache_free(&c);
    cache_free(&untouched);
    free(s.kv[0]);
    free(s.kv[1]);
}

/* ---- prefill rows ---------------------------------------------------------------------------------------------------- */

static float place_value(int64_t position, int64_t i) { return (float)(position * 1000 + i); }

/* Which position local row i of a rank holds: the chunks dealt out by hand. */
static int64_t dealt_position(int64_t row, int rank, int cp, int64_t chunk) {
    int64_t chunk_of_row = row / chunk == 0 ? rank : 2 * cp - 1 - rank;
    return chunk_of_row * chunk + row % chunk;
}

/* From all ranks' rows into position order. */
static void test_rows_place(int cp, int64_t n) {
    enum { WIDTH = 5 };
    int64_t chunk = ceil_div(n, 2 * cp), n_local = 2 * chunk * WIDTH;
    struct guarded gathered = guarded_new((size_t)(cp * n_local) * 4), placed = guarded_new((size_t)(n * WIDTH) * 4);
    struct guarded expected = guarded_new(placed.bytes);
    float *rows = (float *)(void *)(gathered.base + GUARD), *in_order = (float *)(void *)(expected.base + GUARD);
    for (int64_t i = 0; i < n * WIDTH; i++)
        in_order[i] = place_value(i / WIDTH, i % WIDTH);
    for (int64_t i = 0; i < cp * n_local; i++) {
        int64_t position = dealt_position(i % n_local / WIDTH, (int)(i / n_local), cp, chunk);
        rows[i] = position < n ? place_value(position, i % WIDTH) : -1.0f;
    }
    cpu_rows_place(&(struct rows_place_args){rows, cp, chunk, n, WIDTH, (float *)(void *)(placed.base + GUARD)});
    check_same(&placed, &expected, "placed rows", "rows_place");
    free(gathered.base);
    free(placed.base);
    free(expected.base);
}

static void test_kv_place(int cp, int64_t n, enum dtype dtype) {
    enum { HEADS = 2, D = 3 };
    int64_t chunk = ceil_div(n, 2 * cp), n_gathered = cp * 2 * chunk, width = 2 * HEADS * D;
    size_t size = dtype_bytes(dtype, 1);
    struct guarded gathered = guarded_new((size_t)(n_gathered * width) * size);
    struct guarded placed = guarded_new((size_t)(n * width) * size), expected = guarded_new(placed.bytes);
    for (int64_t i = 0; i < n_gathered * width; i++) {
        int64_t c = i % D, head = i / D % HEADS, row = i / (HEADS * D) % (2 * chunk), part = i / (HEADS * D) / (2 * chunk) % 2;
        int64_t position = dealt_position(row, (int)(i / (HEADS * D) / (4 * chunk)), cp, chunk);
        float value = (float)(((position * 2 + part) * HEADS + head) * D + c);
        dtype_narrow(dtype, &value, gathered.base + GUARD + (size_t)i * size, 1);
        if (position < n)
            dtype_narrow(dtype, &value, expected.base + GUARD + (size_t)(((head * 2 + part) * n + position) * D + c) * size, 1);
    }
    cpu_kv_place(&(struct kv_place_args){gathered.base + GUARD, cp, chunk, n, HEADS, D, dtype, placed.base + GUARD});
    check_same(&placed, &expected, "placed K and V", "kv_place");
    free(gathered.base);
    free(placed.base);
    free(expected.base);
}

int main(void) {
    for (int cp = 1; cp <= 3; cp++) {
        for (int64_t n = 1; n <= 20; n++) {
            test_rows_place(cp, n);
            test_kv_place(cp, n, DTYPE_F32);
            test_kv_place(cp, n, DTYPE_F16);
        }
    }
    test_nothing_to_do();
    test_layouts();
    return test_report();
}
