/* The small pieces around the commands: progress in a log and on a terminal, the environment, signals, facts as text. */
#include <jansson.h>
#include <signal.h>

#include "launch/environment.h"
#include "launch/print_json.h"
#include "launch/progress.h"
#include "launch/signals.h"
#include "test.h"

enum { TEXT_BYTES = 4096 };

/* What was written to a temporary file so far. */
static const char *written(FILE *file) {
    static char text[TEXT_BYTES];
    fflush(file);
    rewind(file);
    size_t bytes = fread(text, 1, sizeof text - 1, file);
    text[bytes] = '\0';
    fseek(file, 0, SEEK_END);
    return text;
}

static void test_progress_log(void) {
    struct environment environment = {0};
    struct progress progress;
    FILE *file = tmpfile();
    progress_start(&progress, file, &environment, false);
    CHECK(!progress.live, "a file is no terminal");
    progress_update(&progress, "too early");
    progress.next = 0;
    progress_update(&progress, "%d of %d", 1, 2);
    progress_update(&progress, "too early again");
    log_info("a log line");
    progress_finish(&progress);
    CHECK(strcmp(written(file), "1 of 2\na log line\n") == 0, "'%s'", written(file));
    fclose(file);

    file = tmpfile();
    progress_start(&progress, file, &environment, true);
    progress.next = 0;
    progress_update(&progress, "nothing");
    progress_finish(&progress);
    CHECK(written(file)[0] == '\0', "quiet: '%s'", written(file));
    fclose(file);
}

static void test_progress_live(void) {
    struct environment environment = {0};
    struct progress progress;
    FILE *file = tmpfile();
    progress_start(&progress, file, &environment, false);
    progress.live = true; /* as if it were a terminal of six columns */
    progress.columns = 6;
    for (int i = 0; i < 2; i++) {
        progress.next = 0;
        progress_update(&progress, "%d 3456789", i);
    }
    log_warn("w");
    progress_finish(&progress);
    log_debug("not shown");
    static const char *const wanted = "0 345\r\033[K1 345\r\033[Kwarning: w\n1 345\r\033[K";
    CHECK(strcmp(written(file), wanted) == 0, "'%s'", written(file));
    fclose(file);
}

static void test_environment(void) {
    static const char *const ranks[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
    struct environment e;
    for (int i = 0; i < 4; i++)
        unsetenv(ranks[i]);
    unsetenv("OMP_NUM_THREADS");
    unsetenv("KVLINC_QUIET");
    unsetenv("COLUMNS");
    setenv("TERM", "xterm", 1);
    environment_read(&e);
    CHECK(e.threads == 0 && e.columns == 0 && e.launcher_rank == -1 && !e.quiet && !e.dumb_terminal);
    setenv("OMP_NUM_THREADS", "3,2", 1);
    setenv("COLUMNS", "many", 1);
    setenv("KVLINC_QUIET", "1", 1);
    setenv("TERM", "dumb", 1);
    environment_read(&e);
    CHECK(e.threads == 3 && e.columns == 0 && e.quiet && e.dumb_terminal, "%d %d", e.threads, e.columns);
    for (int i = 3; i >= 0; i--) { /* the first of the list wins */
        char text[8];
        snprintf(text, sizeof text, "%d", i);
        setenv(ranks[i], text, 1);
        environment_read(&e);
        CHECK(e.launcher_rank == i, "%s: %d", ranks[i], e.launcher_rank);
    }
    setenv("OMP_NUM_THREADS", "0", 1);
    environment_read(&e);
    CHECK(e.threads == 0);
}

static void test_signals(void) {
    REQUIRE(signals_install());
    CHECK(signals_pending() == 0);
    static const int asked[] = {SIGUSR1, SIGTERM, SIGINT};
    for (int i = 0; i < 3; i++) {
        raise(asked[i]);
        CHECK(signals_pending() == asked[i], "%s", signals_name(asked[i]));
    }
    CHECK(strcmp(signals_name(SIGTERM), "TERM") == 0 && strcmp(signals_name(SIGUSR1), "USR1") == 0);
    raise(SIGPIPE); /* ignored */
}

static void test_facts(void) {
    json_t *facts = json_pack("{s:s, s:I, s:[i,i], s:b, s:n, s:{s:f}, s:[{s:s, s:I}, {s:s, s:I}]}", "a_name", "text", "held_bytes",
                              (json_int_t)2048, "ids", 1, 2, "tied", 1, "none", "part", "x", 0.5, "rows", "type", "Q4", "bytes",
                              (json_int_t)1, "type", "F32", "bytes", (json_int_t)(5 << 20));
    CHECK(facts != NULL);
    FILE *file = tmpfile();
    print_json_text(file, facts);
    static const char *const wanted = "a name            text\n"
                                      "held              2.00 KiB\n"
                                      "ids               1, 2\n"
                                      "tied              yes\n"
                                      "none              none\n"
                                      "part\n"
                                      "    x             0.5\n"
                                      "rows\n"
                                      "    type     bytes\n"
                                      "    Q4     1 bytes\n"
                                      "    F32   5.00 MiB\n";
    CHECK(strcmp(written(file), wanted) == 0, "\n%s", written(file));
    fclose(file);
    json_decref(facts);
}

int main(void) {
    test_progress_log();
    test_progress_live();
    test_environment();
    test_signals();
    test_facts();
    return test_report();
}
