/* The input file of a batch: read once from end to end for the names and digests of its rows, then row by row when each is due;
 * a file of any size costs about a hundred bytes a row. Lines of white space are no rows. */
#pragma once

#include "launch/openai.h"

struct batch_row {
    char *custom_id;
    uint8_t digest[OPENAI_DIGEST_BYTES];
    int64_t line, offset, bytes; /* line: from 1 */
};

struct batch_input;

/* Errors: STATUS_INPUT for a file that cannot be read or in which a custom_id stands twice. */
int batch_input_open(const char *path, struct batch_input **out);
void batch_input_close(struct batch_input *input);

int batch_input_n_rows(const struct batch_input *input);
const struct batch_row *batch_input_row(const struct batch_input *input, int index);
/* Index of the row of this name, -1 if none. */
int batch_input_find(const struct batch_input *input, const char *custom_id);

/* Reads row `index` again. Errors: STATUS_INPUT if it is no longer the same. */
int batch_input_read(const struct batch_input *input, int index, struct openai_item *item);
/* Whether `path` names this very file. */
bool batch_input_is(const struct batch_input *input, const char *path);
