/* Bytes: what a rank holds and what a step reads. Each function follows one that allocates; the order of terms is theirs. */
#include "engine/cost.h"

#include "engine/worker.h"

enum {
    CHUNK_ROWS = KV_BLOCK,         /* prompt tokens in one step: engine_open.c's */
    WINDOW_UNIT = 2 << 20,         /* what comm_nccl rounds its windows to */
    SCRATCH_BYTES = 2 * ((96 << 20) + (4 << 17)), /* CUDA_SCRATCH_BYTES and CUDA_COUNTERS for each of the engine's two streams */
    ELEMENT = 2,                   /* bytes of a weight */
};

/* As in engine_open.c: of what weights and workspace leave free on a GPU, the cache takes this share. */
static const double DEVICE_SHARE = 0.92;

/* What one rank works with. */
struct holder {
    const struct cost_job *job;
    const struct model_config *config;
    int tp_rank;
    struct weights_slices slices;
    int64_t rows, sample;                    /* of the decode path's buffers */
    int64_t heads, kv_heads, inner, vocab;   /* of the rank */
    int64_t qkv, width;                      /* columns of the QKV projection; of attention's result */
    int64_t value;                           /* bytes of head_dim values in the window's type */
    bool o_whole;
};

static struct holder holder_make(const struct cost_job *job, int tp_rank, int cp_rank) {
    const struct model_config *c = job->config;
    struct holder h = {.job = job, .config = c, .tp_rank = tp_rank, .o_whole = job->merge == MERGE_FUSED && job->cp > 1};
    weights_slices_make(c, job->tp, tp_rank, job->cp, cp_rank, h.o_whole, &h.slices);
    h.rows = plan_bucket((int)max_i64(CHUNK_ROWS, job->batch));
    h.sample = plan_bucket(job->batch);
    h.heads = range_size(h.slices.heads);
    h.kv_heads = range_size(h.slices.kv_heads);
    h.inner = range_size(h.slices.inner);
    h.vocab = range_size(h.slices.vocab);
    h.qkv = (h.heads + 2 * h.kv_heads) * c->head_dim;
    h.width = h.heads * c->head_dim;
    h.value = (int64_t)dtype_bytes(job->spec->window_type, c->head_dim);
    return h;
}

/* Memory that comm_alloc gives on a communicator of `ranks`. */
static int64_t shared(const struct cost_job *job, int64_t ranks, int64_t bytes) {
    return job->gpu && ranks > 1 ? round_up(max_i64(bytes, 1), WINDOW_UNIT) : bytes;
}

/* ---- weights ------------------------------------------------------------------------------------------------------- */

static int64_t n_corrected(const struct cache_spec *spec) {
    int64_t n = 0;
    for (int i = 0; i < spec->n_layers; i++)
        n += spec->layer[i].correction;
    return n;
}

static int64_t weight_bytes(const struct holder *h) {
    const struct model_config *c = h->config;
    int64_t floats = weights_norm_values(c) + c->head_dim / 2; /* and RoPE's frequencies */
    if (c->qkv_bias)
        floats += c->n_layers * h->qkv;
    floats += n_corrected(h->job->spec) * 2 * h->kv_heads * c->head_dim * h->job->features; /* phi_k and phi_q */
    return weights_slices_bytes(c, &h->slices, ELEMENT) + floats * (int64_t)sizeof(float);
}

/* ---- workspace ----------------------------------------------------------------------------------------------------- */

static int64_t forward_bytes(const struct holder *h) {
    int64_t n = h->rows, hidden = h->config->hidden, word = sizeof(float), replica = h->job->tp * h->job->cp;
    int64_t bytes = (int64_t)sizeof(struct step_input) + 2 * n * (int64_t)sizeof(int32_t);
    bytes += 2 * shared(h->job, replica, n * hidden * word);                     /* x, projected */
    bytes += n * (hidden + h->qkv + h->width + 3 * h->inner) * word;             /* norm, qkv, attention, gate_up, act */
    bytes += n * (h->heads + 2 * h->kv_heads) * h->value;                        /* q, k, v */
    bytes += n * (hidden + h->vocab) * word + h->sample * h->vocab * word;       /* picked, logits, processed */
    bytes += shared(h->job, replica, h->sample * word) + h->sample * (int64_t)sizeof(struct filter_state);
    bytes += shared(h->job, replica, h->sample * (FILTER_BINS + 1) * (int64_t)sizeof(uint64_t));
    bytes += shared(h->job, replica, n * replica * (int64_t)sizeof(struct sample_record));
    return bytes + n * (int64_t)sizeof(struct sample_result);
}

