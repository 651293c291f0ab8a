/* The rank layout: which (dp, tp, cp) fit a number of ranks, and who is who. Pure arithmetic; an error lists what would fit,
 * because whoever typed a layout that does not fit wants to know which one does. */
#include "dist/grid.h"

#include <stdio.h>
#include <string.h>

enum { LAYOUTS_BYTES = 1200 };

static bool layout_fits(int dp, int tp, int world, int n_kv_heads) {
    return world % dp == 0 && world / dp % tp == 0 && n_kv_heads % tp == 0;
}

/* All layouts for this world, dp = 1 first: "tp=1 cp=4, dp=2 tp=1 cp=2"; only those of one dp where that was given and can be. Ends in
 * "..." when there are too many. */
static void list_layouts(char *text, size_t bytes, int only_dp, int world, int n_kv_heads) {
    size_t n = 0;
    text[0] = '\0';
    for (int dp = 1; dp <= world; dp++) {
        for (int tp = 1; tp <= world / dp; tp++) {
            if (!layout_fits(dp, tp, world, n_kv_heads) || (only_dp > 0 && world % only_dp == 0 && dp != only_dp))
                continue;
            char one[64], first[24] = "";
            if (dp > 1)
                snprintf(first, sizeof first, "dp=%d ", dp);
            int length = snprintf(one, sizeof one, "%s%stp=%d cp=%d", n ? ", " : "", first, tp, world / dp / tp);
            if (n + (size_t)length + sizeof ", ..." > bytes) {
                snprintf(text + n, bytes - n, ", ...");
                return;
            }
            memcpy(text + n, one, (size_t)length + 1);
            n += (size_t)length;
        }
    }
}

/* A size for messages: "?" where it was left open and cannot be derived. */
static const char *size_text(int size, char text[16]) {
    snprintf(text, 16, size > 0 ? "%d" : "?", size);
    return text;
}

static int refuse(int dp, int tp, int cp, int world, int n_kv_heads, const char *why) {
    char layouts[LAYOUTS_BYTES], a[16], b[16], c[16];
    list_layouts(layouts, sizeof layouts, dp, world, n_kv_heads);
    FAIL(STATUS_USAGE, "layout dp=%s tp=%s cp=%s does not fit: %s; with %d rank%s: %s", size_text(dp, a), size_text(tp, b),
         size_text(cp, c), why, world, world == 1 ? "" : "s", layouts);
}

/* The one size that is left open, or dp = tp = 1 and the rest for cp. False: the given sizes do not divide the world. */
static bool derive_sizes(int *dp, int *tp, int *cp, int world) {
    if ((*dp == 0) + (*tp == 0) + (*cp == 0) > 1) {
        if (*dp == 0)
            *dp = 1;
        if (*tp == 0)
            *tp = 1;
    }
    int *open = *cp == 0 ? cp : *tp == 0 ? tp : *dp == 0 ? dp : NULL;
    if (!open)
        return true;
    int64_t given = 1;
    int *sizes[3] = {dp, tp, cp};
    for (int i = 0; i < 3; i++)
        given *= sizes[i] == open ? 1 : *sizes[i];
    if (given > world || world % given != 0)
        return false;
    *open = (int)(world / given);
    return true;
}

int grid_make(int dp, int tp, int cp, int world, int rank, int n_kv_heads, struct grid *out) {
    if (world < 1 || rank < 0 || rank >= world || n_kv_heads < 1)
        FAIL(STATUS_USAGE, "layout: rank %d of %d with %d KV heads cannot be", rank, world, n_kv_heads);
    if (dp < 0 || tp < 0 || cp < 0)
        FAIL(STATUS_USAGE, "layout dp=%d tp=%d cp=%d: sizes are positive, or 0 to be derived", dp, tp, cp);
    char why[128];
    /* Beyond the world a product could overflow, and the reason is plain anyway. */
    if (dp > world || tp > world || cp > world) {
        snprintf(why, sizeof why, "one of them is more than the %d rank%s there %s", world, world == 1 ? "" : "s",
                 world == 1 ? "is" : "are");
        return refuse(dp, tp, cp, world, n_kv_heads, why);
    }
    if (!derive_sizes(&dp, &tp, &cp, world)) {
        snprintf(why, sizeof why, "the sizes given do not divide the %d ranks", world);
        return refuse(dp, tp, cp, world, n_kv_heads, why);
    }
    int64_t product = (int64_t)dp * tp * cp;
    if (product != world) {
        snprintf(why, sizeof why, "dp*tp*cp = %lld but there %s %d rank%s", (long long)product, world == 1 ? "is" : "are", world,
                 world == 1 ? "" : "s");
        return refuse(dp, tp, cp, world, n_kv_heads, why);
    }
    if (n_kv_heads % tp != 0) {
        snprintf(why, sizeof why, "tp must divide the model's %d KV heads", n_kv_heads);
        return refuse(dp, tp, cp, world, n_kv_heads, why);
    }
    *out = (struct grid){.dp = dp, .tp = tp, .cp = cp, .dp_rank = rank / (tp * cp), .tp_rank = rank / cp % tp, .cp_rank = rank % cp};
    return STATUS_OK;
}

int grid_rank(const struct grid *grid, int dp_rank, int tp_rank, int cp_rank) {
    return (dp_rank * grid->tp + tp_rank) * grid->cp + cp_rank;
}
