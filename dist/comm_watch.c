/* The watchdog's thread: see comm_watch.h for the protocol. Waits are entered and left under one mutex, and only those that
 * last longer than a moment are entered at all, so the fast path of a collective never comes here. */
#include "dist/comm_watch.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* The thread looks around this often; an alarm and its answers take a few of these. */
static const double TICK_SECONDS = 0.05;
/* More than this between two looks means that this process itself did not run. */
static const double LONGEST_TICK = 0.5;
/* Answers to an alarm are collected for this long. */
static const double ANSWER_SECONDS = 2.0;
/* A rank that does not print waits this long to be ended by the one that does. */
static const double LEAVE_SECONDS = 10.0;
/* The library's abort may take this long. */
static const double ABORT_SECONDS = 5.0;

struct watch {
    struct watch_link link;
    int rank, size;
    double deadline;
    const struct watch_peer *peers;

    pthread_t thread;
    bool started;
    pthread_mutex_t mutex; /* guards all below */
    pthread_cond_t changed;
    bool stopped;
    double now; /* seconds that this process has run */
    struct watch_wait *waits;
    int64_t step;
    char last_what[WATCH_WHAT_BYTES]; /* the last long wait that ended, and when */
    double last_end;

    /* the thread's own */
    bool alarm, reported;
    double alarm_since;
    struct watch_message *states; /* [size]; kind is -1 until the rank has answered */
};

static void wait_until(pthread_cond_t *changed, pthread_mutex_t *mutex, double seconds) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t ns = t.tv_nsec + (int64_t)(seconds * 1e9);
    t.tv_sec += ns / 1000000000;
    t.tv_nsec = ns % 1000000000;
    pthread_cond_timedwait(changed, mutex, &t);
}

static void monotonic_cond_init(pthread_cond_t *changed) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* Signals are the program's: none is delivered to a thread of ours. */
static bool start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(thread, NULL, run, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

/* ---- the guard ----------------------------------------------------------------------------------------------------------- */

static void *guard_run(void *argument) {
    struct guard *guard = argument;
    double end = base_seconds() + guard->seconds;
    pthread_mutex_lock(&guard->mutex);
    for (double left; !guard->stopped && (left = end - base_seconds()) > 0;)
        wait_until(&guard->changed, &guard->mutex, left);
    bool stopped = guard->stopped;
    pthread_mutex_unlock(&guard->mutex);
    if (!stopped) {
        if (guard->text)
            log_error("%s", guard->text);
        _exit(guard->exit_code);
    }
    return NULL;
}

void guard_start(struct guard *guard, double seconds, int exit_code, const char *text) {
    *guard = (struct guard){.seconds = seconds, .exit_code = exit_code, .text = text};
    pthread_mutex_init(&guard->mutex, NULL);
    monotonic_cond_init(&guard->changed);
    guard->running = start_thread(&guard->thread, guard_run, guard);
}

void guard_stop(struct guard *guard) {
    if (guard->running) {
        pthread_mutex_lock(&guard->mutex);
        guard->stopped = true;
        pthread_cond_signal(&guard->changed);
        pthread_mutex_unlock(&guard->mutex);
        pthread_join(guard->thread, NULL);
    }
    pthread_cond_destroy(&guard->changed);
    pthread_mutex_destroy(&guard->mutex);
}

/* ---- the message ----------------------------------------------------------------------------------------------------------- */

struct text {
    char *at;
    size_t left;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *text, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text->at, text->left, format, args);
    va_end(args);
    size_t used = n < 0 ? 0 : (size_t)n < text->left ? (size_t)n : text->left - 1;
    text->at += used;
    text->left -= used;
}

static bool same_state(const struct watch_message *a, const struct watch_message *b) {
    return a->kind == b->kind && a->waits == b->waits && a->step == b->step && strcmp(a->what, b->what) == 0 &&
           strcmp(a->comm, b->comm) == 0;
}

static void add_silent(struct text *text, const struct watch *watch) {
    for (int r = 0; r < watch->size; r++) {
        if (watch->states[r].kind >= 0)
            continue;
        add(text, "; rank %d (%s, pid %lld) does not answer: stopped, or its host is out of reach", r, watch->peers[r].host,
            (long long)watch->peers[r].pid);
    }
}