static int64_t merge_bytes(const struct holder *h) {
    int64_t cp = h->job->cp, items = h->rows * h->heads, records = items * partial_stride(h->config->head_dim, true);
    int64_t floats = records;
    if (cp > 1 && h->job->merge == MERGE_GATHER)
        floats = cp * records;
    else if (cp > 1 && h->job->merge == MERGE_ALLREDUCE)
        floats = records + items * (h->config->head_dim + 2);
    else if (cp > 1)
        floats = records + cp * items * 3;
    return shared(h->job, cp, floats * (int64_t)sizeof(float));
}

static int64_t worker_bytes(const struct holder *h) {
    return (int64_t)sizeof(struct seq_params) + h->job->context * (int64_t)sizeof(int32_t);
}

static int64_t worker_host_bytes(const struct holder *h) {
    int64_t flight = (int64_t)sizeof(struct step_input) + h->rows * (int64_t)sizeof(struct sample_result);
    return WORKER_FLIGHTS * flight + worker_bytes(h);
}

/* ---- exact prefill ------------------------------------------------------------------------------------------------- */

struct prompt { /* the shape of the longest prompt's buffers */
    int64_t tokens, chunk, replicated, local, kv_rows;
};

static struct prompt prompt_make(const struct cost_job *job) {
    int64_t gather_from = job->prefill_gather > 0 ? job->prefill_gather : PREFILL_GATHER_FROM;
    struct prompt p = {.tokens = job->context > job->spec->window + KV_BLOCK && !job->no_prefill ? job->context : 0};
    p.chunk = ceil_div(p.tokens, 2 * job->cp);
    p.replicated = min_i64(p.tokens, gather_from * job->cp);
    p.local = max_i64(2 * p.chunk, round_up(p.replicated, 2));
    p.kv_rows = max_i64(2 * job->cp * p.chunk, round_up(p.replicated, 2));
    return p;
}

static int64_t arena_bytes(const struct holder *h) {
    const struct cost_job *job = h->job;
    int64_t total = 0;
    for (int i = 0; i < job->cp; i++) {
        struct weights_slices s;
        weights_slices_make(h->config, job->tp, h->tp_rank, job->cp, i, h->o_whole, &s);
        total += round_up((int64_t)weights_sliced_bytes(h->config, &s, DTYPE_F16, h->o_whole), 64);
    }
    return job->cp > 1 ? 2 * shared(job, job->cp, total) : 0;
}

static int64_t prefill_bytes(const struct holder *h) {
    const struct cost_job *job = h->job;
    struct prompt p = prompt_make(job);
    int64_t hidden = h->config->hidden, word = sizeof(float), cp = job->cp;
    if (p.tokens == 0)
        return 0;
    struct weights_slices widest; /* of the cp peers: the first has the most */
    weights_slices_make(h->config, job->tp, h->tp_rank, job->cp, 0, h->o_whole, &widest);
    int64_t bytes = arena_bytes(h) + (p.tokens + p.local) * (int64_t)sizeof(int32_t);
    bytes += p.local * (hidden * word + h->heads * h->value);                        /* x, q */
    bytes += shared(job, cp, 2 * p.kv_rows * h->kv_heads * h->value);                /* gathered */
    bytes += 2 * p.tokens * h->kv_heads * h->value;                                  /* kv */
    bytes += p.local * h->width * word;                                              /* attention */
    bytes += shared(job, cp, 2 * cp * ceil_div(p.replicated, 2 * cp) * h->width * word); /* collected */
    bytes += PREFILL_TILE * (2 * hidden + h->qkv + 3 * range_size(widest.inner)) * word; /* norm, part, qkv, gate_up, act */
    return bytes + shared(job, (int64_t)job->tp * cp, PREFILL_TILE * hidden * word); /* projected */
}

static int64_t prefill_host_bytes(const struct cost_job *job) {
    struct prompt p = prompt_make(job);
    return p.tokens ? (p.local + p.tokens + p.tokens / KV_BLOCK + 1) * (int64_t)sizeof(int32_t) : 0;
}

/* ---- all of it ----------------------------------------------------------------------------------------------------- */

