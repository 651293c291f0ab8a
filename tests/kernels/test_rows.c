/* Rows between chunk order and position order, on every small number of ranks and prompt length, and beyond: against prefill_position. */
#include "kernels/ops.h"
#include "test.h"

enum { WIDTH = 3, MOST = 64, GUARD = 2 };

static float value_of(int64_t position, int64_t k) { return (float)(position * WIDTH + k + 1); }

struct rig {
    struct stream *stream;
    float own[MOST * WIDTH], out[(MOST + GUARD) * WIDTH];
};

/* Position of each own row, or -1 beyond the prompt. */
static int64_t position_of(int64_t row, int rank, int cp, int64_t chunk, int64_t n) {
    int64_t position = prefill_position(row, rank, cp, chunk);
    return position < n ? position : -1;
}

static void check_window(struct rig *r, int rank, int cp, int64_t chunk, int64_t n, int64_t first, int64_t count) {
    for (int64_t i = 0; i < (MOST + GUARD) * WIDTH; i++)
        r->out[i] = NAN;
    struct rows_pick_args args = {r->own, rank, cp, chunk, first, count, WIDTH, r->out};
    for (int64_t row = 0; row < 2 * chunk; row++)
        for (int k = 0; k < WIDTH; k++)
            r->own[row * WIDTH + k] = value_of(prefill_position(row, rank, cp, chunk), k);
    REQUIRE(op_rows_pick(r->stream, &args));
    for (int64_t i = 0; i < count; i++) {
        bool own = false;
        for (int64_t row = 0; row < 2 * chunk; row++)
            own |= position_of(row, rank, cp, chunk, n) == first + i;
        for (int k = 0; k < WIDTH; k++)
            CHECK(r->out[i * WIDTH + k] == (own ? value_of(first + i, k) : 0), "cp %d, rank %d, chunk %lld, position %lld", cp, rank,
                  (long long)chunk, (long long)(first + i));
    }
    CHECK(isnan(r->out[count * WIDTH]), "written beyond %lld rows", (long long)count);
    /* and back: own positions of the window are put, the rest of the rows stay */
    for (int64_t i = 0; i < count * WIDTH; i++)
        r->out[i] = -value_of(first + i / WIDTH, i % WIDTH);
    args = (struct rows_put_args){r->out, rank, cp, chunk, first, count, WIDTH, r->own};
    REQUIRE(op_rows_put(r->stream, &args));
    for (int64_t row = 0; row < 2 * chunk; row++) {
        int64_t position = prefill_position(row, rank, cp, chunk);
        bool inside = position >= first && position < first + count;
        for (int k = 0; k < WIDTH; k++)
            CHECK(r->own[row * WIDTH + k] == (inside ? -1 : 1) * value_of(position, k), "cp %d, rank %d, row %lld", cp, rank, (long long)row);
    }
}

int main(void) {
    struct backend *backend;
    static struct rig r;
    REQUIRE(backend_open("cpu", &(struct backend_options){.n_threads = 1}, &backend));
    REQUIRE(stream_open(backend, &r.stream));
    for (int cp = 1; cp <= 4; cp++)
        for (int64_t n = 1; n <= 21; n++) {
            int64_t chunk = (n + 2 * cp - 1) / (2 * cp);
            for (int rank = 0; rank < cp; rank++)
                for (int64_t first = 0; first < n; first++)
                    for (int64_t count = 1; first + count <= n; count++)
                        check_window(&r, rank, cp, chunk, n, first, count);
        }
    stream_close(r.stream);
    backend_close(backend);
    return test_report();
}
