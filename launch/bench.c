/* The command: lists from options, then the parts in turn. Rank 0 leads, the others follow its plans; between engines all agree. */
#include "launch/bench.h"

#include <stdlib.h>
#include <string.h>

#include "launch/bench_predict.h"

/* ---- options ---------------------------------------------------------------------------------------------------------- */

/* The next word of a comma-separated list; false at its end. */
static bool next_word(const char **text, char *word, size_t bytes) {
    size_t length = strcspn(*text, ",");
    if (!**text)
        return false;
    snprintf(word, bytes, "%.*s", (int)length, *text);
    *text += length + ((*text)[length] == ',');
    return true;
}

static int parse_list(const char *option, const char *text, struct bench_list *list) {
    char word[32];
    for (list->n = 0; next_word(&text, word, sizeof word); list->n++) {
        if (list->n == BENCH_MAX_LIST)
            FAIL(STATUS_USAGE, "option --%s: more than %d entries", option, BENCH_MAX_LIST);
        int64_t *value = &list->value[list->n];
        if (options_parse_size(word, value) < 0 || *value < 1 || *value > INT32_MAX) {
            base_clear_error();
            FAIL(STATUS_USAGE, "option --%s: '%s' is not a number such as 512 or 4K", option, word);
        }
    }
    if (list->n == 0)
        FAIL(STATUS_USAGE, "option --%s: the list is empty", option);
    return STATUS_OK;
}

static bool is_without_model(const char *what) {
    return strcmp(what, "rates") == 0 || strcmp(what, "attention") == 0 || strcmp(what, "collective") == 0;
}

int bench_open_model(const struct bench *b, struct model_file **out) {
    const char *path = b->options->engine.model;
    return b->options->random_weights ? model_file_open_shape(path, out) : model_file_open(path, out);
}

static int heads_of_model(const struct bench *b, struct bench_heads *out) {
    static const char *const others[] = {"heads", "kv-heads", "head-dim"};
    struct model_file *file;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (options_given(b->options, others[i]))
            FAIL(STATUS_USAGE, "option --%s: --model says that already, give one of the two", others[i]);
    TRY(bench_open_model(b, &file));
    const struct model_config *c = model_file_config(file);
    *out = (struct bench_heads){c->n_heads, c->n_kv_heads, c->head_dim};
    model_file_close(file);
    return STATUS_OK;
}

static int find_heads(const struct bench *b, struct bench_heads *out) {
    const struct options *o = b->options;
    *out = (struct bench_heads){o->heads, o->kv_heads, o->head_dim};
    if (o->engine.model)
        TRY(heads_of_model(b, out));
    if (out->head_dim != 64 && out->head_dim != 128)
        FAIL(STATUS_USAGE, "option --%s: heads of %d, 64 and 128 can be", o->engine.model ? "model" : "head-dim", out->head_dim);
    return STATUS_OK;
}

static int parse_options(struct bench *b) {
    const struct options *o = b->options;
    const char *caches = o->caches;
    TRY(parse_list("contexts", o->contexts, &b->contexts));
    TRY(parse_list("prompts", o->prompts, &b->prompts));
    TRY(parse_list("batches", o->batches, &b->batches));
    while (b->n_caches < BENCH_MAX_LIST && next_word(&caches, b->caches[b->n_caches], BENCH_CACHE_BYTES))
        b->n_caches++;
    if (b->n_caches == 0)
        FAIL(STATUS_USAGE, "option --caches: the list is empty");
    if (strcmp(o->what, "attention") == 0 || strcmp(o->what, "collective") == 0)
        TRY(find_heads(b, &b->heads));
    if (!o->engine.model && !is_without_model(o->what))
        FAIL(STATUS_USAGE, "option --model is needed for all but kvlinc bench rates, attention and collective");
    return STATUS_OK;
}

bool bench_wants(const struct bench *b, const char *part) {
    return strcmp(b->options->what, "all") == 0 || strcmp(b->options->what, part) == 0;
}

