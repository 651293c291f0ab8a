/* kvlinc inspect: what a model's files hold, and who gets what on a number of ranks. One process, no ranks, nothing computed. */
#pragma once

#include "launch/options.h"

int inspect_main(const struct options *options);