static struct cache_shape shape_of(const struct holder *h, int cp_rank) {
    const struct cost_job *job = h->job;
    return (struct cache_shape){.n_kv_heads = (int)h->kv_heads, .head_dim = h->config->head_dim, .n_heads = (int)h->heads,
                                .cp_rank = cp_rank, .cp_size = job->cp, .max_seqs = job->batch, .context = job->context,
                                .n_pages = cache_pages_for(job->spec, job->cp, job->context) * job->batch,
                                .vocab_begin = h->slices.vocab.begin, .vocab_count = h->vocab, .features = job->features};
}

void cost_memory(const struct cost_job *job, int tp_rank, int cp_rank, struct cost_memory *out) {
    struct holder h = holder_make(job, tp_rank, cp_rank);
    struct cache_shape shape = shape_of(&h, cp_rank);
    *out = (struct cost_memory){.weights = weight_bytes(&h),
                                .workspace = forward_bytes(&h) + merge_bytes(&h) + worker_bytes(&h) + (job->gpu ? SCRATCH_BYTES : 0),
                                .prefill = prefill_bytes(&h),
                                .cache = cache_plan_bytes(job->spec, &shape),
                                .host = worker_host_bytes(&h) + prefill_host_bytes(job)};
    out->cache_total = cache_bytes_sum(&out->cache);
    out->total = out->weights + out->workspace + out->prefill + out->cache_total;
}

bool cost_fits(const struct cost_job *job, const struct cost_rates *rates, int64_t *left) {
    struct cost_memory m;
    cost_memory(job, 0, 0, &m);
    int64_t room = rates->memory_bytes - rates->reserved_bytes - m.weights - m.workspace - m.prefill;
    int64_t free_bytes = (room > 0 ? (int64_t)(DEVICE_SHARE * (double)room) : room) - m.cache_total;
    if (left)
        *left = free_bytes;
    return free_bytes >= 0;
}

/* ---- what a step reads --------------------------------------------------------------------------------------------- */

/* Tokens of the rank's own among the blocks begin .. end-1, the last of which ends with token n-1. */
static int64_t tokens_owned(const struct cache_layout *layout, int64_t begin, int64_t end, int64_t n, int64_t offset) {
    int64_t blocks = cache_n_owned(layout, end, offset) - cache_n_owned(layout, begin, offset);
    int64_t tokens = blocks * KV_BLOCK;
    return end > begin && cache_owns(layout, end - 1, offset) ? tokens - (end * KV_BLOCK - n) : tokens;
}

/* Bytes of the pages and 16-bit tokens of one sequence of n > 0 tokens with this owner offset. */
static int64_t sequence_reads(const struct holder *h, const struct cache_layout *layout, int64_t page, int64_t n, int64_t offset) {
    int64_t flushed = cache_n_flushed(layout, n - 1), end = (n - 1) / KV_BLOCK + 1;
    int64_t exact = tokens_owned(layout, flushed, end, n, offset);
    if (flushed > 0 && cache_owns(layout, 0, offset))
        exact += layout->sink;
    return cache_n_owned(layout, flushed, offset) * page + exact * 2 * h->config->n_layers * h->kv_heads * h->value;
}

void cost_reads(const struct cost_job *job, int tp_rank, int cp_rank, int64_t n_tokens, struct cost_reads *out) {
    struct holder h = holder_make(job, tp_rank, cp_rank);
    struct cache_shape shape = shape_of(&h, cp_rank);
    struct cache_layout layout = {.cp_rank = cp_rank, .cp_size = job->cp, .window_blocks = job->spec->window / KV_BLOCK,
                                  .sink = job->spec->sink, .n_kv_heads = (int)h.kv_heads, .head_dim = h.config->head_dim};
    int64_t page = cache_page_bytes(job->spec, &shape);
    *out = (struct cost_reads){.weights = weight_bytes(&h)};
    if (!h.config->tied) /* of the embedding only a row */
        out->weights -= (h.vocab - (tp_rank + cp_rank == 0)) * h.config->hidden * ELEMENT;
    out->cache = cache_plan_bytes(job->spec, &shape).states; /* of all sequences */
    for (int offset = 0; n_tokens > 0 && offset < job->cp && offset < job->batch; offset++) {
        int64_t n_seqs = job->batch / job->cp + (offset < job->batch % job->cp);
        out->cache += n_seqs * sequence_reads(&h, &layout, page, n_tokens, offset);
    }
}
