/* kvlinc generate: one prompt to text. */
#pragma once

#include "launch/run.h"

/* Collective, on every rank. With n = 1 text goes to standard output as it comes; with n > 1 each choice is printed when it is
 * complete, a line "choice 2 of 3:" before it on standard error; with `json` one response object is printed at the end. */
int generate_main(struct run *run);
