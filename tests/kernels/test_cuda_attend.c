/* The GPU's decode attention against double precision, with the CPU's beside it: every pair of bits, head sizes, window types, groups,
 * ranks, owner offsets, windows, sinks, correction on and off, what kvlinc+ adds, batches of mixed lengths with padding in between and
 * garbage behind.
 * Pages are made in both layouts from the same codes; what no row may read is NaN. Then the hazards of 16-bit arithmetic.
 *
 * Bounds, u = 2^-24. Score: products of 16-bit operands are exact; a product of matrices adds 17 terms, each cut off at u of the largest
 * (that is how tensor cores add), in at most 3 d/16 steps (high, low, zero-point); splitting q and scale into two fp16 parts is good to
 * 4u, the fp32 steps around to 20u more. So 17 * 3 * d/16 u + 32u of A = scale * sum |q| |k|, |k| with code * scale and zero apart; with q
 * rotated |q'| <= sum |q| / sqrt(d) takes its place, with mean keys both members of a pair do. m: one score, and 4u of itself for
 * the constants log2 e and ln 2. A weight: e^x of two scores, 8u of its own and 8u for each block that moves the sums. The weights of
 * V are rounded to fp16 (half a unit: 2^-11 with its scale's normalization), and those below 2^-25 of their page's largest
 * vanish: 2^-24 of l * max |v| in all. */
#include "kernels/cuda_attend_world.h"

/* ---- the truth ------------------------------------------------------------------------------------------------------- */

struct sum { /* of one (row, head) */
    int n;
    double s[MAX_TOKENS], score_abs; /* scores; the largest A of one */
    const float *v[MAX_TOKENS], *v_abs[MAX_TOKENS];
    double m, l, y[KV_MAX_HEAD_DIM], y_abs[KV_MAX_HEAD_DIM], v_max;
};

/* Tokens begin .. end-1 of `rows`; extra: added to the scores and to A. */
static void sum_add(struct sum *sum, const struct world *w, const double *q, const double *q_abs, const struct rows *rows, int begin,
                    int end, const double *extra, const double *extra_abs) {
    int d = w->d;
    for (int t = begin; t < end; t++) {
        double s = 0.0, abs = 0.0, scale = (double)w->args[0].scale;
        for (int c = 0; c < d; c++) {
            s += q[c] * (double)rows->k[t * d + c];
            abs += q_abs[c] * (double)rows->k_abs[t * d + c];
        }
        sum->s[sum->n] = scale * (s + (extra ? extra[t] : 0.0));
        sum->score_abs = fmax(sum->score_abs, scale * (abs + (extra ? extra_abs[t] : 0.0)));
        sum->v[sum->n] = rows->v + t * d;
        sum->v_abs[sum->n++] = rows->v_abs + t * d;
    }
}

static void mean_terms(const struct world *w, const double *q, int kv_head, int64_t block, double *terms, double *terms_abs) {
    int d = w->d, half = d / 2;
    double turned[KV_MAX_HEAD_DIM], abs[KV_MAX_HEAD_DIM];
    for (int i = 0; i < half; i++) {
        double angle = (double)((float)(block * KV_BLOCK) * w->inv_freq[i]);
        turned[i] = q[i] * cos(angle) + q[i + half] * sin(angle);
        turned[i + half] = q[i + half] * cos(angle) - q[i] * sin(angle);
        abs[i] = abs[i + half] = fabs(q[i]) + fabs(q[i + half]);
    }
    for (int o = 0; o < KV_BLOCK; o++) {
        const float *mean = w->mean + ((int64_t)kv_head * KV_BLOCK + o) * d;
        terms[o] = terms_abs[o] = 0.0;
        for (int c = 0; c < d; c++) {
            terms[o] += turned[c] * (double)mean[c];
            terms_abs[o] += abs[c] * fabs((double)mean[c]);
        }
    }
}

static void hadamard(const double *x, int d, double *out) {
    for (int i = 0; i < d; i++) {
        out[i] = 0.0;
        for (int j = 0; j < d; j++)
            out[i] += x[j] * (__builtin_popcount((unsigned)(i & j)) % 2 ? -1.0 : 1.0) / sqrt((double)d);
    }
}

