/* Parsing and checking by the table of option_table.c: defaults, then the command line, then what the config file adds. */
#include "launch/options.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "launch/option_table.h"

enum {
    CONFIG_MAX_BYTES = 1 << 20, /* a config file is small: more is some other file */
    NAME_BYTES = 32,            /* longest option name */
    HELP_WIDTH = 100,
    HELP_INDENT = 29,
};

static const struct {
    enum options_command command;
    const char *name;
} command_names[] = {{OPTIONS_GENERATE, "generate"}, {OPTIONS_BATCH, "batch"}, {OPTIONS_INSPECT, "inspect"},
                     {OPTIONS_BENCH, "bench"},       {OPTIONS_PLAN, "plan"}};
enum { N_COMMANDS = sizeof command_names / sizeof command_names[0] };

const char *options_command_name(enum options_command command) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (command_names[i].command == command)
            return command_names[i].name;
    return "";
}

static const struct option *find_option(const char *name, size_t bytes) {
    for (int i = 0; i < option_table_size; i++)
        if (strlen(option_table[i].name) == bytes && memcmp(option_table[i].name, name, bytes) == 0)
            return &option_table[i];
    return NULL;
}

bool options_given(const struct options *options, const char *name) {
    const struct option *option = find_option(name, strlen(name));
    return option && options->given[option - option_table];
}

/* Levenshtein distance. */
static int name_distance(const char *a, size_t n_a, const char *b) {
    int row[NAME_BYTES + 1];
    int n_b = (int)strlen(b);
    for (int j = 0; j <= n_b; j++)
        row[j] = j;
    for (size_t i = 0; i < n_a; i++) {
        int diagonal = row[0];
        row[0] = (int)i + 1;
        for (int j = 0; j < n_b; j++) {
            int replaced = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            int moved = (row[j] < row[j + 1] ? row[j] : row[j + 1]) + 1;
            row[j + 1] = replaced < moved ? replaced : moved;
        }
    }
    return row[n_b];
}

static const char *nearest_name(enum options_command command, const char *name, size_t bytes) {
    const char *nearest = "help";
    int least = NAME_BYTES;
    if (bytes > NAME_BYTES)
        return nearest;
    for (int i = 0; i < option_table_size; i++) {
        if (!(option_table[i].commands & command))
            continue;
        int distance = name_distance(name, bytes, option_table[i].name);
        if (distance < least) {
            least = distance;
            nearest = option_table[i].name;
        }
    }
    return nearest;
}

/* ---- values ----------------------------------------------------------------------------------------------------------- */

int options_parse_size(const char *text, int64_t *bytes) {
    char *end;
    errno = 0;
    double value = isdigit((unsigned char)text[0]) ? strtod(text, &end) : (end = NULL, 0);
    const char *unit = end ? end : "?";
    double factor = 1;
    if (*unit && strchr("KMGTkmgt", *unit)) {
        const char *units = "KMGT";
        factor = pow(1024, (double)(strchr(units, toupper((unsigned char)*unit)) - units) + 1);
        unit++;
    }
    if (*unit || errno || strpbrk(text, "eExXpP") || value * factor > 9e18)
        FAIL(STATUS_USAGE, "'%s' is not a number of bytes, such as 8G, 1.5G or 512M", text);
    *bytes = (int64_t)(value * factor);
    return STATUS_OK;
}

static int parse_whole(const char *text, int64_t *value) {
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (!(isdigit((unsigned char)text[0]) || (text[0] == '-' && isdigit((unsigned char)text[1]))) || *end || errno)
        FAIL(STATUS_USAGE, "'%s' is not a whole number", text);
    *value = number;
    return STATUS_OK;
}

static int parse_real(const char *text, double *value) {
    char *end;
    errno = 0;
    *value = strtod(text, &end);
    if (end == text || isspace((unsigned char)text[0]) || *end || errno == ERANGE || !isfinite(*value))
        FAIL(STATUS_USAGE, "'%s' is not a number", text);
    return STATUS_OK;
}

