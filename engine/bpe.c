/* Symbols form a doubly linked list over the piece; a heap holds every neighbouring pair that has a rank. A popped pair is
 * stale if either symbol has changed since, which comparing the two ids shows: equal ids at one place are the same merge. */
#include "engine/bpe.h"

#include <stdlib.h>
#include <string.h>

enum { NO_SYMBOL = -1 };

struct bpe_symbol {
    int32_t id; /* NO_SYMBOL: merged into the one before it */
    int32_t previous, next;
};

struct bpe_candidate {
    uint64_t order; /* rank, then position: the heap's smallest is the next merge */
    int32_t left, right;
};

struct bpe_slot {
    int32_t left, right; /* left < 0: free */
    int32_t rank;
};

struct bpe {
    int32_t byte_id[256];
    int32_t unk_id;
    bool fuse_unk;
    const struct token_map *whole;
    int32_t *merged; /* [n_merges], by rank */
    size_t mask;     /* slots - 1 */
    struct bpe_slot *slot;
};

int id_list_add(struct id_list *list, int32_t id) {
    if (list->n == list->capacity) {
        if (list->capacity > INT32_MAX / 2)
            FAIL(STATUS_INPUT, "more than %d tokens in one text", list->capacity);
        int capacity = list->capacity ? 2 * list->capacity : 256;
        int32_t *grown = realloc(list->id, (size_t)capacity * sizeof *grown);
        if (!grown)
            FAIL(STATUS_MEMORY, "no memory for %d token ids", capacity);
        list->id = grown;
        list->capacity = capacity;
    }
    list->id[list->n++] = id;
    return 0;
}

static size_t bpe_pair_hash(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    return (size_t)(h ^ h >> 29);
}

static struct bpe_slot *bpe_probe(const struct bpe *bpe, int32_t left, int32_t right) {
    for (size_t i = bpe_pair_hash(left, right) & bpe->mask;; i = (i + 1) & bpe->mask) {
        struct bpe_slot *slot = &bpe->slot[i];
        if (slot->left < 0 || (slot->left == left && slot->right == right))
            return slot;
    }
}

int bpe_new(const struct bpe_rules *rules, struct bpe **out) {
    struct bpe *bpe = NULL;
    int status;
    *out = NULL;
    TRY(base_alloc(&bpe, 1, sizeof *bpe));
    memcpy(bpe->byte_id, rules->byte_id, sizeof bpe->byte_id);
    bpe->unk_id = rules->unk_id;
    bpe->fuse_unk = rules->fuse_unk;
    bpe->whole = rules->whole;
    size_t slots = 16;
    while (slots < 2 * (size_t)rules->n_merges)
        slots *= 2;
    bpe->mask = slots - 1;
    TRY_GOTO(base_alloc(&bpe->slot, slots, sizeof *bpe->slot));
    TRY_GOTO(base_alloc(&bpe->merged, (size_t)rules->n_merges, sizeof *bpe->merged));
    for (size_t i = 0; i < slots; i++)
        bpe->slot[i].left = -1;
    for (int rank = 0; rank < rules->n_merges; rank++) {
        const struct bpe_merge *merge = &rules->merge[rank];
        *bpe_probe(bpe, merge->left, merge->right) = (struct bpe_slot){merge->left, merge->right, rank};
        bpe->merged[rank] = merge->merged;
    }
    *out = bpe;
    return 0;
fail:
    bpe_free(bpe);
    return status;
}

void bpe_free(struct bpe *bpe) {
    if (!bpe)
        return;
    free(bpe->merged);
    free(bpe->slot);
    free(bpe);
}

void bpe_work_deinit(struct bpe_work *work) {
    free(work->symbol);
    free(work->heap);
    *work = (struct bpe_work){0};
}

/* n symbols have at most n - 1 pairs, and each of at most n - 1 merges adds two. */
static int bpe_work_reserve(struct bpe_work *work, size_t n) {
    if (n <= work->capacity)
        return 0;
    size_t capacity = n < 512 ? 512 : n + n / 2;
    bpe_work_deinit(work);
    TRY(base_alloc(&work->symbol, capacity, sizeof *work->symbol));
    TRY(base_alloc(&work->heap, 3 * capacity, sizeof *work->heap));
    work->capacity = capacity;
    return 0;
}

