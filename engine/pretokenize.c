/* White space is written out in the patterns: PCRE2's \s under UCP also takes U+180E, which Unicode has not counted as white
 * space since version 6.3 and which `tokenizers` does not. Subjects are checked to be UTF-8 once by the caller, never
 * per match, and matches have no step limit, so that time stays linear in the text and length alone is no error. The rules
 * have no groups to return to, so the 32 KiB of machine stack that compiled patterns get are enough for any length. */
#include "engine/pretokenize.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "engine/utf8.h"

#define SPACE "\\t-\\r\\x{85}\\p{Z}" /* Unicode's White_Space, for use inside [] */

struct pretokenize_row {
    const char *name;
    const char *published; /* as tokenizer.json writes it; NULL: never written as a regex */
    const char *pattern;   /* the same for PCRE2 */
};

static const struct pretokenize_row pretokenize_table[] = {
    [PRETOKENIZE_DIGITS] = {"digits", NULL, "\\p{N}"},
    [PRETOKENIZE_DIGIT_RUNS] = {"digit-runs", NULL, "\\p{N}+"},
    [PRETOKENIZE_GPT2] = {
        "gpt2",
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+",
    },
    [PRETOKENIZE_LLAMA3] = {
        "llama3",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|"
        "[" SPACE "]*[\\r\\n]+|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+",
    },
    [PRETOKENIZE_QWEN2] = {
        "qwen2",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|"
        "[" SPACE "]*[\\r\\n]+|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+",
    },
};

enum { PRETOKENIZE_N_ROWS = sizeof pretokenize_table / sizeof pretokenize_table[0] };

struct pretokenizer {
    int n_rules;
    const char *name[PRETOKENIZE_MAX_RULES];
    pcre2_code *code[PRETOKENIZE_MAX_RULES];
};

struct pretokenizer_work {
    pcre2_match_context *context;
    pcre2_match_data *match[PRETOKENIZE_MAX_RULES]; /* one a rule: rules run inside each other */
};

const char *pretokenize_rule_name(enum pretokenize_rule rule) { return pretokenize_table[rule].name; }

int pretokenize_find_regex(const char *regex) {
    for (int i = 0; i < PRETOKENIZE_N_ROWS; i++)
        if (pretokenize_table[i].published && strcmp(pretokenize_table[i].published, regex) == 0)
            return i;
    return -1;
}

int pretokenizer_new(const enum pretokenize_rule *rules, int n_rules, struct pretokenizer **out) {
    struct pretokenizer *p = NULL;
    int status;
    *out = NULL;
    TRY(base_alloc(&p, 1, sizeof *p));
    for (int i = 0; i < n_rules; i++) {
        const struct pretokenize_row *row = &pretokenize_table[rules[i]];
        int error;
        PCRE2_SIZE place;
        p->code[i] = pcre2_compile((PCRE2_SPTR)row->pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &place, NULL);
        if (!p->code[i])
            FAIL_GOTO(STATUS_FAILED, "PCRE2 does not compile rule '%s': error %d at byte %zu", row->name, error, (size_t)place);
        p->name[i] = row->name;
        p->n_rules = i + 1;
        /* Where no executable memory may be had this fails, and PCRE2 interprets the pattern with the same results. */
        (void)pcre2_jit_compile(p->code[i], PCRE2_JIT_COMPLETE);
    }
    *out = p;
    return 0;
fail:
    pretokenizer_free(p);
    return status;
}

void pretokenizer_free(struct pretokenizer *pretokenizer) {
    if (!pretokenizer)
        return;
    for (int i = 0; i < pretokenizer->n_rules; i++)
        pcre2_code_free(pretokenizer->code[i]);
    free(pretokenizer);
}

