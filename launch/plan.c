/* Every layout of the GPUs given, its bytes and its time by engine/cost.h, and the fastest that fits. Like inspect it makes one tree of
 * facts and prints it as JSON or as text. */
#include "launch/plan.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cost.h"
#include "launch/plan_cluster.h"
#include "launch/print_json.h"
#include "launch/units.h"

enum {
    MAX_LAYOUTS = 64,    /* divisors of a number of KV heads */
    MOST_GPUS = 4096,    /* up to which a number of GPUs that would do is looked for */
    WORDS_BYTES = 512,
    PATH_BYTES = 4096,
};

struct layout { /* one tp x cp with the merge that is fastest on it */
    struct cost_job job;
    struct cost_memory memory;
    struct cost_step step;
    struct cost_prefill prefill;
    int64_t left;
    bool fits;
};

struct plan {
    const struct options *options;
    char path[PATH_BYTES]; /* of the rates */
    struct cost_rates rates;
    struct model_config config;
    struct cache_spec spec;
    struct cost_job job;   /* what all layouts share */
    int gpus;
    int n;
    struct layout layouts[MAX_LAYOUTS];
    const struct layout *best, *next; /* of those that fit; NULL: none */
};

/* ---- what was asked -------------------------------------------------------------------------------------------------- */

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static int read_model(const char *path, struct model_config *out) {
    struct model_file *file;
    if (!path)
        FAIL(STATUS_USAGE, "option --model is needed: a model, or a shape of configs/models");
    TRY(ends_with(path, ".conf") ? model_file_open_shape(path, &file) : model_file_open(path, &file));
    *out = *model_file_config(file);
    model_file_close(file);
    return STATUS_OK;
}

static int read_rates(struct plan *p) {
    const struct options *o = p->options;
    if (!o->rates == !o->cluster)
        FAIL(STATUS_USAGE, "one of --rates FILE and --cluster NAME is needed");
    if (o->cluster)
        TRY(plan_cluster_find(o->cluster, p->path, sizeof p->path));
    else
        snprintf(p->path, sizeof p->path, "%s", o->rates);
    return cost_rates_read(p->path, &p->rates);
}

static int make_spec(struct plan *p) {
    const struct engine_options *e = &p->options->engine;
    struct cache_request request = {.preset = e->cache, .k_bits = e->k_bits, .v_bits = e->v_bits, .correction = e->correction,
                                    .window = e->window, .sink = e->sink, .has_adapters = p->options->features > 0};
    TRY(cache_spec_make(&request, p->config.n_layers, &p->spec));
    if (p->spec.window_type == DTYPE_F32)
        FAIL(STATUS_USAGE, "cache %s is for the CPU, a plan is for GPUs", p->spec.name);
    return STATUS_OK;
}

static int make_job(struct plan *p) {
    const struct engine_options *e = &p->options->engine;
    int given = e->tp && e->cp ? (int)min_i64((int64_t)e->tp * e->cp, INT32_MAX) : p->rates.gpus;
    struct grid grid;
    p->gpus = p->options->gpus ? p->options->gpus : given;
    if (p->gpus > p->rates.gpus)
        FAIL(STATUS_USAGE, "%d GPUs: %s is of a machine with %d", p->gpus, p->path, p->rates.gpus);
    if (e->tp || e->cp)
        TRY(grid_make(1, e->tp, e->cp, p->gpus, 0, p->config.n_kv_heads, &grid));
    p->job = (struct cost_job){.config = &p->config, .spec = &p->spec, .features = p->options->features,
                               .context = e->context ? e->context : p->config.context, .batch = e->max_batch ? e->max_batch : 1,
                               .prefill_gather = e->prefill_gather, .gpu = true};
    if (p->job.batch > STEP_MAX_ROWS)
        FAIL(STATUS_USAGE, "max-batch %d: allowed are 1 to %d", p->job.batch, STEP_MAX_ROWS);
    return STATUS_OK;
}

/* ---- layouts --------------------------------------------------------------------------------------------------------- */

static bool merge_allowed(const struct plan *p, int cp, enum merge_kind merge) {
    const char *name = p->options->engine.merge;
    return cp == 1 ? merge == MERGE_GATHER : strcmp(name, "auto") == 0 || strcmp(name, merge_name(merge)) == 0;
}

