/* Decode's writes to the cache: new rows into 16-bit slots, and full blocks from their slot into a page.
 *
 * Heads and blocks are encoded side by side; what they add to S and P is added in the order of the events, so the sums are the same
 * bits for every number of threads. The scratch of a flush lies on the stack (below 1 MiB a thread): operations cannot fail. */
#include "kernels/cpu/flush.h"

#include <string.h>

#include "kernels/cpu/correct.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page.h"

enum { APPEND_PARALLEL_ROWS = 32 }; /* below, waking the threads costs more than the copies */

static uint8_t *record_of(const struct cache_layer *layer, const struct cpu_flush_head *from) {
    return layer->pages + from->page * layer->page_stride + (size_t)from->head * page_record_bytes(&layer->format);
}

void cpu_flush_encode(const struct cache_layout *layout, const struct cache_layer *layer, const struct cpu_flush_head *from) {
    int first = cpu_flush_first(layout, from->block);
    uint8_t *record = record_of(layer, from);
    cpu_page_encode_k(&layer->format, from->k, first, record);
    cpu_page_encode_v(&layer->format, from->v, first, record);
    if (first > 0) {
        size_t bytes = dtype_bytes(layer->format.window, (int64_t)first * layout->head_dim);
        size_t index = 2 * ((size_t)from->seq * (size_t)layout->n_kv_heads + (size_t)from->head);
        uint8_t *sink = (uint8_t *)layer->sink + index * bytes;
        memcpy(sink, from->k, bytes);
        memcpy(sink + bytes, from->v, bytes);
    }
}

void cpu_flush_sum(const struct cache_layout *layout, const struct cache_layer *layer, const struct cpu_flush_head *from, float *sums) {
    int first = cpu_flush_first(layout, from->block);
    cpu_correct_block(layer, from->head, from->k, from->v, first, record_of(layer, from), sums);
}

void cpu_flush_add(const struct cache_layout *layout, const struct cache_layer *layer, const struct cpu_flush_head *from,
                   const float *sums) {
    int64_t index = (int64_t)from->seq * layout->n_kv_heads + from->head;
    cpu_correct_add(layer, sums, layer->states + index * cpu_correct_n_states(layer));
}

static struct cpu_flush_head head_of_event(const struct flush_args *args, const struct step_flush *event, int head) {
    const struct cache_layout *layout = &args->layout;
    size_t part_bytes = dtype_bytes(args->layer.format.window, (int64_t)KV_BLOCK * layout->head_dim);
    const uint8_t *rows = args->layer.window;
    rows += cpu_flush_slot_offset(layout, &args->layer, event->seq, event->block, head);
    return (struct cpu_flush_head){event->seq, head, event->block, event->page, rows, rows + part_bytes};
}

void cpu_flush(const struct flush_args *args) {
    const struct step_input *in = args->in;
    int n_owned = 0, owned[STEP_MAX_ROWS];
    for (int i = 0; i < in->n_flush; i++) {
        const struct step_flush *event = &in->flush[i];
        if (event->page < 0)
            continue;
        owned[n_owned++] = i;
        if (args->write_table)
            args->page_table[event->seq * args->table_stride + event->local] = event->page;
    }
    if (n_owned == 0)
        return;
    int n_kv_heads = args->layout.n_kv_heads, n_items = n_owned * n_kv_heads;
    bool correction = cpu_correct_is_on(&args->layer);
#pragma omp parallel for ordered schedule(static, 1) if (n_items > 1)
    for (int item = 0; item < n_items; item++) {
        float sums[CPU_FLUSH_MAX_STATES];
        struct cpu_flush_head from = head_of_event(args, &in->flush[owned[item / n_kv_heads]], item % n_kv_heads);
        cpu_flush_encode(&args->layout, &args->layer, &from);
        if (correction) {
            cpu_flush_sum(&args->layout, &args->layer, &from, sums);
#pragma omp ordered
            cpu_flush_add(&args->layout, &args->layer, &from, sums);
        }
    }
}

void cpu_append(const struct append_args *args) {
    const struct cache_layout *layout = &args->layout;
    size_t row_bytes = dtype_bytes(args->layer.format.window, layout->head_dim);
    int n_kv_heads = layout->n_kv_heads;
#pragma omp parallel for schedule(static) if (args->in->n_rows >= APPEND_PARALLEL_ROWS)
    for (int i = 0; i < args->in->n_rows; i++) {
        const struct step_row *row = &args->in->row[i];
        int64_t block = row->position / KV_BLOCK;
        if (row->seq < 0 || !cache_owns(layout, block, args->params[row->seq].owner_offset))
            continue;
        for (int h = 0; h < n_kv_heads; h++) {
            size_t from = ((size_t)i * (size_t)n_kv_heads + (size_t)h) * row_bytes;
            uint8_t *to = (uint8_t *)args->layer.window + cpu_flush_slot_offset(layout, &args->layer, row->seq, block, h);
            to += (size_t)(row->position % KV_BLOCK) * row_bytes;
            memcpy(to, (const uint8_t *)args->k + from, row_bytes);
            memcpy(to + KV_BLOCK * row_bytes, (const uint8_t *)args->v + from, row_bytes);
        }
    }
}
