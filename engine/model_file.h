/* One model on disk, whatever its form: a Hugging Face folder (config.json, tokenizer.json, one or several safetensors)
 * or a GGUF file. Owns the mappings; everything is checked here, once, against the configuration: a tensor that is
 * missing, has another shape or dtype, or lies beyond the file's end is an error that names file, tensor, expected, got.
 *
 * Tensors carry Hugging Face's names (model.layers.3.self_attn.q_proj.weight) in both forms. Data stays in the file:
 * mapped read-only, never copied here. GGUF stores Q and K rows permuted for llama-architecture files; `permuted` says so
 * and model_file_row_index gives the row of the file that holds a row in Hugging Face's order. */
#pragma once

#include "kernels/dtype.h"

enum { MODEL_MAX_DIMS = 4, MODEL_MAX_STOP_IDS = 16, MODEL_MAX_HEAD_DIM = 128 };

enum model_arch { MODEL_ARCH_LLAMA, MODEL_ARCH_QWEN2, MODEL_ARCH_QWEN3 }; /* others follow: a new value, a row in model_config.c's table */

enum rope_kind { ROPE_DEFAULT, ROPE_LLAMA3, ROPE_LINEAR, ROPE_DIVISORS };

struct model_config {
    enum model_arch arch;
    int hidden;       /* width of the residual stream */
    int n_layers;
    int n_heads;      /* query heads */
    int n_kv_heads;
    int head_dim;     /* 64 or 128 */
    int intermediate; /* width of the MLP */
    int vocab;        /* rows of the embedding */
    int context;      /* longest position the model was made for */
    float rms_eps;
    bool tied;        /* LM head = embedding */
    bool qkv_bias;    /* vectors added to q, k and v before RoPE (Qwen2) */
    bool qk_norm;     /* RMSNorm of each head of q and k before RoPE (Qwen3) */
    enum rope_kind rope;
    double rope_theta;
    double rope_factor, rope_low_freq, rope_high_freq; /* ROPE_LLAMA3 and ROPE_LINEAR (factor) */
    int rope_original_context;                         /* ROPE_LLAMA3 */
    float rope_divisor[MODEL_MAX_HEAD_DIM / 2];        /* ROPE_DIVISORS: GGUF's rope_freqs.weight, [head_dim/2] */
    int bos_id;                                        /* -1: none */
    int n_stop;                                        /* ids that end a sequence (eos, end of turn) */
    int stop_id[MODEL_MAX_STOP_IDS];
};

struct model_tensor {
    const char *name;               /* Hugging Face's name */
    enum dtype dtype;
    int n_dims;
    int64_t shape[MODEL_MAX_DIMS];  /* row-major, outermost first: [out, in] for a projection */
    const void *data;               /* in the mapping; safetensors promise no alignment: read with dtype_widen or memcpy */
    bool permuted;                  /* rows in GGUF's order (q_proj, k_proj of llama GGUF files) */
};

struct model_file;

/* Opens and checks `path` (a folder or a .gguf file). Errors: STATUS_INPUT for anything wrong with the files. */
int model_file_open(const char *path, struct model_file **out);
/* A model of a shape file's configuration (configs/models), without tensors and without a tokenizer: for made-up weights and for plans. */
int model_file_open_shape(const char *path, struct model_file **out);
bool model_file_is_shape(const struct model_file *file);
void model_file_close(struct model_file *file);

const char *model_file_path(const struct model_file *file);
const char *model_file_format(const struct model_file *file); /* "gguf", "safetensors" or "shape" */
const struct model_config *model_file_config(const struct model_file *file);

int model_file_n_tensors(const struct model_file *file);
const struct model_tensor *model_file_tensor_at(const struct model_file *file, int index);

/* NULL when the file has no tensor of that name. */
const struct model_tensor *model_file_find(const struct model_file *file, const char *name);

/* Row of the file that holds Hugging Face's row `row` of a q_proj or k_proj with heads of `head_dim` rows:
 * the identity unless the tensor is permuted. GGUF row h*d + 2i + j holds Hugging Face's row h*d + j*d/2 + i. */
int64_t model_file_row_index(const struct model_tensor *tensor, int64_t row, int head_dim);

/* Bytes of one row (the innermost dimension) and the address of row `row` of a 1-D or 2-D tensor as it lies in the file. */
size_t model_file_row_bytes(const struct model_tensor *tensor);
const void *model_file_row(const struct model_tensor *tensor, int64_t row);

/* inv_freq[i] for i < head_dim/2, as transformers computes them for this configuration (float32 values). */
void model_config_inv_freq(const struct model_config *config, float *inv_freq);

/* SHA-256, 64 hex digits and a NUL, over the float32 values of all norm weights (input and post-attention norms in layer
 * order, with qk_norm those of q and k after them, then the final norm): equal for every file format and quantization of
 * one model, different for other weights. */
int model_file_fingerprint(const struct model_file *file, char hex[65]);

/* What the tokenizer is made from. At most one of the two forms is set (neither: the model comes without a tokenizer,
 * and only token ids can be used); all pointers live as long as the file. */
struct tokenizer_source {
    const char *path;                   /* for messages */
    const char *json;                   /* tokenizer.json, json_bytes long */
    size_t json_bytes;
    const char *config_json;            /* tokenizer_config.json, may be NULL */
    size_t config_json_bytes;
    const char *const *tokens;          /* GGUF: tokenizer.ggml.tokens, n_tokens of them */
    const size_t *token_bytes;          /* their lengths (a token may hold a NUL) */
    const int32_t *token_types;         /* GGUF: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte */
    int n_tokens;
    const char *const *merges;          /* GGUF: "left right" */
    const size_t *merge_bytes;
    int n_merges;
    const char *model;                  /* GGUF: tokenizer.ggml.model, "gpt2" */
    const char *pre;                    /* GGUF: tokenizer.ggml.pre, "smollm" */
    bool add_bos;                       /* GGUF: add_bos_token; HF: read from the JSON by the tokenizer */
    const char *chat_template;          /* Jinja text, NULL if none */
    int bos_id, eos_id;                 /* -1: none */
};
const struct tokenizer_source *model_file_tokenizer(const struct model_file *file);
