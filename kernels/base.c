/* Error text, logging, clock. The only mutable globals of the project: the error text (per thread) and the log sink. */
#include "kernels/base.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ERROR_BYTES = 2048, PREFIX_BYTES = 64, LINE_BYTES = 4096 };

static _Thread_local char error_text[ERROR_BYTES];

static enum log_level log_most = LOG_INFO;
static char log_prefix[PREFIX_BYTES];
static void (*log_sink)(enum log_level, const char *, void *);
static void *log_context;

int base_fail(int code, const char *file, int line, const char *format, ...) {
    if (error_text[0] == '\0') {
        va_list args;
        va_start(args, format);
        vsnprintf(error_text, sizeof error_text, format, args);
        va_end(args);
        const char *name = strrchr(file, '/');
        base_log(LOG_DEBUG, "%s:%d: %s", name ? name + 1 : file, line, error_text);
    }
    return code;
}

int base_fail_text(int code, const char *text) {
    if (error_text[0] == '\0')
        snprintf(error_text, sizeof error_text, "%s", text);
    return code;
}

const char *base_error(void) { return error_text; }

void base_clear_error(void) { error_text[0] = '\0'; }

void base_error_prefix(const char *format, ...) {
    char text[ERROR_BYTES];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0 || n >= ERROR_BYTES)
        return;
    size_t room = ERROR_BYTES - (size_t)n - 1;
    size_t kept = strlen(error_text);
    if (kept > room)
        kept = room;
    memmove(error_text + n, error_text, kept);
    memcpy(error_text, text, (size_t)n);
    error_text[(size_t)n + kept] = '\0';
}

void base_log(enum log_level level, const char *format, ...) {
    if (level > log_most)
        return;
    char line[LINE_BYTES];
    int n = snprintf(line, sizeof line, "%s%s", log_prefix,
                     level == LOG_ERROR ? "error: " : level == LOG_WARN ? "warning: " : "");
    va_list args;
    va_start(args, format);
    vsnprintf(line + n, sizeof line - (size_t)n, format, args);
    va_end(args);
    if (log_sink)
        log_sink(level, line, log_context);
    else
        fprintf(stderr, "%s\n", line);
}

void base_set_log(enum log_level most, const char *prefix) {
    log_most = most;
    snprintf(log_prefix, sizeof log_prefix, "%s", prefix);
}

void base_set_log_sink(void (*sink)(enum log_level, const char *, void *), void *context) {
    log_sink = sink;
    log_context = context;
}

double base_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int base_alloc(void *pointer, size_t n, size_t size) {
    void *memory = calloc(n ? n : 1, size ? size : 1);
    memcpy(pointer, &memory, sizeof memory);
    if (!memory)
        FAIL(STATUS_MEMORY, "out of memory: %zu x %zu bytes", n, size);
    return STATUS_OK;
}
