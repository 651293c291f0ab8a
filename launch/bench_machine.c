/* The machine as the system describes it, and what this build was made of: without it a number means nothing. */
#include "launch/bench.h"

#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "kernels/rates.h"
#include "launch/units.h"

enum { TEXT_BYTES = 512, LINE_BYTES = 8192 };

static void add(struct bench *b, const char *item, const char *text) {
    bench_add(b, (struct bench_row){.section = "machine", .item = item, .note = text});
}

/* The value of the first line of /proc/cpuinfo that begins with `name`; "" when there is none. */
static void read_cpuinfo(const char *name, char *text, size_t bytes) {
    char line[LINE_BYTES];
    FILE *file = fopen("/proc/cpuinfo", "re");
    text[0] = '\0';
    while (file && !text[0] && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, name, strlen(name)) != 0 || !colon)
            continue;
        line[strcspn(line, "\n")] = '\0';
        snprintf(text, bytes, "%s", colon + 1 + (colon[1] == ' '));
    }
    if (file)
        fclose(file);
}

static void append(char *text, const char *word) {
    size_t used = strlen(text);
    snprintf(text + used, TEXT_BYTES - used, "%s%s", used ? " " : "", word);
}

/* Of the flags those that the program's speed depends on. */
static void find_flags(char text[TEXT_BYTES]) {
    static const char *const wanted[] = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16",
                                         "avx512_vnni", "amx_bf16", "asimd", "asimdhp", "sve", "bf16"};
    char flags[LINE_BYTES];
    text[0] = '\0';
    read_cpuinfo("flags", flags, sizeof flags);
    if (!flags[0])
        read_cpuinfo("Features", flags, sizeof flags);
    char *rest = NULL;
    for (char *flag = strtok_r(flags, " ", &rest); flag; flag = strtok_r(NULL, " ", &rest))
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
            if (strcmp(flag, wanted[i]) == 0)
                append(text, flag);
}

static const char *built_for(void) {
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "the compiler's default";
#endif
}

static void add_program(struct bench *b) {
    char text[TEXT_BYTES], now[64] = "";
    time_t seconds = time(NULL);
    struct tm utc;
    double load[3] = {0};
    gmtime_r(&seconds, &utc);
    strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", &utc);
    snprintf(text, sizeof text, "kvlinc %s, commit %s, built for %s with %s", KVLINC_VERSION, KVLINC_COMMIT, built_for(), __VERSION__);
    add(b, "program", text);
    if (getloadavg(load, 3) < 0)
        load[0] = -1;
    snprintf(text, sizeof text, "%s; load average %.2f, %.2f, %.2f when it began", now, load[0], load[1], load[2]);
    add(b, "time", text);
}

static void add_hardware(struct bench *b) {
    char text[TEXT_BYTES], flags[TEXT_BYTES], model[TEXT_BYTES / 2], memory[UNITS_TEXT], cache[UNITS_TEXT];
    struct utsname names;
    int64_t page = sysconf(_SC_PAGESIZE), last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
    read_cpuinfo("model name", model, sizeof model);
    if (uname(&names) == 0) {
        snprintf(text, sizeof text, "%s, %s %s", names.machine, names.sysname, names.release);
        add(b, "system", text);
    }
    snprintf(text, sizeof text, "%s, %ld cores, last-level cache %s", model[0] ? model : "unknown", sysconf(_SC_NPROCESSORS_ONLN),
             last_level > 0 ? units_bytes(last_level, cache) : "unknown");
    add(b, "cpu", text);
    find_flags(flags);
    add(b, "flags", flags);
    add(b, "memory", units_bytes(page * sysconf(_SC_PHYS_PAGES), memory));
}

void bench_machine(struct bench *b) {
    char text[TEXT_BYTES], library[TEXT_BYTES / 2];
    const struct place *place = &b->run->place;
    add_program(b);
    add_hardware(b);
    snprintf(text, sizeof text, "%d, %d on this host%s, %d thread%s each", comm_size(b->run->world), place->local_size,
             place->shared ? " (more than cores)" : "", b->n_threads, b->n_threads == 1 ? "" : "s");
    add(b, "ranks", text);
    comm_library(b->run->world, library, sizeof library);
    add(b, "mpi", library);
    add(b, "blas", rates_blas());
}