static int parse_seed(const char *text, uint64_t *value) {
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (!isdigit((unsigned char)text[0]) || *end || errno)
        FAIL(STATUS_USAGE, "'%s' is not a whole number from 0 to 9223372036854775807", text); /* what JSON readers hold */
    *value = (uint64_t)number;
    return STATUS_OK;
}

static int parse_flag(const char *text, bool *value) {
    static const char *const words[2][4] = {{"no", "false", "off", "0"}, {"yes", "true", "on", "1"}};
    for (int yes = 0; yes < 2; yes++)
        for (int i = 0; i < 4; i++)
            if (!text || strcasecmp(text, words[yes][i]) == 0) {
                *value = !text || yes;
                return STATUS_OK;
            }
    FAIL(STATUS_USAGE, "'%s' is not allowed: yes or no", text);
}

/* The word of the table, which outlives the caller's text. */
static int parse_choice(const struct option *option, const char *text, const char **value) {
    size_t bytes = strlen(text);
    for (const char *word = option->values; *word;) {
        size_t length = strcspn(word, " ");
        if (length == bytes && bytes && memcmp(word, text, bytes) == 0) {
            *value = text;
            return STATUS_OK;
        }
        word += length + (word[length] == ' ');
    }
    FAIL(STATUS_USAGE, "'%s' is not allowed: one of %s", text, option->values);
}

static int check_number(const struct option *option, const char *text, double value) {
    if ((option->least || option->most) && (value < option->least || value > option->most))
        FAIL(STATUS_USAGE, "%s is not allowed: %.15g to %.15g", text, option->least, option->most);
    if (option->multiple && (int64_t)value % option->multiple != 0)
        FAIL(STATUS_USAGE, "%s is not allowed: a multiple of %d", text, option->multiple);
    return STATUS_OK;
}

static int store_number(const struct option *option, const char *text, void *field) {
    int64_t whole = 0;
    double real = 0;
    if (option->kind == OPTION_REAL || option->kind == OPTION_SECONDS)
        TRY(parse_real(text, &real));
    else if (option->kind == OPTION_SIZE)
        TRY(options_parse_size(text, &whole));
    else
        TRY(parse_whole(text, &whole));
    bool is_real = option->kind == OPTION_REAL || option->kind == OPTION_SECONDS;
    TRY(check_number(option, text, is_real ? real : (double)whole));
    if (option->kind == OPTION_REAL)
        *(float *)field = (float)real;
    else if (option->kind == OPTION_SECONDS)
        *(double *)field = real;
    else if (option->kind == OPTION_INT)
        *(int *)field = (int)whole;
    else
        *(int64_t *)field = whole;
    return STATUS_OK;
}

static int store_value(const struct option *option, const char *text, struct options *out) {
    void *field = (char *)out + option->offset;
    switch (option->kind) {
    case OPTION_FLAG:
        return parse_flag(text, field);
    case OPTION_TEXT:
        *(const char **)field = text;
        return STATUS_OK;
    case OPTION_TEXTS:
        if (out->n_stop == OPTIONS_MAX_STOP)
            FAIL(STATUS_USAGE, "given more than %d times", OPTIONS_MAX_STOP);
        ((const char **)field)[out->n_stop++] = text;
        return STATUS_OK;
    case OPTION_CHOICE:
        return parse_choice(option, text, field);
    case OPTION_SEED:
        return parse_seed(text, field);
    default:
        return store_number(option, text, field);
    }
}

static int set_defaults(struct options *out) {
    memset(out, 0, sizeof *out);
    out->engine.window = out->engine.sink = -1; /* the preset's: beyond what a user may write */
    out->logprobs = -1;                         /* none; 0 asks for the tokens' own */
    for (int i = 0; i < option_table_size; i++)
        if (option_table[i].initial)
            TRY(store_value(&option_table[i], option_table[i].initial, out));
    return STATUS_OK;
}

/* ---- where values come from ------------------------------------------------------------------------------------------- */

