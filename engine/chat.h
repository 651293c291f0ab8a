/* Chat messages to prompt text. Templates are Jinja programs in the model's files; those we know are recognized by
 * their text and rendered in C, any other is refused by name. Known: ChatML of SmolLM2 and Qwen2.5. */
#pragma once

#include "kernels/base.h"

struct chat_message {
    const char *role;    /* "system", "user", "assistant" */
    const char *content; /* UTF-8, NUL-terminated */
};

struct chat_template;

/* `jinja` is the template's text (NULL: the model has none), `path` names its file in messages. Returns a static object.
 * Errors: STATUS_INPUT when there is none or it is not a known one. */
int chat_find(const char *jinja, const char *path, const struct chat_template **out);
const char *chat_name(const struct chat_template *chat);

/* The prompt for `n` messages; with `add_generation_prompt` it ends where the assistant starts. *text is malloced.
 * Errors: STATUS_INPUT for no message or a role the template cannot render. */
int chat_render(const struct chat_template *chat, const struct chat_message *messages, int n,
                bool add_generation_prompt, char **text);