static void add_computing(struct text *text, const struct watch *watch) {
    for (int r = 0; r < watch->size; r++) {
        const struct watch_message *state = &watch->states[r];
        if (state->kind < 0 || state->waits)
            continue;
        add(text, "; rank %d (%s, pid %lld) is still computing at step %lld", r, watch->peers[r].host, (long long)watch->peers[r].pid,
            (long long)state->step);
        if (state->what[0])
            add(text, ", %.0f s after '%s'", state->seconds, state->what);
    }
}

/* Ranks that wait in the same operation at the same step are named together: "ranks 0, 2 wait in ...". */
static void add_waiting(struct text *text, const struct watch *watch) {
    for (int r = 0; r < watch->size; r++) {
        const struct watch_message *state = &watch->states[r];
        bool first = state->kind >= 0 && state->waits;
        int n = 0;
        for (int q = 0; q < watch->size && first; q++) {
            bool same = same_state(&watch->states[q], state);
            first = !(same && q < r);
            n += same;
        }
        if (!first)
            continue;
        add(text, "; rank%s", n > 1 ? "s" : "");
        for (int q = r, listed = 0; q < watch->size; q++)
            if (same_state(&watch->states[q], state))
                add(text, "%s%d", listed++ ? ", " : " ", q);
        add(text, " wait%s in '%s' (%s) at step %lld", n > 1 ? "" : "s", state->what, state->comm, (long long)state->step);
    }
}

static void print_report(const struct watch *watch) {
    char line[3800];
    struct text text = {line, sizeof line};
    double longest = 0;
    for (int r = 0; r < watch->size; r++)
        if (watch->states[r].kind >= 0 && watch->states[r].waits && watch->states[r].seconds > longest)
            longest = watch->states[r].seconds;
    add(&text, "no progress for %.0f s (deadline %g s)", longest, watch->deadline);
    add_silent(&text, watch);
    add_computing(&text, watch);
    add_waiting(&text, watch);
    add(&text, "; the job ends");
    log_error("%s", line);
}

/* ---- the protocol ---------------------------------------------------------------------------------------------------------- */

/* The longest wait of this process is its state; an idle one only if there is no other. Mutex held. */
static struct watch_message own_state(const struct watch *watch) {
    const struct watch_wait *longest = NULL;
    for (const struct watch_wait *wait = watch->waits; wait; wait = wait->next) {
        bool idle = wait->idle_root >= 0, longest_idle = longest && longest->idle_root >= 0;
        if (!longest || (idle == longest_idle ? wait->since < longest->since : longest_idle))
            longest = wait;
    }
    struct watch_message state = {.kind = WATCH_STATE, .rank = watch->rank, .waits = longest != NULL, .step = watch->step};
    state.seconds = watch->now - (longest ? longest->since : watch->last_end);
    snprintf(state.what, sizeof state.what, "%s", longest ? longest->what : watch->last_what);
    snprintf(state.comm, sizeof state.comm, "%s", longest ? longest->comm : "");
    return state;
}

static void raise_alarm(struct watch *watch) {
    if (watch->alarm)
        return;
    watch->alarm = true;
    watch->alarm_since = watch->now;
    struct watch_message state = own_state(watch);
    watch->states[watch->rank] = state;
    for (int r = 0; r < watch->size; r++)
        if (r != watch->rank)
            watch->link.send(watch->link.context, r, &state);
}

static void handle_message(struct watch *watch, const struct watch_message *message) {
    if (message->rank < 0 || message->rank >= watch->size)
        return;
    if (message->kind == WATCH_PING) {
        struct watch_message answer = {.kind = WATCH_PONG, .rank = watch->rank};
        watch->link.send(watch->link.context, message->rank, &answer);
    } else if (message->kind == WATCH_PONG) {
        for (struct watch_wait *wait = watch->waits; wait; wait = wait->next)
            if (wait->idle_root == message->rank)
                wait->heard = watch->now;
    } else {
        watch->states[message->rank] = *message;
        watch->states[message->rank].what[WATCH_WHAT_BYTES - 1] = '\0';
        watch->states[message->rank].comm[WATCH_COMM_BYTES - 1] = '\0';
        raise_alarm(watch);
    }
}

