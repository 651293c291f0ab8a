/* The GGUF reader on files made here: good ones, each kind of bad one, every truncation, thousands of mutations. */
#include "engine/gguf.h"

#include "file_maker.h"

enum { N_MUTATIONS = 4000, TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q6_K = 14 };

/* What test rows change in an otherwise good file. */
struct variant {
    const char *magic;
    uint32_t version;
    uint64_t n_tensors, n_pairs, key_bytes, array_count, array_item, n_dims, columns, type, offset;
    const char *second_key, *second_name;
    uint32_t alignment;
    size_t surplus;
};

static const struct variant plain = {
    .magic = "GGUF", .version = 3, .n_tensors = 2, .n_pairs = 7, .key_bytes = 1, .array_count = 2,
    .array_item = GGUF_STRING, .n_dims = 2, .columns = 64, .type = TYPE_Q4_0, .offset = 32,
    .second_key = "real", .second_name = "matrix", .alignment = 32,
};

/* A vector of 3 values in F32, then a matrix [2,64] in Q4_0, which ends the file without padding. */
static void make(struct maker *m, const struct variant *v) {
    maker_put(m, v->magic, 4);
    maker_u32(m, v->version);
    maker_u64(m, v->n_tensors);
    maker_u64(m, v->n_pairs);
    maker_u64(m, v->key_bytes); /* "t": a text */
    maker_put(m, "t", 1);
    maker_u32(m, GGUF_STRING);
    maker_text(m, "hello");
    maker_gguf_f32(m, v->second_key, 0.5f);
    maker_gguf_array(m, "texts", (uint32_t)v->array_item, v->array_count);
    maker_u64(m, 3);
    maker_put(m, "a\0b", 3);
    maker_text(m, "");
    maker_gguf_array(m, "ints", GGUF_I32, 2);
    maker_u32(m, 7);
    maker_u32(m, (uint32_t)-7);
    maker_text(m, "flag");
    maker_u32(m, GGUF_BOOL);
    maker_put(m, "\1", 1);
    maker_gguf_u32(m, "general.alignment", v->alignment);
    maker_text(m, "minus");
    maker_u32(m, GGUF_I32);
    maker_u32(m, (uint32_t)-7);
    maker_gguf_info(m, "vector", 3, 0, TYPE_F32, 0);
    maker_text(m, v->second_name);
    maker_u32(m, (uint32_t)v->n_dims);
    maker_u64(m, v->columns);
    maker_u64(m, 2);
    maker_u32(m, (uint32_t)v->type);
    maker_u64(m, v->offset);
    maker_align(m, 32);
    maker_zeros(m, 32 + 2 * 2 * 18 + v->surplus);
}

static const char *save(const struct variant *v) {
    struct maker m = {0};
    make(&m, v);
    return maker_save(&m, "x.gguf");
}

static int try_open(const char *path) {
    struct gguf *file;
    int status = gguf_open(path, &file);
    if (status < 0)
        return status;
    int n, n_ints;
    const struct file_tensor *tensors = gguf_tensors(file, &n);
    volatile uint8_t sum = 0; /* every byte that the reader promises must be there */
    for (int i = 0; i < n; i++)
        for (size_t b = 0; b < tensors[i].bytes; b++)
            sum = (uint8_t)(sum + ((const uint8_t *)tensors[i].data)[b]);
    struct gguf_texts texts = {0};
    int32_t *ints = NULL;
    bool flag;
    gguf_get_texts(file, "texts", &texts);
    gguf_get_ints(file, "ints", &ints, &n_ints);
    gguf_get_bool(file, "flag", &flag);
    base_clear_error();
    gguf_texts_free(&texts);
    free(ints);
    gguf_close(file);
    return STATUS_OK;
}

static void check_values(const struct gguf *file) {
    const char *text = NULL;
    double real = 0;
    bool flag = false;
    int64_t number = -1;
    CHECK(gguf_get_text(file, "t", &text) == 1 && strcmp(text, "hello") == 0);
    CHECK(gguf_get_real(file, "real", &real) == 1 && real == 0.5);
    CHECK(gguf_get_bool(file, "flag", &flag) == 1 && flag);
    CHECK(gguf_get_int(file, "general.alignment", &number) == 1 && number == 32);
    CHECK(gguf_get_int(file, "absent", &number) == 0 && number == 32);
    CHECK(gguf_get_int(file, "minus", &number) == 1 && number == -7);
    CHECK_FAILS(gguf_get_int(file, "t", &number), STATUS_INPUT, "t: a value of type string, expected an integer");
    CHECK_FAILS(gguf_get_text(file, "texts", &text), STATUS_INPUT, "of type array of string, expected a string");
    struct gguf_texts texts = {0};
    CHECK(gguf_get_texts(file, "texts", &texts) == 1 && texts.n == 2 && texts.bytes[0] == 3 && texts.bytes[1] == 0 &&
          memcmp(texts.text[0], "a\0b", 4) == 0 && texts.text[1][0] == '\0');
    gguf_texts_free(&texts);
    int32_t *ints = NULL;
    int n = 0;
    CHECK(gguf_get_ints(file, "ints", &ints, &n) == 1 && n == 2 && ints[0] == 7 && ints[1] == -7);
    free(ints);
}

