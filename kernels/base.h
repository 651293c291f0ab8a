/* Status codes, error text and logging: what every file of the project includes first.
 *
 * A function that can fail returns 0 or one negative code of the list below. FAIL records the text in a thread-local
 * buffer and returns the code; TRY passes a failure on. The first error of a thread is kept until base_clear_error,
 * so a clean-up that fails as well cannot hide the cause. Libraries never exit, abort or print results. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum status {
    STATUS_OK = 0,
    STATUS_FAILED = -1,      /* a library or the system said no */
    STATUS_USAGE = -2,       /* an option or a layout that cannot be: exit code 2 */
    STATUS_INPUT = -3,       /* a file or a request that is wrong: exit code 2 */
    STATUS_MEMORY = -4,      /* it does not fit */
    STATUS_TIMEOUT = -5,     /* a peer made no progress within the deadline */
    STATUS_INTERRUPTED = -6, /* told to stop, nothing lost: exit code 75 */
};

/* Records `format` as this thread's error unless one is already kept, and returns `code`. */
int base_fail(int code, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));

/* Takes over an error that another thread or rank recorded; same rule. */
int base_fail_text(int code, const char *text);

/* This thread's error text, "" when there is none. Valid until the next base_clear_error of the thread. */
const char *base_error(void);
void base_clear_error(void);

/* Puts words before the kept error text, such as the file that was being read. */
void base_error_prefix(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define FAIL(code, ...) return base_fail((code), __FILE__, __LINE__, __VA_ARGS__)
#define TRY(call)                     \
    do {                              \
        int try_status_ = (call);     \
        if (try_status_ < 0)          \
            return try_status_;       \
    } while (0)

/* The same for functions with one `fail:` label that frees in reverse; they need a local `int status`. */
#define FAIL_GOTO(code, ...)                                           \
    do {                                                               \
        status = base_fail((code), __FILE__, __LINE__, __VA_ARGS__);   \
        goto fail;                                                     \
    } while (0)
#define TRY_GOTO(call)        \
    do {                      \
        status = (call);      \
        if (status < 0)       \
            goto fail;        \
    } while (0)

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

/* One line to the log sink (standard error by default), with a newline added. */
void base_log(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Which lines are printed, and what stands before each ("" by default; "rank 3: " on other ranks than 0). */
void base_set_log(enum log_level most, const char *prefix);

/* Called by base_log with a whole line without newline; NULL restores standard error. */
void base_set_log_sink(void (*sink)(enum log_level level, const char *line, void *context), void *context);

#define log_error(...) base_log(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) base_log(LOG_WARN, __VA_ARGS__)
#define log_info(...) base_log(LOG_INFO, __VA_ARGS__)
#define log_debug(...) base_log(LOG_DEBUG, __VA_ARGS__)

/* Monotonic time in seconds. */
double base_seconds(void);

/* malloc that records STATUS_MEMORY; calloc semantics (zeroed). `*pointer` is NULL on failure. n or size may be 0. */
int base_alloc(void *pointer, size_t n, size_t size);

/* FNV-1a: begin with BASE_HASH and mix in one byte or word after the other. For choices and comparisons, not for secrets. */
#define BASE_HASH 14695981039346656037u
static inline uint64_t base_hash(uint64_t hash, uint64_t word) { return (hash ^ word) * 1099511628211u; }
static inline uint64_t base_hash_text(const char *text) {
    uint64_t hash = BASE_HASH;
    for (; *text; text++)
        hash = base_hash(hash, (unsigned char)*text);
    return hash;
}

HOST_DEVICE static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE static inline int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
HOST_DEVICE static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HOST_DEVICE static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

#ifdef __cplusplus
}
#endif