/* ---- what the parts share ---------------------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

double bench_sum(const double *values, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += values[i];
    return sum;
}

/* A well-mixed hash of (seed, index): splitmix64's finalizer. */
static uint64_t hash(uint64_t seed, uint64_t index) {
    uint64_t z = (seed + 1) * 0x9e3779b97f4a7c15u + index * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int bench_submit(struct bench *b, int64_t n, int which, int max_tokens, enum engine_prefill prefill, int64_t *id) {
    struct engine *engine = b->run->engine;
    struct engine_request request;
    int32_t *prompt;
    TRY(base_alloc(&prompt, (size_t)n, sizeof *prompt));
    for (int64_t i = 0; i < n; i++)
        prompt[i] = (int32_t)(hash((uint64_t)which, (uint64_t)i) % (uint64_t)engine_model(engine)->vocab);
    engine_request_init(&request);
    request.prompt = prompt;
    request.n_prompt = (int)n;
    request.max_tokens = max_tokens;
    request.temperature = 0;
    request.ignore_eos = true;
    request.prefill = prefill;
    int status = engine_submit(engine, &request, id);
    free(prompt);
    return status;
}

/* ---- the parts --------------------------------------------------------------------------------------------------------- */

static int64_t largest(const struct bench_list *list) {
    int64_t most = 0;
    for (int i = 0; i < list->n; i++)
        most = max_i64(most, list->value[i]);
    return most;
}

/* Drops what is longer than the model allows. */
static void limit_list(struct bench *b, const char *what, struct bench_list *list, int64_t most) {
    int n = 0;
    for (int i = 0; i < list->n; i++) {
        if (list->value[i] <= most)
            list->value[n++] = list->value[i];
        else if (b->run->root)
            log_info("%s of %lld tokens left out: the model allows %lld here", what, (long long)list->value[i], (long long)most);
    }
    list->n = n;
}

/* Every rank reads the same configuration. Made-up weights know no longest context. */
static int limit_lists(struct bench *b) {
    struct model_file *file;
    TRY(bench_open_model(b, &file));
    int64_t context = b->options->random_weights ? INT32_MAX : model_file_config(file)->context;
    if (b->options->engine.context)
        context = min_i64(context, b->options->engine.context);
    model_file_close(file);
    limit_list(b, "a context", &b->contexts, context - bench_decode_room(b));
    limit_list(b, "a prompt", &b->prompts, context - 1);
    return STATUS_OK;
}

/* Collective. */
static int open_engine(struct bench *b, const char *cache) {
    struct engine_options options = b->options->engine;
    int64_t context = 1;
    if (b->decodes && b->contexts.n)
        context = largest(&b->contexts) + bench_decode_room(b);
    if (b->prefills)
        context = max_i64(context, largest(&b->prompts) + 1);
    options.cache = cache;
    options.context = context;
    options.max_batch = b->decodes ? (int)largest(&b->batches) : 1;
    options.profile = b->options->profile;
    options.random_weights = b->options->random_weights;
    options.assume_prompts = options.random_weights && b->decodes;
    return run_open_engine(b->run, &options);
}

/* Says that not one sequence of the longest context fits, in the engine's words, and leaves that context out. */
static void drop_longest(struct bench *b, const char *cache) {
    char note[256];
    struct bench_list *list = &b->contexts;
    int64_t longest = largest(list);
    int n = 0;
    snprintf(note, sizeof note, "left out: %s", base_error());
    base_clear_error();
    if (b->run->root)
        bench_add(b, (struct bench_row){.section = "decode", .item = "step", .cache = cache, .batch = 1, .tokens = longest, .note = note});
    for (int i = 0; i < list->n; i++)
        if (list->value[i] != longest)
            list->value[n++] = list->value[i];
    list->n = n;
}

/* Collective. With random weights contexts that do not fit are left out; without an engine if none is left. */
static int open_fitting(struct bench *b, const char *cache) {
    int status = open_engine(b, cache);
    while (status == STATUS_MEMORY && b->options->random_weights && b->decodes && b->contexts.n > 0) {
        drop_longest(b, cache);
        status = b->contexts.n > 0 ? open_engine(b, cache) : STATUS_OK;
    }
    return status;
}

static int lead(struct bench *b) {
    int status = STATUS_OK;
    if (b->decodes)
        status = bench_decode(b);
    if (status == STATUS_OK && b->prefills)
        status = bench_prefill(b);
    if (b->run->broken)
        return status;
    int stopped = run_stop(b->run);
    return status < 0 ? status : stopped;
}

/* Collective. The engine stays open after a failure: the end of the job closes it. */
static int run_engine(struct bench *b, const char *cache, bool decodes, bool prefills) {
    struct run *run = b->run;
    b->decodes = decodes;
    b->prefills = prefills;
    bench_memory_reset();
    TRY(open_fitting(b, cache));
    if (!run->engine)
        return STATUS_OK;
    int status = run->root ? lead(b) : run_follow(run);
    if (run->broken)
        return status;
    TRY(comm_agree(run->world, "bench", status < 0 ? status : b->table.status));
    TRY(bench_memory(b));
    engine_close(run->engine);
    run->engine = NULL;
    return STATUS_OK;
}

/* Collective. An engine that takes prompts as cached has no memory to read one: with random weights each part has an engine of its own. */
static int run_cache(struct bench *b, const char *cache) {
    struct bench_list contexts = b->contexts;
    bool decodes = bench_wants(b, "decode"), prefills = bench_wants(b, "prefill");
    bool apart = b->options->random_weights && decodes && prefills;
    TRY(run_engine(b, cache, decodes, prefills && !apart));
    b->contexts = contexts;
    return apart ? run_engine(b, cache, false, true) : STATUS_OK;
}

/* Attention by itself is fast enough on a GPU for what people have long caches for. */
static int set_attention_defaults(struct bench *b) {
    const char *caches = "fp16,kivi,k4v4,kvlinc";
    if (!options_given(b->options, "caches"))
        for (b->n_caches = 0; next_word(&caches, b->caches[b->n_caches], BENCH_CACHE_BYTES);)
            b->n_caches++;
    if (bench_on_gpu(b) && !options_given(b->options, "contexts"))
        TRY(parse_list("contexts", "1K,4K,32K,128K,512K,1M", &b->contexts));
    if (bench_on_gpu(b) && !options_given(b->options, "prompts"))
        TRY(parse_list("prompts", "4K,32K,128K", &b->prompts));
    return STATUS_OK;
}

/* Collective. The parts without an engine, on a device of their own. */
static int run_device(struct bench *b) {
    TRY(bench_device_open(b));
    TRY(bench_rates(b));
    if (strcmp(b->options->what, "attention") == 0) {
        TRY(set_attention_defaults(b));
        TRY(bench_attention(b));
    }
    if (strcmp(b->options->what, "collective") == 0)
        TRY(bench_collective(b));
    return is_without_model(b->options->what) ? STATUS_OK : bench_predict_measure(b);
}

static int run_parts(struct bench *b) {
    if (b->run->root)
        bench_machine(b);
    if (!is_without_model(b->options->what))
        TRY(comm_agree(b->run->world, "reading the model", limit_lists(b)));
    int status = run_device(b);
    bench_device_close(b);
    TRY(status);
    for (b->cache = 0; b->cache < b->n_caches && !is_without_model(b->options->what); b->cache++)
        TRY(run_cache(b, b->caches[b->cache]));
    return STATUS_OK;
}

int bench_main(struct run *run) {
    const struct options *o = run->options;
    struct bench b = {.run = run, .options = o, .n_threads = o->engine.threads ? o->engine.threads : run->place.n_cores};
    int status = base_alloc(&b.prediction, 1, sizeof *b.prediction);
    if (status == STATUS_OK)
        status = parse_options(&b);
    if (status == STATUS_OK && run->root)
        status = bench_table_open(o->csv, &b.table);
    status = comm_agree(run->world, "bench", status);
    if (status == STATUS_OK)
        status = run_parts(&b);
    int closed = bench_table_close(&b.table);
    free(b.prediction);
    return status < 0 ? status : closed;
}
