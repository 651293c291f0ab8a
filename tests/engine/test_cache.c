/* The cache's accounts: bytes told are bytes allocated, pages are given once and come back, slots keep to their own. */
#include "engine/cache.h"
#include "test.h"

enum { LAYERS = 3, SEQS = 3, CONTEXT = 1500, PAGES = 7 };

static void make_spec(const char *preset, const char *k_bits, int window, int sink, const char *correction, struct cache_spec *spec) {
    struct cache_request r = {preset, k_bits, NULL, correction, window, sink, correction != NULL};
    REQUIRE(cache_spec_make(&r, LAYERS, spec));
}

static struct cache_shape shape_of(int cp_rank, int cp_size, int features) {
    return (struct cache_shape){.n_kv_heads = 2, .head_dim = 64, .n_heads = 4, .cp_rank = cp_rank, .cp_size = cp_size, .max_seqs = SEQS,
                                .context = CONTEXT, .n_pages = PAGES, .vocab_begin = 16, .vocab_count = 33, .features = features};
}

static void check_bytes(const char *device, const struct cache_spec *spec, int cp, int features) {
    struct backend *b;
    struct cache c;
    struct cache_shape shape = shape_of(cp - 1, cp, features);
    struct cache_adapter adapters[LAYERS];
    memset(adapters, 0, sizeof adapters);
    struct cache_bytes bytes = cache_plan_bytes(spec, &shape);
    REQUIRE(backend_open(device, &(struct backend_options){.n_threads = 1}, &b));
    REQUIRE(cache_init(&c, b, spec, &shape, adapters));
    CHECK((int64_t)backend_used(b, MEMORY_CACHE) == cache_bytes_sum(&bytes), "%s, cp %d: %zu bytes allocated, %lld told", spec->name, cp,
          backend_used(b, MEMORY_CACHE), (long long)cache_bytes_sum(&bytes));
    CHECK(backend_used(b, MEMORY_WEIGHTS) + backend_used(b, MEMORY_WORKSPACE) + backend_used(b, MEMORY_HOST) == 0, "other memory");
    CHECK(memcmp(&bytes, &c.bytes, sizeof bytes) == 0, "told twice");
    int64_t page = 0, states = 0;
    for (int i = 0; i < LAYERS; i++) {
        page += c.layers[i].page_stride;
        CHECK((c.layers[i].states != NULL) == spec->layer[i].correction, "states of layer %d", i);
        states += spec->layer[i].correction ? SEQS * 2 * (features * 64 + features) * 4 : 0;
    }
    CHECK(page == cache_page_bytes(spec, &shape) && bytes.pages == PAGES * page, "%lld bytes of a page", (long long)page);
    CHECK(bytes.states == states, "%lld bytes of states, expected %lld", (long long)bytes.states, (long long)states);
    /* the blocks that are 16-bit at the same time: W before the current one, every cp-th of them */
    int64_t slots = (spec->window / KV_BLOCK + 1 + cp - 1) / cp;
    CHECK(c.layout.n_slots == slots && bytes.window == LAYERS * SEQS * slots * 2 * KV_BLOCK * 2 * (int64_t)dtype_bytes(spec->window_type, 64),
          "%d slots, %lld bytes", c.layout.n_slots, (long long)bytes.window);
    cache_deinit(&c);
    CHECK(backend_used(b, MEMORY_CACHE) == 0, "%zu bytes stay", backend_used(b, MEMORY_CACHE));
    cache_deinit(&c);
    backend_close(b);
}

/* Pages for a length at most over the offsets, against counting. */
static void check_pages_for(const struct cache_spec *spec) {
    for (int cp = 1; cp <= 4; cp++)
        for (int64_t n = 0; n < 1300; n++) {
            int64_t most = 0, blocks = n > 0 ? (n - 1) / KV_BLOCK - spec->window / KV_BLOCK : 0;
            for (int offset = 0; offset < cp; offset++) {
                int64_t all = 0;
                for (int rank = 0; rank < cp; rank++) {
                    struct cache_layout layout = {.cp_rank = rank, .cp_size = cp, .window_blocks = spec->window / KV_BLOCK};
                    int64_t counted = 0, told = cache_pages_for_offset(&layout, n, offset);
                    for (int64_t block = 0; block < blocks; block++)
                        counted += (block + offset) % cp == rank;
                    CHECK(counted == told, "cp %d, rank %d, offset %d, %lld tokens: %lld pages, told %lld", cp, rank, offset, (long long)n,
                          (long long)counted, (long long)told);
                    most = max_i64(most, counted);
                    all += counted;
                }
                CHECK(all == max_i64(0, blocks), "%lld pages of %lld blocks", (long long)all, (long long)blocks);
            }
            CHECK(most == cache_pages_for(spec, cp, n), "cp %d, %lld tokens: %lld pages", cp, (long long)n, (long long)most);
        }
}

