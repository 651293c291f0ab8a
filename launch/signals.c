/* One flag per process: a signal handler can reach nothing else. */
#include "launch/signals.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

static volatile sig_atomic_t pending;

static void take(int number) {
    if (number == SIGINT && pending == SIGINT) {
        signal(SIGINT, SIG_DFL);
        raise(SIGINT);
    }
    pending = number;
}

int signals_install(void) {
    static const int asked[] = {SIGTERM, SIGINT, SIGUSR1};
    struct sigaction action = {.sa_handler = take, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < sizeof asked / sizeof asked[0]; i++)
        if (sigaction(asked[i], &action, NULL) != 0)
            FAIL(STATUS_FAILED, "cannot handle signal %s: %s", signals_name(asked[i]), strerror(errno));
    action.sa_handler = SIG_IGN;
    if (sigaction(SIGPIPE, &action, NULL) != 0)
        FAIL(STATUS_FAILED, "cannot ignore signal PIPE: %s", strerror(errno));
    return STATUS_OK;
}

int signals_pending(void) { return pending; }

const char *signals_name(int number) {
    return number == SIGTERM ? "TERM" : number == SIGINT ? "INT" : number == SIGUSR1 ? "USR1" : "?";
}
