/* The rows of the option table; private to options.c and its test. */
#pragma once

#include "launch/options.h"

enum option_kind {
    OPTION_TEXT,   /* const char * */
    OPTION_TEXTS,  /* const char *[OPTIONS_MAX_STOP]: may be repeated; n_stop counts */
    OPTION_CHOICE, /* const char *, one of the words in `values` */
    OPTION_FLAG,   /* bool; takes no value, or =yes, =no */
    OPTION_INT,    /* int */
    OPTION_INT64,  /* int64_t, a plain number */
    OPTION_SIZE,   /* int64_t, bytes with K, M, G, T */
    OPTION_SEED,   /* uint64_t */
    OPTION_REAL,   /* float */
    OPTION_SECONDS /* double */
};

struct option {
    const char *name;
    enum option_kind kind;
    size_t offset;        /* of the field in struct options */
    const char *values;   /* CHOICE: the words; others: the value's name in the help */
    double least, most;   /* numbers: what is allowed; both 0: anything */
    int multiple;         /* INT: the value is a multiple of this; 0: any */
    const char *initial;  /* parsed into the field before anything else; NULL: zero */
    const char *standard; /* the default as the help says it, where `initial` does not */
    const char *help;     /* one sentence */
    unsigned commands;
};

extern const struct option option_table[];
extern const int option_table_size;
