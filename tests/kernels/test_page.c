/* The quantizer bit by bit: codes, scales, zeros and decoded values against golden/quantizer.py (PyTorch), through the record's
 * layout as kernels/cpu/page.h states it; record sizes; 16-bit parts; nothing written outside of a record. */
#include <float.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page.h"
#include "test.h"

enum { GUARD = 64, MAX_RECORD = 2 * KV_BLOCK * KV_MAX_HEAD_DIM * 4, POISON = 0xa5, N_KINDS = 10 };

struct golden_case {
    struct page_format format;
    bool is_k;
    int kind, first;
    uint64_t seed, codes, params, decoded;
};

static double bell(uint64_t u) {
    int64_t sum = -131070;
    for (int i = 0; i < 4; i++)
        sum += (int64_t)(u >> (16 * i) & 0xffff);
    return (double)sum / 32768.0;
}

static double special(uint64_t u, int key, double x) {
    if (key % 16 == 5)
        return INFINITY;
    if (key % 16 == 3 || (key % 16 == 7 && u % 2 == 0))
        return NAN;
    return u % 64 == 0 ? NAN : u % 64 == 1 ? INFINITY : u % 64 == 2 ? -INFINITY : x;
}

/* The inputs of quantizer.py's make_values: token t, channel c; `key` numbers the group, `other` runs inside it. */
static double make_value(const struct golden_case *g, int bits, int t, int c) {
    int key = g->is_k ? c : t, other = g->is_k ? t : c;
    uint64_t u = test_hash(g->seed, (uint64_t)(t * g->format.head_dim + c));
    double normal = bell(u);
    bool half = g->format.window == DTYPE_F16;
    int64_t top = (1 << bits) - 1;
    switch (g->kind) {
    case 1: {
        double flat = (double)((int64_t)(test_hash(g->seed + 1000003, (uint64_t)key) >> 48) - 32768) / 1024.0;
        return key % 3 == 0 ? flat : key % 3 == 1 ? 0.0 : normal;
    }
    case 2: return key % 2 + ldexp((double)(u % 8), -(20 + key % 12));
    case 3: return normal * (c == 5 ? 1000.0 : 1.0);
    case 4:
        if (key % 4 == 0)
            return normal < 0 ? -(double)FLT_MAX : (double)FLT_MAX;
        return key % 4 == 1 ? normal * 7e4 : ldexp(normal, 14 + (int)(u % (half ? 4 : 118)));
    case 5: return ldexp((double)((int64_t)(u % 2047) - 1023), half ? -24 : -(149 - key % 130));
    case 6: {
        int64_t m = other % 16 == 0 ? 0 : other % 16 == 1 ? 2 * top : (int64_t)(u % (uint64_t)(2 * top + 1));
        return ldexp((double)m * 0.5 - key % 8, key % 5 - 2);
    }
    case 7: {
        double low = key % 3 == 0 ? -0.0 : key % 3 == 1 ? -1e-9 : u % 5 == 0 ? 1.0 : 0.0;
        return u % 3 == 0 ? -0.0 : u % 3 == 1 ? 0.0 : low;
    }
    case 8: return special(u, key, normal);
    case 9: return ldexp(normal, key % 40 - 20);
    default: return normal;
    }
}

static void make_rows(const struct golden_case *g, int bits, void *rows) {
    int d = g->format.head_dim;
    static float values[KV_BLOCK * KV_MAX_HEAD_DIM];
    for (int t = 0; t < KV_BLOCK; t++) {
        for (int c = 0; c < d; c++) {
            double x = make_value(g, bits, t, c);
            if (g->format.window == DTYPE_F16 && g->kind != 8)
                x = x < -65504.0 ? -65504.0 : x > 65504.0 ? 65504.0 : x;
            values[t * d + c] = (float)x;
        }
    }
    dtype_narrow(g->format.window, values, rows, (int64_t)KV_BLOCK * d);
}

static uint64_t fnv(uint64_t h, uint64_t word) { return (h ^ word) * 0x100000001b3u; }

/* One code by the layout's own rule, apart from the encoder's packing. */
static unsigned code_at(const uint32_t *words, bool is_k, int d, int bits, int t, int c) {
    size_t word;
    int bit;
    if (is_k)
        cpu_page_code_place(bits, KV_BLOCK, c, t, &word, &bit);
    else
        cpu_page_code_place(bits, d, t, c, &word, &bit);
    return words[word] >> bit & ((1u << bits) - 1);
}

