/* A SHA-256 as text. */
#pragma once

#include <stdint.h>

enum { DIGEST_BYTES = 32, DIGEST_HEX = 2 * DIGEST_BYTES + 1 };

/* 64 hex digits and a NUL. */
static inline void digest_hex(const uint8_t digest[DIGEST_BYTES], char hex[DIGEST_HEX]) {
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < DIGEST_BYTES; i++) {
        hex[2 * i] = digits[digest[i] >> 4];
        hex[2 * i + 1] = digits[digest[i] & 15];
    }
    hex[DIGEST_HEX - 1] = '\0';
}
