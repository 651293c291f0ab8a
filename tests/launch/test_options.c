/* The option table: every row can be given, is in the help of its commands and only there, refuses what it must; config files,
 * precedence, sizes, nearest names. Also the small pieces beside it: quantities, the progress line. */
#include <stdlib.h>
#include <unistd.h>

#include "launch/option_table.h"
#include "launch/progress.h"
#include "launch/run.h"
#include "launch/units.h"
#include "test.h"

enum { MAX_ARGUMENTS = 64 };

static const enum options_command ALL[] = {OPTIONS_GENERATE, OPTIONS_BATCH, OPTIONS_INSPECT, OPTIONS_BENCH, OPTIONS_PLAN};
enum { N_ALL = sizeof ALL / sizeof ALL[0] };

/* Arguments up to NULL; the caller frees the options. */
#define PARSE(command, out, ...) parse((command), (out), (const char *[]){__VA_ARGS__ __VA_OPT__(, ) NULL})
static int parse(enum options_command command, struct options *out, const char *const *arguments) {
    static char *copy[MAX_ARGUMENTS];
    int n = 0;
    for (; arguments[n]; n++) {
        free(copy[n]); /* values point into the last call's arguments */
        copy[n] = strdup(arguments[n]);
    }
    return options_parse(command, n, copy, out);
}

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    if (!file || fputs(text, file) < 0 || fclose(file) != 0) {
        fprintf(stderr, "cannot write %s\n", path);
        exit(1);
    }
}

/* A text that the row's kind and range allow. */
static void allowed_text(const struct option *option, char text[64]) {
    switch (option->kind) {
    case OPTION_FLAG:
        snprintf(text, 64, "yes");
        break;
    case OPTION_CHOICE:
        snprintf(text, 64, "%.*s", (int)strcspn(option->values, " "), option->values);
        break;
    case OPTION_TEXT:
    case OPTION_TEXTS:
        snprintf(text, 64, "some text");
        break;
    default:
        snprintf(text, 64, "%.15g", option->least);
    }
}

static void test_every_row(void) {
    for (int i = 0; i < option_table_size; i++) {
        const struct option *option = &option_table[i];
        if (strcmp(option->name, "config") == 0 || strcmp(option->name, "help") == 0)
            continue;
        for (int j = i + 1; j < option_table_size; j++)
            CHECK(strcmp(option->name, option_table[j].name) != 0, "%s stands twice", option->name);
        for (int c = 0; c < N_ALL; c++) {
            struct options options;
            char value[64], argument[128];
            allowed_text(option, value);
            snprintf(argument, sizeof argument, "--%s=%s", option->name, value);
            if (!(option->commands & ALL[c])) {
                CHECK_FAILS(PARSE(ALL[c], &options, argument), STATUS_USAGE, option->name);
                options_free(&options);
                continue;
            }
            CHECK(PARSE(ALL[c], &options, argument) == STATUS_OK, "%s: %s", argument, base_error());
            base_clear_error();
            CHECK(options_given(&options, option->name), "%s", option->name);
            options_free(&options);
            if (option->kind == OPTION_FLAG)
                continue;
            snprintf(argument, sizeof argument, "--%s", option->name);
            CHECK(PARSE(ALL[c], &options, argument, value) == STATUS_OK, "%s: %s", argument, base_error());
            base_clear_error();
            options_free(&options);
            CHECK_FAILS(PARSE(ALL[c], &options, argument), STATUS_USAGE, "needs a value");
        }
    }
}

