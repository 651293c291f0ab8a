/* This rank's slice of a model's weights, in backend memory, in the order the forward pass reads them.
 *
 * Slices (DESIGN, 4): Q, K, V rows of the tp rank's heads, held by each of its cp ranks; o_proj by input columns, MLP by its inner width,
 * embedding and LM head by vocabulary rows, each over all tp x cp ranks of a replica. The slices of the cp ranks of one tp rank are
 * contiguous in rank order, so together they are the tp slice that exact prefill computes with. Rows are in Hugging Face's order.
 * For layers with rotate_v, H is folded into W_v, its bias and W_o in float before the one rounding to the stored type. */
#pragma once

#include "dist/grid.h"
#include "dist/shard.h"
#include "engine/cache_spec.h"
#include "engine/model_file.h"
#include "kernels/ops.h"

struct weights_slices { /* pure arithmetic: what rank (tp, cp) of a replica holds */
    struct range heads, kv_heads;     /* of the tp rank */
    struct range o_columns;           /* of the n_heads * head_dim inputs of o_proj */
    struct range inner;               /* of the MLP's width */
    struct range vocab;
};
/* `o_whole`: o_proj's columns of the whole tp slice (merge = fused). */
void weights_slices_make(const struct model_config *config, int tp, int tp_rank, int cp, int cp_rank, bool o_whole,
                         struct weights_slices *out);
/* Bytes of the matrices of one rank, `element` bytes each. */
int64_t weights_slices_bytes(const struct model_config *config, const struct weights_slices *slices, int element);
/* Values of all norms: floats that every rank holds. */
int64_t weights_norm_values(const struct model_config *config);

struct matrix {
    void *data; /* [n_out][n_in], weights.dtype */
    int64_t n_out, n_in;
};

struct layer_weights {
    float *attn_norm, *mlp_norm; /* [hidden] */
    struct matrix qkv;           /* q rows, k rows, v rows of this tp rank */
    float *qkv_bias;             /* NULL without */
    float *q_norm, *k_norm;      /* [head_dim], the same on every rank; NULL without */
    void *sliced;                /* one block: o, gate_up, down, in this order; exact prefill gathers it */
    struct matrix o;             /* [hidden][o_columns] */
    struct matrix gate_up;       /* gate rows, then up rows: [2 inner][hidden] */
    struct matrix down;          /* [hidden][inner] */
};

struct weights {
    struct weights_slices slices;
    enum dtype dtype;
    size_t layer_sliced_bytes;   /* of each layer's `sliced` block */
    struct matrix embed, head;   /* [vocab slice][hidden]; head shares embed's memory when tied */
    float *final_norm;
    float *inv_freq;             /* [head_dim / 2] */
    int n_layers;
    struct layer_weights *layers;
    struct backend *backend;
};

/* Of a shape file (no tensors) the weights are made up, on the device, by tensor name and place: the same model in every layout.
 * `dtype_option`: "auto" (16 bit: the file's own 16-bit type, else F16) or "f32". Reads nothing that this rank does not own. */
int weights_load(const struct model_file *file, const struct cache_spec *spec, const struct grid *grid, bool o_whole,
                 const char *dtype_option, struct backend *backend, struct stream *stream, struct weights *out);
void weights_free(struct weights *weights);

/* Bytes of layer `sliced` of a rank with these slices: what others expect from it in the gather. */
size_t weights_sliced_bytes(const struct model_config *config, const struct weights_slices *slices, enum dtype dtype, bool o_whole);