static void check_pages(const struct cache_spec *spec) {
    struct backend *b;
    struct cache c;
    struct cache_shape shape = shape_of(1, 2, 0);
    int32_t page, local;
    bool used[PAGES] = {false};
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &b));
    REQUIRE(cache_init(&c, b, spec, &shape, NULL));
    for (int i = 0; i < PAGES; i++) { /* slots 0 and 2 in turn; blocks 1, 3, 5, ... are this rank's at offset 0 */
        REQUIRE(cache_take_page(&c, i % 2 * 2, i / 2 * 2 + 1, &page, &local));
        CHECK(page >= 0 && page < PAGES && !used[page], "page %d twice", page);
        used[page] = true;
        CHECK(local == i / 2 && c.slot_pages[i % 2 * 2 * c.table_stride + local] == page, "local %d", local);
    }
    CHECK_FAILS(cache_take_page(&c, 1, 1, &page, &local), STATUS_FAILED, "no page is free");
    cache_release(&c, 0);
    CHECK(c.n_free == 4, "%lld pages are free", (long long)c.n_free);
    CHECK_FAILS(cache_take_page(&c, 1, 5, &page, &local), STATUS_FAILED, "which has 0");
    REQUIRE(cache_take_page(&c, 1, 0, &page, &local));
    CHECK_FAILS(cache_take_page(&c, 1, 1, &page, &local), STATUS_FAILED, "which has 1");
    cache_release(&c, 0); /* nothing left there */
    cache_release(&c, 1);
    cache_release(&c, 2);
    CHECK(c.n_free == PAGES, "%lld pages are free", (long long)c.n_free);
    memset(used, 0, sizeof used);
    for (int i = 0; i < PAGES; i++) {
        CHECK(!used[c.free_pages[i]], "page %d is free twice", c.free_pages[i]);
        used[c.free_pages[i]] = true;
    }
    cache_deinit(&c);
    backend_close(b);
}

/* Zeroing one slot's states leaves its neighbours'. */
static void check_states(const struct cache_spec *spec) {
    enum { FEATURES = 32, FLOATS = 2 * (FEATURES * 64 + FEATURES) };
    struct backend *b;
    struct stream *s;
    struct cache c;
    struct cache_shape shape = shape_of(0, 1, FEATURES);
    struct cache_adapter adapters[LAYERS];
    static float ones[SEQS * FLOATS], host[SEQS * FLOATS];
    memset(adapters, 0, sizeof adapters);
    REQUIRE(backend_open("cpu-async", &(struct backend_options){.n_threads = 1}, &b));
    REQUIRE(stream_open(b, &s));
    REQUIRE(cache_init(&c, b, spec, &shape, adapters));
    for (int i = 0; i < SEQS * FLOATS; i++)
        ones[i] = 1;
    for (int l = 0; l < LAYERS; l++)
        if (c.layers[l].states)
            REQUIRE(stream_copy_in(s, c.layers[l].states, ones, sizeof ones));
    REQUIRE(cache_reset_states(&c, s, 1));
    for (int l = 0; l < LAYERS; l++) {
        if (!c.layers[l].states)
            continue;
        REQUIRE(stream_copy_out(s, host, c.layers[l].states, sizeof host));
        REQUIRE(stream_sync(s));
        for (int i = 0; i < SEQS * FLOATS; i++)
            CHECK(host[i] == (i / FLOATS == 1 ? 0 : 1), "layer %d, float %d: %g", l, i, (double)host[i]);
    }
    REQUIRE(stream_sync(s));
    cache_deinit(&c);
    stream_close(s);
    backend_close(b);
}

int main(void) {
    struct cache_spec kvlinc, mixed, plain;
    make_spec("kvlinc", NULL, -1, 16, "0,2", &kvlinc);
    make_spec("kivi", "0:2,1:4,2:16", 256, -1, NULL, &mixed);
    make_spec("f32", NULL, 0, -1, NULL, &plain);
    for (int cp = 1; cp <= 4; cp++) {
        check_bytes("cpu", &kvlinc, cp, 64);
        check_bytes("cpu-async", &mixed, cp, 0);
        check_bytes("cpu", &plain, cp, 0);
    }
    check_pages_for(&kvlinc);
    check_pages_for(&mixed);
    check_pages_for(&plain);
    check_pages(&plain);
    check_states(&kvlinc);
    return test_report();
}