static void test_help(void) {
    for (int c = 0; c < N_ALL; c++) {
        char *text = options_help(ALL[c], "About it.");
        CHECK(text != NULL, "no help");
        for (int i = 0; text && i < option_table_size; i++) {
            char name[64];
            snprintf(name, sizeof name, "\n  --%s ", option_table[i].name);
            bool there = strstr(text, name) != NULL, wanted = option_table[i].commands & ALL[c];
            CHECK(there == wanted, "%s in the help of %s", name, options_command_name(ALL[c]));
            CHECK(option_table[i].help && option_table[i].help[0], "%s", name);
        }
        for (const char *line = text; line && *line;) {
            size_t bytes = strcspn(line, "\n");
            CHECK(bytes <= 100, "a line of %zu bytes: %.*s", bytes, (int)bytes, line);
            line += bytes + (line[bytes] == '\n');
        }
        free(text);
    }
    struct options options;
    CHECK(PARSE(OPTIONS_GENERATE, &options, "--wrong", "--help") == STATUS_OK && options.help, "help comes before complaints");
}

static void test_defaults(void) {
    struct options o;
    REQUIRE(PARSE(OPTIONS_GENERATE, &o));
    CHECK(strcmp(o.engine.device, "auto") == 0 && strcmp(o.engine.comm, "auto") == 0 && strcmp(o.engine.merge, "auto") == 0);
    CHECK(strcmp(o.engine.cache, "kvlinc") == 0 && strcmp(o.engine.weights, "auto") == 0);
    CHECK(strcmp(o.engine.correction, "auto") == 0 && !o.engine.calibration && !o.prefill && !o.engine.k_bits);
    CHECK(o.engine.window == -1 && o.engine.sink == -1 && o.engine.context == 0 && o.engine.cache_memory == 0);
    CHECK(o.engine.dp == 0 && o.engine.tp == 0 && o.engine.cp == 0 && o.engine.max_batch == 0 && o.engine.threads == 0);
    CHECK(o.deadline == 60 && o.max_tokens == 256 && o.n == 1 && o.temperature == 1 && o.top_p == 1);
    CHECK(o.repetition_penalty == 1 && o.presence_penalty == 0 && o.logprobs == -1 && o.n_stop == 0 && o.seed == 0);
    CHECK(!o.chat && !o.json && !o.quiet && !options_given(&o, "max-tokens"));
}

static void test_values(void) {
    struct options o;
    REQUIRE(PARSE(OPTIONS_GENERATE, &o, "--cache", "kivi", "--cp=4", "--window", "256", "--sink=16", "--cache-memory", "1.5G",
                  "--temperature", "0.7", "--stop", "a", "--stop=b", "--stop", "", "--seed", "9223372036854775807", "--chat",
                  "--ignore-eos=no", "--context", "131072", "--presence-penalty", "-1.5", "--prompt=--x", "--prompt", "last"));
    CHECK(strcmp(o.engine.cache, "kivi") == 0 && o.engine.cp == 4 && o.engine.window == 256 && o.engine.sink == 16);
    CHECK(o.engine.cache_memory == 3ll << 29 && o.temperature == 0.7f && o.engine.context == 131072);
    CHECK(o.n_stop == 3 && strcmp(o.stop[0], "a") == 0 && strcmp(o.stop[1], "b") == 0 && o.stop[2][0] == '\0');
    CHECK(o.seed == INT64_MAX && o.chat && !o.ignore_eos && o.presence_penalty == -1.5f);
    CHECK(strcmp(o.prompt, "last") == 0, "the last one wins: %s", o.prompt);
}

