/* Times: bytes over rates, operations and collectives by their number. Operations are counted as forward.c and prefill.c launch them. */
#include "engine/cost.h"

#include <math.h>

#include "engine/prefill.h"

enum {
    LAYER_OPS = 11, /* of a layer of a decode step, without merge and correction: add and norm in one, qkv, rope, flush, append, attend, o,
                       add and norm, gate_up, silu, down */
    STEP_OPS = 8,   /* beside the layers: step_begin, embed, the last add, norm, head, logits_process, sample, sample_merge */
};

/* ---- collectives --------------------------------------------------------------------------------------------------- */

struct cost_group cost_group_make(const struct cost_rates *rates, int first, int stride, int ranks) {
    struct cost_group group = {.ranks = ranks};
    int last = -1, here = 0;
    for (int i = 0; i < ranks; i++) {
        int node = (first + i * stride) / rates->gpus_per_node;
        here = node == last ? here + 1 : 1;
        group.nodes += node != last;
        group.each = here > group.each ? here : group.each;
        last = node;
    }
    return group;
}

static double curve_at(const struct cost_curve *c, double bytes) {
    int i = 1;
    if (c->n == 1 || bytes <= c->bytes[0])
        return c->seconds[0];
    while (i < c->n - 1 && bytes > c->bytes[i])
        i++;
    double slope = (c->seconds[i] - c->seconds[i - 1]) / (c->bytes[i] - c->bytes[i - 1]);
    return c->seconds[i - 1] + fmax(slope, 0) * (bytes - c->bytes[i - 1]);
}

static double inside_node(const struct cost_rates *rates, enum cost_collective kind, int ranks, double bytes) {
    const struct cost_curve *c = rates->curves[kind];
    int n = rates->n_curves[kind], i = 0;
    if (ranks < 2 || n == 0)
        return 0;
    while (i < n - 1 && c[i].ranks < ranks)
        i++;
    double here = curve_at(&c[i], bytes);
    if (i == 0 || c[i].ranks <= ranks)
        return here;
    double before = curve_at(&c[i - 1], bytes), share = (double)(ranks - c[i - 1].ranks) / (c[i].ranks - c[i - 1].ranks);
    return before + share * (here - before);
}

double cost_collective(const struct cost_rates *rates, enum cost_collective kind, const struct cost_group *group, double bytes) {
    double seconds = inside_node(rates, kind, group->each, bytes);
    if (group->nodes < 2)
        return seconds;
    /* each GPU of a node exchanges its share with its peers: once for a gather, twice (scatter, gather) for a sum */
    double share = bytes / group->each * (group->nodes - 1) / group->nodes;
    double trips = kind == COST_ALL_GATHER ? 1 : 2;
    return seconds + trips * (ceil(log2((double)group->nodes)) * rates->node_latency_s + share / rates->node_bandwidth);
}

struct groups {
    struct cost_group replica, tp, cp;
};

/* Of several groups of a kind, the one on most nodes. */
static struct groups groups_make(const struct cost_job *job, const struct cost_rates *rates) {
    struct groups g = {.replica = cost_group_make(rates, 0, 1, job->tp * job->cp), .tp = cost_group_make(rates, 0, job->cp, job->tp)};
    for (int i = 0; i < job->tp; i++) {
        struct cost_group cp = cost_group_make(rates, i * job->cp, 1, job->cp);
        if (cp.nodes > g.cp.nodes)
            g.cp = cp;
    }
    return g;
}

/* ---- decode -------------------------------------------------------------------------------------------------------- */

static int n_corrected(const struct cache_spec *spec) {
    int n = 0;
    for (int i = 0; i < spec->n_layers; i++)
        n += spec->layer[i].correction;
    return n;
}

static int64_t rank_heads(const struct cost_job *job) { /* of tp rank 0 */
    struct weights_slices s;
    weights_slices_make(job->config, job->tp, 0, 1, 0, false, &s);
    return range_size(s.heads);
}

static double merge_time(const struct cost_job *job, const struct cost_rates *rates, const struct cost_group *cp, int64_t rows,
                         bool correction) {
    double items = (double)(rows * rank_heads(job)), word = sizeof(float);
    int d = job->config->head_dim;
    if (job->cp == 1)
        return 0;
    if (job->merge == MERGE_ALLREDUCE)
        return cost_collective(rates, COST_ALL_MAX, cp, items * word) + cost_collective(rates, COST_ALL_REDUCE, cp, items * (d + 1) * word);
    if (job->merge == MERGE_FUSED)
        return cost_collective(rates, COST_ALL_GATHER, cp, job->cp * items * 3 * word);
    return cost_collective(rates, COST_ALL_GATHER, cp, job->cp * items * partial_stride(d, correction) * word);
}

