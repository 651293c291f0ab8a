/* What a step of the model is made of, each part by itself on this machine: the rates that engine/cost.h reckons from. */
#pragma once

#include "engine/cost.h"
#include "launch/bench.h"

struct step_shape { /* one rank's part of the model */
    struct model_config config;
    struct grid grid;
    struct weights_slices slices;
};

/* Every rank alike: the layout that an engine with these options would take. */
int bench_step_shape(const struct bench *b, struct step_shape *out);

/* Collective, device open; figures are rank 0's. */
/* Seconds of an operation that has next to nothing to do, in a chain of such: norm, activation and sum of one row. */
int bench_step_launch(struct bench *b, const struct step_shape *shape, double *seconds);
/* Bytes/s of weights that a layer's four products with `n_rows` rows go through, beside `launch` seconds for each of them. */
int bench_step_products(struct bench *b, const struct step_shape *shape, int n_rows, double launch, double *rate);
/* Curves of the collectives of the replica and of its tp and cp groups; `rates` had none. */
int bench_step_collectives(struct bench *b, const struct step_shape *shape, struct cost_rates *rates);