static int fail_not_taken(enum options_command command, const struct option *option) {
    char takers[64] = "";
    for (int i = 0; i < N_COMMANDS; i++)
        if (option->commands & command_names[i].command) {
            size_t used = strlen(takers);
            snprintf(takers + used, sizeof takers - used, "%s%s", used ? ", " : "", command_names[i].name);
        }
    FAIL(STATUS_USAGE, "option --%s is not of %s but of %s", option->name, options_command_name(command), takers);
}

/* One argument, and the next where that is the value. *index moves on. */
static int parse_argument(enum options_command command, int argc, char **argv, int *index, struct options *out) {
    const char *argument = argv[(*index)++];
    const char *name = argument + 2;
    bool what = command == OPTIONS_BENCH && argument[0] != '-'; /* kvlinc bench decode is kvlinc bench --what decode */
    if (strcmp(argument, "-h") == 0)
        name = "help";
    else if (what)
        name = "what";
    else if (strncmp(argument, "--", 2) != 0 || !*name)
        FAIL(STATUS_USAGE, "unexpected argument '%s': options are written --name value", argument);
    size_t bytes = strcspn(name, "=");
    const struct option *option = find_option(name, bytes);
    if (!option)
        FAIL(STATUS_USAGE, "unknown option --%.*s; the nearest is --%s (kvlinc %s --help lists all)", (int)bytes, name,
             nearest_name(command, name, bytes), options_command_name(command));
    if (!(option->commands & command))
        return fail_not_taken(command, option);
    const char *value = what ? argument : name[bytes] == '=' ? name + bytes + 1 : NULL;
    if (!value && option->kind != OPTION_FLAG) {
        if (*index >= argc || strncmp(argv[*index], "--", 2) == 0)
            FAIL(STATUS_USAGE, "option --%s needs a value (one that begins with -- is written --%s=VALUE)", option->name,
                 option->name);
        value = argv[(*index)++];
    }
    int status = store_value(option, value, out);
    if (status < 0)
        base_error_prefix("option --%s: ", option->name);
    out->given[option - option_table] = true;
    return status;
}

static char *trim(char *text) {
    while (isspace((unsigned char)*text))
        text++;
    char *end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1]))
        end--;
    *end = '\0';
    return text;
}

/* A comment begins with a # at the start of a line or after white space. */
static void cut_comment(char *line) {
    for (char *c = line; *c; c++)
        if (*c == '#' && (c == line || isspace((unsigned char)c[-1]))) {
            *c = '\0';
            return;
        }
}

/* `from_line`: options that the command line gave; `in_file`: those that the file gave before. */
static int parse_line(enum options_command command, char *line, const bool *from_line, bool *in_file, struct options *out) {
    cut_comment(line);
    char *name = trim(line);
    if (!*name)
        return STATUS_OK;
    char *equals = strchr(name, '=');
    if (!equals)
        FAIL(STATUS_INPUT, "'%s' is not of the form name = value", name);
    *equals = '\0';
    char *value = trim(equals + 1);
    name = trim(name);
    const struct option *option = find_option(name, strlen(name));
    if (!option)
        FAIL(STATUS_INPUT, "unknown option '%s'; the nearest is '%s'", name, nearest_name(command, name, strlen(name)));
    int row = (int)(option - option_table);
    if (strcmp(name, "config") == 0 || strcmp(name, "help") == 0)
        FAIL(STATUS_INPUT, "'%s' may not stand in a config file", name);
    if (in_file[row] && option->kind != OPTION_TEXTS)
        FAIL(STATUS_INPUT, "'%s' stands there twice", name);
    in_file[row] = true;
    if (from_line[row] || !(option->commands & command))
        return STATUS_OK;
    if (store_value(option, value, out) < 0) {
        base_error_prefix("%s: ", name);
        return STATUS_INPUT;
    }
    out->given[row] = true;
    return STATUS_OK;
}