static void gather(struct sum *sum, const struct world *w, int i, int head) {
    const struct step_row *row = &w->s.row[i];
    const struct cache_layout *l = &w->s.layout;
    int d = w->d, h = head / w->s.group, offset = w->s.owner_offset[row->seq];
    double q[KV_MAX_HEAD_DIM], q_abs[KV_MAX_HEAD_DIM], page_q[KV_MAX_HEAD_DIM], page_abs[KV_MAX_HEAD_DIM], extra[KV_BLOCK];
    double extra_abs[KV_BLOCK], total = 0.0;
    for (int c = 0; c < d; c++) {
        page_q[c] = q[c] = (double)w->q[((int64_t)i * w->n_heads + head) * d + c];
        page_abs[c] = q_abs[c] = fabs(q[c]);
        total += q_abs[c];
    }
    if (w->s.rotate) {
        hadamard(q, d, page_q);
        for (int c = 0; c < d; c++)
            page_abs[c] = total / sqrt((double)d);
    }
    int64_t n_flushed = cache_n_flushed(l, row->position), local = 0;
    sum->n = 0, sum->score_abs = 0.0;
    for (int64_t block = 0; block <= row->position / KV_BLOCK; block++) {
        if (!cache_owns(l, block, offset))
            continue;
        if (block < n_flushed) {
            if (w->s.mean)
                mean_terms(w, q, h, block, extra, extra_abs);
            if (block == 0)
                sum_add(sum, w, q, q_abs, &w->sink[row->seq][h], 0, l->sink, NULL, NULL);
            sum_add(sum, w, page_q, page_abs, &w->page[w->table[row->seq * MAX_BLOCKS + local++]][h], block == 0 ? l->sink : 0, KV_BLOCK,
                    w->s.mean ? extra : NULL, extra_abs);
        } else {
            const struct rows *all = &w->window[row->seq][h];
            int64_t at = block / l->cp_size % l->n_slots * KV_BLOCK * d;
            struct rows slot = {all->k + at, all->v + at, all->k_abs + at, all->v_abs + at};
            sum_add(sum, w, q, q_abs, &slot, 0, (int)min_i64(KV_BLOCK, row->position - block * KV_BLOCK + 1), NULL, NULL);
        }
    }
}

/* The softmax over what was gathered. */
static void sum_finish(struct sum *sum, int d) {
    sum->m = -INFINITY, sum->l = sum->v_max = 0.0;
    memset(sum->y, 0, sizeof sum->y), memset(sum->y_abs, 0, sizeof sum->y_abs);
    for (int t = 0; t < sum->n; t++)
        sum->m = fmax(sum->m, sum->s[t]);
    for (int t = 0; t < sum->n; t++) {
        double p = exp(sum->s[t] - sum->m);
        sum->l += p;
        for (int c = 0; c < d; c++) {
            sum->y[c] += p * (double)sum->v[t][c];
            sum->y_abs[c] += p * (double)sum->v_abs[t][c];
            sum->v_max = fmax(sum->v_max, (double)sum->v_abs[t][c]);
        }
    }
}

