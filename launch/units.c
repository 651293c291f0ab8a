/* Powers of 1024, three digits. */
#include "launch/units.h"

#include <stdio.h>

const char *units_bytes(int64_t bytes, char text[UNITS_TEXT]) {
    static const char *const names[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB"};
    double value = (double)bytes;
    int unit = 0;
    while (value >= 999.5 && unit < 5) { /* 999.5 would be printed with four digits */
        value /= 1024;
        unit++;
    }
    int digits = unit == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(text, UNITS_TEXT, "%.*f %s", digits, value, names[unit]);
    return text;
}
