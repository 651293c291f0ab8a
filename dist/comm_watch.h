/* The watchdog of a communicator library: one thread per process that answers for this rank, and ends the job when
 * a rank makes no progress. It knows ranks and times, but no library: comm_mpi.c lends it a way to send and to receive.
 *
 * - A wait that lasts longer than the deadline raises the alarm: the rank tells all others what it waits for. Each answers all
 *   others once with its own state. The thread answers while the rank computes; only a stopped process or a lost host is silent.
 * - After some seconds for answers, the lowest rank that answered prints one message (who is silent, what the others wait for)
 *   and aborts the job; the others stay quiet and wait for their end.
 * - An idle wait may last for ever. Meanwhile the rank pings the root that it waits for, four times per deadline, and the root's
 *   thread answers; a root that is silent for a deadline raises the alarm. Nothing is sent when nobody is idle.
 * - Time is counted by the thread itself in steps of at most half a second, so a job that is suspended as a whole (and its
 *   clocks not) goes on afterwards. */
#pragma once

#include <pthread.h>

#include "kernels/base.h"

enum { WATCH_HOST_BYTES = 64, WATCH_WHAT_BYTES = 96, WATCH_COMM_BYTES = 16 };

enum watch_kind { WATCH_PING, WATCH_PONG, WATCH_STATE };

struct watch_message {
    int32_t kind, rank;
    int32_t waits; /* 1: in `what`; 0: computes since `what` */
    int32_t reserved;
    int64_t step;
    double seconds;
    char what[WATCH_WHAT_BYTES];
    char comm[WATCH_COMM_BYTES];
};

/* Both are called by the watchdog's thread only and never block. */
struct watch_link {
    void *context;
    void (*send)(void *context, int to, const struct watch_message *message);
    bool (*receive)(void *context, struct watch_message *message);
    void (*end_job)(void *context, int exit_code); /* may return; the process ends anyway */
};

struct watch_peer {
    char host[WATCH_HOST_BYTES];
    int64_t pid;
};

struct watch;

/* `peers` (one for each rank) is the caller's and may be filled in later. */
int watch_open(const struct watch_link *link, int rank, int size, double deadline_seconds, const struct watch_peer *peers,
               struct watch **out);
/* Stops the thread; nothing is sent or received any more. */
void watch_stop(struct watch *watch);
void watch_close(struct watch *watch);

/* One wait, on the stack of who waits. `what` and `comm` outlive it. */
struct watch_wait {
    const char *what, *comm;
    int idle_root; /* rank that must be alive in an idle wait; -1: the deadline holds */
    double extra;  /* seconds that it may last beyond the deadline: a library that starts takes its time */
    double since, heard, pinged;
    struct watch_wait *next, **link;
};
void watch_enter(struct watch *watch, struct watch_wait *wait);
void watch_leave(struct watch *watch, struct watch_wait *wait);

void watch_set_step(struct watch *watch, int64_t step);

/* Ends the process with this exit code after `seconds`, with `text` as an error message if not NULL, unless stopped before. */
struct guard {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    double seconds;
    int exit_code;
    const char *text;
    bool stopped, running;
};
void guard_start(struct guard *guard, double seconds, int exit_code, const char *text);
void guard_stop(struct guard *guard);
