/* What rows are served with, from an open engine: the only place where OpenAI's side asks the engine about itself. */
#include <stdio.h>
#include <string.h>

#include "launch/openai.h"

void openai_context_init(struct openai_context *context, const struct engine *engine, const char *prefill, uint64_t seed) {
    const struct model_config *model = engine_model(engine);
    const char *path = engine_model_path(engine), *slash = strrchr(path, '/');
    *context = (struct openai_context){
        .tokenizer = engine_tokenizer(engine),
        .chat = engine_chat(engine),
        .model = slash && slash[1] ? slash + 1 : path,
        .vocab = model->vocab,
        .context = engine_context(engine),
        .n_stop = model->n_stop,
        .stop_id = model->stop_id,
        .prefill = prefill,
        .seed = seed,
    };
    if (!context->chat) {
        snprintf(context->chat_error, sizeof context->chat_error, "%s", base_error());
        base_clear_error();
    }
}