static void test_refusals(void) {
    static const struct {
        const char *argument, *words;
    } rows[] = {
        {"--temprature=1", "--temperature"},
        {"--max_tokens=1", "the nearest is --max-tokens"},
        {"--a-very-long-name-that-is-no-option-at-all=1", "unknown option"},
        {"--cache=kvlink", "option --cache: 'kvlink' is not allowed: one of fp16 bf16 f32 kivi hadv kvlinc"},
        {"--cache=", "is not allowed"},
        {"--cache=fp16 bf16", "is not allowed"},
        {"--merge=all", "allreduce fused gather"},
        {"--window=100", "128 to"},
        {"--window=200", "a multiple of 128"},
        {"--sink=24", "a multiple of 16"},
        {"--sink=144", "0 to 128"},
        {"--cp=0", "option --cp: 0 is not allowed: 1 to"},
        {"--cp=x", "not a whole number"},
        {"--cp=4x", "not a whole number"},
        {"--cp=99999999999999999999", "not a whole number"},
        {"--temperature=nan", "not a number"},
        {"--temperature=", "not a number"},
        {"--temperature=2.5", "0 to 2"},
        {"--top-p=1.01", "0 to 1"},
        {"--seed=-1", "whole number from 0"},
        {"--deadline=0", "1 to 86400"},
        {"--chat=maybe", "yes or no"},
        {"--input=x", "option --input is not of generate but of batch"},
        {"--tensors", "but of inspect"},
        {"prompt", "unexpected argument 'prompt'"},
        {"--", "unexpected argument"},
        {"-x", "unexpected argument"},
        {"--n=129", "1 to 128"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct options o;
        CHECK_FAILS(PARSE(OPTIONS_GENERATE, &o, rows[i].argument), STATUS_USAGE, rows[i].words);
        options_free(&o);
    }
    struct options o;
    CHECK_FAILS(PARSE(OPTIONS_GENERATE, &o, "--model", "--cp", "4"), STATUS_USAGE, "--model needs a value");
    CHECK_FAILS(PARSE(OPTIONS_GENERATE, &o, "--quiet", "--verbose"), STATUS_USAGE, "exclude");
    const char *many[2 * OPTIONS_MAX_STOP + 4] = {NULL};
    for (int i = 0; i <= OPTIONS_MAX_STOP; i++)
        many[i] = "--stop=x";
    CHECK_FAILS(parse(OPTIONS_GENERATE, &o, many), STATUS_USAGE, "more than 16");
}

static void test_sizes(void) {
    static const struct {
        const char *text;
        int64_t bytes;
    } rows[] = {{"0", 0},          {"1", 1},          {"512M", 512ll << 20}, {"8G", 8ll << 30}, {"8g", 8ll << 30},
                {"1.5K", 1536},    {"2T", 2ll << 40}, {"123456789012", 123456789012}, {"0.5k", 512}};
    int64_t bytes;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        bytes = -1;
        CHECK(options_parse_size(rows[i].text, &bytes) == STATUS_OK && bytes == rows[i].bytes, "%s: %lld", rows[i].text,
              (long long)bytes);
    }
    static const char *const wrong[] = {"", "G", "8GB", "8 G", "-1", "1e9", "0x10", "8Gx", "nan", "99999999T", " 8G", "1..5G"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK_FAILS(options_parse_size(wrong[i], &bytes), STATUS_USAGE, "is not a number of bytes");
}

static void test_config(const char *folder) {
    char path[256], missing[300];
    struct options o;
    snprintf(path, sizeof path, "%s/a.conf", folder);
    snprintf(missing, sizeof missing, "%s/missing.conf", folder);
    write_file(path, "# a comment\n\n  cache =  kivi # why\ncp=2\r\nprompt = a # b#c\nstop = x#y\nstop = z\nchat = yes\n"
                     "input = rows.jsonl\nwindow = 256");
    REQUIRE(PARSE(OPTIONS_GENERATE, &o, "--cp", "4", "--config", path));
    CHECK(strcmp(o.engine.cache, "kivi") == 0 && o.engine.cp == 4, "the command line wins: %d", o.engine.cp);
    CHECK(strcmp(o.prompt, "a") == 0 && o.n_stop == 2 && strcmp(o.stop[0], "x#y") == 0 && strcmp(o.stop[1], "z") == 0);
    CHECK(o.chat && o.engine.window == 256 && !o.input && options_given(&o, "window") && !options_given(&o, "input"));
    options_free(&o);
    REQUIRE(PARSE(OPTIONS_GENERATE, &o, "--config", path, "--stop", "only"));
    CHECK(o.n_stop == 1 && strcmp(o.stop[0], "only") == 0, "a list is replaced, not joined");
    options_free(&o);
    REQUIRE(PARSE(OPTIONS_BATCH, &o, "--config", path));
    CHECK(strcmp(o.input, "rows.jsonl") == 0 && !o.prompt && o.engine.cp == 2);
    options_free(&o);
    CHECK_FAILS(PARSE(OPTIONS_GENERATE, &o, "--config", missing), STATUS_INPUT, "missing.conf: No such file");
    options_free(&o);
    static const struct {
        const char *text, *words;
    } wrong[] = {
        {"cp = 2\ncahce = kivi\n", "a.conf:2: unknown option 'cahce'; the nearest is 'cache'"},
        {"cache kivi\n", "a.conf:1: 'cache kivi' is not of the form"},
        {"\n\ncache = kvi\n", "a.conf:3: cache: 'kvi' is not allowed: one of fp16"},
        {"cp = 2\ncp = 3\n", "a.conf:2: 'cp' stands there twice"},
        {"config = b.conf\n", "may not stand in a config file"},
        {"= 3\n", "unknown option ''"},
        {"cp =\n", "not a whole number"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        write_file(path, wrong[i].text);
        CHECK_FAILS(PARSE(OPTIONS_GENERATE, &o, "--config", path), STATUS_INPUT, wrong[i].words);
        options_free(&o);
    }
    unlink(path);
}

static void test_shipped_configs(void) {
    static const char *const names[] = {"kivi", "rotation", "correction-0-9", "k4v2", "exact"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[512];
        struct options o;
        snprintf(path, sizeof path, "%s/../configs/cache/%s.conf", KVLINC_TESTS, names[i]);
        for (int c = 0; c < 2; c++) {
            CHECK(PARSE(ALL[c], &o, "--config", path) == STATUS_OK, "%s", base_error());
            base_clear_error();
            CHECK(options_given(&o, "cache"), "%s", path);
            options_free(&o);
        }
    }
}

static void test_small_pieces(void) {
    char text[UNITS_TEXT];
    CHECK(strcmp(units_bytes(0, text), "0 bytes") == 0, "%s", text);
    CHECK(strcmp(units_bytes(999, text), "999 bytes") == 0, "%s", text);
    CHECK(strcmp(units_bytes(1000, text), "0.98 KiB") == 0, "%s", text);
    CHECK(strcmp(units_bytes(98057216, text), "93.5 MiB") == 0, "%s", text);
    CHECK(strcmp(units_bytes(3ll << 40, text), "3.00 TiB") == 0, "%s", text);
    char line[32] = "a\xc3\xa4\xe2\x82\xac" "b";
    progress_cut(line, 4);
    CHECK(strcmp(line, "a\xc3\xa4\xe2\x82\xac" "b") == 0);
    progress_cut(line, 2);
    CHECK(strcmp(line, "a\xc3\xa4") == 0);
    progress_cut(line, 0);
    CHECK(line[0] == '\0');
    CHECK(run_exit_code(STATUS_OK) == 0 && run_exit_code(STATUS_USAGE) == 2 && run_exit_code(STATUS_INPUT) == 2);
    CHECK(run_exit_code(STATUS_INTERRUPTED) == 75 && run_exit_code(STATUS_FAILED) == 1 && run_exit_code(STATUS_MEMORY) == 1);
    CHECK(run_exit_code(STATUS_TIMEOUT) == 1);
}

int main(void) {
    char folder[] = "/tmp/kvlinc_options_XXXXXX";
    if (!mkdtemp(folder))
        return 1;
    test_every_row();
    test_help();
    test_defaults();
    test_values();
    test_refusals();
    test_sizes();
    test_config(folder);
    test_shipped_configs();
    test_small_pieces();
    rmdir(folder);
    return test_report();
}
