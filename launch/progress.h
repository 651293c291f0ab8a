/* Progress on standard error: one live line on a terminal, a plain line every few seconds in a log. Log lines do not mix
 * with the live line: it is wiped before them and drawn again after. One progress per process, made by the main program. */
#pragma once

#include <stdio.h>

#include "launch/environment.h"

enum { PROGRESS_MAX_LINE = 512 };

struct progress {
    FILE *stream;
    bool live;              /* a terminal */
    bool silent;
    bool shown;             /* the live line stands on the screen */
    int columns;            /* of the terminal: the live line is cut there */
    double every, next;     /* seconds between two lines, time of the next */
    char line[PROGRESS_MAX_LINE];
};

/* `quiet`: nothing is printed. Routes base_log through the progress until progress_finish. */
void progress_start(struct progress *progress, FILE *stream, const struct environment *environment, bool quiet);

/* Shows this text if it is time for it; cheap when it is not. */
void progress_update(struct progress *progress, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Wipes the live line, for other output to the terminal; the next update draws it again. */
void progress_clear(struct progress *progress);

/* Wipes the live line and restores the log sink. */
void progress_finish(struct progress *progress);

/* Cuts `line` to `columns` characters of UTF-8, in place. */
void progress_cut(char *line, int columns);