static void test_good(void) {
    for (uint32_t version = 2; version <= 3; version++) {
        struct variant v = plain;
        v.version = version;
        struct gguf *file;
        REQUIRE(gguf_open(save(&v), &file));
        int n;
        const struct file_tensor *t = gguf_tensors(file, &n);
        CHECK(n == 2 && strcmp(t[0].name, "matrix") == 0 && strcmp(t[1].name, "vector") == 0);
        CHECK(t[0].dtype == DTYPE_Q4_0 && t[0].n_dims == 2 && t[0].shape[0] == 2 && t[0].shape[1] == 64);
        CHECK((const uint8_t *)t[0].data == (const uint8_t *)t[1].data + 32 && t[0].bytes == 72 && t[1].bytes == 12);
        check_values(file);
        gguf_close(file);
    }
    struct variant v = plain; /* up to the next aligned byte the end may be padded */
    v.surplus = 24;
    CHECK(try_open(save(&v)) == STATUS_OK, "%s", base_error());
}

static void test_bad(void) {
#define BAD(words_, ...)                                               \
    do {                                                               \
        struct variant v = plain;                                      \
        __VA_ARGS__;                                                   \
        CHECK_FAILS(try_open(save(&v)), STATUS_INPUT, words_);         \
    } while (0)
    BAD("does not begin with 'GGUF'", v.magic = "GGML");
    BAD("a big-endian GGUF file", v.version = 0x03000000);
    BAD("GGUF version 1, expected 2 or 3", v.version = 1);
    BAD("GGUF version 4, expected 2 or 3", v.version = 4);
    BAD("more than fit", v.n_tensors = (uint64_t)1 << 63);
    BAD("more than fit", v.n_tensors = UINT64_MAX);
    BAD("more than fit", v.n_pairs = (uint64_t)1 << 63);
    BAD("a metadata key: 9223372036854775808 bytes", v.key_bytes = (uint64_t)1 << 63);
    BAD("texts: an array of 9223372036854775808 values", v.array_count = (uint64_t)1 << 63);
    BAD("texts: an array of 2305843009213693952 values", v.array_count = (uint64_t)1 << 61);
    BAD("texts: an array of type 9", v.array_item = GGUF_ARRAY);
    BAD("texts: an array of type 99", v.array_item = 99);
    BAD("flag: there twice", v.second_key = "flag");
    BAD("tensor vector: there twice", v.second_name = "vector");
    BAD("matrix: 0 dimensions", v.n_dims = 0);
    BAD("matrix: 5 dimensions", v.n_dims = 5);
    BAD("tensor matrix: dimension 1 is -9223372036854775808", v.columns = (uint64_t)1 << 63);
    BAD("more than 2^63 values", v.columns = (uint64_t)1 << 62);
    BAD("is larger than the file", v.columns = (uint64_t)1 << 40);
    BAD("is larger than the file", v.columns = (uint64_t)1 << 61, v.type = TYPE_F32);
    BAD("rows of type Q4_0 are multiples of 32", v.columns = 63);
    BAD("tensor matrix: bytes ", v.columns = 96);
    BAD("type 4 is unknown", v.type = 4);
    BAD("type 1000 is unknown", v.type = 1000);
    BAD("rows of type Q6_K are multiples of 256", v.type = TYPE_Q6_K);
    BAD("offset 0, expected 32", v.offset = 0);
    BAD("offset 64, expected 32", v.offset = 64);
    BAD("offset 18446744073709551615, expected 32", v.offset = UINT64_MAX);
    BAD("general.alignment: 0", v.alignment = 0);
    BAD("general.alignment: 24", v.alignment = 24);
    BAD("the last tensor ends at", v.surplus = 25);
#undef BAD
}

static void test_truncated(void) {
    struct maker m = {0};
    make(&m, &plain);
    for (size_t n = 0; n < m.n; n++) {
        CHECK(try_open(maker_write("x.gguf", m.data, n)) == STATUS_INPUT, "%zu bytes: %s", n, base_error());
        base_clear_error();
    }
    maker_free(&m);
}

static void test_mutations(void) {
    struct maker m = {0};
    make(&m, &plain);
    maker_mutate(&m, "x.gguf", m.n - 104, N_MUTATIONS, 3, try_open);
    maker_free(&m);
}

int main(void) {
    test_good();
    test_bad();
    test_truncated();
    test_mutations();
    return test_report();
}