static bool is_poison(const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bytes[i] != POISON)
            return false;
    return true;
}

/* Encodes one part into a guarded record, the other part staying poison. Returns the record. */
static uint8_t *encode_guarded(const struct golden_case *g, const void *rows, uint8_t *buffer) {
    size_t v = cpu_page_v_offset(&g->format), end = page_record_bytes(&g->format);
    uint8_t *record = buffer + GUARD;
    memset(buffer, POISON, end + 2 * GUARD);
    if (g->is_k)
        cpu_page_encode_k(&g->format, rows, g->first, record);
    else
        cpu_page_encode_v(&g->format, rows, g->first, record);
    CHECK(is_poison(buffer, GUARD) && is_poison(record + end, GUARD), "guards");
    CHECK(g->is_k ? is_poison(record + v, end - v) : is_poison(record, v), "the other part");
    return record;
}

/* What the encoder made, in the golden file's order. */
struct result {
    uint8_t code[KV_BLOCK * KV_MAX_HEAD_DIM];
    uint16_t param[2 * KV_BLOCK];
    int n_codes, n_params;
};

static void check_case(const struct golden_case *g, const char *line, struct result *out) {
    static _Alignas(64) uint8_t buffer[MAX_RECORD + 2 * GUARD];
    static float rows[KV_BLOCK * KV_MAX_HEAD_DIM], k[KV_BLOCK * KV_MAX_HEAD_DIM], v[KV_BLOCK * KV_MAX_HEAD_DIM];
    int d = g->format.head_dim, bits = g->is_k ? g->format.k_bits : g->format.v_bits, groups = g->is_k ? d : KV_BLOCK;
    make_rows(g, bits, rows);
    const uint8_t *record = encode_guarded(g, rows, buffer);
    struct cpu_page_part part = cpu_page_part_of(g->is_k ? record : record + cpu_page_v_offset(&g->format), d, bits, groups);
    uint64_t codes = 0xcbf29ce484222325u, params = codes, decoded = codes;
    cpu_unpack(&(struct unpack_args){g->format, record, k, v});
    const float *values = g->is_k ? k : v;
    out->n_codes = KV_BLOCK * d;
    out->n_params = 2 * groups;
    for (int i = 0; i < KV_BLOCK * d; i++) {
        uint32_t word;
        out->code[i] = (uint8_t)code_at(part.codes, g->is_k, d, bits, i / d, i % d);
        codes = fnv(codes, out->code[i]);
        memcpy(&word, &values[i], sizeof word);
        decoded = fnv(decoded, word);
    }
    for (int i = 0; i < 2 * groups; i++) {
        out->param[i] = i < groups ? part.scale[i] : part.zero[i - groups];
        params = fnv(params, out->param[i]);
    }
    CHECK(codes == g->codes, "codes: %s", line);
    CHECK(params == g->params, "scales and zeros: %s", line);
    CHECK(decoded == g->decoded, "decoded: %s", line);
}

/* `words`: two hexadecimal digits a code, then four a scale or zero. */
static void check_full(const struct result *result, char *words) {
    char *params = strchr(words, ' ');
    REQUIRE(params ? 0 : STATUS_INPUT);
    params++;
    CHECK(params - words - 1 == 2 * result->n_codes, "length");
    for (int i = 0; i < result->n_codes; i++) {
        char digits[3] = {words[2 * i], words[2 * i + 1], 0};
        CHECK(strtoul(digits, NULL, 16) == result->code[i], "code %d: %u, golden %s", i, result->code[i], digits);
    }
    for (int i = 0; i < result->n_params; i++) {
        char digits[5] = {0};
        memcpy(digits, params + 4 * i, 4);
        CHECK(strtoul(digits, NULL, 16) == result->param[i], "scale or zero %d: %04x, golden %s", i, result->param[i], digits);
    }
}

static bool parse_case(const char *line, struct golden_case *g) {
    char window[8], part;
    int bits, d;
    unsigned long long seed, codes, params, decoded;
    if (sscanf(line, "case %7s %d %d %c %d %d %llu %llx %llx %llx", window, &d, &bits, &part, &g->kind, &g->first, &seed, &codes, &params,
               &decoded) != 10)
        return false;
    enum dtype dtype = strcmp(window, "f16") == 0 ? DTYPE_F16 : strcmp(window, "bf16") == 0 ? DTYPE_BF16 : DTYPE_F32;
    g->is_k = part == 'K';
    /* The other part's bits vary with the case: the parts do not depend on each other. */
    int other = (const int[]){2, 4, 8, 16}[seed % 4];
    g->format = (struct page_format){d, g->is_k ? bits : other, g->is_k ? other : bits, dtype};
    g->seed = seed;
    g->codes = codes;
    g->params = params;
    g->decoded = decoded;
    return true;
}