static int merge_ops(const struct cost_job *job) {
    if (job->cp == 1)
        return 1;
    return job->merge == MERGE_ALLREDUCE ? 3 : job->merge == MERGE_FUSED ? 2 : 1;
}

/* A step of `rows` rows that reads this much. */
static void step_time(const struct cost_job *job, const struct cost_rates *rates, int64_t rows, const struct cost_reads *reads,
                      struct cost_step *out) {
    const struct model_config *c = job->config;
    struct groups g = groups_make(job, rates);
    int corrected = n_corrected(job->spec), layers = c->n_layers;
    double row_bytes = (double)rows * c->hidden * sizeof(float);
    /* two bytes and two operations for each weight and row */
    out->weights = fmax((double)reads->weights / (rates->read_rate * rates->weights_share),
                        (double)reads->weights * (double)rows / rates->gemm_rate);
    out->attention = (double)reads->cache / (rates->read_rate * rates->attention_share) + layers * rates->attention_s;
    out->merge = corrected * merge_time(job, rates, &g.cp, rows, true) + (layers - corrected) * merge_time(job, rates, &g.cp, rows, false);
    out->sums = 2 * layers * cost_collective(rates, COST_ALL_REDUCE, &g.replica, row_bytes);
    out->ends = cost_collective(rates, COST_ALL_REDUCE, &g.replica, row_bytes) +
                cost_collective(rates, COST_ALL_GATHER, &g.replica, (double)g.replica.ranks * (double)rows * sizeof(struct sample_record));
    out->launches = ((double)layers * (LAYER_OPS + merge_ops(job)) + corrected + STEP_OPS) * rates->launch_s;
    out->total = out->weights + out->attention + out->merge + out->sums + out->ends + out->launches;
}

void cost_decode(const struct cost_job *job, const struct cost_rates *rates, int64_t n_tokens, struct cost_step *out) {
    struct cost_reads reads, most;
    cost_reads(job, 0, 0, n_tokens, &most);
    for (int r = 1; r < job->cp; r++) { /* whoever owns the newest blocks reads more */
        cost_reads(job, 0, r, n_tokens, &reads);
        most.cache = max_i64(most.cache, reads.cache);
    }
    step_time(job, rates, plan_bucket(job->batch), &most, out);
}

/* ---- prefill ------------------------------------------------------------------------------------------------------- */

struct prompt {
    int64_t n, chunk, rows; /* rows: that this rank passes through the dense layers */
    bool gathers;
    struct weights_slices tp, own; /* the tp slice; this rank's part of it */
    int64_t qkv, width, kv;        /* columns; bytes of one token's K and V */
};

static struct prompt prompt_make(const struct cost_job *job, int64_t n) {
    const struct model_config *c = job->config;
    struct prompt p = {.n = n, .chunk = ceil_div(n, 2 * job->cp)};
    int64_t gather_from = job->prefill_gather > 0 ? job->prefill_gather : PREFILL_GATHER_FROM;
    p.gathers = job->cp > 1 && n >= gather_from * job->cp;
    p.rows = p.gathers ? 2 * p.chunk : n;
    weights_slices_make(c, job->tp, 0, 1, 0, false, &p.tp);
    weights_slices_make(c, job->tp, 0, job->cp, 0, job->merge == MERGE_FUSED && job->cp > 1, &p.own);
    p.width = range_size(p.tp.heads) * c->head_dim;
    p.qkv = p.width + 2 * range_size(p.tp.kv_heads) * c->head_dim;
    p.kv = 2 * range_size(p.tp.kv_heads) * (int64_t)dtype_bytes(job->spec->window_type, c->head_dim);
    return p;
}

static int64_t sliced_columns(const struct weights_slices *s) { return range_size(s->o_columns) + 3 * range_size(s->inner); }

static double layer_dense_flop(const struct cost_job *job, const struct prompt *p) {
    int64_t columns = p->qkv + sliced_columns(p->gathers ? &p->tp : &p->own);
    return 2.0 * (double)p->rows * (double)columns * job->config->hidden;
}

/* Half of the square of scores, two products of d for each, split evenly by the zigzag. */
static double layer_attention_flop(const struct cost_job *job, const struct prompt *p) {
    return 2.0 * (double)p->n * (double)p->n * (double)p->width / job->cp;
}

/* What the operations between the products move, in floats of a row: hidden: two norms (read, write, read again), two results written and
 * added (4); qkv written, turned and written in half; attention's input and result; gate and up written and read, act too. Summing the
 * parts of cp peers adds to it. K and V are placed once (read, written) and flushed. */