int pretokenizer_work_new(const struct pretokenizer *pretokenizer, struct pretokenizer_work **out) {
    struct pretokenizer_work *work = NULL;
    int status;
    *out = NULL;
    TRY(base_alloc(&work, 1, sizeof *work));
    work->context = pcre2_match_context_create(NULL);
    if (!work->context)
        FAIL_GOTO(STATUS_MEMORY, "no memory for a PCRE2 match context");
    pcre2_set_match_limit(work->context, UINT32_MAX);
    pcre2_set_depth_limit(work->context, UINT32_MAX);
    pcre2_set_heap_limit(work->context, UINT32_MAX);
    for (int i = 0; i < pretokenizer->n_rules; i++) {
        work->match[i] = pcre2_match_data_create(1, NULL);
        if (!work->match[i])
            FAIL_GOTO(STATUS_MEMORY, "no memory for PCRE2 match data");
    }
    *out = work;
    return 0;
fail:
    pretokenizer_work_free(work);
    return status;
}

void pretokenizer_work_free(struct pretokenizer_work *work) {
    if (!work)
        return;
    for (int i = 0; i < PRETOKENIZE_MAX_RULES; i++)
        pcre2_match_data_free(work->match[i]);
    pcre2_match_context_free(work->context);
    free(work);
}

/* Rules from `rule` on; depth is at most PRETOKENIZE_MAX_RULES. Each piece is a subject of its own: a later rule's look-ahead
 * does not see beyond it. */
static int pretokenizer_cut(const struct pretokenizer *p, struct pretokenizer_work *work, int rule, const char *text,
                            size_t bytes, const struct pretokenizer_sink *sink) {
    if (bytes == 0)
        return 0;
    if (rule == p->n_rules)
        return sink->add(sink->context, text, bytes);
    const PCRE2_SIZE *place = pcre2_get_ovector_pointer(work->match[rule]);
    size_t done = 0;
    while (done < bytes) {
        int found = pcre2_match(p->code[rule], (PCRE2_SPTR)text, bytes, done, PCRE2_NO_UTF_CHECK, work->match[rule],
                                work->context);
        if (found == PCRE2_ERROR_NOMATCH)
            break;
        if (found < 0)
            FAIL(STATUS_FAILED, "PCRE2 error %d in rule '%s' at byte %zu of %zu", found, p->name[rule], done, bytes);
        size_t start = place[0], end = place[1]; /* no rule matches the empty text */
        TRY(pretokenizer_cut(p, work, rule + 1, text + done, start - done, sink));
        TRY(pretokenizer_cut(p, work, rule + 1, text + start, end - start, sink));
        done = end;
    }
    return pretokenizer_cut(p, work, rule + 1, text + done, bytes - done, sink);
}

int pretokenizer_run(const struct pretokenizer *pretokenizer, struct pretokenizer_work *work, const char *text,
                     size_t bytes, const struct pretokenizer_sink *sink) {
    return pretokenizer_cut(pretokenizer, work, 0, text, bytes, sink);
}

/* Printable Latin-1 stands for itself; the 68 others (0-32, 127-160, 173) take U+0100 onwards in order. */
size_t pretokenize_byte_char(uint8_t byte, char character[3]) {
    uint32_t code = byte;
    if (byte <= 32)
        code = 256u + byte;
    else if (byte >= 127 && byte <= 160)
        code = 256u + 33u + (byte - 127u);
    else if (byte == 173)
        code = 256u + 67u;
    size_t n = 0;
    if (code < 128) {
        character[n++] = (char)code;
    } else {
        character[n++] = (char)(0xC0 | code >> 6);
        character[n++] = (char)(0x80 | (code & 0x3F));
    }
    character[n] = 0;
    return n;
}

static int pretokenize_char_byte(uint32_t code) {
    if (code >= 256 && code < 256 + 33)
        return (int)code - 256;
    if (code >= 256 + 33 && code < 256 + 67)
        return (int)code - 256 - 33 + 127;
    if (code == 256 + 67)
        return 173;
    return (code > 32 && code < 127) || (code > 160 && code < 256 && code != 173) ? (int)code : -1;
}

bool pretokenize_bytes(const char *text, size_t bytes, char *out, size_t *out_bytes) {
    size_t n = 0;
    for (size_t i = 0, length; i < bytes; i += length) {
        if (utf8_next(text + i, bytes - i, &length) != UTF8_CHAR)
            return false;
        int byte = pretokenize_char_byte(utf8_code(text + i, length));
        if (byte < 0)
            return false;
        out[n++] = (char)byte;
    }
    *out_bytes = n;
    return true;
}
