/* One rank of a replica carrying out plans: the same on every rank, rank 0 included. Knows no requests and no scheduling. */
#pragma once

#include "engine/forward.h"
#include "engine/prefill.h"

enum { WORKER_FLIGHTS = 2 }; /* steps whose host buffers may be in use at once */

struct worker {
    struct rank rank;
    struct forward forward;
    struct prefill prefill;
    bool has_prefill;
    struct step_input *input[WORKER_FLIGHTS];      /* MEMORY_HOST */
    struct sample_result *results[WORKER_FLIGHTS]; /* MEMORY_HOST; filled on every rank, read by rank 0 */
    struct event *done[WORKER_FLIGHTS];
    int flight;                                    /* index of the next one */
    struct seq_params *host_params, *device_params;
    int32_t *host_prompt, *device_prompt;          /* [context]: the sequence admitted last */
    int32_t prompt_owner_offset;
    bool assumes;                                  /* engine_options.assume_prompts */
};

/* Allocates host buffers and the decode path's, and exact prefill's for prompts of up to max_exact tokens (0: none). `rank` is complete
 * but for its cache. */
int worker_init(struct worker *worker, int64_t context, int max_seqs, int max_rows, int64_t max_exact, int gather_from);
void worker_deinit(struct worker *worker);

/* Carries out `plan` (not PLAN_STOP). For PLAN_ADMIT host_params and host_prompt hold the payload on every rank. *flight: which
 * buffers hold the results, -1 when there are none. Collective, in the plan's order. */
int worker_execute(struct worker *worker, const struct step_plan *plan, int *flight);

/* Waits for the results of a flight. */
int worker_wait(struct worker *worker, int flight, const struct sample_result **results);
