/* Slices, exhaustively for small sizes: they are contiguous, cover everything once, keep to units and differ by one unit at most;
 * nested ones refine the outer ones. */
#include "dist/shard.h"
#include "test.h"

static void check_even(int64_t n, int64_t unit, int64_t least, int64_t most) {
    CHECK(most - least <= 1, "n %lld unit %lld: slices of %lld to %lld units", (long long)n, (long long)unit, (long long)least, (long long)most);
}

static void check_range(int64_t n, int64_t unit, int parts) {
    int64_t at = 0, least = INT64_MAX, most = 0;
    for (int i = 0; i < parts; i++) {
        struct range r = shard_range(n, unit, parts, i);
        CHECK(r.begin == at && r.end >= r.begin, "n %lld unit %lld: part %d of %d begins at %lld", (long long)n, (long long)unit, i, parts,
              (long long)r.begin);
        CHECK(r.end == n || r.end % unit == 0, "n %lld unit %lld: part %d of %d ends at %lld", (long long)n, (long long)unit, i, parts,
              (long long)r.end);
        least = min_i64(least, ceil_div(range_size(r), unit));
        most = max_i64(most, ceil_div(range_size(r), unit));
        at = r.end;
    }
    CHECK(at == n, "n %lld unit %lld: %d parts end at %lld", (long long)n, (long long)unit, parts, (long long)at);
    check_even(n, unit, least, most);
}

static void check_nested(int64_t n, int64_t unit, int n_outer, int n_inner) {
    int64_t at = 0, least = INT64_MAX, most = 0;
    for (int outer = 0; outer < n_outer; outer++) {
        struct range whole = shard_range(n, unit, n_outer, outer);
        for (int inner = 0; inner < n_inner; inner++) {
            struct range r = shard_nested(n, unit, n_outer, outer, n_inner, inner);
            CHECK(r.begin == at && r.end >= r.begin, "n %lld unit %lld %d x %d: %d, %d", (long long)n, (long long)unit, n_outer, n_inner,
                  outer, inner);
            CHECK(r.begin >= whole.begin && r.end <= whole.end, "not inside the outer slice");
            CHECK(r.end == n || r.end % unit == 0, "ends inside a unit");
            least = min_i64(least, ceil_div(range_size(r), unit));
            most = max_i64(most, ceil_div(range_size(r), unit));
            at = r.end;
        }
        CHECK(at == whole.end, "inner slices end at %lld, not %lld", (long long)at, (long long)whole.end);
    }
    CHECK(at == n);
    check_even(n, unit, least, most);
}

int main(void) {
    static const int64_t units[] = {1, 2, 3, 7, 16, 32};
    for (size_t u = 0; u < sizeof units / sizeof *units; u++)
        for (int64_t n = 0; n <= 100; n++) {
            for (int parts = 1; parts <= 12; parts++)
                check_range(n, units[u], parts);
            for (int n_outer = 1; n_outer <= 4; n_outer++)
                for (int n_inner = 1; n_inner <= 6; n_inner++)
                    check_nested(n, units[u], n_outer, n_inner);
        }
    check_range((int64_t)1 << 50, 128, 7);
    check_nested(((int64_t)1 << 50) + 13, 128, 5, 3);
    struct range r = shard_range(10, 4, 2, 0), q = shard_range(10, 4, 2, 1);
    CHECK(r.begin == 0 && r.end == 8 && q.begin == 8 && q.end == 10);
    return test_report();
}
