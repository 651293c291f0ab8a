/* Putting an engine together: files, layout, weights, memory plan, cache. Every rank goes through the same stages and the ranks agree on
 * their status after each, so one rank's error is everybody's message and nobody hangs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cache_random.h"
#include "engine/device.h"
#include "engine/engine_impl.h"

enum {
    DEFAULT_BATCH = 16,    /* sequences decoded at once when nobody says how many */
    CHUNK_ROWS = KV_BLOCK, /* prompt tokens in one step */
    MIN_CONTEXT = 2 * KV_BLOCK,
    SETTINGS_BYTES = 1024,
};

/* Of a node's memory, this share is planned for; the rest is the system's, the page cache of the model file and libraries'. */
static const double MEMORY_SHARE = 0.85;
/* Of what is free on a GPU once weights and workspace are there; graphs, and what NCCL and the driver take later, need the rest. */
static const double DEVICE_SHARE = 0.92;

/* ---- files and settings -------------------------------------------------------------------------------------------- */

static int read_shape(struct engine *e) {
    if (e->options.calibration)
        FAIL(STATUS_USAGE, "calibration %s: with random weights the adapters are random too", e->options.calibration);
    return model_file_open_shape(e->options.model, &e->file);
}

static int read_files(struct engine *e) {
    char hash[65];
    if (!e->options.model)
        FAIL(STATUS_USAGE, "no model: name one with --model");
    if (e->options.random_weights)
        return read_shape(e);
    TRY(model_file_open(e->options.model, &e->file));
    TRY(tokenizer_open(model_file_tokenizer(e->file), model_file_config(e->file)->vocab, &e->tokenizer));
    if (!e->options.calibration)
        return STATUS_OK;
    tokenizer_hash(e->tokenizer, hash);
    return calibration_open(e->options.calibration, e->file, hash, &e->calibration);
}

static int make_spec(struct engine *e) {
    const struct engine_options *o = &e->options;
    struct cache_request request = {.preset = o->cache, .k_bits = o->k_bits, .v_bits = o->v_bits, .correction = o->correction,
                                    .window = o->window, .sink = o->sink,
                                    .has_adapters = o->random_weights || (e->calibration && calibration_has_adapters(e->calibration))};
    TRY(cache_spec_make(&request, model_file_config(e->file)->n_layers, &e->spec));
    for (int i = 0; i < e->spec.n_layers; i++)
        if (e->calibration && e->spec.layer[i].correction && !calibration_has_layer(e->calibration, i))
            e->spec.layer[i].correction = false;
    return STATUS_OK;
}

static int make_layout(struct engine *e, enum merge_kind *merge) {
    const struct engine_options *o = &e->options;
    const struct model_config *c = model_file_config(e->file);
    struct rank *r = &e->worker.rank;
    if (o->dp > 1)
        FAIL(STATUS_USAGE, "dp %d: several replicas are not supported yet; leave dp out and give the ranks to tp and cp", o->dp);
    TRY(grid_make(1, o->tp, o->cp, comm_size(e->world), comm_rank(e->world), c->n_kv_heads, &r->grid));
    TRY(merge_parse(o->merge, merge));
    r->config = c;
    r->spec = &e->spec;
    r->o_whole = *merge == MERGE_FUSED && r->grid.cp > 1;
    snprintf(e->merge, sizeof e->merge, "%s", r->grid.cp > 1 ? merge_name(*merge) : "none");
    return STATUS_OK;
}

/* ---- device -------------------------------------------------------------------------------------------------------- */

/* What only the CPU has: "" when `device` can do all that is asked. */
static const char *cpu_only(const struct engine *e) {
    if (e->spec.window_type == DTYPE_F32)
        return "cache f32";
    return e->options.profile ? "keeping the time of each kind of work" : "";
}

