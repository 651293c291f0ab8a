/* Which device a rank computes on, and opening it. */
#pragma once

#include "dist/place.h"

struct device_request {
    const char *device, *comm;      /* options of these names; NULL or "auto": what is there */
    const char *cpu_only;           /* what is asked for that only the CPU has, in words; "": nothing */
    struct backend_options backend; /* `device` is filled in */
};

/* Collective. "auto" is GPUs where every rank has one of its own and nothing else was asked for. *text (`bytes` of it): what runs, in
 * words. The backend is watched (comm_watch_device). After a failure *out may be open: close it. */
int device_open(struct comm *world, const struct place *place, const struct device_request *request, struct backend **out, char *text,
                size_t bytes);
