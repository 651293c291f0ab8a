/* The known templates: each row is a template's exact text and what it has of its own; one function renders the same in C. A template
 * that differs by one character may mean something else, so nothing but white space at its end is forgiven. */
#include "engine/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHAT_SHOWN = 60 }; /* characters of an unknown template in the message */

struct chat_text {
    char *data; /* NULL: only count */
    size_t bytes;
};

struct chat_template {
    const char *name;
    const char *jinja;
    const char *system; /* the message put first where the chat has none */
};

static void chat_add(struct chat_text *out, const char *text) {
    size_t bytes = strlen(text);
    if (out->data)
        memcpy(out->data + out->bytes, text, bytes);
    out->bytes += bytes;
}

/* ChatML: what the known templates say of these roles. A chat without a system message first gets the template's. */
static void chat_render_ml(const struct chat_template *chat, const struct chat_message *messages, int n, bool add_generation_prompt,
                           struct chat_text *out) {
    if (strcmp(messages[0].role, "system") != 0) {
        chat_add(out, "<|im_start|>system\n");
        chat_add(out, chat->system);
        chat_add(out, "<|im_end|>\n");
    }
    for (int i = 0; i < n; i++) {
        chat_add(out, "<|im_start|>");
        chat_add(out, messages[i].role);
        chat_add(out, "\n");
        chat_add(out, messages[i].content);
        chat_add(out, "<|im_end|>\n");
    }
    if (add_generation_prompt)
        chat_add(out, "<|im_start|>assistant\n");
}

/* Qwen2.5's template, whose example of a tool call stands in one or in two braces. What it says of tools does not concern the roles
 * that chat_render takes. */
#define CHAT_QWEN(open, close) \
    "{%- if tools %}\n" \
    "    {{- '<|im_start|>system\\n' }}\n" \
    "    {%- if messages[0]['role'] == 'system' %}\n" \
    "        {{- messages[0]['content'] }}\n" \
    "    {%- else %}\n" \
    "        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}\n" \
    "    {%- endif %}\n" \
    "    {{- \"\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with " \
    "function signatures within <tools></tools> XML tags:\\n<tools>\" }}\n" \
    "    {%- for tool in tools %}\n" \
    "        {{- \"\\n\" }}\n" \
    "        {{- tool | tojson }}\n" \
    "    {%- endfor %}\n" \
    "    {{- \"\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments " \
    "within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" open "\\\"name\\\": <function-name>, \\\"arguments\\\": " \
    "<args-json-object>" close "\\n</tool_call><|im_end|>\\n\" }}\n" \
    "{%- else %}\n" \
    "    {%- if messages[0]['role'] == 'system' %}\n" \
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n" \
    "    {%- else %}\n" \
    "        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n" \
    "    {%- endif %}\n" \
    "{%- endif %}\n" \
    "{%- for message in messages %}\n" \
    "    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) or (message.role == \"assistant\" " \
    "and not message.tool_calls) %}\n" \
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n" \
    "    {%- elif message.role == \"assistant\" %}\n" \
    "        {{- '<|im_start|>' + message.role }}\n" \
    "        {%- if message.content %}\n" \
    "            {{- '\\n' + message.content }}\n" \
    "        {%- endif %}\n" \
    "        {%- for tool_call in message.tool_calls %}\n" \
    "            {%- if tool_call.function is defined %}\n" \
    "                {%- set tool_call = tool_call.function %}\n" \
    "            {%- endif %}\n" \
    "            {{- '\\n<tool_call>\\n{\"name\": \"' }}\n" \
    "            {{- tool_call.name }}\n" \
    "            {{- '\", \"arguments\": ' }}\n" \
    "            {{- tool_call.arguments | tojson }}\n" \
    "            {{- '}\\n</tool_call>' }}\n" \
    "        {%- endfor %}\n" \
    "        {{- '<|im_end|>\\n' }}\n" \
    "    {%- elif message.role == \"tool\" %}\n" \
    "        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != \"tool\") %}\n" \
    "            {{- '<|im_start|>user' }}\n" \
    "        {%- endif %}\n" \
    "        {{- '\\n<tool_response>\\n' }}\n" \
    "        {{- message.content }}\n" \
    "        {{- '\\n</tool_response>' }}\n" \
    "        {%- if loop.last or (messages[loop.index0 + 1].role != \"tool\") %}\n" \
    "            {{- '<|im_end|>\\n' }}\n" \
    "        {%- endif %}\n" \
    "    {%- endif %}\n" \
    "{%- endfor %}\n" \
    "{%- if add_generation_prompt %}\n" \
    "    {{- '<|im_start|>assistant\\n' }}\n" \
    "{%- endif %}\n"
#define CHAT_QWEN_SYSTEM "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

static const struct chat_template chat_table[] = {
    {
        "smollm2",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' + '\n"
        "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
        "' }}{% endif %}",
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    },
    {"qwen2.5", CHAT_QWEN("{", "}"), CHAT_QWEN_SYSTEM},
    {"qwen2.5-coder", CHAT_QWEN("{{", "}}"), CHAT_QWEN_SYSTEM},
};

enum { CHAT_N_TEMPLATES = sizeof chat_table / sizeof chat_table[0] };

static size_t chat_trimmed(const char *text) {
    size_t n = strlen(text);
    while (n > 0 && strchr(" \t\r\n", text[n - 1]))
        n--;
    return n;
}

int chat_find(const char *jinja, const char *path, const struct chat_template **out) {
    char known[256] = "";
    *out = NULL;
    if (!jinja)
        FAIL(STATUS_INPUT, "%s: the model has no chat template", path);
    size_t n = chat_trimmed(jinja);
    for (int i = 0; i < CHAT_N_TEMPLATES; i++) {
        if (chat_trimmed(chat_table[i].jinja) == n && memcmp(chat_table[i].jinja, jinja, n) == 0) {
            *out = &chat_table[i];
            return 0;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", chat_table[i].name);
    }
    FAIL(STATUS_INPUT, "%s: chat template '%.*s%s' is not known (known: %s)", path, (int)min_i64((int64_t)n, CHAT_SHOWN), jinja,
         n > CHAT_SHOWN ? "..." : "", known);
}

const char *chat_name(const struct chat_template *chat) { return chat->name; }

int chat_render(const struct chat_template *chat, const struct chat_message *messages, int n,
                bool add_generation_prompt, char **text) {
    static const char *const roles[] = {"system", "user", "assistant"};
    *text = NULL;
    if (n <= 0)
        FAIL(STATUS_INPUT, "a chat needs at least one message");
    for (int i = 0; i < n; i++) {
        bool fine = false;
        for (size_t r = 0; r < sizeof roles / sizeof roles[0]; r++)
            fine = fine || strcmp(messages[i].role, roles[r]) == 0;
        if (!fine)
            FAIL(STATUS_INPUT, "message %d: role '%.40s' is not known (known: system, user, assistant)", i, messages[i].role);
    }
    struct chat_text out = {0};
    chat_render_ml(chat, messages, n, add_generation_prompt, &out);
    TRY(base_alloc(&out.data, out.bytes + 1, 1));
    out.bytes = 0;
    chat_render_ml(chat, messages, n, add_generation_prompt, &out);
    *text = out.data;
    return 0;
}
