/* Reading a machine's rates. One table of names says what may stand in a file, what has to, and where it goes. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cost.h"

enum { LINE_BYTES = 1024, MAX_GPUS = 1 << 20 };

enum kind { KIND_TEXT, KIND_COUNT, KIND_BYTES, KIND_NUMBER, KIND_MICROSECONDS };

static const struct field {
    const char *name;
    enum kind kind;
    size_t offset;
    bool optional;
} fields[] = {
    {"about", KIND_TEXT, offsetof(struct cost_rates, about), false},
    {"assumed", KIND_TEXT, offsetof(struct cost_rates, assumed), true},
    {"gpus", KIND_COUNT, offsetof(struct cost_rates, gpus), false},
    {"gpus_per_node", KIND_COUNT, offsetof(struct cost_rates, gpus_per_node), false},
    {"memory_bytes", KIND_BYTES, offsetof(struct cost_rates, memory_bytes), false},
    {"reserved_bytes", KIND_BYTES, offsetof(struct cost_rates, reserved_bytes), false},
    {"read_rate", KIND_NUMBER, offsetof(struct cost_rates, read_rate), false},
    {"gemm_rate", KIND_NUMBER, offsetof(struct cost_rates, gemm_rate), false},
    {"weights_share", KIND_NUMBER, offsetof(struct cost_rates, weights_share), true},
    {"attention_share", KIND_NUMBER, offsetof(struct cost_rates, attention_share), false},
    {"attention_us", KIND_MICROSECONDS, offsetof(struct cost_rates, attention_s), false},
    {"prefill_rate", KIND_NUMBER, offsetof(struct cost_rates, prefill_rate), false},
    {"cached_rate", KIND_NUMBER, offsetof(struct cost_rates, cached_rate), true},
    {"launch_us", KIND_MICROSECONDS, offsetof(struct cost_rates, launch_s), false},
    {"node_latency_us", KIND_MICROSECONDS, offsetof(struct cost_rates, node_latency_s), true},
    {"node_bandwidth", KIND_NUMBER, offsetof(struct cost_rates, node_bandwidth), true},
};
enum { N_FIELDS = sizeof fields / sizeof *fields };

/* all_reduce_4 = 1K:3.9 16K:4.5: microseconds by bytes, on 4 GPUs of a node */
static const char *const curve_names[COST_N_COLLECTIVES] = {"all_reduce_", "all_max_", "all_gather_"};

/* A positive number at *text, which moves on; K, M, G and T are powers of 1024. NAN: none there. */
static double take_number(const char **text) {
    char *end;
    double value = isdigit((unsigned char)**text) ? strtod(*text, &end) : NAN;
    const char *units = "KMGT", *unit;
    if (isnan(value))
        return NAN;
    unit = *end ? strchr(units, *end) : NULL;
    for (int i = 0; unit && i <= unit - units; i++)
        value *= 1024;
    *text = end + (unit != NULL);
    return value > 0 && isfinite(value) ? value : NAN;
}

static int parse_points(const char *text, struct cost_curve *c) {
    for (const char *at = text; *at;) {
        double bytes = take_number(&at);
        double us = *at == ':' ? (at++, take_number(&at)) : NAN;
        if (isnan(bytes) || isnan(us) || (*at && *at != ' '))
            FAIL(STATUS_INPUT, "'%s' is not a list of bytes:microseconds, such as 1K:3.7 16K:4.2", text);
        if (c->n == COST_MAX_POINTS)
            FAIL(STATUS_INPUT, "more than %d points", COST_MAX_POINTS);
        if (c->n && bytes <= c->bytes[c->n - 1])
            FAIL(STATUS_INPUT, "bytes have to ascend in '%s'", text);
        c->bytes[c->n] = bytes;
        c->seconds[c->n++] = us * 1e-6;
        at += strspn(at, " ");
    }
    if (c->n == 0)
        FAIL(STATUS_INPUT, "no points");
    return STATUS_OK;
}

static int parse_curve(enum cost_collective kind, const char *ranks_text, const char *text, struct cost_rates *r) {
    int *n = &r->n_curves[kind];
    double ranks = take_number(&ranks_text);
    if (isnan(ranks) || *ranks_text || ranks < 2 || ranks > MAX_GPUS || ranks != floor(ranks))
        FAIL(STATUS_INPUT, "the name has to end in a number of GPUs, 2 or more");
    if (*n == COST_MAX_CURVES)
        FAIL(STATUS_INPUT, "more than %d numbers of GPUs", COST_MAX_CURVES);
    if (*n && ranks <= r->curves[kind][*n - 1].ranks)
        FAIL(STATUS_INPUT, "numbers of GPUs have to ascend");
    struct cost_curve *c = &r->curves[kind][(*n)++];
    c->ranks = (int)ranks;
    return parse_points(text, c);
}

