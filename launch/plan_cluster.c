/* Looking for a cluster's rates, from the root of a clone or from build/. */
#include "launch/plan_cluster.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FOLDER_BYTES = 3072, NAMES_BYTES = 1024 };
static const char FOLDER[] = "configs/clusters", SUFFIX[] = ".conf";

static bool is_folder(const char *path) { return access(path, R_OK | X_OK) == 0; }

/* false: there is none. */
static bool find_folder(char folder[FOLDER_BYTES]) {
    char program[FOLDER_BYTES - 64];
    snprintf(folder, FOLDER_BYTES, "%s", FOLDER);
    if (is_folder(folder))
        return true;
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(program, '/');
    if (!slash)
        return false;
    *slash = '\0';
    snprintf(folder, FOLDER_BYTES, "%s/../%s", program, FOLDER);
    return is_folder(folder);
}

static int is_cluster(const struct dirent *entry) {
    const char *end = strrchr(entry->d_name, '.');
    return end && end != entry->d_name && strcmp(end, SUFFIX) == 0;
}

static void list_names(const char *folder, char names[NAMES_BYTES]) {
    struct dirent **entries;
    int n = scandir(folder, &entries, is_cluster, alphasort);
    size_t used = 0;
    names[0] = '\0';
    for (int i = 0; i < n; i++) {
        int length = (int)(strlen(entries[i]->d_name) - strlen(SUFFIX));
        if (used + (size_t)length + 3 < NAMES_BYTES)
            used += (size_t)snprintf(names + used, NAMES_BYTES - used, "%s%.*s", used ? ", " : "", length, entries[i]->d_name);
        free(entries[i]);
    }
    if (n >= 0)
        free(entries);
}

int plan_cluster_find(const char *name, char *path, size_t bytes) {
    char folder[FOLDER_BYTES], names[NAMES_BYTES];
    if (!find_folder(folder))
        FAIL(STATUS_USAGE, "cluster '%s': there is no folder %s here; name a file with --rates", name, FOLDER);
    int n = snprintf(path, bytes, "%s/%s%s", folder, name, SUFFIX);
    if (!strchr(name, '/') && n > 0 && (size_t)n < bytes && access(path, R_OK) == 0)
        return STATUS_OK;
    list_names(folder, names);
    FAIL(STATUS_USAGE, "unknown cluster '%s'; known: %s", name, names);
}
