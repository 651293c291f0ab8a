/* `kvlinc batch`: a file of rows in, a file of answers out, and after a kill only what is missing. Owns the order of work: which
 * rows are due (batch_input, journal), how many run at once, what is written when. What a row means is openai.h's. */
#pragma once

#include "launch/run.h"

/* Collective, on every rank. STATUS_INTERRUPTED when a signal asked for the end before all rows were done. */
int batch_main(struct run *run);
