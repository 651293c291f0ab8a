/* What journal.c needs to know of the lines in its file. */
#pragma once

#include "launch/journal.h"

/* Reads the names of a whole line (without its newline). 1: *out is set, but for `line`; its custom_id is malloced. 0: batch did not
 * write this line. */
int journal_line_read(const char *text, size_t bytes, struct journal_entry *out);

/* Whether text without a newline can be what a kill or a power failure left of a line: the beginning of one, then maybe zeros. */
bool journal_line_is_cut(const char *text, size_t bytes);