static int read_config(const char *path, char **text) {
    int status = STATUS_OK;
    char *memory = NULL;
    FILE *file = fopen(path, "re");
    if (!file)
        FAIL(STATUS_INPUT, "config file %s: %s", path, strerror(errno));
    TRY_GOTO(base_alloc(&memory, CONFIG_MAX_BYTES + 1, 1));
    size_t bytes = fread(memory, 1, CONFIG_MAX_BYTES, file);
    if (ferror(file))
        FAIL_GOTO(STATUS_INPUT, "config file %s: %s", path, strerror(errno));
    if (bytes == CONFIG_MAX_BYTES || memchr(memory, '\0', bytes))
        FAIL_GOTO(STATUS_INPUT, "config file %s: not a text of at most %d bytes", path, CONFIG_MAX_BYTES);
    fclose(file);
    *text = memory;
    return STATUS_OK;
fail:
    fclose(file);
    free(memory);
    return status;
}

static int parse_config(enum options_command command, struct options *out) {
    bool from_line[OPTIONS_MAX_TABLE], in_file[OPTIONS_MAX_TABLE] = {false};
    memcpy(from_line, out->given, sizeof from_line);
    TRY(read_config(out->config, &out->file_text));
    char *line = out->file_text;
    for (int number = 1; line; number++) {
        char *next = strchr(line, '\n');
        if (next)
            *next++ = '\0';
        int status = parse_line(command, line, from_line, in_file, out);
        if (status < 0) {
            base_error_prefix("%s:%d: ", out->config, number);
            return status;
        }
        line = next;
    }
    return STATUS_OK;
}

int options_parse(enum options_command command, int argc, char **argv, struct options *out) {
    TRY(set_defaults(out));
    for (int i = 0; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            out->help = true;
            return STATUS_OK;
        }
    for (int i = 0; i < argc;)
        TRY(parse_argument(command, argc, argv, &i, out));
    if (out->config)
        TRY(parse_config(command, out));
    if (out->verbose && out->quiet)
        FAIL(STATUS_USAGE, "--verbose and --quiet exclude each other");
    return STATUS_OK;
}

void options_free(struct options *options) {
    free(options->file_text);
    options->file_text = NULL;
}

/* ---- help ------------------------------------------------------------------------------------------------------------- */

/* Prints words from column HELP_INDENT on, broken at HELP_WIDTH. */
static void print_wrapped(FILE *stream, const char *text) {
    int column = HELP_INDENT;
    while (*text) {
        int length = (int)strcspn(text, " ");
        if (column + length > HELP_WIDTH && column > HELP_INDENT) {
            fprintf(stream, "\n%*s", HELP_INDENT, "");
            column = HELP_INDENT;
        }
        fprintf(stream, "%s%.*s", column > HELP_INDENT ? " " : "", length, text);
        column += length + 1;
        text += length + (text[length] == ' ');
    }
    fputc('\n', stream);
}

static void print_option(FILE *stream, const struct option *option) {
    char left[64], text[512];
    bool choice = option->kind == OPTION_CHOICE;
    snprintf(left, sizeof left, "  --%s%s%s", option->name, option->kind == OPTION_FLAG ? "" : " ",
             choice ? "WORD" : option->values ? option->values : "");
    const char *standard = option->initial ? option->initial : option->standard;
    snprintf(text, sizeof text, "%s%s%s%s%s%s", option->help, choice ? "; one of " : "", choice ? option->values : "",
             standard ? " (default: " : "", standard ? standard : "", standard ? ")" : "");
    fprintf(stream, "%-*s", HELP_INDENT, left);
    print_wrapped(stream, text);
}

char *options_help(enum options_command command, const char *about) {
    char *text = NULL;
    size_t bytes = 0;
    FILE *stream = open_memstream(&text, &bytes);
    if (!stream)
        return NULL;
    fprintf(stream, "kvlinc %s [--name value | --name=value]...\n\n%s\n\n", options_command_name(command), about);
    for (int i = 0; i < option_table_size; i++)
        if (option_table[i].commands & command)
            print_option(stream, &option_table[i]);
    fprintf(stream, "\nA config file holds the same names, one name = value a line, # before comments.\n"
                    "Exit codes: 0 done, 1 failed, 2 usage or input, 75 not finished, run me again.\n");
    if (fclose(stream) != 0) {
        free(text);
        return NULL;
    }
    return text;
}
