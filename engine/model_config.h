/* From config.json or GGUF metadata to struct model_config. Error texts name the field, expected and got; the caller puts
 * the path before them. */
#pragma once

#include "engine/gguf.h"

/* Sets the architecture that config.json calls `model_type` and GGUF `general.architecture`, and what it implies; an unknown
 * one is an error that lists those known. */
int model_config_set_arch(const char *name, struct model_config *config);
const char *model_config_arch_name(enum model_arch arch);

/* Hugging Face's class name for the architecture's language model, such as LlamaForCausalLM. */
const char *model_config_arch_class(enum model_arch arch);

/* Adds an id that ends a sequence unless it is there already. */
int model_config_add_stop(struct model_config *config, int64_t id, const char *field);

/* What every configuration must obey, whatever it came from. */
int model_config_check(const struct model_config *config);

/* Stores `value` in *out when it is a positive number that an int holds; an error naming `field` otherwise. */
int model_config_set_count(int64_t value, const char *field, int *out);

/* config.json; then, where the folder has one, generation_config.json, whose eos ids are stop ids too. */
int model_config_json_read(const char *text, size_t bytes, struct model_config *config);
int model_config_json_add_generation(const char *text, size_t bytes, struct model_config *config);

/* A shape file: `name = value` lines, see model_shape.c. Error texts are complete. */
int model_config_shape_read(const char *path, struct model_config *config);

/* GGUF metadata, with the vocabulary from the embedding's rows. */
int model_config_gguf_read(const struct gguf *gguf, struct model_config *config);
