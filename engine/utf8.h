/* UTF-8 as Python reads it: what is a character, what is the cut-off beginning of one, and which bytes become one U+FFFD. */
#pragma once

#include "kernels/base.h"

enum utf8_kind { UTF8_CHAR, UTF8_PARTIAL, UTF8_INVALID };

enum { UTF8_REPLACEMENT_BYTES = 3 }; /* U+FFFD is EF BF BD */
extern const char utf8_replacement[UTF8_REPLACEMENT_BYTES + 1];

/* Judges the first bytes of `text` (n > 0). *bytes is the length of the character, of the beginning of one that the end
 * of the text cuts off, or of the longest invalid piece that counts as one error (as bytes.decode('utf-8', 'replace')). */
enum utf8_kind utf8_next(const char *text, size_t n, size_t *bytes);

/* Code point of a character that utf8_next found whole. */
uint32_t utf8_code(const char *text, size_t bytes);

bool utf8_is_valid(const char *text, size_t n);

/* A malloced copy (NUL-terminated) with every error replaced by U+FFFD. */
int utf8_repair(const char *text, size_t n, char **out, size_t *out_bytes);
