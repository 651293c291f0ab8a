/* Quantities as people read them. */
#pragma once

#include "kernels/base.h"

enum { UNITS_TEXT = 32 };

/* "93.5 MiB" into `text`, which it returns. */
const char *units_bytes(int64_t bytes, char text[UNITS_TEXT]);
