/* The output file: what a kill leaves behind is known at every byte, whole lines are never lost, foreign files never touched. And the
 * input file: names, lines, duplicates, reading again. */
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launch/batch_input.h"
#include "launch/journal.h"
#include "test.h"

static char folder[] = "/tmp/test_journal.XXXXXX";
static char out_path[64], in_path[64];

static void put(const char *path, const char *text, size_t bytes) {
    FILE *file = fopen(path, "w");
    if (!file || fwrite(text, 1, bytes, file) != bytes || fclose(file) != 0) {
        perror(path);
        exit(1);
    }
}

static char *get(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "r");
    char *text = calloc(1, 1 << 16);
    *bytes = file && text ? fread(text, 1, (1 << 16) - 1, file) : 0;
    if (file)
        fclose(file);
    return text;
}

static void check_file(const char *path, const char *expected, size_t expected_bytes) {
    size_t bytes;
    char *text = get(path, &bytes);
    CHECK(bytes == expected_bytes && memcmp(text, expected, bytes) == 0, "%zu bytes, expected %zu:\n%s", bytes, expected_bytes, text);
    free(text);
}

/* Four rows; the third is an error; names that need escapes, a body that looks like a line's end. */
enum { ROWS = 4 };
static const char *const names[ROWS] = {"one", "q\"\\\n\xC3\xA9", "3", "four"};
static const char *const ids[ROWS] = {"kv-0000000000000001", "kv-00000000000000ab", "kv-fedcba9876543210", "kv-4444444444444444"};

static void make_line(int row, struct json_text *line) {
    if (row == 2) {
        journal_line_error(line, ids[row], names[row], "invalid_request", "no \"good\"");
        return;
    }
    journal_line_begin(line, ids[row], names[row]);
    json_text_raw(line, row == 0 ? "{\"text\":\"},\\\"error\\\":null}\"}" : "{}");
    journal_line_end(line);
}

static void check_entry(const struct journal *journal, int row) {
    const struct journal_entry *entry = journal_find(journal, names[row]);
    CHECK(entry && strcmp(entry->id, ids[row]) == 0 && strcmp(entry->custom_id, names[row]) == 0, "row %d", row);
    CHECK(entry && entry->failed == (row == 2) && entry->line == row + 1, "row %d", row);
}

/* Cut anywhere, with or without zeros where the disk lost a block: whole lines stay, the rest is written again. */
static void test_every_byte(void) {
    struct json_text whole = {0};
    size_t end[ROWS];
    for (int row = 0; row < ROWS; row++) {
        make_line(row, &whole);
        end[row] = whole.bytes;
    }
    for (size_t cut = 0; cut <= whole.bytes; cut++) {
        for (size_t zeros = 0; zeros <= 8; zeros += 8) {
            struct journal *journal;
            char *text = calloc(1, whole.bytes + 8);
            memcpy(text, whole.text, cut);
            put(out_path, text, cut + zeros);
            free(text);
            int n = 0;
            while (n < ROWS && end[n] <= cut)
                n++;
            REQUIRE(journal_open(out_path, &journal));
            CHECK(journal_n_entries(journal) == n, "cut at %zu: %d rows, expected %d", cut, journal_n_entries(journal), n);
            for (int row = 0; row < n; row++)
                check_entry(journal, row);
            for (int row = n; row < ROWS; row++)
                CHECK(!journal_find(journal, names[row]), "cut at %zu: row %d", cut, row);
            struct stat info;
            CHECK(stat(out_path, &info) == 0 && info.st_size == (off_t)(cut + zeros), "opening changes nothing");
            REQUIRE(journal_begin(journal, false));
            for (int row = n; row < ROWS; row++) {
                struct json_text line = {0};
                make_line(row, &line);
                REQUIRE(journal_append(journal, &line));
                json_text_deinit(&line);
            }
            if (cut % 64 == 0) /* slow on a real disk */
                REQUIRE(journal_sync(journal));
            journal_close(journal);
            check_file(out_path, whole.text, whole.bytes);
        }
    }
    json_text_deinit(&whole);
}

