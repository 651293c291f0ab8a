/* A job of several ranks as seen from outside: started through launch/mpirun.sh, its output and exit code, and whether all of its
 * processes are gone. Each rank prints "[pid 123]" first. For the tests of the watchdog, whose programs play both parts. */
#pragma once

#include "test.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { JOB_MOST_RANKS = 8, JOB_OUTPUT_BYTES = 65536 };

struct job {
    int n_ranks;
    double suspend; /* seconds for which all ranks are stopped meanwhile; 0: not at all */
    int code;       /* exit code; -1: by a signal or not in time */
    double seconds;
    char output[JOB_OUTPUT_BYTES];
    int n_pids, pids[JOB_MOST_RANKS];
};

static inline void job_find_pids(struct job *job) {
    job->n_pids = 0;
    for (const char *at = job->output; (at = strstr(at, "[pid ")) && strchr(at, ']') && job->n_pids < JOB_MOST_RANKS; at++)
        job->pids[job->n_pids++] = atoi(at + 5);
}

static inline void job_signal(const struct job *job, int number) {
    for (int i = 0; i < job->n_pids; i++)
        kill(job->pids[i], number);
}

/* Reads until the end of the output. */
static inline void job_read(struct job *job, int fd, double limit) {
    double begin = base_seconds();
    size_t n = 0;
    for (int phase = 0;;) {
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        double now = base_seconds() - begin;
        if (now > limit || n + 1 >= JOB_OUTPUT_BYTES)
            return;
        if (poll(&wait, 1, 50) > 0) {
            ssize_t got = read(fd, job->output + n, JOB_OUTPUT_BYTES - 1 - n);
            if (got <= 0)
                return;
            n += (size_t)got;
            job_find_pids(job);
        }
        if (job->suspend > 0 && phase == 0 && job->n_pids == job->n_ranks && now > 1.5) {
            job_signal(job, SIGSTOP);
            phase = 1;
        } else if (phase == 1 && now > 1.5 + job->suspend) {
            job_signal(job, SIGCONT);
            phase = 2;
        }
    }
}

static inline void job_run(struct job *job, int n_ranks, double suspend, char *const *command, double limit) {
    int ends[2], status = 0;
    memset(job, 0, sizeof *job);
    job->n_ranks = n_ranks;
    job->suspend = suspend;
    job->code = -1;
    double begin = base_seconds();
    CHECK(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        execvp(command[0], command);
        _exit(127);
    }
    close(ends[1]);
    job_read(job, ends[0], limit);
    close(ends[0]);
    for (; waitpid(child, &status, WNOHANG) == 0; usleep(10000))
        if (base_seconds() - begin > limit) {
            kill(child, SIGKILL);
            job_signal(job, SIGKILL);
        }
    job->seconds = base_seconds() - begin;
    if (WIFEXITED(status))
        job->code = WEXITSTATUS(status);
}

static inline void job_check_gone(const struct job *job) {
    CHECK(job->n_pids == job->n_ranks, "%d ranks told their pid: %s", job->n_pids, job->output);
    for (int i = 0; i < job->n_pids; i++) {
        bool gone = false;
        for (int k = 0; k < 100 && !(gone = kill(job->pids[i], 0) < 0 && errno == ESRCH); k++)
            usleep(20000);
        CHECK(gone, "process %d is still there", job->pids[i]);
    }
    job_signal(job, SIGKILL);
}

/* The program `self` on n ranks, with two arguments: what happens, and the digits of the ranks that do it. */
static inline void job_run_ranks(struct job *job, int n_ranks, double suspend, char *self, const char *mode, const char *chosen) {
    char launch[] = KVLINC_TESTS "/../launch/mpirun.sh", np[] = "-np", n[8], a[16], b[16];
    snprintf(n, sizeof n, "%d", n_ranks);
    snprintf(a, sizeof a, "%s", mode);
    snprintf(b, sizeof b, "%s", chosen);
    char *command[] = {launch, np, n, self, a, b, NULL};
    job_run(job, n_ranks, suspend, command, 60);
    job_check_gone(job);
}

static inline int job_count(const char *text, const char *words) {
    int n = 0;
    for (; (text = strstr(text, words)); text += strlen(words))
        n++;
    return n;
}

/* `words` up to NULL must all stand in the output; a report must be there once, unless a rank was killed: then the launcher ends it. */
static inline void job_check_ends(int n_ranks, char *self, const char *mode, const char *chosen, double limit,
                                  const char *const *words) {
    struct job *job = malloc(sizeof *job);
    job_run_ranks(job, n_ranks, 0, self, mode, chosen);
    CHECK(job->code > 0, "%s %s: exit code %d: %s", mode, chosen, job->code, job->output);
    CHECK(job->seconds < limit, "%s %s: %.1f s: %s", mode, chosen, job->seconds, job->output);
    for (; *words; words++)
        CHECK(strstr(job->output, *words), "%s %s: no '%s' in: %s", mode, chosen, *words, job->output);
    int reports = job_count(job->output, "no progress for");
    CHECK(reports == (strcmp(mode, "kill") != 0), "%s %s: %d reports: %s", mode, chosen, reports, job->output);
    free(job);
}

/* This program's file. */
static inline void job_find_self(char *path, size_t bytes) {
    ssize_t n = readlink("/proc/self/exe", path, bytes - 1);
    CHECK(n > 0);
    path[n > 0 ? n : 0] = '\0';
}
