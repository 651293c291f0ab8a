/* The layout over all worlds of 1 to 32 ranks, sizes given (right and wrong) or left open, for several numbers of KV heads. */
#include "dist/grid.h"
#include "test.h"

enum { MOST_RANKS = 32 };

static void check_ranks(int dp, int tp, int cp, int world, int n_kv_heads) {
    struct grid first = {0};
    bool seen[MOST_RANKS] = {false};
    for (int rank = 0; rank < world; rank++) {
        struct grid g;
        REQUIRE(grid_make(dp, tp, cp, world, rank, n_kv_heads, &g));
        if (rank == 0)
            first = g;
        CHECK(g.dp == first.dp && g.tp == first.tp && g.cp == first.cp, "sizes differ at rank %d", rank);
        CHECK(g.dp * g.tp * g.cp == world && n_kv_heads % g.tp == 0, "%d %d %d", g.dp, g.tp, g.cp);
        CHECK((dp == 0 || g.dp == dp) && (tp == 0 || g.tp == tp) && (cp == 0 || g.cp == cp), "a given size changed");
        CHECK(g.dp_rank < g.dp && g.tp_rank < g.tp && g.cp_rank < g.cp);
        /* cp varies fastest, then tp */
        CHECK(grid_rank(&g, g.dp_rank, g.tp_rank, g.cp_rank) == rank, "rank %d", rank);
        CHECK(rank == g.dp_rank * grid_replica_size(&g) + grid_replica_rank(&g), "rank %d", rank);
        CHECK(g.cp == 1 || rank == 0 || g.cp_rank == (rank % g.cp), "rank %d", rank);
        int at = grid_rank(&g, g.dp_rank, g.tp_rank, g.cp_rank);
        CHECK(!seen[at], "rank %d twice", at);
        seen[at] = true;
    }
}

/* What the contract says, written down in another way: tries everything. */
static bool expected_sizes(int dp, int tp, int cp, int world, int n_kv_heads, int want[3]) {
    int n_open = (dp == 0) + (tp == 0) + (cp == 0);
    for (int a = 1; a <= world; a++)
        for (int b = 1; a * b <= world; b++) {
            int c = world / (a * b);
            if (a * b * c != world || n_kv_heads % b != 0)
                continue;
            bool fits_dp = dp == 0 ? (n_open == 1 || a == 1) : a == dp;
            bool fits_tp = tp == 0 ? (n_open == 1 || b == 1) : b == tp;
            if (fits_dp && fits_tp && (cp == 0 || c == cp)) {
                want[0] = a, want[1] = b, want[2] = c;
                return true;
            }
        }
    return false;
}

static void test_all(void) {
    static const int heads[] = {1, 2, 3, 4, 6, 8};
    for (int world = 1; world <= MOST_RANKS; world++)
        for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
            for (int dp = 0; dp <= world + 1; dp++)
                for (int tp = 0; tp <= world + 1; tp++)
                    for (int cp = 0; cp <= world + 1; cp++) {
                        if (dp * tp * cp > 4 * world) /* plainly wrong; the others stand for them */
                            continue;
                        int want[3];
                        struct grid g;
                        bool fits = expected_sizes(dp, tp, cp, world, heads[h], want);
                        if (!fits) {
                            CHECK_FAILS(grid_make(dp, tp, cp, world, 0, heads[h], &g), STATUS_USAGE, "does not fit");
                            continue;
                        }
                        REQUIRE(grid_make(dp, tp, cp, world, 0, heads[h], &g));
                        CHECK(g.dp == want[0] && g.tp == want[1] && g.cp == want[2], "world %d heads %d: %d %d %d gives %d %d %d", world,
                              heads[h], dp, tp, cp, g.dp, g.tp, g.cp);
                        if (world <= 12 || dp * tp * cp == world)
                            check_ranks(dp, tp, cp, world, heads[h]);
                    }
}

static void check_text(int dp, int tp, int cp, int world, int heads, const char *text) {
    struct grid g;
    CHECK(grid_make(dp, tp, cp, world, 0, heads, &g) == STATUS_USAGE);
    CHECK(strcmp(base_error(), text) == 0, "'%s'", base_error());
    base_clear_error();
}

static void test_messages(void) {
    struct grid g;
    check_text(1, 2, 2, 4, 3,
               "layout dp=1 tp=2 cp=2 does not fit: tp must divide the model's 3 KV heads; with 4 ranks: tp=1 cp=4");
    check_text(3, 2, 2, 4, 3,
               "layout dp=3 tp=2 cp=2 does not fit: dp*tp*cp = 12 but there are 4 ranks; with 4 ranks: tp=1 cp=4, "
               "dp=2 tp=1 cp=2, dp=4 tp=1 cp=1");
    check_text(1, 3, 2, 4, 3,
               "layout dp=1 tp=3 cp=2 does not fit: dp*tp*cp = 6 but there are 4 ranks; with 4 ranks: tp=1 cp=4");
    check_text(1, 0, 3, 4, 8,
               "layout dp=1 tp=? cp=3 does not fit: the sizes given do not divide the 4 ranks; with 4 ranks: tp=1 cp=4, tp=2 cp=2, "
               "tp=4 cp=1");
    check_text(1, 1, 2, 1, 8, "layout dp=1 tp=1 cp=2 does not fit: one of them is more than the 1 rank there is; with 1 rank: tp=1 cp=1");
    CHECK_FAILS(grid_make(1, 1, 2000000000, 4, 0, 8, &g), STATUS_USAGE, "more than the 4 ranks");
    CHECK_FAILS(grid_make(-1, 1, 4, 4, 0, 8, &g), STATUS_USAGE, "positive");
    CHECK_FAILS(grid_make(1, 1, 4, 4, 4, 8, &g), STATUS_USAGE, "rank 4 of 4");
    CHECK_FAILS(grid_make(11, 1, 5, 5040, 0, 5040, &g), STATUS_USAGE, "...");
}

int main(void) {
    test_all();
    test_messages();
    return test_report();
}