/* Collective. */
static int open_backend(struct engine *e) {
    struct rank *r = &e->worker.rank;
    struct device_request request = {
        .device = e->options.device, .comm = e->options.comm, .cpu_only = cpu_only(e),
        .backend = {.n_threads = e->options.threads > 0 ? e->options.threads : e->place.n_cores,
                    .seed = e->options.test_seed + (uint64_t)comm_rank(e->world), .profile = e->options.profile}};
    TRY(device_open(e->world, &e->place, &request, &r->backend, e->device, sizeof e->device));
    int status = stream_open(r->backend, &r->stream);
    if (status == STATUS_OK)
        status = stream_open(r->backend, &r->side);
    return comm_agree(e->world, "opening the device", status);
}

/* Collective. The communicators whose collectives run in streams, on the device. */
static int split_ranks(struct engine *e) {
    struct rank *r = &e->worker.rank;
    const struct grid *g = &r->grid;
    TRY(comm_split(e->world, g->dp_rank, grid_replica_rank(g), "replica", &r->replica));
    TRY(comm_split(e->world, g->dp_rank * g->cp + g->cp_rank, g->tp_rank, "tp", &r->tp));
    TRY(comm_split(e->world, g->dp_rank * g->tp + g->tp_rank, g->cp_rank, "cp", &r->cp));
    TRY(comm_split(e->world, g->dp_rank * g->tp + g->tp_rank, g->cp_rank, "cp weights", &r->gather));
    struct comm **all[] = {&r->replica, &r->tp, &r->cp, &r->gather};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        TRY(comm_use_device(all[i], r->backend));
    return STATUS_OK;
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static int n_features(const struct engine *e) {
    return e->options.random_weights ? CACHE_RANDOM_FEATURES : e->calibration ? calibration_features(e->calibration) : 0;
}

static struct cache_shape base_shape(const struct engine *e) {
    const struct rank *r = &e->worker.rank;
    const struct weights_slices *s = &r->weights.slices;
    return (struct cache_shape){.n_kv_heads = rank_n_kv_heads(r), .head_dim = r->config->head_dim, .n_heads = rank_n_heads(r),
                                .cp_rank = r->grid.cp_rank, .cp_size = r->grid.cp, .max_seqs = e->max_batch, .context = e->context,
                                .vocab_begin = s->vocab.begin, .vocab_count = range_size(s->vocab),
                                .features = n_features(e)};
}

static int64_t backend_total(const struct backend *b) {
    return (int64_t)(backend_used(b, MEMORY_WEIGHTS) + backend_used(b, MEMORY_WORKSPACE) + backend_used(b, MEMORY_CACHE) +
                     backend_used(b, MEMORY_HOST));
}

/* Bytes that this rank may give to its cache. */
static int64_t cache_room(const struct engine *e) {
    if (e->options.cache_memory > 0)
        return e->options.cache_memory;
    int64_t free_bytes = backend_free_bytes(e->worker.rank.backend);
    if (free_bytes >= 0)
        return (int64_t)(DEVICE_SHARE * (double)free_bytes);
    return (int64_t)(MEMORY_SHARE * (double)e->place.memory_bytes) - backend_total(e->worker.rank.backend);
}

/* How many pages the room holds beside what every slot takes, at most `wanted`; negative when not even the slots fit. */
static int64_t pages_in_room(const struct engine *e, struct cache_shape shape, int64_t room, int64_t wanted) {
    shape.n_pages = 0;
    struct cache_bytes fixed = cache_plan_bytes(&e->spec, &shape);
    int64_t left = room - cache_bytes_sum(&fixed);
    return left < 0 ? -1 : min_i64(wanted, left / cache_page_bytes(&e->spec, &shape));
}

static int fail_room(const struct engine *e, struct cache_shape shape, int64_t room, int64_t pages_each) {
    int64_t fits = pages_in_room(e, shape, room, INT64_MAX);
    shape.n_pages = pages_each;
    struct cache_bytes bytes = cache_plan_bytes(&e->spec, &shape);
    int64_t context = fits < 0 ? 0 : (fits * e->worker.rank.grid.cp + 1 + e->spec.window / KV_BLOCK) * KV_BLOCK;
    if (context < MIN_CONTEXT)
        FAIL(STATUS_MEMORY, "the cache does not fit: a sequence of %lld tokens takes %lld bytes on each rank, there are %lld",
             (long long)e->context, (long long)cache_bytes_sum(&bytes), (long long)room);
    FAIL(STATUS_MEMORY,
         "the cache does not fit: a sequence of %lld tokens takes %lld bytes on each rank, there are %lld; --context %lld would fit",
         (long long)e->context, (long long)cache_bytes_sum(&bytes), (long long)room, (long long)min_i64(context, e->context));
}

/* Pages of this rank's pool for max_batch sequences of the full context, or as many as fit, but at least one such sequence. */
static int plan_pages(struct engine *e, int64_t *n_pages) {
    struct cache_shape shape = base_shape(e);
    int64_t each = cache_pages_for(&e->spec, shape.cp_size, e->context), room = cache_room(e);
    *n_pages = pages_in_room(e, shape, room, each * e->max_batch);
    if (*n_pages < each && e->options.max_batch == 0) { /* fewer slots, if that makes one sequence fit */
        while (e->max_batch > 1 && *n_pages < each) {
            shape.max_seqs = e->max_batch /= 2;
            *n_pages = pages_in_room(e, shape, room, each * e->max_batch);
        }
    }
    return *n_pages < each ? fail_room(e, shape, room, each) : STATUS_OK;
}

static int choose_sizes(struct engine *e) {
    const struct model_config *c = e->worker.rank.config;
    e->context = e->options.context ? e->options.context : c->context;
    if (e->context > c->context && !e->options.random_weights) /* made-up weights are as good at any length */
        FAIL(STATUS_USAGE, "context %lld: the model was made for at most %d tokens", (long long)e->context, c->context);
    if (e->context < 1)
        FAIL(STATUS_USAGE, "context %lld: must be at least 1", (long long)e->context);
    e->max_batch = e->options.max_batch ? e->options.max_batch : DEFAULT_BATCH;
    if (e->max_batch < 1 || e->max_batch > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "max-batch %d: allowed are 1 to %d", e->max_batch, STEP_MAX_ROWS);
    return STATUS_OK;
}

static int64_t exact_from(const struct engine *e) { return e->spec.window + KV_BLOCK; }

static int alloc_worker(struct engine *e, enum merge_kind merge) {
    struct rank *r = &e->worker.rank;
    int max_rows = plan_bucket((int)max_i64(CHUNK_ROWS, e->max_batch));
    TRY(merge_init(&r->merge, merge, r->cp, r->backend, max_rows, rank_n_heads(r), r->config->head_dim));
    int64_t max_exact = e->context > exact_from(e) && !e->options.assume_prompts ? e->context : 0;
    e->worker.assumes = e->options.assume_prompts;
    return worker_init(&e->worker, e->context, e->max_batch, max_rows, max_exact, e->options.prefill_gather);
}

static int load_adapters(struct engine *e) {
    struct rank *r = &e->worker.rank;
    const struct weights_slices *s = &r->weights.slices;
    if (e->options.random_weights)
        return cache_random_adapters(&e->spec, s->kv_heads, r->config->head_dim, r->backend, r->stream, e->adapters);
    return e->calibration ? calibration_load(e->calibration, s->heads, s->kv_heads, r->backend, r->stream, e->adapters) : STATUS_OK;
}

/* Collective: all ranks take the fewest pages and slots that any has room for. */
static int alloc_cache(struct engine *e) {
    struct rank *r = &e->worker.rank;
    int64_t n_pages = 0;
    int status = plan_pages(e, &n_pages);
    TRY(comm_agree(e->world, "memory plan", status));
    int64_t least[2] = {n_pages, e->max_batch};
    TRY(comm_reduce_host(e->world, "memory plan", least, 2, COMM_MIN));
    e->max_batch = (int)least[1];
    struct cache_shape shape = base_shape(e);
    shape.n_pages = least[0];
    status = base_alloc(&e->adapters, (size_t)e->spec.n_layers, sizeof *e->adapters);
    if (status == STATUS_OK)
        status = load_adapters(e);
    if (status == STATUS_OK)
        status = cache_init(&r->cache, r->backend, &e->spec, &shape, e->adapters);
    if (status == STATUS_OK && e->options.assume_prompts)
        status = cache_random_fill(&r->cache, r->stream);
    return comm_agree(e->world, "cache", status);
}

/* Collective. */
static int count_memory(struct engine *e) {
    const struct rank *r = &e->worker.rank;
    const struct cache_bytes *b = &r->cache.bytes;
    const struct model_config *c = r->config;
    int64_t own = backend_total(r->backend);
    int64_t sums[7] = {(int64_t)backend_used(r->backend, MEMORY_WEIGHTS),
                       (int64_t)(backend_used(r->backend, MEMORY_WORKSPACE) + backend_used(r->backend, MEMORY_HOST)),
                       b->pages, b->window, b->sink, b->states, b->tables};
    TRY(comm_reduce_host(r->replica, "memory in use", sums, 7, COMM_SUM));
    TRY(comm_reduce_host(r->replica, "memory in use", &own, 1, COMM_MAX));
    struct engine_memory *m = &e->memory;
    *m = (struct engine_memory){.weights = sums[0], .workspace = sums[1], .pages = sums[2], .window = sums[3], .sink = sums[4],
                                .states = sums[5], .tables = sums[6], .largest_rank = own};
    m->cache = m->pages + m->window + m->sink + m->states + m->tables;
    m->elements_per_token = 2 * (int64_t)c->n_layers * c->n_kv_heads * c->head_dim;
    m->page_tokens = r->cache.shape.n_pages * r->grid.cp * KV_BLOCK;
    m->cache_tokens = m->page_tokens + (int64_t)e->max_batch * (e->spec.window + KV_BLOCK);
    return STATUS_OK;
}

/* ---- settings ------------------------------------------------------------------------------------------------------ */

static void put_layers(char *text, const struct cache_spec *spec, bool k) {
    int n = (int)strlen(text);
    for (int i = 0, from = 0; i < spec->n_layers; i++) {
        const struct cache_layer_spec *l = &spec->layer[i], *next = &spec->layer[i + 1 < spec->n_layers ? i + 1 : i];
        bool ends = i + 1 == spec->n_layers || (k ? l->k_bits != next->k_bits : l->v_bits != next->v_bits) ||
                    l->rotate_v != next->rotate_v || l->correction != next->correction;
        if (!ends || n >= SETTINGS_BYTES - 64)
            continue;
        n += snprintf(text + n, (size_t)(SETTINGS_BYTES - n), "%s%d-%d:%d%s%s", from ? "," : "", from, i, k ? l->k_bits : l->v_bits,
                      !k && l->rotate_v ? "h" : "", k && l->correction ? "c" : "");
        from = i + 1;
    }
}

static int make_settings(struct engine *e) {
    char fingerprint[65];
    char k[SETTINGS_BYTES] = "", v[SETTINGS_BYTES] = "";
    if (e->options.random_weights)
        snprintf(fingerprint, sizeof fingerprint, "random");
    else
        TRY(model_file_fingerprint(e->file, fingerprint));
    TRY(base_alloc(&e->settings, 3 * SETTINGS_BYTES, 1));
    put_layers(k, &e->spec, true);
    put_layers(v, &e->spec, false);
    snprintf(e->settings, 3 * SETTINGS_BYTES, "model %s weights %s cache %s %s k %s v %s window %d sink %d calibration %s", fingerprint,
             dtype_name(e->worker.rank.weights.dtype), e->spec.name, dtype_name(e->spec.window_type), k, v, e->spec.window,
             e->spec.sink, e->calibration ? calibration_hash(e->calibration) : "none");
    return STATUS_OK;
}

/* What the user should know; said by rank 0. */
static void say_choices(const struct engine *e) {
    const char *asked = e->options.cache ? e->options.cache : "kvlinc";
    if (comm_rank(e->world) != 0)
        return;
    if (strcmp(asked, e->spec.name) != 0)
        log_info("cache %s without trained adapters runs as %s: 2-bit cache, values rotated, no correction", asked, e->spec.name);
    int64_t trained = e->calibration ? calibration_trained_length(e->calibration) : 0;
    bool corrects = false;
    for (int i = 0; i < e->spec.n_layers; i++)
        corrects |= e->spec.layer[i].correction;
    if (corrects && trained > 0 && e->context > 2 * trained)
        log_warn("context %lld: the correction was trained on at most %lld tokens and does harm beyond twice that", (long long)e->context,
                 (long long)trained);
}

/* ---- opening and closing ------------------------------------------------------------------------------------------- */

static int init_scheduler(struct engine *e) {
    const struct rank *r = &e->worker.rank;
    struct scheduler_limits limits = {.max_seqs = e->max_batch, .chunk_rows = CHUNK_ROWS, .n_layers = e->spec.n_layers,
                                      .cp_size = r->grid.cp, .layout = r->cache.layout, .n_pages = r->cache.shape.n_pages,
                                      .exact_from = exact_from(e), .assume_prompts = e->options.assume_prompts,
                                      .random_offsets = e->options.test_offsets,
                                      .seed = e->options.test_seed};
    return scheduler_init(&e->scheduler, &limits);
}

static int open_stages(struct engine *e) {
    struct rank *r = &e->worker.rank;
    enum merge_kind merge = MERGE_GATHER;
    int status = read_files(e);
    if (status == STATUS_OK)
        status = make_spec(e);
    if (status == STATUS_OK)
        status = make_layout(e, &merge);
    if (status == STATUS_OK)
        status = choose_sizes(e);
    TRY(comm_agree(e->world, "reading the model", status));
    TRY(open_backend(e));
    TRY(split_ranks(e));
    TRY(comm_agree(e->world, "loading weights",
                   weights_load(e->file, &e->spec, &r->grid, r->o_whole, e->options.weights, r->backend, r->stream, &r->weights)));
    TRY(comm_agree(e->world, "allocating the workspace", alloc_worker(e, merge)));
    TRY(alloc_cache(e));
    TRY(count_memory(e));
    status = make_settings(e);
    if (status == STATUS_OK && comm_rank(r->replica) == 0)
        status = init_scheduler(e);
    TRY(comm_agree(e->world, "opening the engine", status));
    say_choices(e);
    return STATUS_OK;
}

int engine_open(struct comm *world, const struct engine_options *options, const struct place *place, struct engine **out) {
    struct engine *e;
    *out = NULL;
    TRY(comm_agree(world, "opening the engine", base_alloc(&e, 1, sizeof *e)));
    e->world = world;
    e->options = *options;
    e->place = *place;
    int status = open_stages(e);
    if (status < 0) {
        engine_close(e);
        return status;
    }
    *out = e;
    return STATUS_OK;
}

void engine_close(struct engine *e) {
    if (!e)
        return;
    struct rank *r = &e->worker.rank;
    free(e->current.scored);
    for (int i = 0; i < e->n_events; i++)
        free(e->events[(e->first_event + i) % e->events_size].scored);
    free(e->events);
    scheduler_deinit(&e->scheduler);
    if (r->backend) {
        if (r->stream)
            (void)stream_sync(r->stream); /* what failed there has been told; nothing may run while its memory goes */
        if (r->side)
            (void)stream_sync(r->side);
        worker_deinit(&e->worker);
        cache_deinit(&r->cache);
        merge_deinit(&r->merge);
        weights_free(&r->weights);
        calibration_unload(r->backend, e->adapters, e->spec.n_layers);
        stream_close(r->stream);
        stream_close(r->side);
    }
    comm_free(r->gather);
    comm_free(r->cp);
    comm_free(r->tp);
    comm_free(r->replica);
    backend_close(r->backend);
    free(e->adapters);
    free(e->settings);
    calibration_close(e->calibration);
    tokenizer_close(e->tokenizer);
    model_file_close(e->file);
    free(e);
}
