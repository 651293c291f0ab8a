/* Shape files: a model's configuration without its weights, one `name = value` a line (configs/models). They are for measurements with
 * made-up weights, and for plans. Every field that the architecture needs must be there; one that is not known is an error. */
#include "engine/model_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { KIND_ARCH, KIND_ROPE, KIND_COUNT, KIND_DOUBLE, KIND_FLOAT, KIND_BOOL };

struct field {
    const char *name;
    enum kind kind;
    size_t offset; /* in struct model_config */
    bool optional;
};
#define AT(member) offsetof(struct model_config, member)

static const struct field fields[] = {
    {"shape", KIND_ARCH, AT(arch), false}, /* sets what the architecture implies too */
    {"hidden", KIND_COUNT, AT(hidden), false},
    {"layers", KIND_COUNT, AT(n_layers), false},
    {"heads", KIND_COUNT, AT(n_heads), false},
    {"kv_heads", KIND_COUNT, AT(n_kv_heads), false},
    {"head_dim", KIND_COUNT, AT(head_dim), false},
    {"inner", KIND_COUNT, AT(intermediate), false},
    {"vocab", KIND_COUNT, AT(vocab), false},
    {"context", KIND_COUNT, AT(context), false},
    {"rms_eps", KIND_FLOAT, AT(rms_eps), false},
    {"tied_head", KIND_BOOL, AT(tied), false},
    {"qkv_bias", KIND_BOOL, AT(qkv_bias), false},
    {"rope", KIND_ROPE, AT(rope), false},
    {"rope_theta", KIND_DOUBLE, AT(rope_theta), false},
    {"rope_factor", KIND_DOUBLE, AT(rope_factor), true}, /* these four: rope = llama3 */
    {"rope_low_freq", KIND_DOUBLE, AT(rope_low_freq), true},
    {"rope_high_freq", KIND_DOUBLE, AT(rope_high_freq), true},
    {"rope_original_context", KIND_COUNT, AT(rope_original_context), true},
};
enum { N_FIELDS = sizeof fields / sizeof *fields };

static int read_double(const char *name, const char *text, double *out) {
    char *end;
    *out = strtod(text, &end);
    if (end == text || *end)
        FAIL(STATUS_INPUT, "%s: '%.64s', expected a number", name, text);
    return STATUS_OK;
}

static int read_count(const char *name, const char *text, int *out) {
    char *end;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end)
        FAIL(STATUS_INPUT, "%s: '%.64s', expected a whole number", name, text);
    return model_config_set_count(value, name, out);
}

static int read_bool(const char *name, const char *text, bool *out) {
    *out = strcmp(text, "yes") == 0;
    if (!*out && strcmp(text, "no") != 0)
        FAIL(STATUS_INPUT, "%s: '%.64s', expected yes or no", name, text);
    return STATUS_OK;
}

static int read_rope(const char *text, enum rope_kind *out) {
    *out = strcmp(text, "llama3") == 0 ? ROPE_LLAMA3 : ROPE_DEFAULT;
    if (*out == ROPE_DEFAULT && strcmp(text, "default") != 0)
        FAIL(STATUS_INPUT, "rope: '%.64s', expected default or llama3", text);
    return STATUS_OK;
}

static int read_value(const struct field *f, const char *text, struct model_config *config) {
    void *to = (char *)config + f->offset;
    double value;
    switch (f->kind) {
    case KIND_ARCH:
        return model_config_set_arch(text, config);
    case KIND_ROPE:
        return read_rope(text, to);
    case KIND_COUNT:
        return read_count(f->name, text, to);
    case KIND_BOOL:
        return read_bool(f->name, text, to);
    case KIND_DOUBLE:
        return read_double(f->name, text, to);
    case KIND_FLOAT:
        TRY(read_double(f->name, text, &value));
        *(float *)to = (float)value;
    }
    return STATUS_OK;
}

/* Cuts white space off both ends, in place. */
static char *trim(char *text) {
    static const char space[] = " \t\r\n";
    text += strspn(text, space);
    size_t n = strlen(text);
    while (n > 0 && strchr(space, text[n - 1]))
        text[--n] = '\0';
    return text;
}

static int read_line(char *line, struct model_config *config, bool *found) {
    line[strcspn(line, "#")] = '\0';
    char *name = trim(line), *equals = strchr(name, '=');
    if (!*name)
        return STATUS_OK;
    if (!equals)
        FAIL(STATUS_INPUT, "'%.64s', expected name = value", name);
    *equals = '\0';
    name = trim(name);
    for (int i = 0; i < N_FIELDS; i++) {
        if (strcmp(name, fields[i].name) != 0)
            continue;
        if (found[i])
            FAIL(STATUS_INPUT, "%s is there twice", name);
        found[i] = true;
        return read_value(&fields[i], trim(equals + 1), config);
    }
    FAIL(STATUS_INPUT, "'%.64s' is no field of a shape", name);
}

static int read_lines(FILE *file, struct model_config *config) {
    bool found[N_FIELDS] = {false};
    char *line = NULL;
    size_t size = 0;
    int status = STATUS_OK;
    for (int n = 1; status == STATUS_OK && getline(&line, &size, file) >= 0; n++) {
        status = read_line(line, config, found);
        if (status < 0)
            base_error_prefix("line %d: ", n);
    }
    free(line);
    TRY(status);
    for (int i = 0; i < N_FIELDS; i++)
        if (!found[i] && !fields[i].optional)
            FAIL(STATUS_INPUT, "%s is missing: a shape file names hidden, layers, heads and so on, as in configs/models/llama-3.1-8b.conf",
                 fields[i].name);
    return model_config_check(config);
}

int model_config_shape_read(const char *path, struct model_config *config) {
    *config = (struct model_config){.bos_id = -1};
    FILE *file = fopen(path, "re");
    if (!file)
        FAIL(STATUS_INPUT, "%s: %s", path, strerror(errno));
    int status = read_lines(file, config);
    fclose(file);
    if (status < 0)
        base_error_prefix("%s: ", path);
    return status;
}