static void check_record(const struct world *w, int side, int row, int head, const struct sum *sum, const float *record) {
    const double u = 0x1p-24;
    int d = w->d, worst_c = 0;
    const float *tail = record + partial_tail(d, w->s.correction);
    if (sum->n == 0) {
        bool empty = tail[0] == -INFINITY && tail[1] == 0.0f;
        for (int c = 0; c < d; c++)
            empty = empty && record[c] == 0.0f;
        CHECK(empty, "%s: no token, but m %g l %g Y0 %g", describe(w, side, row, head), (double)tail[0], (double)tail[1],
              (double)record[0]);
        return;
    }
    double score = (17 * 3 * d / 16 + 32) * u * sum->score_abs, m_error = score + 4 * u * fabs(sum->m);
    double weight = 2.0 * score + m_error + (8 + 8 * (MAX_BLOCKS + 2)) * u, factor = exp((double)tail[0] - sum->m), worst = 0.0;
    CHECK(fabs((double)tail[0] - sum->m) <= m_error, "%s: m %.9g, truth %.9g, bound %g", describe(w, side, row, head), (double)tail[0],
          sum->m, m_error);
    CHECK(fabs((double)tail[1] * factor - sum->l) <= weight * sum->l, "%s: l %.9g (m %.9g), truth %.9g (%.9g), bound %g",
          describe(w, side, row, head), (double)tail[1], (double)tail[0], sum->l, sum->m, weight * sum->l);
    for (int c = 0; c < d; c++) { /* a record is shifted by its own m */
        double bound = (0x1p-11 + weight) * sum->y_abs[c] + 0x1p-24 * sum->l * sum->v_max;
        double share = fabs((double)record[c] * factor - sum->y[c]) / bound;
        if (!(share <= worst)) {
            worst = share, worst_c = c;
            if (share != share)
                break;
        }
    }
    CHECK(worst <= 1.0, "%s: Y[%d] %.9g (m %.9g), truth %.9g (%.9g): %.3g times the bound", describe(w, side, row, head), worst_c,
          (double)record[worst_c], (double)tail[0], sum->y[worst_c], sum->m, worst);
}

static int again(struct stream *stream, const void *args) { return op_attend(stream, args); }

/* Records of padding, and in all records what belongs to the correction: the same bytes as on the CPU. */
static void check_bytes(const struct world *w, float *const got[RIG_SIDES]) {
    int d = w->d, stride = w->args[0].stride, n = w->s.correction ? d : 0;
    for (int row = 0; row < w->args[0].n_rows; row++)
        for (int h = 0; h < w->n_heads; h++) {
            int known = row < w->s.n_rows ? row : 0; /* for the message */
            size_t at = (size_t)(row * w->n_heads + h) * (size_t)stride, tail = at + (size_t)partial_tail(d, w->s.correction);
            bool padding = row >= w->s.n_rows || w->s.row[row].seq < 0;
            const float *cpu = got[RIG_CPU], *cuda = got[RIG_CUDA];
            CHECK(!padding || memcmp(cpu + at, cuda + at, (size_t)stride * 4) == 0, "padding row %d of %d, head %d: m %g l %g Y0 %g",
                  row, w->s.n_rows, h, (double)cuda[tail], (double)cuda[tail + 1], (double)cuda[at]);
            CHECK(memcmp(cpu + at + d, cuda + at + d, (size_t)n * 4) == 0, "%s: C_n", describe(w, RIG_CUDA, known, h));
            CHECK(memcmp(cpu + tail + 2, cuda + tail + 2, 8) == 0,
                  "%s: C_d %g, pad %g", describe(w, RIG_CUDA, known, h), (double)cuda[tail + 2], (double)cuda[tail + 3]);
        }
}

static void check_setup(struct rig *rig, const struct setup *s, bool repeat) {
    int n_twins = rig->n_twins;
    struct world w;
    float *got[RIG_SIDES];
    static struct sum sum;
    world_make(rig, &w, s);
    for (int side = 0; side < RIG_SIDES; side++) {
        REQUIRE(op_attend(rig->stream[side], &w.args[side]));
        got[side] = rig_fetch(rig, side, w.partial.at[side], w.partial.bytes);
    }
    check_bytes(&w, got);
    for (int row = 0; row < s->n_rows; row++)
        for (int h = 0; h < w.n_heads && s->row[row].seq >= 0; h++) {
            gather(&sum, &w, row, h);
            sum_finish(&sum, w.d);
            for (int side = 0; side < RIG_SIDES; side++)
                check_record(&w, side, row, h, &sum, got[side] + (size_t)(row * w.n_heads + h) * (size_t)w.args[0].stride);
        }
    if (repeat)
        rig_expect_repeat(rig, &w.partial, again, &w.args[RIG_CUDA], "attend");
    free(got[RIG_CPU]), free(got[RIG_CUDA]);
    world_free(&w);
    rig_drop(rig, n_twins);
}

/* ---- the cases --------------------------------------------------------------------------------------------------------- */