static struct layout judge(const struct plan *p, int tp, int cp, enum merge_kind merge) {
    struct layout l = {.job = p->job};
    l.job.tp = tp;
    l.job.cp = cp;
    l.job.merge = merge;
    cost_memory(&l.job, 0, 0, &l.memory);
    l.fits = cost_fits(&l.job, &p->rates, &l.left);
    cost_decode(&l.job, &p->rates, p->job.context, &l.step);
    cost_prefill(&l.job, &p->rates, p->job.context, &l.prefill);
    return l;
}

static bool better(const struct layout *a, const struct layout *b) {
    if (a->fits != b->fits)
        return a->fits;
    if (!a->fits)
        return a->left > b->left;
    return a->step.total < b->step.total || (a->step.total == b->step.total && a->prefill.total < b->prefill.total);
}

static void find_layouts(struct plan *p, int gpus) {
    const struct engine_options *e = &p->options->engine;
    p->gpus = gpus;
    p->n = 0;
    p->best = p->next = NULL;
    for (int tp = 1; tp <= p->gpus && tp <= p->config.n_kv_heads && p->n < MAX_LAYOUTS; tp++) {
        int cp = p->gpus / tp;
        if (p->gpus % tp || p->config.n_kv_heads % tp || (e->tp && e->tp != tp) || (e->cp && e->cp != cp))
            continue;
        struct layout *best = &p->layouts[p->n++];
        bool none = true;
        for (enum merge_kind m = MERGE_ALLREDUCE; m <= MERGE_GATHER; m++) {
            if (!merge_allowed(p, cp, m))
                continue;
            struct layout l = judge(p, tp, cp, m);
            if (none || better(&l, best))
                *best = l;
            none = false;
        }
    }
    for (int i = 0; i < p->n; i++) {
        const struct layout *l = &p->layouts[i];
        if (l->fits && (!p->best || better(l, p->best))) {
            p->next = p->best;
            p->best = l;
        } else if (l->fits && (!p->next || better(l, p->next))) {
            p->next = l;
        }
    }
}

/* Whether some layout of so many GPUs holds it; any merge. */
static bool would_do(const struct plan *p, int gpus, struct cost_job *job) {
    *job = p->job;
    for (int tp = 1; tp <= gpus && tp <= p->config.n_kv_heads; tp++)
        for (enum merge_kind m = MERGE_ALLREDUCE; m <= MERGE_GATHER && gpus % tp == 0 && p->config.n_kv_heads % tp == 0; m++) {
            job->tp = tp;
            job->cp = gpus / tp;
            job->merge = m;
            if (merge_allowed(p, job->cp, m) && cost_fits(job, &p->rates, NULL))
                return true;
        }
    return false;
}

/* Beyond one node whole nodes only. 0: none up to MOST_GPUS. */
static int smallest_gpus(const struct plan *p, struct cost_job *job) {
    int node = p->rates.gpus_per_node;
    for (int gpus = 1; gpus <= MOST_GPUS; gpus += gpus < node ? 1 : node)
        if (would_do(p, gpus, job))
            return gpus;
    return 0;
}

/* ---- words ----------------------------------------------------------------------------------------------------------- */

static const struct part {
    const char *name, *words;
    size_t offset;
} parts[] = {
    {"weights_ms", "reading weights", offsetof(struct cost_step, weights)},
    {"attention_ms", "reading the cache", offsetof(struct cost_step, attention)},
    {"merge_ms", "merging attention", offsetof(struct cost_step, merge)},
    {"sums_ms", "sums of dense layers", offsetof(struct cost_step, sums)},
    {"ends_ms", "embedding and sampling", offsetof(struct cost_step, ends)},
    {"launches_ms", "launches", offsetof(struct cost_step, launches)},
};
enum { N_PARTS = sizeof parts / sizeof *parts };

static double part_of(const struct cost_step *step, const struct part *part) {
    return *(const double *)((const char *)step + part->offset);
}

