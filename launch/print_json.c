/* Shapes follow from the tree: an object is a block of "name  value" lines, an array of scalars a comma list, an array of objects
 * a table whose columns are the first object's members. */
#include "launch/print_json.h"

#include <errno.h>
#include <jansson.h>
#include <string.h>

#include "launch/units.h"

enum { NAME_COLUMNS = 16, INDENT = 4, CELL_BYTES = 256, MAX_COLUMNS = 16 };

static bool names_bytes(const char *name) {
    size_t n = strlen(name);
    return n >= 5 && strcmp(name + n - 5, "bytes") == 0;
}

/* One scalar as text. */
static void format_scalar(const char *name, const json_t *value, char *text, size_t room) {
    char units[UNITS_TEXT];
    text[0] = '\0';
    if (json_is_string(value))
        snprintf(text, room, "%s", json_string_value(value));
    else if (json_is_integer(value) && names_bytes(name))
        snprintf(text, room, "%s", units_bytes(json_integer_value(value), units));
    else if (json_is_integer(value))
        snprintf(text, room, "%lld", (long long)json_integer_value(value));
    else if (json_is_real(value))
        snprintf(text, room, "%g", json_real_value(value));
    else if (json_is_boolean(value))
        snprintf(text, room, "%s", json_is_true(value) ? "yes" : "no");
    else if (json_is_null(value))
        snprintf(text, room, "none");
}

static void format_value(const char *name, const json_t *value, char text[CELL_BYTES]) {
    if (!json_is_array(value)) {
        format_scalar(name, value, text, CELL_BYTES);
        return;
    }
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < json_array_size(value) && used < CELL_BYTES - 3; i++) {
        if (i)
            used += (size_t)snprintf(text + used, CELL_BYTES - used, ", ");
        format_scalar("", json_array_get(value, i), text + used, CELL_BYTES - used);
        used += strlen(text + used);
    }
}

static void format_name(const char *name, char text[CELL_BYTES]) {
    snprintf(text, CELL_BYTES, "%s", name);
    for (char *c = text; *c; c++)
        if (*c == '_')
            *c = ' ';
    size_t n = strlen(text);
    if (n > 6 && names_bytes(text))
        text[n - 6] = '\0'; /* the value says that these are bytes */
}

/* Row -1 is the head. */
static void format_cell(const json_t *array, int row, const char *name, char text[CELL_BYTES]) {
    if (row < 0)
        format_name(name, text);
    else
        format_value(name, json_object_get(json_array_get(array, (size_t)row), name), text);
}

static void print_table(FILE *stream, json_t *array, int indent) {
    const char *names[MAX_COLUMNS], *name;
    int width[MAX_COLUMNS] = {0}, n = 0, n_rows = (int)json_array_size(array);
    json_t *first = json_array_get(array, 0), *value;
    char text[CELL_BYTES];
    json_object_foreach(first, name, value) if (n < MAX_COLUMNS) names[n++] = name;
    for (int row = -1; row < n_rows; row++)
        for (int i = 0; i < n; i++) {
            format_cell(array, row, names[i], text);
            width[i] = (int)max_i64(width[i], (int64_t)strlen(text));
        }
    for (int row = -1; row < n_rows; row++) {
        fprintf(stream, "%*s", indent, "");
        for (int i = 0; i < n; i++) {
            format_cell(array, row, names[i], text);
            bool left = json_is_string(json_object_get(first, names[i]));
            fprintf(stream, left ? "%s%-*s" : "%s%*s", i ? "  " : "", i == n - 1 && left ? 0 : width[i], text);
        }
        fputc('\n', stream);
    }
}

static void print_members(FILE *stream, json_t *object, int indent) {
    const char *name;
    json_t *value;
    char label[CELL_BYTES], text[CELL_BYTES];
    json_object_foreach(object, name, value) {
        format_name(name, label);
        if (json_is_object(value)) {
            fprintf(stream, "%*s%s\n", indent, "", label);
            print_members(stream, value, indent + INDENT);
        } else if (json_is_object(json_array_get(value, 0))) {
            fprintf(stream, "%*s%s\n", indent, "", label);
            print_table(stream, value, indent + INDENT);
        } else {
            format_value(name, value, text);
            fprintf(stream, "%*s%-*s  %s\n", indent, "", NAME_COLUMNS - indent, label, text);
        }
    }
}

void print_json_text(FILE *stream, const struct json_t *object) {
    json_t *copy = json_deep_copy(object); /* jansson's walk wants a tree that it may write to */
    if (copy)
        print_members(stream, copy, 0);
    json_decref(copy);
}

int print_json_facts(bool json, const struct json_t *facts) {
    if (json)
        json_dumpf(facts, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    else
        print_json_text(stdout, facts);
    if (json)
        putchar('\n');
    if (fflush(stdout) != 0 || ferror(stdout))
        FAIL(STATUS_FAILED, "standard output: %s", strerror(errno));
    return STATUS_OK;
}