static void test_golden(void) {
    static char line[1 << 16];
    static struct result result;
    struct golden_case g;
    int n_cases = 0, n_full = 0, kinds = 0;
    FILE *file = fopen(TEST_FILE("golden/quantizer.golden"), "r");
    REQUIRE(file ? 0 : STATUS_FAILED);
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (parse_case(line, &g)) {
            check_case(&g, line, &result);
            n_cases++;
            kinds |= 1 << g.kind;
        } else if (strncmp(line, "full ", 5) == 0) {
            check_full(&result, line + 5);
            n_full++;
        }
    }
    fclose(file);
    CHECK(n_cases == 756 && n_full == 4 && kinds == (1 << N_KINDS) - 1, "%d cases, %d full, kinds %x", n_cases, n_full, (unsigned)kinds);
}

static void test_sizes(void) {
    const int bits[] = {2, 4, 8, 16};
    CHECK(page_record_bytes(&(struct page_format){128, 2, 2, DTYPE_F16}) == 9216, "d 128, 2 bits");
    CHECK(page_record_bytes(&(struct page_format){64, 2, 2, DTYPE_BF16}) == 4864, "d 64, 2 bits");
    CHECK(page_record_bytes(&(struct page_format){128, 16, 16, DTYPE_F16}) == 65536, "16 bits");
    CHECK(page_record_bytes(&(struct page_format){128, 16, 2, DTYPE_F32}) == 65536 + 4608, "float K, 2-bit V");
    for (int i = 0; i < 2 * 4 * 4 * 3; i++) {
        struct page_format f = {i % 2 ? 128 : 64, bits[i / 2 % 4], bits[i / 8 % 4], (const enum dtype[]){DTYPE_F32, DTYPE_F16, DTYPE_BF16}[i / 32]};
        size_t parts = cpu_page_v_offset(&f) + cpu_page_part_bytes(&f, f.v_bits, KV_BLOCK);
        CHECK(page_record_bytes(&f) % 16 == 0 && page_record_bytes(&f) == parts, "format %d", i);
        CHECK(cpu_page_v_offset(&f) % 16 == 0, "format %d: V is not aligned", i);
    }
}

/* 16-bit parts are the rows themselves, sink tokens zero, and unpack widens them. */
static void test_plain(void) {
    static uint8_t rows[KV_BLOCK * KV_MAX_HEAD_DIM * 4];
    static _Alignas(64) uint8_t buffer[MAX_RECORD + 2 * GUARD];
    static float k[KV_BLOCK * KV_MAX_HEAD_DIM], v[KV_BLOCK * KV_MAX_HEAD_DIM], expected[KV_BLOCK * KV_MAX_HEAD_DIM];
    for (int i = 0; i < 3 * 2 * 2; i++) {
        int d = i % 2 ? 64 : 128, first = i / 2 % 2 ? 16 : 0;
        enum dtype window = (const enum dtype[]){DTYPE_F32, DTYPE_F16, DTYPE_BF16}[i / 4];
        struct page_format f = {d, 16, 16, window};
        struct golden_case g = {.format = f, .is_k = true, .kind = 0, .first = first, .seed = (uint64_t)(900 + i)};
        make_rows(&g, 2, rows);
        dtype_widen(window, rows, expected, (int64_t)KV_BLOCK * d);
        memset(expected, 0, sizeof *expected * (size_t)(first * d));
        encode_guarded(&g, rows, buffer);
        cpu_page_decode_k(&f, buffer + GUARD, k);
        CHECK(memcmp(k, expected, sizeof *k * (size_t)(KV_BLOCK * d)) == 0, "K, case %d", i);
        g.is_k = false;
        encode_guarded(&g, rows, buffer);
        cpu_page_decode_v(&f, buffer + GUARD, v);
        CHECK(memcmp(v, expected, sizeof *v * (size_t)(KV_BLOCK * d)) == 0, "V, case %d", i);
    }
}

int main(void) {
    test_sizes();
    test_plain();
    test_golden();
    return test_report();
}
