/* Where the files of configs/clusters are. */
#pragma once

#include "kernels/base.h"

/* The path of the rates of a cluster called `name`: configs/clusters/NAME.conf of the current folder, else beside the folder that the
 * program lies in. Errors: STATUS_USAGE, naming those known. */
int plan_cluster_find(const char *name, char *path, size_t bytes);
