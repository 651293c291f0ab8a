/* The decoding table of RFC 3629 as ranges of the second byte: overlong forms, surrogates and anything above U+10FFFF are
 * errors at the first byte that makes them so, which is what decides how many bytes one replacement stands for. */
#include "engine/utf8.h"

#include <stdlib.h>
#include <string.h>

const char utf8_replacement[UTF8_REPLACEMENT_BYTES + 1] = "\xEF\xBF\xBD";

/* Length that a first byte announces (0: no character starts so) and the limits of the second byte. */
static size_t utf8_lead(uint8_t c, uint8_t *low, uint8_t *high) {
    *low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    *high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    if (c < 0x80)
        return 1;
    if (c < 0xC2 || c > 0xF4)
        return 0;
    return c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}

enum utf8_kind utf8_next(const char *text, size_t n, size_t *bytes) {
    uint8_t low, high;
    size_t need = utf8_lead((uint8_t)text[0], &low, &high);
    *bytes = 1;
    if (need == 0)
        return UTF8_INVALID;
    for (size_t i = 1; i < need; i++) {
        if (i == n)
            return UTF8_PARTIAL;
        uint8_t c = (uint8_t)text[i];
        if (c < low || c > high)
            return UTF8_INVALID;
        low = 0x80, high = 0xBF;
        *bytes = i + 1;
    }
    return UTF8_CHAR;
}

uint32_t utf8_code(const char *text, size_t bytes) {
    static const uint8_t lead_mask[5] = {0, 0x7F, 0x1F, 0x0F, 0x07};
    uint32_t code = (uint8_t)text[0] & lead_mask[bytes];
    for (size_t i = 1; i < bytes; i++)
        code = code << 6 | ((uint8_t)text[i] & 0x3F);
    return code;
}

bool utf8_is_valid(const char *text, size_t n) {
    for (size_t i = 0, bytes; i < n; i += bytes) {
        if ((uint8_t)text[i] < 0x80)
            bytes = 1;
        else if (utf8_next(text + i, n - i, &bytes) != UTF8_CHAR)
            return false;
    }
    return true;
}

int utf8_repair(const char *text, size_t n, char **out, size_t *out_bytes) {
    *out = NULL;
    TRY(base_alloc(out, n + 1, UTF8_REPLACEMENT_BYTES)); /* at worst every byte becomes one U+FFFD */
    size_t at = 0;
    for (size_t i = 0, bytes; i < n; i += bytes) {
        if (utf8_next(text + i, n - i, &bytes) == UTF8_CHAR) {
            memcpy(*out + at, text + i, bytes);
            at += bytes;
        } else {
            memcpy(*out + at, utf8_replacement, UTF8_REPLACEMENT_BYTES);
            at += UTF8_REPLACEMENT_BYTES;
        }
    }
    (*out)[at] = 0;
    *out_bytes = at;
    return 0;
}