static void check_waits(struct watch *watch) {
    struct watch_message ping = {.kind = WATCH_PING, .rank = watch->rank};
    for (struct watch_wait *wait = watch->waits; wait; wait = wait->next) {
        double since = wait->idle_root < 0 ? wait->since : wait->heard;
        if (watch->now - since > watch->deadline + wait->extra) {
            raise_alarm(watch);
        } else if (wait->idle_root >= 0 && watch->now - wait->pinged >= watch->deadline / 4) {
            wait->pinged = watch->now;
            watch->link.send(watch->link.context, wait->idle_root, &ping);
        }
    }
}

static bool is_lowest_answer(const struct watch *watch) {
    for (int r = 0; r < watch->rank; r++)
        if (watch->states[r].kind >= 0)
            return false;
    return true;
}

/* Does not return. */
static void leave_job(struct watch *watch) {
    struct guard guard;
    if (is_lowest_answer(watch)) {
        print_report(watch);
        guard_start(&guard, ABORT_SECONDS, 1, NULL);
        if (guard.running)
            watch->link.end_job(watch->link.context, 1);
    }
    for (double end = base_seconds() + LEAVE_SECONDS; base_seconds() < end;)
        usleep(50000);
    _exit(1);
}

static void *watch_run(void *argument) {
    struct watch *watch = argument;
    double last = base_seconds();
    pthread_mutex_lock(&watch->mutex);
    while (!watch->stopped) {
        double now = base_seconds();
        watch->now += now - last < LONGEST_TICK ? now - last : LONGEST_TICK;
        last = now;
        struct watch_message message;
        while (watch->link.receive(watch->link.context, &message))
            handle_message(watch, &message);
        check_waits(watch);
        if (watch->alarm && watch->now - watch->alarm_since > ANSWER_SECONDS) {
            pthread_mutex_unlock(&watch->mutex);
            leave_job(watch);
        }
        wait_until(&watch->changed, &watch->mutex, TICK_SECONDS);
    }
    pthread_mutex_unlock(&watch->mutex);
    return NULL;
}

/* ---- open, close, enter, leave -------------------------------------------------------------------------------------------- */

int watch_open(const struct watch_link *link, int rank, int size, double deadline_seconds, const struct watch_peer *peers,
               struct watch **out) {
    struct watch *watch;
    int status;
    TRY(base_alloc(&watch, 1, sizeof *watch));
    watch->link = *link;
    watch->rank = rank;
    watch->size = size;
    watch->deadline = deadline_seconds;
    watch->peers = peers;
    pthread_mutex_init(&watch->mutex, NULL);
    monotonic_cond_init(&watch->changed);
    TRY_GOTO(base_alloc(&watch->states, (size_t)size, sizeof *watch->states));
    for (int r = 0; r < size; r++)
        watch->states[r].kind = -1;
    if (!start_thread(&watch->thread, watch_run, watch))
        FAIL_GOTO(STATUS_FAILED, "cannot start the watchdog's thread");
    watch->started = true;
    *out = watch;
    return STATUS_OK;
fail:
    watch_close(watch);
    return status;
}

void watch_stop(struct watch *watch) {
    if (!watch->started)
        return;
    pthread_mutex_lock(&watch->mutex);
    watch->stopped = true;
    pthread_cond_signal(&watch->changed);
    pthread_mutex_unlock(&watch->mutex);
    pthread_join(watch->thread, NULL);
    watch->started = false;
}

void watch_close(struct watch *watch) {
    if (!watch)
        return;
    watch_stop(watch);
    pthread_cond_destroy(&watch->changed);
    pthread_mutex_destroy(&watch->mutex);
    free(watch->states);
    free(watch);
}

void watch_enter(struct watch *watch, struct watch_wait *wait) {
    pthread_mutex_lock(&watch->mutex);
    wait->since = wait->heard = wait->pinged = watch->now;
    wait->next = watch->waits;
    wait->link = &watch->waits;
    if (wait->next)
        wait->next->link = &wait->next;
    watch->waits = wait;
    pthread_mutex_unlock(&watch->mutex);
}

void watch_leave(struct watch *watch, struct watch_wait *wait) {
    pthread_mutex_lock(&watch->mutex);
    *wait->link = wait->next;
    if (wait->next)
        wait->next->link = wait->link;
    snprintf(watch->last_what, sizeof watch->last_what, "%s", wait->what);
    watch->last_end = watch->now;
    pthread_mutex_unlock(&watch->mutex);
}

void watch_set_step(struct watch *watch, int64_t step) {
    pthread_mutex_lock(&watch->mutex);
    watch->step = step;
    pthread_mutex_unlock(&watch->mutex);
}
