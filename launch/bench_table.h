/* The one table of kvlinc bench: each row goes to standard output and, in the same columns, to a CSV file as soon as it is known. */
#pragma once

#include <stdio.h>

#include "kernels/base.h"

struct bench_row { /* 0 or NULL: the column stays empty */
    const char *section, *item;
    const char *cache;     /* what runs */
    int batch;             /* sequences in a step */
    int64_t tokens;        /* context or prompt */
    double ms;             /* median of one step, prompt, pass or call */
    double best_ms;        /* the shortest: on a machine that others use too it says more */
    double rate;           /* by the median */
    const char *unit;      /* of rate */
    double bytes, flop;    /* what `ms` moves or computes; memory rows: bytes held */
    double share;          /* reached part of a limit, 1 = all */
    const char *of;        /* the limit */
    double predicted_ms;   /* what engine/cost.h makes of it from the rates of this run */
    const char *note;
};

struct bench_table {
    FILE *csv; /* NULL: none */
    const char *csv_path;
    bool headed;
    int status; /* first failure of writing, told by bench_table_close: the ranks are in step whatever happens to the output */
    char section[32]; /* of the last row on standard output */
};

/* `csv`: path or NULL. Errors: STATUS_INPUT when the file cannot be made. */
int bench_table_open(const char *csv, struct bench_table *table);
void bench_table_add(struct bench_table *table, const struct bench_row *row);
int bench_table_close(struct bench_table *table);
