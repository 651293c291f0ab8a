/* The safetensors reader on files made here: good ones, each kind of bad one, every truncation, thousands of mutations. */
#include "engine/safetensors.h"

#include "file_maker.h"

enum { N_MUTATIONS = 4000 };

static const char good[] = "{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"F16\",\"shape\":[3],"
                           "\"data_offsets\":[16,22]},\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
                           "\"none\":{\"dtype\":\"I64\",\"shape\":[0,5],\"data_offsets\":[22,22]}}  ";
enum { GOOD_BYTES = 22 };

static const char *save(const char *header, size_t bytes) {
    struct maker m = {0};
    maker_safetensors(&m, header, bytes);
    return maker_save(&m, "x.safetensors");
}

static int try_open(const char *path) {
    struct safetensors *file;
    int status = safetensors_open(path, &file);
    if (status == STATUS_OK) {
        int n;
        const struct file_tensor *tensors = safetensors_tensors(file, &n);
        volatile uint8_t sum = 0; /* every byte that the reader promises must be there */
        for (int i = 0; i < n; i++)
            for (size_t b = 0; b < tensors[i].bytes; b++)
                sum = (uint8_t)(sum + ((const uint8_t *)tensors[i].data)[b]);
        safetensors_close(file);
    }
    return status;
}

static void test_good(void) {
    struct safetensors *file;
    REQUIRE(safetensors_open(save(good, GOOD_BYTES), &file));
    int n;
    const struct file_tensor *t = safetensors_tensors(file, &n);
    CHECK(n == 3, "%d", n);
    CHECK(strcmp(t[0].name, "a") == 0 && t[0].dtype == DTYPE_F32 && t[0].n_dims == 2 && t[0].shape[0] == 2 &&
          t[0].shape[1] == 2 && t[0].bytes == 16);
    CHECK(strcmp(t[1].name, "b") == 0 && t[1].dtype == DTYPE_F16 && t[1].n_dims == 1 && t[1].shape[0] == 3 &&
          (const uint8_t *)t[1].data == (const uint8_t *)t[0].data + 16);
    CHECK(strcmp(t[2].name, "none") == 0 && t[2].dtype == -1 && strcmp(t[2].type, "I64") == 0 && t[2].bytes == 0);
    CHECK(file_tensor_find(t, n, "b") == &t[1] && file_tensor_find(t, n, "c") == NULL);
    const char *format = safetensors_metadata(file, "format");
    CHECK(format && strcmp(format, "pt") == 0 && !safetensors_metadata(file, "absent"));
    safetensors_close(file);
    CHECK(try_open(save("{}", 0)) == STATUS_OK, "%s", base_error());
}

#define ENTRY(name, dtype, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_bad(void) {
    static const struct {
        const char *header;
        size_t bytes;
        const char *words;
    } rows[] = {
        {"", 0, "does not begin with '{'"},
        {"[]", 0, "does not begin with '{'"},
        {"{\"a\":", 0, "header:"},
        {"{} x", 0, "header:"},
        {"{\"a\":3}", 0, "tensor a: expected an object"},
        {"{\"__metadata__\":{\"x\":1}}", 0, "__metadata__: x is not a string"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor a: data_offsets is missing"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":0}}", 4, "4 fields"},
        {"{" ENTRY("a", "F31", "[1]", "[0,4]") "}", 4, "dtype F31 is unknown"},
        {"{" ENTRY("a", "F32", "[1.0]", "[0,4]") "}", 4, "dimension 0 is not an integer"},
        {"{" ENTRY("a", "F32", "[-1]", "[0,4]") "}", 4, "dimension 0 is -1"},
        {"{" ENTRY("a", "F32", "[1,1,1,1,1]", "[0,4]") "}", 4, "5 dimensions"},
        {"{" ENTRY("a", "F32", "4", "[0,4]") "}", 4, "expected an array"},
        {"{" ENTRY("a", "F32", "[2]", "[0,4]") "}", 4, "do not make the 4 bytes"},
        {"{" ENTRY("a", "F16", "[1]", "[0,4]") "}", 4, "dtype F16 and shape [1] do not make"},
        {"{" ENTRY("a", "F4", "[3]", "[0,1]") "}", 1, "do not make"},
        {"{" ENTRY("a", "F32", "[1]", "[0,4,4]") "}", 4, "expected two integers"},
        {"{" ENTRY("a", "F32", "[1]", "[4,0]") "}", 4, "expected a range within the 4 bytes"},
        {"{" ENTRY("a", "F32", "[1]", "[-4,0]") "}", 4, "expected a range"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8]") "}", 7, "expected a range within the 7 bytes"},
        {"{" ENTRY("a", "F32", "[1]", "[9223372036854775804,9223372036854775807]") "}", 4, "expected a range"},
        {"{" ENTRY("a", "F32", "[1]", "[0,9223372036854775808]") "}", 4, "too big integer"},
        {"{" ENTRY("a", "F32", "[4294967296,4294967296,4294967296]", "[0,4]") "}", 4, "more than 2^63 values"},
        {"{" ENTRY("a", "F32", "[4294967296,1073741824]", "[0,0]") "}", 0, "do not make"},
        {"{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("b", "F32", "[1]", "[0,4]") "}", 4, "overlaps"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8]") "," ENTRY("b", "F32", "[2]", "[4,12]") "}", 12, "overlaps"},
        {"{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("b", "F32", "[1]", "[8,12]") "}", 12, "a hole before it"},
        {"{" ENTRY("a", "F32", "[1]", "[4,8]") "}", 8, "a hole before it"},
        {"{" ENTRY("a", "F32", "[1]", "[0,4]") "}", 5, "5 bytes of data, the header describes 4"},
        {"{" ENTRY("a", "F32", "[1]", "[0,4]") "," ENTRY("a", "F32", "[1]", "[4,8]") "}", 8, "duplicate object key"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        CHECK_FAILS(try_open(save(rows[i].header, rows[i].bytes)), STATUS_INPUT, rows[i].words);
        CHECK(try_open(maker_path("x.safetensors")) == STATUS_INPUT && strncmp(base_error(), maker_temp(), 10) == 0,
              "row %zu: '%s' does not begin with the path", i, base_error());
        base_clear_error();
    }
}

static void test_lengths(void) {
    static const uint64_t lengths[] = {3, 100000001, (uint64_t)1 << 32, (uint64_t)1 << 63, UINT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct maker m = {0};
        maker_u64(&m, lengths[i]);
        maker_put(&m, "{}", 2);
        CHECK_FAILS(try_open(maker_save(&m, "x.safetensors")), STATUS_INPUT, "expected at most 2");
    }
}

static void test_truncated(void) {
    struct maker m = {0};
    maker_safetensors(&m, good, GOOD_BYTES);
    for (size_t n = 0; n < m.n; n++) {
        CHECK(try_open(maker_write("x.safetensors", m.data, n)) == STATUS_INPUT, "%zu bytes: %s", n, base_error());
        base_clear_error();
    }
    maker_free(&m);
}

static void test_mutations(void) {
    struct maker m = {0};
    maker_safetensors(&m, good, GOOD_BYTES);
    maker_mutate(&m, "x.safetensors", m.n - GOOD_BYTES, N_MUTATIONS, 1, try_open);
    maker_free(&m);
}

int main(void) {
    test_good();
    test_bad();
    test_lengths();
    test_truncated();
    test_mutations();
    return test_report();
}
