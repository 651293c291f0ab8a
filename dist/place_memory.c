/* The memory limit of the control groups that this process is in. A limit may stand at any level above the process, and
 * inside a container the path that /proc names may not exist, while the limit stands at the top of what is mounted: so
 * every level that can be read counts, and the smallest wins. */
#include "dist/place_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

/* One number; "max" and unreadable files are no limit. Version 1 writes a huge number for none, which is harmless. */
static int64_t read_limit(const char *folder, const char *name) {
    char path[PATH_BYTES + 64], text[64] = "";
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    if (!file)
        return INT64_MAX;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = '\0';
    char *end;
    long long value = strtoll(text, &end, 10);
    return end == text || value <= 0 ? INT64_MAX : value;
}

/* The least limit from mount/group up to mount. */
static int64_t least_limit(const char *root, const char *mount, const char *group, const char *name) {
    char folder[PATH_BYTES];
    int n = snprintf(folder, sizeof folder, "%s%s", root, mount);
    size_t top = (size_t)n;
    int64_t least = INT64_MAX;
    if (n < 0 || n + strlen(group) >= sizeof folder)
        return least;
    strcat(folder, group);
    for (;;) {
        least = min_i64(least, read_limit(folder, name));
        char *slash = strrchr(folder + top, '/');
        if (!slash)
            return least;
        *slash = '\0';
    }
}

/* Whether a comma-separated list holds "memory". */
static bool has_memory(const char *controllers) {
    for (const char *at = controllers; *at;) {
        size_t n = strcspn(at, ",");
        if (n == 6 && strncmp(at, "memory", n) == 0)
            return true;
        at += n + (at[n] == ',');
    }
    return false;
}

int64_t place_memory_limit(const char *root) {
    char path[PATH_BYTES], line[PATH_BYTES];
    int64_t least = INT64_MAX;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    if (!file)
        return least;
    while (fgets(line, sizeof line, file)) { /* number:controllers:path */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        if (controllers[1] == '\0') { /* version 2, alone or beside version 1 */
            least = min_i64(least, least_limit(root, "/sys/fs/cgroup", group, "memory.max"));
            least = min_i64(least, least_limit(root, "/sys/fs/cgroup/unified", group, "memory.max"));
        } else if (has_memory(controllers + 1)) {
            least = min_i64(least, least_limit(root, "/sys/fs/cgroup/memory", group, "memory.limit_in_bytes"));
        }
    }
    fclose(file);
    return least;
}
