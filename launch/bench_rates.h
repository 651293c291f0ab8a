/* What the files of the yardsticks share. */
#pragma once

#include "launch/bench.h"

struct rates {
    struct bench *bench;
    uint8_t *from, *to; /* bytes each */
    size_t bytes;
    uint64_t sum;       /* of what was read */
    struct rates_gemm *gemm;
    struct graph *graph;
};

/* A pass does its work once on this rank and says how long it took. */
typedef int rates_pass(struct rates *r, double *seconds);

/* Collective. `pass` on all ranks together; a row with bytes per second, of r->bytes times `factor` on each rank. */
int bench_rates_memory_row(struct rates *r, const char *what, rates_pass *pass, int factor, double *rate);
/* Collective. The same with FLOP per second, of `flop` on each rank. */
int bench_rates_flop_row(struct rates *r, const char *item, rates_pass *pass, double flop, double *rate);

/* Collective, on GPUs: memory, and one product of m rows [m][k] x [n][k]^T in 16 bit. */
int bench_rates_gpu_memory(struct rates *r);
int bench_rates_gpu_gemm(struct rates *r, const char *item, int64_t m, int64_t n, int64_t k, double *rate);
