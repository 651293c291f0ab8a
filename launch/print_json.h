/* A JSON tree of facts as text for people: aligned names and values, lists of equal objects as tables. */
#pragma once

#include <stdio.h>

#include "kernels/base.h"

struct json_t;

/* Prints an object's members. Names ending in "bytes" are shown as quantities, '_' as a space. */
void print_json_text(FILE *stream, const struct json_t *object);