static int parse_field(const struct field *f, const char *text, struct cost_rates *r) {
    void *to = (char *)r + f->offset;
    const char *at = text;
    if (f->kind == KIND_TEXT) {
        if (strlen(text) >= COST_TEXT)
            FAIL(STATUS_INPUT, "longer than %d bytes", COST_TEXT - 1);
        strcpy(to, text);
        return STATUS_OK;
    }
    double value = take_number(&at);
    if (isnan(value) || *at)
        FAIL(STATUS_INPUT, "'%s' is not a positive number", text);
    if (f->kind == KIND_COUNT && (value != floor(value) || value > MAX_GPUS))
        FAIL(STATUS_INPUT, "'%s' is not a whole number up to %d", text, MAX_GPUS);
    if (f->kind == KIND_BYTES && value > 1e18)
        FAIL(STATUS_INPUT, "'%s' is more than any memory", text);
    if (f->kind == KIND_COUNT)
        *(int *)to = (int)value;
    else if (f->kind == KIND_BYTES)
        *(int64_t *)to = (int64_t)value;
    else
        *(double *)to = f->kind == KIND_MICROSECONDS ? value * 1e-6 : value;
    return STATUS_OK;
}

static const struct field *find_field(const char *name) {
    for (int i = 0; i < N_FIELDS; i++)
        if (strcmp(fields[i].name, name) == 0)
            return &fields[i];
    return NULL;
}

static int parse_pair(const char *name, const char *value, bool *seen, struct cost_rates *r) {
    const struct field *f = find_field(name);
    for (int i = 0; !f && i < COST_N_COLLECTIVES; i++)
        if (strncmp(name, curve_names[i], strlen(curve_names[i])) == 0)
            return parse_curve(i, name + strlen(curve_names[i]), value, r);
    if (!f)
        FAIL(STATUS_INPUT, "no rate is called that");
    if (seen[f - fields])
        FAIL(STATUS_INPUT, "stands there twice");
    seen[f - fields] = true;
    return parse_field(f, value, r);
}

static char *trim(char *text) {
    text += strspn(text, " \t");
    size_t n = strlen(text);
    while (n && isspace((unsigned char)text[n - 1]))
        text[--n] = '\0';
    return text;
}

/* A comment begins with a # at the start of a line or after white space. */
static int parse_line(char *line, bool *seen, struct cost_rates *r) {
    for (char *c = line; *c; c++)
        if (*c == '#' && (c == line || isspace((unsigned char)c[-1])))
            *c = '\0';
    char *name = trim(line), *equals = strchr(name, '=');
    if (!*name)
        return STATUS_OK;
    if (!equals)
        FAIL(STATUS_INPUT, "'%s' is not of the form name = value", name);
    *equals = '\0';
    name = trim(name);
    int status = parse_pair(name, trim(equals + 1), seen, r);
    if (status < 0)
        base_error_prefix("%s: ", name);
    return status;
}

/* Names in `assumed` are those of rates. */
static int check_assumed(const struct cost_rates *r) {
    char text[COST_TEXT], *rest = NULL;
    strcpy(text, r->assumed);
    for (char *word = strtok_r(text, " ,", &rest); word; word = strtok_r(NULL, " ,", &rest)) {
        bool known = find_field(word) != NULL;
        for (int i = 0; i < COST_N_COLLECTIVES; i++)
            known |= strncmp(word, curve_names[i], strlen(curve_names[i])) == 0;
        if (!known)
            FAIL(STATUS_INPUT, "assumed: no rate is called '%s'", word);
    }
    return STATUS_OK;
}

static int check_rates(const bool *seen, const struct cost_rates *r) {
    for (int i = 0; i < N_FIELDS; i++)
        if (!seen[i] && !fields[i].optional)
            FAIL(STATUS_INPUT, "%s is missing", fields[i].name);
    if (r->gpus > r->gpus_per_node && (r->node_latency_s <= 0 || r->node_bandwidth <= 0))
        FAIL(STATUS_INPUT, "%d GPUs are more than the %d of a node: node_latency_us and node_bandwidth are needed", r->gpus,
             r->gpus_per_node);
    if (r->attention_share > 1 || r->weights_share > 1)
        FAIL(STATUS_INPUT, "%s: %g, expected a share of the read rate up to 1",
             r->attention_share > 1 ? "attention_share" : "weights_share", fmax(r->attention_share, r->weights_share));
    for (int i = 0; i < COST_N_COLLECTIVES; i++) {
        int n = r->n_curves[i], most = n ? r->curves[i][n - 1].ranks : 1;
        if (most < r->gpus_per_node)
            FAIL(STATUS_INPUT, "%s%d is missing: a node has so many GPUs", curve_names[i], r->gpus_per_node);
    }
    return check_assumed(r);
}

static int parse_file(FILE *file, struct cost_rates *r) {
    char line[LINE_BYTES];
    bool seen[N_FIELDS] = {false};
    for (int number = 1; fgets(line, sizeof line, file); number++) {
        int status = STATUS_OK;
        if (!strchr(line, '\n') && !feof(file))
            status = base_fail(STATUS_INPUT, __FILE__, __LINE__, "a line of more than %d bytes", LINE_BYTES - 2);
        if (status == STATUS_OK)
            status = parse_line(line, seen, r);
        if (status < 0) {
            base_error_prefix("%d: ", number);
            return status;
        }
    }
    if (ferror(file))
        FAIL(STATUS_INPUT, "%s", strerror(errno));
    return check_rates(seen, r);
}

int cost_rates_read(const char *path, struct cost_rates *out) {
    *out = (struct cost_rates){.weights_share = 1};
    FILE *file = fopen(path, "re");
    if (!file)
        FAIL(STATUS_INPUT, "rates %s: %s", path, strerror(errno));
    int status = parse_file(file, out);
    fclose(file);
    if (status < 0)
        base_error_prefix("rates %s: ", path);
    return status;
}