/* Rows that ended with an error are taken away; a run that stops there leaves a file that can go on. */
static void test_retry(void) {
    struct json_text whole = {0}, kept = {0};
    struct journal *journal, *again;
    for (int row = 0; row < ROWS; row++) {
        make_line(row, &whole);
        if (row != 2)
            make_line(row, &kept);
    }
    json_text_raw(&whole, "{\"id\":\"kv-11");
    put(out_path, whole.text, whole.bytes);
    chmod(out_path, 0640);
    REQUIRE(journal_open(out_path, &journal));
    REQUIRE(journal_begin(journal, true));
    check_file(out_path, kept.text, kept.bytes);
    CHECK_FAILS(journal_open(out_path, &again), STATUS_FAILED, "another process is writing");
    struct stat info;
    CHECK(stat(out_path, &info) == 0 && (info.st_mode & 0777) == 0640);
    make_line(2, &kept);
    struct json_text line = {0};
    make_line(2, &line);
    REQUIRE(journal_append(journal, &line));
    json_text_deinit(&line);
    journal_close(journal);
    check_file(out_path, kept.text, kept.bytes);
    json_text_deinit(&kept);
    json_text_deinit(&whole);
}

static void test_lock(void) {
    struct journal *journal, *again;
    unlink(out_path);
    REQUIRE(journal_open(out_path, &journal));
    pid_t child = fork();
    if (child == 0)
        _exit(journal_open(out_path, &again) == STATUS_FAILED && strstr(base_error(), "another process is writing this file") ? 0 : 1);
    int how = -1;
    waitpid(child, &how, 0);
    CHECK(how == 0, "a second process gets in");
    journal_close(journal);
    REQUIRE(journal_open(out_path, &again));
    journal_close(again);
}

/* Files that are not ours are refused and stay as they are. */
static void test_foreign(void) {
    static const char *const texts[] = {
        "some notes", "some notes\n", "{\"id\":\"x\"}\n", "{\"id\":\"kv-12\",\"custom_id\":\"a\",\"response\":{},\"error\":null}\n",
        "{\"id\":\"kv-0000000000000001\",\"custom_id\":\"a\",\"response\":null,\"error\":null}\n",
        "{\"id\":\"kv-0000000000000001\",\"custom_id\":5,\"response\":{},\"error\":null}\n", "\n", "{\"prompt\": \"x\"}",
        "{\"id\":\"kv-0000000000000001\",\"custom_id\":\"a\",\"response\":{\"status_code\":200,\"request_id\":\"kv-0000000000000001\",\"bo\n",
    };
    struct journal *journal;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        put(out_path, texts[i], strlen(texts[i]));
        CHECK_FAILS(journal_open(out_path, &journal), STATUS_INPUT, "line 1 is not one that batch wrote");
        check_file(out_path, texts[i], strlen(texts[i]));
    }
    struct json_text whole = {0}; /* a block in the middle that never reached the disk */
    for (int row = 0; row < ROWS; row++)
        make_line(row, &whole);
    memset(whole.text + 100, 0, 8);
    put(out_path, whole.text, whole.bytes);
    CHECK_FAILS(journal_open(out_path, &journal), STATUS_INPUT, "line 1 is not one");
    json_text_deinit(&whole);
    /* the same JSON in another program's form is fine; the same name twice is not */
    const char *other = "{ \"custom_id\": \"a\", \"error\": null, \"response\": {\"body\": {}}, \"id\": \"kv-0000000000000001\" }\n";
    put(out_path, other, strlen(other));
    REQUIRE(journal_open(out_path, &journal));
    CHECK(journal_n_entries(journal) == 1 && journal_find(journal, "a") && !journal_find(journal, "a")->failed);
    journal_close(journal);
    char twice[512];
    put(out_path, twice, (size_t)snprintf(twice, sizeof twice, "%s%s", other, other));
    CHECK_FAILS(journal_open(out_path, &journal), STATUS_INPUT, "lines 1 and 2 both answer custom_id \"a\"");
}

