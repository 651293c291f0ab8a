/* kvlinc plan: what fits on which GPUs, and how fast. Runs alone, on any machine; nothing is measured. */
#pragma once

#include "launch/options.h"

int plan_main(const struct options *options);
