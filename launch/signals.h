/* TERM, INT and USR1 ask for an orderly end: they set a flag that loops look at between steps. A second INT kills. */
#pragma once

#include "kernels/base.h"

/* Installs the handlers; a write to a closed pipe becomes an error code instead of a signal. */
int signals_install(void);

/* The signal that asked for the end, 0 if none has. */
int signals_pending(void);
/* "TERM", "INT" or "USR1". */
const char *signals_name(int number);