static void test_unwritable(void) {
    struct journal *journal;
    struct json_text line = {0};
    char path[96];
    snprintf(path, sizeof path, "%s/none/out", folder);
    CHECK_FAILS(journal_open(path, &journal), STATUS_FAILED, "cannot be opened for writing: No such file");
    CHECK_FAILS(journal_open(folder, &journal), STATUS_FAILED, "Is a directory");
    make_line(0, &line);
    if (access("/dev/full", W_OK) == 0) {
        REQUIRE(journal_open("/dev/full", &journal));
        REQUIRE(journal_begin(journal, false));
        CHECK_FAILS(journal_append(journal, &line), STATUS_FAILED, "No space left");
        journal_close(journal);
    }
    REQUIRE(journal_open("/dev/null", &journal));
    REQUIRE(journal_append(journal, &line));
    REQUIRE(journal_sync(journal));
    journal_close(journal);
    json_text_deinit(&line);
}

static void open_input(const char *text, struct batch_input **input) {
    put(in_path, text, strlen(text));
    REQUIRE(batch_input_open(in_path, input));
}

static void test_input(void) {
    struct batch_input *input;
    struct openai_item item;
    open_input("\xEF\xBB\xBF{\"custom_id\": \"a\", \"prompt\": \"x\"}\r\n\n  \t\n{\"prompt\": \"y\"}\nnonsense\n{\"custom_id\":\"z\"}", &input);
    CHECK(batch_input_n_rows(input) == 4);
    static const char *const expected[] = {"a", "4", "5", "z"};
    static const int64_t lines[] = {1, 4, 5, 6};
    for (int i = 0; i < 4; i++) {
        const struct batch_row *row = batch_input_row(input, i);
        CHECK(strcmp(row->custom_id, expected[i]) == 0 && row->line == lines[i], "row %d: %s", i, row->custom_id);
        CHECK(batch_input_find(input, expected[i]) == i);
        REQUIRE(batch_input_read(input, i, &item));
        CHECK(strcmp(item.custom_id, expected[i]) == 0 && (item.json != NULL) == (i != 2) && (item.problem != NULL) == (i == 2));
        openai_item_deinit(&item);
    }
    CHECK(batch_input_find(input, "b") == -1);
    CHECK(batch_input_is(input, in_path) && !batch_input_is(input, folder) && !batch_input_is(input, "/none"));
    int fd = open(in_path, O_WRONLY);
    CHECK(pwrite(fd, "q", 1, 27) == 1);
    CHECK_FAILS(batch_input_read(input, 0, &item), STATUS_INPUT, "line 1 has changed since the run began");
    CHECK(ftruncate(fd, 20) == 0);
    CHECK_FAILS(batch_input_read(input, 0, &item), STATUS_INPUT, "became shorter");
    close(fd);
    batch_input_close(input);
    open_input("", &input);
    CHECK(batch_input_n_rows(input) == 0);
    batch_input_close(input);
    static const char twice[] = "{\"prompt\":\"x\"}\n{\"custom_id\":\"1\"}\n";
    put(in_path, twice, strlen(twice));
    CHECK_FAILS(batch_input_open(in_path, &input), STATUS_INPUT, "lines 1 and 2 have the same custom_id \"1\"");
    CHECK_FAILS(batch_input_open("/none/in", &input), STATUS_INPUT, "/none/in: cannot be read: No such file");
    CHECK_FAILS(batch_input_open(folder, &input), STATUS_INPUT, "got a folder");
    CHECK_FAILS(batch_input_open("/dev/null", &input), STATUS_INPUT, "cannot be read twice");
}

int main(void) {
    if (!mkdtemp(folder)) {
        perror(folder);
        return 1;
    }
    snprintf(out_path, sizeof out_path, "%s/out.jsonl", folder);
    snprintf(in_path, sizeof in_path, "%s/in.jsonl", folder);
    test_every_byte();
    test_retry();
    test_lock();
    test_foreign();
    test_unwritable();
    test_input();
    unlink(out_path);
    unlink(in_path);
    CHECK(rmdir(folder) == 0, "something was left in %s", folder);
    return test_report();
}
