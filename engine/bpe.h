/* Byte-pair merging of one piece of text: the pair of lowest rank first, the leftmost of equal ones, until none is left. */
#pragma once

#include "engine/token_map.h"

/* Token ids that grow; `id` is malloced and belongs to whoever holds the list. */
struct id_list {
    int32_t *id;
    int n, capacity;
};
int id_list_add(struct id_list *list, int32_t id);

struct bpe_merge {
    int32_t left, right, merged;
};

struct bpe_rules {
    int32_t byte_id[256];           /* token of a single byte, -1: the vocabulary has none */
    const struct bpe_merge *merge;  /* n_merges of them, in rank order */
    int n_merges;
    const struct token_map *whole;  /* `ignore_merges`: a piece that is a token is that token; NULL: always merge */
    int32_t unk_id;                 /* for bytes without a token; -1: they are left out, as `tokenizers` does */
    bool fuse_unk;                  /* neighbouring unknown bytes give one unk_id */
};

struct bpe;

/* Copies `rules` but for `whole`, which must outlive it. A pair given twice keeps its later rank. */
int bpe_new(const struct bpe_rules *rules, struct bpe **out);
void bpe_free(struct bpe *bpe);

/* Working memory of one caller, reused from piece to piece; zero it before the first use. */
struct bpe_work {
    struct bpe_symbol *symbol;
    struct bpe_candidate *heap;
    size_t capacity, n_heap;
};
void bpe_work_deinit(struct bpe_work *work);

/* Appends the ids of a piece of fewer than 2^31 bytes. Takes O(n log n) for n bytes. */
int bpe_encode(const struct bpe *bpe, struct bpe_work *work, const char *piece, size_t bytes, struct id_list *out);
