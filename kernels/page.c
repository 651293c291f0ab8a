/* How many bytes a page record takes: the one thing about it that is decided for all backends alike. What lies where inside is
 * each backend's own. */
#include "kernels/page.h"

/* Codes of one matrix and an fp16 scale and zero for each group; 16 bits: the values themselves. */
static size_t part_bytes(const struct page_format *format, int bits, int groups) {
    int64_t n_values = (int64_t)KV_BLOCK * format->head_dim;
    if (bits == 16)
        return dtype_bytes(format->window, n_values);
    return (size_t)(n_values * bits / 8) + 2 * sizeof(uint16_t) * (size_t)groups;
}

size_t page_record_bytes(const struct page_format *format) {
    size_t k = part_bytes(format, format->k_bits, format->head_dim);
    size_t v = part_bytes(format, format->v_bits, KV_BLOCK);
    return (size_t)round_up((int64_t)(k + v), 16);
}
