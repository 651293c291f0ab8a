/* The inside of struct engine, shared by engine_open.c (putting it together) and engine.c (serving). */
#pragma once

#include "engine/calibration.h"
#include "engine/engine.h"
#include "engine/scheduler.h"
#include "engine/worker.h"

struct queued_event {
    struct engine_event event;
    int32_t top_id[STEP_MAX_TOP];
    float top_logprob[STEP_MAX_TOP];
    struct engine_scored *scored; /* owned: of ENGINE_PROMPT */
};

struct engine {
    struct comm *world;
    struct engine_options options;
    struct place place;
    struct model_file *file;
    struct tokenizer *tokenizer;
    struct calibration *calibration; /* NULL without */
    struct cache_adapter *adapters;  /* [n_layers] */
    struct cache_spec spec;
    struct worker worker;
    char merge[16];
    char device[PLACE_DEVICE_BYTES]; /* what runs, in words */
    char *settings;
    int64_t context;
    int max_batch;
    struct engine_memory memory;
    /* rank 0 */
    struct scheduler scheduler;
    struct step_plan plan;
    struct scheduler_flight flights[WORKER_FLIGHTS];
    bool flying[WORKER_FLIGHTS];     /* results not yet collected */
    struct queued_event *events;     /* ring */
    int n_events, first_event, events_size;
    struct queued_event current;     /* handed out last */
};
