/* A JSON tree of facts as text for people: aligned names and values, lists of equal objects as tables. */
#pragma once

#include <stdio.h>

#include "kernels/base.h"

struct json_t;

/* Prints an object's members. Names ending in "bytes" are shown as quantities, '_' as a space. */
void print_json_text(FILE *stream, const struct json_t *object);

/* A command's answer to standard output, as one JSON object or as text. Errors: STATUS_FAILED when it cannot be written. */
int print_json_facts(bool json, const struct json_t *facts);
