/* A GGUF file as a model: one source of tensors, configuration and tokenizer from its metadata. */
#include <string.h>

#include "engine/model_config.h"
#include "engine/model_parts.h"

static int check_ids(const struct model_file *file) {
    const struct tokenizer_source *source = &file->tokenizer;
    if (source->n_tokens != file->config.vocab)
        FAIL(STATUS_INPUT, "tokenizer.ggml.tokens: %d tokens, token_embd.weight has %d rows", source->n_tokens,
             file->config.vocab);
    return STATUS_OK;
}

static int read_token_types(struct model_file *file) {
    int n = 0;
    int found = gguf_get_ints(file->gguf, "tokenizer.ggml.token_type", &file->token_types, &n);
    TRY(found);
    if (!found)
        FAIL(STATUS_INPUT, "tokenizer.ggml.token_type is missing");
    if (n != file->tokenizer.n_tokens)
        FAIL(STATUS_INPUT, "tokenizer.ggml.token_type: %d values, expected one for each of %d tokens", n,
             file->tokenizer.n_tokens);
    file->tokenizer.token_types = file->token_types;
    return STATUS_OK;
}

static int read_tokenizer(struct model_file *file) {
    const struct gguf *gguf = file->gguf;
    struct tokenizer_source *source = &file->tokenizer;
    source->path = file->path;
    source->bos_id = file->config.bos_id;
    source->eos_id = -1;
    int found = gguf_get_texts(gguf, "tokenizer.ggml.tokens", &file->tokens);
    TRY(found);
    if (!found)
        return STATUS_OK;
    source->tokens = file->tokens.text;
    source->token_bytes = file->tokens.bytes;
    source->n_tokens = file->tokens.n;
    TRY(check_ids(file));
    TRY(read_token_types(file));
    TRY(gguf_get_texts(gguf, "tokenizer.ggml.merges", &file->merges));
    source->merges = file->merges.text;
    source->merge_bytes = file->merges.bytes;
    source->n_merges = file->merges.n;
    TRY(gguf_get_text(gguf, "tokenizer.ggml.model", &source->model));
    TRY(gguf_get_text(gguf, "tokenizer.ggml.pre", &source->pre));
    TRY(gguf_get_bool(gguf, "tokenizer.ggml.add_bos_token", &source->add_bos));
    TRY(gguf_get_text(gguf, "tokenizer.chat_template", &source->chat_template));
    int64_t eos = -1; /* checked against the vocabulary as a stop id */
    TRY(gguf_get_int(gguf, "tokenizer.ggml.eos_token_id", &eos));
    source->eos_id = (int)eos;
    return STATUS_OK;
}

static int read_parts(struct model_file *file) {
    int n;
    const struct file_tensor *tensors = gguf_tensors(file->gguf, &n);
    TRY(model_parts_alloc_sources(file, 1));
    TRY(model_parts_set_source(&file->sources[0], file->path, tensors, n));
    TRY(model_config_gguf_read(file->gguf, &file->config));
    return read_tokenizer(file);
}

int model_gguf_read(struct model_file *file) {
    TRY(gguf_open(file->path, &file->gguf));
    int status = read_parts(file);
    if (status < 0)
        base_error_prefix("%s: ", file->path);
    return status;
}
