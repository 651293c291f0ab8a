/* The output file of a batch, which is also its memory: a row is done when its line is in the file. Owns the lock that keeps a
 * second process out, what a kill left behind, and when lines reach the disk. A line is written by one write(2) with O_APPEND, so a kill
 * can only cut the last one; that one is taken away before the next is added. Lines follow INTERFACE.md:
 *
 *   {"id":"kv-...","custom_id":"...","response":{"status_code":200,"request_id":"kv-...","body":{...}},"error":null}
 *   {"id":"kv-...","custom_id":"...","response":null,"error":{"code":"...","message":"..."}}
 *
 * A file that is not regular (a pipe, a terminal) is written the same way but remembers nothing. */
#pragma once

#include "launch/json_text.h"

enum { JOURNAL_ID_BYTES = 20 }; /* "kv-", 16 hex digits, NUL */

struct journal;

struct journal_entry {
    char *custom_id;
    char id[JOURNAL_ID_BYTES];
    bool failed;  /* the row's answer is an error */
    int64_t line; /* from 1 */
};

/* Creates or opens, locks and reads the file; changes nothing in it. Errors: STATUS_FAILED if it cannot be opened or another process
 * holds it; STATUS_INPUT for a line that batch did not write or a custom_id that stands there twice. */
int journal_open(const char *path, struct journal **out);
/* Unlocks and closes. Lines that were added are synced by journal_sync. */
void journal_close(struct journal *journal);

int journal_n_entries(const struct journal *journal);
const struct journal_entry *journal_entry_at(const struct journal *journal, int index);
const struct journal_entry *journal_find(const struct journal *journal, const char *custom_id); /* NULL: not there */

/* Makes the file ready for more lines: takes a cut last line away, and with `drop_failed` the rows that ended with an error (by
 * writing a new file and renaming it over the old one; entries stay as they were read). */
int journal_begin(struct journal *journal, bool drop_failed);

/* Adds one whole line, newline included, and syncs if the last sync is a second ago. A line that could not be written whole is
 * taken back. Errors: STATUS_FAILED, such as a full disk. */
int journal_append(struct journal *journal, const struct json_text *line);
/* Lines added so far are on the disk. */
int journal_sync(struct journal *journal);
/* The same if it is time for it: for loops that may not add a line for long. */
int journal_tick(struct journal *journal);

/* Begins a line, up to where the body stands; ends it; writes a whole line of a row that failed. */
void journal_line_begin(struct json_text *line, const char *id, const char *custom_id);
void journal_line_end(struct json_text *line);
void journal_line_error(struct json_text *line, const char *id, const char *custom_id, const char *code, const char *message);
