/* The engine's public face: a model on sharded caches, over the ranks of one communicator.
 *
 * Every rank opens the engine (engine_open, collective). Then rank 0 submits requests and calls engine_step until it is done;
 * the other ranks call engine_follow, which returns when rank 0 calls engine_stop. A request is one sequence: token ids in, events out.
 * Text, stop strings and files are the caller's (text_stream.h, launch/). A request that cannot be served fails at engine_submit with a
 * status and a text for that client; anything else that fails is the whole job's failure, agreed on by all ranks. */
#pragma once

#include "dist/comm.h"
#include "dist/grid.h"
#include "dist/place.h"
#include "engine/chat.h"
#include "engine/model_file.h"
#include "engine/tokenizer.h"

struct engine;

enum engine_prefill { ENGINE_PREFILL_EXACT, ENGINE_PREFILL_CACHED };

/* Texts are as the user gave them (INTERFACE.md); NULL or 0 (-1 where 0 means something) is the default. Texts must outlive engine_open. */
struct engine_options {
    const char *model;
    const char *device;      /* "auto", "cpu", "cuda"; "cpu-async" for tests */
    const char *comm;        /* what comm_start was asked for: "auto" takes GPUs only if it may use NCCL */
    int dp, tp, cp;
    const char *merge;       /* "auto", "allreduce", "fused", "gather" */
    const char *cache;       /* preset */
    const char *k_bits, *v_bits; /* "2", or by layer "0-3:4,4-27:2" */
    int window, sink;        /* tokens; -1: preset's */
    const char *calibration; /* file */
    const char *correction;  /* layers that use the calibration's adapters: "auto", "off", "0-9" */
    const char *weights;     /* "auto", "f32" */
    int64_t context;         /* most tokens of a sequence; 0: the model's */
    int64_t cache_memory;    /* bytes on each rank; 0: what fits */
    int max_batch;           /* 0: by memory */
    int threads;             /* of one rank; 0: the cores it is bound to */
    int prefill_gather;      /* tokens a rank from which exact prefill gathers weights instead of activations; 0: default */
    bool random_weights;     /* measurements: `model` is a shape file (configs/models); weights and adapters are made up, there is no tokenizer */
    bool assume_prompts;     /* measurements: all of a prompt but its last token counts as cached, in pages of random content */
    bool profile;            /* keep times by operation: engine_profile */
    uint64_t test_seed;      /* cpu-async's delays; offsets of owners when `test_offsets` */
    bool test_offsets;       /* tests: the first owner of each sequence also depends on test_seed */
};

/* Collective. Loads this rank's slice, plans memory, allocates everything. `place`: from place_bind. */
int engine_open(struct comm *world, const struct engine_options *options, const struct place *place, struct engine **out);
/* Collective unless the job has failed. */
void engine_close(struct engine *engine);

const struct model_config *engine_model(const struct engine *engine);
const char *engine_model_path(const struct engine *engine);
/* NULL with random weights. */
const struct tokenizer *engine_tokenizer(const struct engine *engine);
/* NULL with the error recorded if the model has no chat template or one that we do not know (STATUS_INPUT). */
const struct chat_template *engine_chat(const struct engine *engine);
const struct grid *engine_grid(const struct engine *engine);
int64_t engine_context(const struct engine *engine);   /* most tokens of a sequence */
int engine_max_batch(const struct engine *engine);
const char *engine_cache_name(const struct engine *engine); /* what runs: "kvlinc without adapters runs as hadv" names hadv */
const char *engine_device(const struct engine *engine);     /* of this rank, in words: "cpu", "cuda 1: NVIDIA H100 80GB HBM3, 0000:1b:00.0" */
const char *engine_merge_name(const struct engine *engine);
/* One line of text that names every setting that changes results (model fingerprint, cache, bits, window, sink, calibration, weights):
 * equal for runs whose results may be mixed in one file. */
const char *engine_settings(const struct engine *engine);

