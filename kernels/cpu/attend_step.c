/* Attention, correction and the merge of one rank, one after the other. */
#include "kernels/cpu/cpu.h"

void cpu_attend_step(const struct attend_step_args *args) {
    const struct attend_args *a = &args->attend;
    bool correction = a->layer.states != NULL;
    cpu_attend(a);
    if (correction)
        cpu_correct(&(struct correct_args){.in = a->in, .n_rows = a->n_rows, .layout = a->layout, .layer = a->layer, .n_heads = a->n_heads,
                                           .q = a->q, .partial = a->partial, .stride = a->stride});
    if (args->out)
        cpu_merge_gather(&(struct merge_gather_args){.n_rows = a->n_rows, .live = &a->in->n_rows, .n_heads = a->n_heads,
                                                     .head_dim = a->layout.head_dim, .correction = correction, .partial = a->partial,
                                                     .n_ranks = 1, .out = args->out});
}
