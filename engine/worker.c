/* Carrying out plans. Host buffers are used in turn, so that the next step can be planned while one runs. */
#include "engine/worker.h"

#include <string.h>

static int host(struct worker *w, int64_t n, size_t size, void *pointer) {
    return backend_alloc(w->rank.backend, MEMORY_HOST, (size_t)n * size, pointer);
}

static int init_buffers(struct worker *w, int64_t context, int max_rows) {
    struct backend *b = w->rank.backend;
    for (int i = 0; i < WORKER_FLIGHTS; i++) {
        TRY(host(w, 1, sizeof *w->input[i], &w->input[i]));
        TRY(host(w, max_rows, sizeof *w->results[i], &w->results[i]));
        TRY(event_open(b, &w->done[i]));
    }
    TRY(host(w, 1, sizeof *w->host_params, &w->host_params));
    TRY(host(w, context, sizeof *w->host_prompt, &w->host_prompt));
    TRY(backend_alloc(b, MEMORY_WORKSPACE, sizeof *w->device_params, &w->device_params));
    return backend_alloc(b, MEMORY_WORKSPACE, (size_t)context * sizeof *w->device_prompt, &w->device_prompt);
}

int worker_init(struct worker *w, int64_t context, int max_seqs, int max_rows, int64_t max_exact, int gather_from) {
    int status = STATUS_OK;
    TRY_GOTO(init_buffers(w, context, max_rows));
    TRY_GOTO(forward_init(&w->forward, &w->rank, max_rows, plan_bucket(max_seqs)));
    w->has_prefill = max_exact > 0;
    if (w->has_prefill)
        TRY_GOTO(prefill_init(&w->prefill, &w->rank, max_exact, gather_from));
    return STATUS_OK;
fail:
    worker_deinit(w);
    return status;
}

void worker_deinit(struct worker *w) {
    struct backend *b = w->rank.backend;
    forward_deinit(&w->forward);
    prefill_deinit(&w->prefill);
    for (int i = 0; i < WORKER_FLIGHTS; i++) {
        backend_free(b, w->input[i]);
        backend_free(b, w->results[i]);
        event_close(w->done[i]);
        w->input[i] = NULL;
        w->results[i] = NULL;
        w->done[i] = NULL;
    }
    void *rest[] = {w->host_params, w->device_params, w->host_prompt, w->device_prompt};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        backend_free(b, rest[i]);
    w->host_params = w->device_params = NULL;
    w->host_prompt = w->device_prompt = NULL;
}

/* The slot gets its pages with whatever they hold; S and P keep what they hold. The prompt's host buffer, which nobody else reads, carries
 * the page table's row. */
static int assume_prompt(struct worker *w, const struct step_plan *plan) {
    struct stream *stream = w->rank.stream;
    TRY(stream_sync(stream));
    TRY(cache_take_prompt(&w->rank.cache, stream, plan->seq, plan->n_prompt - 1, w->prompt_owner_offset, w->host_prompt));
    return stream_sync(stream);
}

static int admit(struct worker *w, const struct step_plan *plan) {
    struct stream *stream = w->rank.stream;
    size_t prompt_bytes = (size_t)plan->n_prompt * sizeof(int32_t);
    w->prompt_owner_offset = w->host_params->owner_offset;
    TRY(stream_copy_in(stream, w->device_params, w->host_params, sizeof *w->host_params));
    TRY(stream_copy_in(stream, w->device_prompt, w->host_prompt, prompt_bytes));
    TRY(op_seq_begin(stream, &(struct seq_begin_args){plan->seq, w->device_params, w->rank.cache.params, w->device_prompt,
                                                      plan->n_prompt, w->rank.cache.counts}));
    if (w->assumes)
        return assume_prompt(w, plan);
    TRY(cache_reset_states(&w->rank.cache, stream, plan->seq));
    return stream_sync(stream); /* the payload's host buffers are free again */
}

/* This rank's pages for the blocks that it owns, into its own copy of the input. */
static int take_pages(struct worker *w, const struct step_plan *plan, struct step_input *input) {
    for (int i = 0; i < input->n_flush; i++) {
        struct step_flush *f = &input->flush[i];
        f->page = f->local = -1;
        if (cache_owns(&w->rank.cache.layout, f->block, plan->flush_offset[i]))
            TRY(cache_take_page(&w->rank.cache, f->seq, f->block, &f->page, &f->local));
    }
    return STATUS_OK;
}

static int run(struct worker *w, const struct step_plan *plan, int *flight) {
    int turn = w->flight;
    struct step_input *input = w->input[turn];
    TRY(event_sync(w->done[turn])); /* its last use is over */
    *input = plan->input;
    TRY(take_pages(w, plan, input));
    if (plan->kind == PLAN_STEP) {
        TRY(forward_step(&w->forward, plan, input));
    } else {
        TRY(prefill_rows(&w->prefill, plan->first, input->n_rows, w->forward.x));
        TRY(forward_head(&w->forward, plan, input));
    }
    if (input->n_logits)
        TRY(stream_copy_out(w->rank.stream, w->results[turn], w->forward.results, (size_t)input->n_logits * sizeof *w->results[turn]));
    TRY(event_record(w->done[turn], w->rank.stream));
    w->flight = (turn + 1) % WORKER_FLIGHTS;
    *flight = input->n_logits ? turn : -1;
    return STATUS_OK;
}

int worker_execute(struct worker *w, const struct step_plan *plan, int *flight) {
    *flight = -1;
    for (int i = 0; i < plan->n_release; i++)
        cache_release(&w->rank.cache, plan->release[i]);
    switch (plan->kind) {
    case PLAN_ADMIT:
        return admit(w, plan);
    case PLAN_PREFILL:
        return prefill_layer(&w->prefill, plan->seq, w->prompt_owner_offset, w->host_prompt, plan->n_prompt, plan->layer);
    default:
        return run(w, plan, flight);
    }
}

int worker_wait(struct worker *w, int flight, const struct sample_result **results) {
    TRY(event_sync(w->done[flight]));
    *results = w->results[flight];
    return STATUS_OK;
}