static void bpe_push(struct bpe_work *work, struct bpe_candidate candidate) {
    size_t i = work->n_heap++;
    while (i > 0 && work->heap[(i - 1) / 2].order > candidate.order) {
        work->heap[i] = work->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    work->heap[i] = candidate;
}

static struct bpe_candidate bpe_pop(struct bpe_work *work) {
    struct bpe_candidate top = work->heap[0], last = work->heap[--work->n_heap];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < work->n_heap) {
        if (child + 1 < work->n_heap && work->heap[child + 1].order < work->heap[child].order)
            child++;
        if (work->heap[child].order >= last.order)
            break;
        work->heap[i] = work->heap[child];
        i = child;
    }
    work->heap[i] = last;
    return top;
}

/* Offers the pair that starts at symbol `at`, if it has a rank. */
static void bpe_offer(const struct bpe *bpe, struct bpe_work *work, int32_t at) {
    const struct bpe_symbol *left = &work->symbol[at];
    if (left->next == NO_SYMBOL)
        return;
    int32_t right = work->symbol[left->next].id;
    const struct bpe_slot *slot = bpe_probe(bpe, left->id, right);
    if (slot->left >= 0)
        bpe_push(work, (struct bpe_candidate){(uint64_t)(uint32_t)slot->rank << 32 | (uint32_t)at, left->id, right});
}

static void bpe_merge_at(const struct bpe *bpe, struct bpe_work *work, struct bpe_candidate candidate) {
    int32_t at = (int32_t)(uint32_t)candidate.order;
    struct bpe_symbol *left = &work->symbol[at];
    if (left->id != candidate.left || left->next == NO_SYMBOL || work->symbol[left->next].id != candidate.right)
        return;
    struct bpe_symbol *right = &work->symbol[left->next];
    left->id = bpe->merged[candidate.order >> 32];
    left->next = right->next;
    right->id = NO_SYMBOL;
    if (left->next != NO_SYMBOL)
        work->symbol[left->next].previous = at;
    if (left->previous != NO_SYMBOL)
        bpe_offer(bpe, work, left->previous);
    bpe_offer(bpe, work, at);
}

/* One symbol a byte; returns their number. */
static int32_t bpe_split(const struct bpe *bpe, struct bpe_work *work, const char *piece, size_t bytes) {
    int32_t n = 0;
    bool unknown_before = false;
    for (size_t i = 0; i < bytes; i++) {
        int32_t id = bpe->byte_id[(uint8_t)piece[i]];
        bool unknown = id < 0;
        if (unknown)
            id = bpe->fuse_unk && unknown_before ? -1 : bpe->unk_id;
        unknown_before = unknown;
        if (id < 0)
            continue;
        work->symbol[n] = (struct bpe_symbol){id, n - 1, n + 1};
        n++;
    }
    if (n > 0)
        work->symbol[n - 1].next = NO_SYMBOL;
    return n;
}

int bpe_encode(const struct bpe *bpe, struct bpe_work *work, const char *piece, size_t bytes, struct id_list *out) {
    if (bytes > INT32_MAX)
        FAIL(STATUS_INPUT, "a piece of %zu bytes, at most %d fit", bytes, INT32_MAX);
    int32_t whole = bpe->whole ? token_map_find(bpe->whole, piece, bytes) : -1;
    if (whole >= 0)
        return id_list_add(out, whole);
    TRY(bpe_work_reserve(work, bytes));
    int32_t n = bpe_split(bpe, work, piece, bytes);
    work->n_heap = 0;
    for (int32_t i = 0; i < n; i++)
        bpe_offer(bpe, work, i);
    while (work->n_heap > 0)
        bpe_merge_at(bpe, work, bpe_pop(work));
    for (int32_t i = 0; n > 0 && i != NO_SYMBOL; i = work->symbol[i].next)
        TRY(id_list_add(out, work->symbol[i].id));
    return 0;
}
