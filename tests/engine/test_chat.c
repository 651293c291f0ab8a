/* Rendered prompts against transformers' apply_chat_template; templates and messages that must be refused. */
#include "engine/chat.h"

#include <jansson.h>

#include "test.h"

enum { MAX_MESSAGES = 8 };

static void check_case(const struct chat_template *chat, const json_t *item) {
    struct chat_message messages[MAX_MESSAGES];
    json_t *list = json_object_get(item, "messages"), *message;
    const char *expected = json_string_value(json_object_get(item, "text"));
    size_t i;
    char *text;
    json_array_foreach(list, i, message) {
        messages[i].role = json_string_value(json_object_get(message, "role"));
        messages[i].content = json_string_value(json_object_get(message, "content"));
    }
    REQUIRE(chat_render(chat, messages, (int)json_array_size(list), json_is_true(json_object_get(item, "generate")), &text));
    CHECK(strcmp(text, expected) == 0, "'%s', expected '%s'", text, expected);
    free(text);
}

static void check_template(const json_t *row) {
    const char *jinja = json_string_value(json_object_get(row, "template")), *name = json_string_value(json_object_get(row, "name"));
    const struct chat_template *chat, *other;
    json_t *item;
    size_t i;
    char changed[4096];
    REQUIRE(chat_find(jinja, "m.gguf", &chat));
    CHECK(strcmp(chat_name(chat), name) == 0, "%s, expected %s", chat_name(chat), name);
    CHECK(json_array_size(json_object_get(row, "cases")) == 20, "%s: cases", name);
    json_array_foreach(json_object_get(row, "cases"), i, item)
        check_case(chat, item);

    snprintf(changed, sizeof changed, "%s \n\t\r\n", jinja);
    REQUIRE(chat_find(changed, "m.gguf", &other));
    CHECK(other == chat, "white space at the end");
    snprintf(changed, sizeof changed, " %s", jinja);
    CHECK_FAILS(chat_find(changed, "m.gguf", &other), STATUS_INPUT, "m.gguf: chat template ' {%");
    for (size_t at = 0; at < strlen(jinja); at += 7) { /* any other character is another template */
        snprintf(changed, sizeof changed, "%s", jinja);
        changed[at] ^= 1;
        CHECK_FAILS(chat_find(changed, "m.gguf", &other), STATUS_INPUT, " is not known (known: smollm2, qwen2.5, qwen2.5-coder)");
    }
}

int main(void) {
    json_error_t error;
    json_t *golden = json_load_file(TEST_FILE("golden/chat.json"), 0, &error), *row;
    const struct chat_template *other;
    size_t i;
    char *text;
    CHECK(golden != NULL, "%s", error.text);
    CHECK(json_array_size(json_object_get(golden, "templates")) == 3, "templates");
    json_array_foreach(json_object_get(golden, "templates"), i, row)
        check_template(row);

    CHECK_FAILS(chat_find("", "m.gguf", &other), STATUS_INPUT, "chat template '' is not known (known: smollm2, qwen2.5, qwen2.5-coder)");
    CHECK_FAILS(chat_find(NULL, "m.gguf", &other), STATUS_INPUT, "m.gguf: the model has no chat template");
    CHECK(other == NULL, "a template came out of an error");

    struct chat_message bad[] = {{"user", "x"}, {"tool", "y"}};
    const struct chat_template *chat;
    row = json_array_get(json_object_get(golden, "templates"), 0);
    REQUIRE(chat_find(json_string_value(json_object_get(row, "template")), "m.gguf", &chat));
    CHECK_FAILS(chat_render(chat, bad, 2, true, &text), STATUS_INPUT, "message 1: role 'tool' is not known");
    CHECK_FAILS(chat_render(chat, bad, 0, true, &text), STATUS_INPUT, "at least one message");
    json_decref(golden);
    return test_report();
}