/* Bytes over all ranks of the replica, exactly what is allocated. */
struct engine_memory {
    int64_t weights, workspace;
    int64_t pages, window, sink, states, tables; /* the cache's parts */
    int64_t cache;                               /* their sum */
    int64_t page_tokens;                         /* tokens that the pages hold */
    int64_t cache_tokens;                        /* the same and those of the 16-bit blocks that can be alive at once */
    int64_t elements_per_token;                  /* 2 n_layers n_kv_heads head_dim */
    int64_t largest_rank;                        /* bytes of the rank that holds most */
};
void engine_memory(const struct engine *engine, struct engine_memory *out);
/* Bytes that one sequence of n tokens takes in this cache, window, sink, states and tables included, over all ranks. */
int64_t engine_sequence_bytes(const struct engine *engine, int64_t n_tokens);
/* Sequences of n tokens that can decode at once: slots and pages. */
int engine_fits(const struct engine *engine, int64_t n_tokens);
/* Bytes that one decode step has to read, over all ranks: `weights` once for the step, `cache` for each sequence whose newest token is its
 * n-th. Of an embedding that is not the LM head too only a row is read. */
void engine_read_bytes(const struct engine *engine, int64_t n_tokens, int64_t *weights, int64_t *cache);
/* The job that engine/cost.h reckons with: this engine's model, cache and layout, decoding `batch` sequences. */
struct cost_job;
void engine_cost_job(const struct engine *engine, int batch, struct cost_job *out);
/* Time that this rank's device spent so far, with options.profile: see backend_profile. */
void engine_profile(const struct engine *engine, struct backend_times *times, struct backend_time *launches, int n);

struct engine_request {
    const int32_t *prompt; /* copied; n_prompt >= 1 */
    int n_prompt;
    int max_tokens;        /* >= 0; 0: only score the prompt */
    float temperature, top_p, min_p;
    int top_k;
    float presence_penalty, frequency_penalty, repetition_penalty;
    uint64_t seed;
    int choice;            /* index of this sequence among the n of its row: part of the random key */
    int n_bias;
    const int32_t *bias_id;
    const float *bias;
    bool ignore_eos;
    int logprobs;          /* alternatives for each new token; -1: no log-probabilities */
    int prompt_logprobs;   /* the same for the prompt; -1: none */
    enum engine_prefill prefill;
    void *user;            /* handed back in events */
};
/* temperature 1, top_p 1, penalties off, no log-probabilities, exact prefill. */
void engine_request_init(struct engine_request *request);

/* Rank 0. Checks and queues; *id names the sequence from now on. Errors (STATUS_INPUT, text for the client, the engine goes on): a prompt
 * longer than the context, a token id out of range, a sampling field out of range, a cache that can never hold it. */
int engine_submit(struct engine *engine, const struct engine_request *request, int64_t *id);
/* Rank 0. The sequence ends; no further event of it but ENGINE_FINISHED with ENGINE_CANCELLED, if it was not finished. */
void engine_cancel(struct engine *engine, int64_t id);

enum engine_event_kind { ENGINE_PROMPT, ENGINE_TOKEN, ENGINE_FINISHED };
enum engine_finish { ENGINE_STOP, ENGINE_LENGTH, ENGINE_CANCELLED };

struct engine_scored { /* a token with its log-probability and the likeliest alternatives, best first */
    int32_t id;
    float logprob;
    int n_top;
    const int32_t *top_id;
    const float *top_logprob;
};

struct engine_event {
    enum engine_event_kind kind;
    int64_t id;
    void *user;
    /* ENGINE_PROMPT, when prompt log-probabilities were asked for: entry i scores prompt token i; entry 0 has logprob NAN and n_top 0 */
    int n_scored;
    const struct engine_scored *scored;
    bool scored_cached;           /* scored with the compressed cache, else exact */
    /* ENGINE_TOKEN; an end token is not reported as a token unless ignore_eos */
    struct engine_scored token;
    /* ENGINE_FINISHED */
    enum engine_finish finish;
    int n_tokens;                 /* generated, as reported */
    double queued_s, prefill_s, decode_s;
};

/* Rank 0. One step: admits what fits, runs the next prefill piece or decode step. Returns 1 while there is work, 0 when idle. */
int engine_step(struct engine *engine);
/* Rank 0. Takes the next event; pointers in it live until the next call. false: none left. */
bool engine_next_event(struct engine *engine, struct engine_event *event);
int engine_n_active(const struct engine *engine); /* queued and running */

/* Other ranks: serve steps until rank 0 stops. */
int engine_follow(struct engine *engine);
/* Rank 0: sends the followers home. */
int engine_stop(struct engine *engine);

/* Progress: of the sequences that wait or are in prefill, prompt tokens done and in all. */
void engine_prefill_progress(const struct engine *engine, int64_t *done, int64_t *total);
