/* Reading tests/golden/model_files.json: float32 values stand there as unsigned integers, bit for bit. */
#pragma once

#include <jansson.h>

#include "engine/model_file.h"
#include "test.h"

static inline json_t *golden_load(void) {
    json_error_t error;
    json_t *root = json_load_file(TEST_FILE("golden/model_files.json"), 0, &error);
    if (!root) {
        fprintf(stderr, "golden/model_files.json: line %d: %s\n", error.line, error.text);
        exit(1);
    }
    return root;
}

static inline float golden_float(const json_t *bits, size_t i) {
    uint32_t word = (uint32_t)json_integer_value(json_array_get(bits, i));
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* Equal bit for bit. */
static inline void golden_check(const char *what, const float *got, const json_t *bits) {
    size_t n = json_array_size(bits), n_wrong = 0;
    CHECK(n > 0, "%s: no golden values", what);
    for (size_t i = 0; i < n; i++) {
        float expected = golden_float(bits, i);
        if (memcmp(&got[i], &expected, sizeof expected) != 0 && n_wrong++ == 0)
            fprintf(stderr, "%s: value %zu: %.9g, expected %.9g\n", what, i, (double)got[i], (double)expected);
    }
    CHECK(n_wrong == 0, "%s: %zu of %zu values differ", what, n_wrong, n);
}

/* Equal up to `ulps` units of the last place. */
static inline void golden_check_close(const char *what, const float *got, const json_t *bits, size_t n, double ulps) {
    CHECK(json_array_size(bits) == n, "%s: %zu golden values, expected %zu", what, json_array_size(bits), n);
    for (size_t i = 0; i < n; i++) {
        double expected = (double)golden_float(bits, i);
        double ulp = ldexp(1.0, ilogb(expected) - 23);
        CHECK(fabs((double)got[i] - expected) <= ulps * ulp, "%s: value %zu: %.9g, expected %.9g (%.1f ulp)", what, i,
              (double)got[i], expected, fabs((double)got[i] - expected) / ulp);
    }
}

/* Row `row`, in Hugging Face's order, of a tensor as floats; malloced. */
static inline float *golden_row(const struct model_file *file, const struct model_tensor *t, int64_t row) {
    int64_t n = t->shape[t->n_dims - 1];
    float *values = calloc((size_t)n, sizeof *values);
    if (!values)
        exit(1);
    int64_t at = model_file_row_index(t, row, model_file_config(file)->head_dim);
    dtype_widen(t->dtype, model_file_row(t, at), values, n);
    return values;
}
