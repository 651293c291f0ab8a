/* The live line and its plain twin. The process has one standard error, so one progress is routed to at a time. */
#include "launch/progress.h"

#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define LIVE_SECONDS 0.1 /* often enough to look alive, seldom enough to cost nothing */
#define LOG_SECONDS 5.0

enum { DEFAULT_COLUMNS = 80 };

static void log_line(enum log_level level, const char *line, void *context) {
    struct progress *progress = context;
    (void)level;
    bool shown = progress->shown;
    progress_clear(progress);
    fprintf(progress->stream, "%s\n", line);
    if (shown) {
        fputs(progress->line, progress->stream);
        fflush(progress->stream);
        progress->shown = true;
    }
}

static int terminal_columns(FILE *stream, const struct environment *environment) {
    struct winsize size;
    if (ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        return size.ws_col;
    return environment->columns ? environment->columns : DEFAULT_COLUMNS;
}

void progress_start(struct progress *progress, FILE *stream, const struct environment *environment, bool quiet) {
    memset(progress, 0, sizeof *progress);
    progress->stream = stream;
    progress->silent = quiet;
    progress->live = !environment->dumb_terminal && isatty(fileno(stream));
    progress->columns = progress->live ? terminal_columns(stream, environment) : PROGRESS_MAX_LINE;
    progress->every = progress->live ? LIVE_SECONDS : LOG_SECONDS;
    progress->next = base_seconds() + progress->every;
    base_set_log_sink(log_line, progress);
}

void progress_update(struct progress *progress, const char *format, ...) {
    if (progress->silent)
        return;
    double now = base_seconds();
    if (now < progress->next)
        return;
    progress->next = now + progress->every;
    va_list args;
    va_start(args, format);
    vsnprintf(progress->line, sizeof progress->line, format, args);
    va_end(args);
    if (!progress->live) {
        fprintf(progress->stream, "%s\n", progress->line);
        return;
    }
    progress_cut(progress->line, progress->columns - 1); /* the last column would wrap on some terminals */
    progress_clear(progress);
    fputs(progress->line, progress->stream);
    fflush(progress->stream);
    progress->shown = true;
}

void progress_clear(struct progress *progress) {
    if (progress->shown)
        fputs("\r\033[K", progress->stream); /* start of line, erase to its end */
    progress->shown = false;
    fflush(progress->stream);
}

void progress_finish(struct progress *progress) {
    progress_clear(progress);
    base_set_log_sink(NULL, NULL);
}

void progress_cut(char *line, int columns) {
    int seen = 0;
    for (char *c = line; *c; c++)
        if (((unsigned char)*c & 0xc0) != 0x80 && seen++ >= columns) { /* not a continuation byte: a character starts */
            *c = '\0';
            return;
        }
}