static double layer_activation_bytes(const struct cost_job *job, const struct prompt *p) {
    int64_t inner = range_size(p->gathers ? p->tp.inner : p->own.inner);
    double peers = p->gathers ? job->cp - 1 : 0;
    double floats = (14 + 8 * peers) * job->config->hidden + 2.5 * (double)(p->qkv + p->width) + 6 * (double)inner;
    return (double)p->rows * floats * sizeof(float) + (double)(p->n * p->kv) * (2 + 1.0 / job->cp);
}

static double tiles_of(const struct prompt *p) {
    return p->gathers ? 2 * (double)ceil_div(p->chunk, PREFILL_TILE) : (double)ceil_div(p->n, PREFILL_TILE);
}

static double layer_collectives(const struct cost_job *job, const struct cost_rates *rates, const struct groups *g,
                                const struct prompt *p) {
    double tile = (double)min_i64(p->gathers ? p->chunk : p->n, PREFILL_TILE) * job->config->hidden * sizeof(float);
    const struct cost_group *sums = p->gathers ? &g->tp : &g->replica;
    double seconds = 2 * tiles_of(p) * cost_collective(rates, COST_ALL_REDUCE, sums, tile);
    if (p->gathers)
        return seconds + cost_collective(rates, COST_ALL_GATHER, &g->cp, (double)(2 * job->cp * p->chunk * p->kv));
    return seconds + cost_collective(rates, COST_ALL_GATHER, &g->cp, (double)(2 * job->cp * p->chunk * p->width) * sizeof(float));
}

static double layer_ops(const struct cost_job *job, const struct prompt *p) {
    double parts = p->gathers ? job->cp : 1;
    return 2 + tiles_of(p) * (3 + 1 + 2 * parts + 4 * parts + 1); /* norm, qkv, rope; attend; o and its sums; the MLP and its */
}

void cost_prefill_cached(const struct cost_job *job, const struct cost_rates *rates, int64_t n, struct cost_prefill *out) {
    const struct prompt p = prompt_make(job, n);
    struct cost_job one = *job;
    struct cost_reads reads;
    struct cost_step step;
    double steps = (double)ceil_div(n, KV_BLOCK);
    *out = (struct cost_prefill){0};
    one.batch = 1;
    cost_reads(&one, 0, 0, n, &reads);
    step_time(&one, rates, min_i64(n, KV_BLOCK), &reads, &step);
    out->dense = steps * step.weights;
    out->attention = steps * step.attention;
    if (rates->cached_rate > 0)
        out->attention = job->config->n_layers * layer_attention_flop(job, &p) / rates->cached_rate;
    out->collectives = steps * (step.merge + step.sums + step.ends);
    out->launches = steps * step.launches;
    out->total = out->dense + out->attention + out->collectives + out->launches;
    out->flop = (double)reads.weights * (double)n * job->tp * job->cp;
}

void cost_prefill(const struct cost_job *job, const struct cost_rates *rates, int64_t n, struct cost_prefill *out) {
    *out = (struct cost_prefill){0};
    if (n <= job->spec->window + KV_BLOCK) {
        cost_prefill_cached(job, rates, n, out);
        return;
    }
    struct groups g = groups_make(job, rates);
    struct prompt p = prompt_make(job, n);
    double layers = job->config->n_layers, tile = (double)min_i64(n, PREFILL_TILE) * job->config->hidden * sizeof(float);
    double dense_flop = layers * layer_dense_flop(job, &p), attention_flop = layers * layer_attention_flop(job, &p);
    out->dense = dense_flop / rates->gemm_rate;
    out->attention = attention_flop / rates->prefill_rate;
    out->activations = layers * layer_activation_bytes(job, &p) / rates->read_rate;
    out->collectives = layers * layer_collectives(job, rates, &g, &p) +
                       (double)ceil_div(n, PREFILL_TILE) * cost_collective(rates, COST_ALL_REDUCE, &g.replica, tile);
    out->launches = layers * layer_ops(job, &p) * rates->launch_s;
    double others = out->dense + out->attention + out->activations + out->collectives + out->launches;
    double bytes = (double)(sliced_columns(&p.tp) - (job->merge == MERGE_FUSED ? range_size(p.tp.o_columns) : 0)) * job->config->hidden * 2;
    if (p.gathers)
        out->gather = fmax(0, layers * cost_collective(rates, COST_ALL_GATHER, &g.cp, bytes) - others);
    out->total = others + out->gather;
    out->flop = (dense_flop + attention_flop) * job->tp * job->cp;
}
