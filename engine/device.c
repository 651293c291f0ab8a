/* See device.h. Every rank goes through the same stages, so that one rank's error is everybody's message. */
#include "engine/device.h"

#include <stdio.h>
#include <string.h>

static bool is(const char *option, const char *word) { return option && strcmp(option, word) == 0; }
static bool is_auto(const char *option) { return !option || is(option, "auto"); }

/* Collective. What "auto" is. */
static int choose_auto(struct comm *world, const struct place *place, const struct device_request *request, const char **device) {
    const char *why = request->cpu_only;
    int64_t least[2] = {backend_n_devices("cuda"), 0};
    *device = "cpu";
    least[1] = least[0] >= place->local_size; /* or one each, made visible by the launcher */
    least[1] |= least[0] == 1;
    TRY(comm_reduce_host(world, "choosing the device", least, 2, COMM_MIN));
    if (least[0] == 0)
        return STATUS_OK;
    if (is(request->comm, "mpi") && comm_size(world) > 1)
        why = "comm mpi";
    else if (!least[1])
        why = "fewer GPUs than ranks";
    if (!*why)
        *device = "cuda";
    else if (comm_rank(world) == 0)
        log_info("device auto: the CPU, though there are GPUs here: %s", why);
    return STATUS_OK;
}

/* Collective: each rank of a host gets a GPU of its own. */
static int choose_gpu(struct comm *world, const struct place *place, int *device) {
    enum { MOST = 64 };
    char pci[MOST][16];
    struct backend *none = NULL;
    int status = STATUS_OK, n = (int)min_i64(MOST, backend_n_devices("cuda"));
    for (int i = 0; i < n && status == STATUS_OK; i++) {
        struct backend_device found;
        status = backend_find_device("cuda", i, &found);
        memcpy(pci[i], found.pci, sizeof pci[i]);
    }
    if (status == STATUS_OK && n == 0) /* its own words: no driver, or no CUDA in this build */
        status = backend_open("cuda", &(struct backend_options){0}, &none);
    TRY(comm_agree(world, "finding GPUs", status));
    return place_choose_device(world, place, n, (const char(*)[16])pci, device);
}

static int check_device(const char *device, const char *cpu_only) {
    if (is(device, "cuda") && *cpu_only)
        FAIL(STATUS_USAGE, "device cuda: %s is for the CPU only", cpu_only);
    return STATUS_OK;
}

static void describe_device(const char *device, int index, char *text, size_t bytes) {
    struct backend_device found;
    if (is(device, "cuda") && backend_find_device(device, index, &found) == STATUS_OK)
        snprintf(text, bytes, "cuda %d: %s, %s", index, found.name, found.pci);
    else
        snprintf(text, bytes, "%s", device);
}

int device_open(struct comm *world, const struct place *place, const struct device_request *request, struct backend **out, char *text,
                size_t bytes) {
    const char *device = request->device;
    struct backend_options options = request->backend;
    *out = NULL;
    if (is_auto(device))
        TRY(choose_auto(world, place, request, &device));
    TRY(comm_agree(world, "choosing the device", check_device(device, request->cpu_only)));
    if (is(device, "cuda"))
        TRY(choose_gpu(world, place, &options.device));
    TRY(comm_agree(world, "opening the device", backend_open(device, &options, out)));
    describe_device(device, options.device, text, bytes);
    return comm_watch_device(world, *out);
}
