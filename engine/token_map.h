/* Bytes to token id: an open-addressing hash table that is filled once and then only read. Keys are borrowed. */
#pragma once

#include "kernels/base.h"

struct token_map;

/* A 64-bit hash of some bytes. */
uint64_t token_map_hash(const char *key, size_t bytes);

int token_map_new(int n_keys, struct token_map **out); /* room for n_keys keys */
void token_map_free(struct token_map *map);

/* Adds a key unless it is there already; returns the id now kept for it. */
int32_t token_map_add(struct token_map *map, const char *key, size_t bytes, int32_t id);

/* -1: not there. */
int32_t token_map_find(const struct token_map *map, const char *key, size_t bytes);