static void check_all_ranks(struct rig *rig, struct setup s, bool repeat) {
    for (s.layout.cp_rank = 0; s.layout.cp_rank < s.layout.cp_size; s.layout.cp_rank++)
        check_setup(rig, &s, repeat);
}

static void check_formats(struct rig *rig) {
    static const int bits[] = {2, 4, 8, 16};
    uint64_t seed = 1;
    for (int d = 64; d <= 128; d += 64)
        for (int window = DTYPE_F16; window <= DTYPE_BF16; window++)
            for (int k = 0; k < 4; k++)
                for (int v = 0; v < 4; v++) /* every group for the pairs that have kernels of their own */
                    for (int i = 0; i < (k == v && k % 3 == 0 ? 9 : 1); i++, seed++)
                        check_all_ranks(rig, setup_of(bits[k], bits[v], d, (enum dtype)window, seed), seed % 16 == 0);
}

/* Nothing to do: no rows, all rows padding, all rows beyond. */
static void check_nothing(struct rig *rig) {
    struct setup s = setup_of(2, 2, 128, DTYPE_F16, 1);
    s.n_rows = 0, s.n_beyond = 0;
    check_setup(rig, &s, false);
    s.n_beyond = 3;
    check_setup(rig, &s, false);
    s.n_rows = 2;
    s.row[0] = s.row[1] = (struct step_row){-1, -1, 0, 0};
    check_setup(rig, &s, true);
}

/* ---- hazards ----------------------------------------------------------------------------------------------------------- */

enum { LONG_D = 128, LONG_LAST = KV_BLOCK - 1 };

/* A cache of n_pages pages of which `top` is page kind 1 and all others kind 0, and a 16-bit block of `n_window` tokens with K = low in
 * channel 0 and V = 0. One query head. */
struct lengthy {
    struct rows page[2];
    struct attend_args args[RIG_SIDES];
    struct twin partial;
};

static void put_parameters(uint8_t *cpu_part, uint8_t *cuda_part, bool key, int group, float scale, float zero) {
    int codes = page_codes_bytes(LONG_D, 2), at = key ? page_k_parameter(group) : page_v_parameter(group), n = key ? LONG_D : KV_BLOCK;
    pages_put_half(cpu_part + codes + 2 * group, dtype_to_f16(scale));
    pages_put_half(cpu_part + codes + 2 * (n + group), dtype_to_f16(zero));
    pages_put_half(cuda_part + codes + at, dtype_to_f16(scale));
    pages_put_half(cuda_part + codes + at + (key ? 8 : 2), dtype_to_f16(zero));
}

/* Clears, or sets to 3, the code of channel c of K of one token in both layouts. */
static void put_key_code(uint8_t *cpu, uint8_t *cuda, int c, int token, uint32_t code) {
    size_t cpu_word;
    int cpu_bit, word, bit, step, column;
    uint32_t x;
    cpu_page_code_place(2, KV_BLOCK, c, token, &cpu_word, &cpu_bit);
    page_k_column(c, &step, &column);
    page_code_place(2, LONG_D / 16, token, step, column, &word, &bit);
    memcpy(&x, cpu + 4 * cpu_word, 4);
    x = (x & ~(3u << cpu_bit)) | code << cpu_bit;
    memcpy(cpu + 4 * cpu_word, &x, 4);
    memcpy(&x, cuda + 4 * (size_t)word, 4);
    x = (x & ~(3u << bit)) | code << bit;
    memcpy(cuda + 4 * (size_t)word, &x, 4);
}