static void explain(const struct plan *p, char text[WORDS_BYTES]) {
    const struct layout *a = p->best, *b = p->next;
    const struct part *most = &parts[0];
    if (!b) {
        snprintf(text, WORDS_BYTES, "tp %d x cp %d is the only layout %s", a->job.tp, a->job.cp, p->n > 1 ? "that fits" : "there is");
        return;
    }
    for (int i = 1; i < N_PARTS; i++)
        if (part_of(&b->step, &parts[i]) - part_of(&a->step, &parts[i]) > part_of(&b->step, most) - part_of(&a->step, most))
            most = &parts[i];
    snprintf(text, WORDS_BYTES,
             "tp %d x cp %d takes %.3g ms for a token, the next best, tp %d x cp %d, %.3g ms, mainly for %s (%.3g ms against %.3g)",
             a->job.tp, a->job.cp, 1e3 * a->step.total, b->job.tp, b->job.cp, 1e3 * b->step.total, most->words,
             1e3 * part_of(&b->step, most), 1e3 * part_of(&a->step, most));
}

/* ---- facts ----------------------------------------------------------------------------------------------------------- */

/* Takes `value` over; an allocation that failed anywhere shows up here. */
static int put(json_t *object, const char *name, json_t *value) {
    if (json_object_set_new(object, name, value) != 0)
        FAIL(STATUS_MEMORY, "out of memory for '%s'", name);
    return STATUS_OK;
}

static const char *merge_word(const struct layout *l) { return l->job.cp > 1 ? merge_name(l->job.merge) : "none"; }

static json_t *new_row(json_t *array, const struct layout *l) {
    json_t *row = json_pack("{s:i, s:i, s:s}", "tp", l->job.tp, "cp", l->job.cp, "merge", merge_word(l));
    return json_array_append_new(array, row) == 0 ? row : NULL;
}

/* Four significant digits. */
static json_t *rounded(double value) {
    double unit = value > 0 ? pow(10, floor(log10(value)) - 3) : 1;
    return json_real(round(value / unit) * unit);
}

static int put_memory(const struct layout *l, json_t *rows) {
    const struct cost_memory *m = &l->memory;
    json_t *row = new_row(rows, l);
    TRY(put(row, "fits", json_boolean(l->fits)));
    TRY(put(row, "weights_bytes", json_integer(m->weights)));
    TRY(put(row, "workspace_bytes", json_integer(m->workspace)));
    TRY(put(row, "prefill_bytes", json_integer(m->prefill)));
    TRY(put(row, "pages_bytes", json_integer(m->cache.pages)));
    TRY(put(row, "window_bytes", json_integer(m->cache.window + m->cache.sink)));
    TRY(put(row, "states_bytes", json_integer(m->cache.states)));
    TRY(put(row, "tables_bytes", json_integer(m->cache.tables)));
    TRY(put(row, "total_bytes", json_integer(m->total)));
    TRY(put(row, "free_bytes", l->fits ? json_integer(l->left) : json_null()));
    return put(row, "lacking_bytes", l->fits ? json_null() : json_integer(-l->left));
}

static int put_totals(const struct layout *l, json_t *row) {
    TRY(put(row, "token_ms", rounded(1e3 * l->step.total)));
    TRY(put(row, "tokens_per_s", rounded(l->job.batch / l->step.total)));
    return put(row, "prompt_s", rounded(l->prefill.total));
}

static int put_time(const struct layout *l, json_t *rows) {
    json_t *row = new_row(rows, l);
    for (int i = 0; i < N_PARTS; i++)
        TRY(put(row, parts[i].name, rounded(1e3 * part_of(&l->step, &parts[i]))));
    return put_totals(l, row);
}

static int put_question(const struct plan *p, json_t *facts) {
    const struct engine_options *e = &p->options->engine;
    TRY(put(facts, "machine", json_string(p->rates.about)));
    TRY(put(facts, "rates", json_string(p->path)));
    TRY(put(facts, "measured_here", json_false()));
    TRY(put(facts, "note",
            json_sprintf("predicted from the rates in %s, for a machine that need not be there; nothing was measured in this run",
                         p->path)));
    TRY(put(facts, "assumed", p->rates.assumed[0] ? json_string(p->rates.assumed) : json_null()));
    TRY(put(facts, "model", json_string(e->model)));
    TRY(put(facts, "cache", json_string(p->spec.name)));
    TRY(put(facts, "context", json_integer(p->job.context)));
    if (p->job.context > p->config.context)
        TRY(put(facts, "warning", json_sprintf("the model was made for %d tokens: generate and batch refuse more", p->config.context)));
    TRY(put(facts, "batch", json_integer(p->job.batch)));
    return put(facts, "gpus", json_integer(p->gpus));
}

