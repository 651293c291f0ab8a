/* Linear probing at a load of at most one half; a slot keeps its key's hash so that most probes touch no key. */
#include "engine/token_map.h"

#include <stdlib.h>
#include <string.h>

struct token_map_slot {
    const char *key; /* NULL: free */
    uint32_t bytes;
    uint32_t hash;
    int32_t id;
};

struct token_map {
    size_t mask; /* slots - 1 */
    struct token_map_slot *slot;
};

uint64_t token_map_hash(const char *key, size_t bytes) {
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a's basis and prime, with a final mix for the low bits */
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ (uint8_t)key[i]) * 0x100000001b3u;
    h ^= h >> 32;
    return h * 0x9e3779b97f4a7c15u >> 7;
}

int token_map_new(int n_keys, struct token_map **out) {
    struct token_map *map = NULL;
    *out = NULL;
    TRY(base_alloc(&map, 1, sizeof *map));
    size_t slots = 16;
    while (slots < 2 * (size_t)n_keys)
        slots *= 2;
    map->mask = slots - 1;
    int status = base_alloc(&map->slot, slots, sizeof *map->slot);
    if (status < 0) {
        free(map);
        return status;
    }
    *out = map;
    return 0;
}

void token_map_free(struct token_map *map) {
    if (!map)
        return;
    free(map->slot);
    free(map);
}

static struct token_map_slot *token_map_probe(const struct token_map *map, const char *key, size_t bytes, uint32_t hash) {
    for (size_t i = hash & map->mask;; i = (i + 1) & map->mask) {
        struct token_map_slot *slot = &map->slot[i];
        if (!slot->key || (slot->hash == hash && slot->bytes == bytes && memcmp(slot->key, key, bytes) == 0))
            return slot;
    }
}

int32_t token_map_add(struct token_map *map, const char *key, size_t bytes, int32_t id) {
    uint32_t hash = (uint32_t)token_map_hash(key, bytes);
    struct token_map_slot *slot = token_map_probe(map, key, bytes, hash);
    if (!slot->key)
        *slot = (struct token_map_slot){key, (uint32_t)bytes, hash, id};
    return slot->id;
}

int32_t token_map_find(const struct token_map *map, const char *key, size_t bytes) {
    const struct token_map_slot *slot = token_map_probe(map, key, bytes, (uint32_t)token_map_hash(key, bytes));
    return slot->key ? slot->id : -1;
}
