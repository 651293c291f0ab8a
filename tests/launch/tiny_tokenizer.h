/* A byte-level tokenizer made by hand: ids 0 to 255 are the bytes, then one merge and three special tokens; the model's vocabulary is
 * larger than the tokenizer's, as padded ones are. */
#pragma once

#include "engine/pretokenize.h"
#include "engine/tokenizer.h"
#include "test.h"

/* SmolLM2's chat template. */
#define TINY_CHAT                                                                                                               \
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"             \
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"                           \
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"                        \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

enum { TINY_HE = 256, TINY_START, TINY_END, TINY_EOS, TINY_TOKENS, TINY_VOCAB = 264 };

static inline struct tokenizer *tiny_tokenizer(bool add_bos) {
    static char text[TINY_TOKENS][16];
    static const char *tokens[TINY_TOKENS], *merges[] = {"h e"};
    static size_t bytes[TINY_TOKENS], merge_bytes[] = {3};
    static int32_t types[TINY_TOKENS];
    static const char *const more[] = {"he", "<|im_start|>", "<|im_end|>", "<|endoftext|>"};
    struct tokenizer *tokenizer;
    for (int i = 0; i < TINY_TOKENS; i++) {
        if (i < TINY_HE)
            pretokenize_byte_char((uint8_t)i, text[i]);
        else
            snprintf(text[i], sizeof text[i], "%s", more[i - TINY_HE]);
        tokens[i] = text[i];
        bytes[i] = strlen(text[i]);
        types[i] = i > TINY_HE ? 3 : 1;
    }
    struct tokenizer_source source = {
        .path = "tiny", .tokens = tokens, .token_bytes = bytes, .token_types = types, .n_tokens = TINY_TOKENS, .merges = merges,
        .merge_bytes = merge_bytes, .n_merges = 1, .model = "gpt2", .pre = "smollm", .add_bos = add_bos,
        .bos_id = add_bos ? TINY_EOS : -1, .eos_id = TINY_END,
    };
    REQUIRE(tokenizer_open(&source, TINY_VOCAB, &tokenizer));
    return tokenizer;
}