static void lengthy_open(struct rig *rig, struct lengthy *w, int n_pages, int top, const float *q, uint8_t *record[2][RIG_SIDES]) {
    struct page_format f = {LONG_D, 2, 2, DTYPE_F16};
    size_t bytes = page_record_bytes(&f), block = (size_t)KV_BLOCK * LONG_D;
    int32_t *ids = fresh((size_t)n_pages * sizeof *ids);
    uint16_t *window = fresh(4 * block), half[LONG_D];
    struct step_input *in = fresh(sizeof *in);
    struct seq_params *params = fresh(sizeof *params);
    ids[top] = 1;
    in->n_rows = 1;
    in->row[0] = (struct step_row){0, 7, n_pages * KV_BLOCK, 0}; /* one token in 16 bit: K = V = 0 */
    dtype_narrow(DTYPE_F16, q, half, LONG_D);
    struct twin pages = rig_make(rig, 2 * bytes, NULL), table = rig_make(rig, (size_t)n_pages * sizeof *ids, ids);
    struct twin slot = rig_make(rig, 4 * block, window), step = rig_make(rig, sizeof *in, in);
    struct twin who = rig_make(rig, sizeof *params, params), queries = rig_make(rig, sizeof half, half);
    w->partial = rig_make(rig, (LONG_D + 4) * sizeof(float), NULL);
    for (int side = 0; side < RIG_SIDES; side++) {
        for (int i = 0; i < 2; i++)
            rig_send(rig, side, (uint8_t *)pages.at[side] + bytes * (size_t)i, record[i][side], bytes);
        w->args[side] = (struct attend_args){.in = step.at[side], .n_rows = 1, .params = who.at[side], .layout = {0, 1, 0, 1, 0, 1, LONG_D},
                                             .page_table = table.at[side], .table_stride = n_pages, .n_heads = 1,
                                             .scale = 1.0f / sqrtf((float)LONG_D),
                                             .q = queries.at[side], .partial = w->partial.at[side], .stride = LONG_D + 4};
        w->args[side].layer = (struct cache_layer){.format = f, .pages = pages.at[side], .page_stride = (int64_t)bytes,
                                                   .window = slot.at[side]};
    }
    for (int i = 0; i < 2; i++) {
        w->page[i] = rows_new(KV_BLOCK, LONG_D);
        rows_of_record(&f, record[i][RIG_CPU], &w->page[i]);
    }
    free(ids), free(window), free(in), free(params);
}

/* m within m_bound, l and Y within share (of sums of absolute terms). n_pages - 1 pages count the same. */
static void lengthy_check(struct rig *rig, struct lengthy *w, int n_pages, const float *q, double m_bound, double share, const char *what) {
    double s[2][KV_BLOCK], m = 0.0, l, y[LONG_D] = {0}, y_abs[LONG_D] = {0}; /* the token in 16 bit has score 0 */
    for (int i = 0; i < 2; i++)
        for (int t = 0; t < KV_BLOCK; t++) {
            s[i][t] = 0.0;
            for (int c = 0; c < LONG_D; c++)
                s[i][t] += (double)q[c] * (double)w->page[i].k[t * LONG_D + c] / sqrt((double)LONG_D);
            m = fmax(m, i == 1 || n_pages > 1 ? s[i][t] : m);
        }
    l = exp(-m);
    for (int i = 0; i < 2; i++)
        for (int t = 0; t < KV_BLOCK; t++) {
            double p = (i ? 1.0 : n_pages - 1.0) * exp(s[i][t] - m);
            l += p;
            for (int c = 0; c < LONG_D; c++) {
                y[c] += p * (double)w->page[i].v[t * LONG_D + c];
                y_abs[c] += p * (double)w->page[i].v_abs[t * LONG_D + c];
            }
        }
    for (int side = 0; side < RIG_SIDES; side++) {
        REQUIRE(op_attend(rig->stream[side], &w->args[side]));
        float *record = rig_fetch(rig, side, w->partial.at[side], w->partial.bytes);
        double factor = exp((double)record[LONG_D] - m), worst = 0.0;
        for (int c = 0; c < LONG_D; c++) {
            double error = fabs((double)record[c] * factor - y[c]) / y_abs[c];
            worst = error <= worst ? worst : error;
        }
        const char *name = side ? "cuda" : "cpu";
        CHECK(fabs((double)record[LONG_D] - m) <= m_bound, "%s, %d pages, %s: m %.9g, truth %.9g", what, n_pages, name,
              (double)record[LONG_D], m);
        CHECK(fabs((double)record[LONG_D + 1] * factor - l) <= share * l, "%s, %d pages, %s: l %.9g, truth %.9g", what, n_pages, name,
              (double)record[LONG_D + 1], l);
        CHECK(worst <= share, "%s, %d pages, %s: Y off by %g of its terms", what, n_pages, name, worst);
        free(record);
    }
    for (int i = 0; i < 2; i++)
        rows_free(&w->page[i]);
}