/* The best layout of 1, 2, 4, ... GPUs that hold it, so that one sees what more of them bring. */
static int put_sizes(const struct plan *p, json_t *facts) {
    struct plan *other = NULL;
    json_t *rows = json_array();
    TRY(put(facts, "by_gpus", rows));
    TRY(base_alloc(&other, 1, sizeof *other));
    *other = *p;
    int status = STATUS_OK;
    for (int gpus = 1; gpus <= p->gpus && status == STATUS_OK; gpus = gpus < p->gpus && 2 * gpus > p->gpus ? p->gpus : 2 * gpus) {
        find_layouts(other, gpus);
        if (!other->best)
            continue;
        const struct layout *l = other->best;
        json_t *row = json_pack("{s:i, s:i, s:i, s:s}", "gpus", gpus, "tp", l->job.tp, "cp", l->job.cp, "merge", merge_word(l));
        status = json_array_append_new(rows, row) == 0 ? STATUS_OK : STATUS_MEMORY;
        if (status == STATUS_OK)
            status = put_totals(l, row);
    }
    free(other);
    return status;
}

static int put_answer(const struct plan *p, json_t *facts) {
    char words[WORDS_BYTES];
    json_t *memory = json_array(), *time = json_array();
    TRY(put(facts, "memory_of_each_gpu", memory));
    for (int i = 0; i < p->n; i++)
        TRY(put_memory(&p->layouts[i], memory));
    TRY(put(facts, "fits", json_boolean(p->best != NULL)));
    if (!p->best) {
        json_decref(time);
        return STATUS_OK;
    }
    TRY(put(facts, "time", time));
    for (int i = 0; i < p->n; i++)
        if (p->layouts[i].fits)
            TRY(put_time(&p->layouts[i], time));
    if (p->gpus > 1 && !p->options->engine.tp && !p->options->engine.cp)
        TRY(put_sizes(p, facts));
    const struct cost_job *job = &p->best->job;
    explain(p, words);
    TRY(put(facts, "tp", json_integer(job->tp)));
    TRY(put(facts, "cp", json_integer(job->cp)));
    TRY(put(facts, "merge", json_string(job->cp > 1 ? merge_name(job->merge) : "auto")));
    TRY(put(facts, "token_ms", rounded(1e3 * p->best->step.total)));
    TRY(put(facts, "prompt_s", rounded(p->best->prefill.total)));
    return put(facts, "why", json_string(words));
}

/* ---- the command ----------------------------------------------------------------------------------------------------- */

static int fail_fit(const struct plan *p, int gpus, const struct cost_job *job) {
    const struct layout *least = &p->layouts[0];
    char units[UNITS_TEXT];
    for (int i = 1; i < p->n; i++)
        if (p->layouts[i].left > least->left)
            least = &p->layouts[i];
    units_bytes(-least->left, units);
    if (gpus == 0)
        FAIL(STATUS_MEMORY, "does not fit: tp %d x cp %d lacks %s on each GPU; up to %d GPUs none would do", least->job.tp, least->job.cp,
             units, MOST_GPUS);
    FAIL(STATUS_MEMORY,
         "does not fit: tp %d x cp %d lacks %s on each GPU; the smallest number of GPUs that would do is %d, as tp %d x cp %d",
         least->job.tp, least->job.cp, units, gpus, job->tp, job->cp);
}

static int answer(const struct plan *p, json_t *facts) {
    struct cost_job job;
    int gpus = 0;
    TRY(put_question(p, facts));
    TRY(put_answer(p, facts));
    if (!p->best) {
        gpus = smallest_gpus(p, &job);
        TRY(put(facts, "smallest_gpus", gpus ? json_integer(gpus) : json_null()));
    }
    TRY(print_json_facts(p->options->json, facts));
    return p->best ? STATUS_OK : fail_fit(p, gpus, &job);
}

int plan_main(const struct options *options) {
    struct plan *p = NULL;
    int status = STATUS_OK;
    json_t *facts = json_object();
    TRY_GOTO(base_alloc(&p, 1, sizeof *p));
    p->options = options;
    TRY_GOTO(read_model(options->engine.model, &p->config));
    TRY_GOTO(read_rates(p));
    TRY_GOTO(make_spec(p));
    TRY_GOTO(make_job(p));
    find_layouts(p, p->gpus);
    TRY_GOTO(answer(p, facts));
fail:
    json_decref(facts);
    free(p);
    return status;
}