enum hazard { HAZARD_MANY, HAZARD_OUTLIERS, HAZARD_EQUAL };

/* MANY: one key at 0, all others `low` below it. OUTLIERS: channels 3 and 67 as in Qwen2.5's keys, 80 +- 5 with q 60. EQUAL: keys all
 * alike. */
static void check_hazard(struct rig *rig, enum hazard hazard, int n_pages, float low) {
    struct page_format f = {LONG_D, 2, 2, DTYPE_F16};
    int n_twins = rig->n_twins;
    float q[LONG_D] = {[0] = 1.0f};
    uint8_t *record[2][RIG_SIDES];
    for (int i = 0; i < 2; i++) {
        for (int side = 0; side < RIG_SIDES; side++)
            record[i][side] = fresh(page_record_bytes(&f));
        pages_make_record(&f, 77 + (uint64_t)i, 0, record[i][RIG_CPU], record[i][RIG_CUDA]);
        for (int t = 0; hazard == HAZARD_MANY && t < KV_BLOCK; t++)
            put_key_code(record[i][RIG_CPU], record[i][RIG_CUDA], 0, t, i == 1 && t == 5 ? 3 : 0);
        float step = low * sqrtf((float)LONG_D) / 3.0f;
        if (hazard == HAZARD_MANY)
            put_parameters(record[i][RIG_CPU], record[i][RIG_CUDA], true, 0, -step, 3.0f * step);
        for (int c = 3; hazard == HAZARD_OUTLIERS && c < LONG_D; c += 64)
            put_parameters(record[i][RIG_CPU], record[i][RIG_CUDA], true, c, 10.0f / 3.0f, c == 3 ? 75.0f : -85.0f);
        for (int c = 0; hazard == HAZARD_EQUAL && c < LONG_D; c++) /* a constant channel: scale 0, codes that must not matter */
            put_parameters(record[i][RIG_CPU], record[i][RIG_CUDA], true, c, 0.0f, test_uniform(5, (uint64_t)c));
    }
    for (int c = 0; hazard != HAZARD_MANY && c < LONG_D; c++) {
        uint16_t half = dtype_to_f16(hazard == HAZARD_OUTLIERS && c % 64 == 3 ? 60.0f : test_normal(6, (uint64_t)c));
        q[c] = dtype_from_f16(half);
    }
    struct lengthy w;
    lengthy_open(rig, &w, n_pages, n_pages / 3, q, record);
    /* Outliers: scores of several hundred; what is asked is an error below 1e-3, and so twice that of a weight. Else scores are exact to
     * 1e-5. */
    bool outliers = hazard == HAZARD_OUTLIERS;
    static const char *const names[] = {"many low keys", "outlier channels", "equal keys"};
    lengthy_check(rig, &w, n_pages, q, outliers ? 1e-3 : 2e-5, 0x1p-11 + (outliers ? 2e-3 : 6e-5), names[hazard]);
    for (int i = 0; i < 4; i++)
        free(record[i / 2][i % 2]);
    rig_drop(rig, n_twins);
}

int main(void) {
    struct rig rig;
    rig_open(&rig);
    check_nothing(&rig);
    check_formats(&rig);
    check_hazard(&rig, HAZARD_MANY, 1024, -10.0f);
    check_hazard(&rig, HAZARD_MANY, 2048, -12.0f);
    check_hazard(&rig, HAZARD_MANY, 4096, -14.0f);
    check_hazard(&rig, HAZARD_MANY, 8192, -16.0f);
    check_hazard(&rig, HAZARD_OUTLIERS, 2, 0.0f);
    check_hazard(&rig, HAZARD_OUTLIERS, 300, 0.0f);
    check_hazard(&rig, HAZARD_EQUAL, 50, 0.0f);
    rig_close(&rig);
    return test_report();
}
