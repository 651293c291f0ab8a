/* A page record decoded to float, for tests and export. It finds every element by page.cuh's rule for a single element, apart from the
 * word-wise ways of encode.cuh and of the attention, so that it checks them. */
#include "kernels/cuda/encode.cuh"

enum { UNPACK_THREADS = 256 };

/* Element (token, channel) of the K or the V part. */
__device__ static float unpack_value(const struct page_format *f, const uint8_t *part, int bits, bool is_k, int token, int channel) {
    int d = f->head_dim, step, column, word, bit;
    if (bits == 16) {
        int i = token * d + channel;
        return f->window == DTYPE_F16 ? device_widen(((const __half *)part)[i]) : device_widen(((const __nv_bfloat16 *)part)[i]);
    }
    if (is_k) {
        page_k_column(channel, &step, &column);
        page_code_place(bits, d / 16, token, step, column, &word, &bit);
    } else {
        page_code_place(bits, KV_BLOCK / 16, channel, token / 16, token % 16, &word, &bit);
    }
    const uint8_t *parameters = part + page_codes_bytes(d, bits);
    const uint8_t *scale = parameters + (is_k ? page_k_parameter(channel) : page_v_parameter(token));
    const uint8_t *zero = scale + (is_k ? 8 : 2);
    unsigned code = ((const uint32_t *)part)[word] >> bit & ((1u << bits) - 1);
    return encode_decode(code, __half2float(*(const __half *)scale), __half2float(*(const __half *)zero));
}

/* grid (KV_BLOCK * d / threads, 2): element i < KV_BLOCK * d of K or V. */
static __global__ void unpack_kernel(const __grid_constant__ struct unpack_args args) {
    const struct page_format *f = &args.format;
    bool is_k = blockIdx.y == 0;
    int i = blockIdx.x * UNPACK_THREADS + threadIdx.x, token = i / f->head_dim, channel = i % f->head_dim;
    if (is_k)
        args.k[i] = unpack_value(f, args.record, f->k_bits, true, token, channel);
    else
        args.v[i] = unpack_value(f, args.record + page_v_offset(f), f->v_bits, false, token, channel);
}

extern "C" int cuda_unpack(const struct cuda_launch *launch, const struct unpack_args *args) {
    TRY(encode_check_format(&args->format, "unpack"));
    if (!encode_aligned(args->record))
        FAIL(STATUS_USAGE, "cuda unpack: a record must lie at a multiple of 16 bytes");
    dim3 grid(KV_BLOCK * args->format.head_dim / UNPACK_THREADS, 2);
    unpack_kernel<<<grid, UNPACK_THREADS, 0, cuda_stream_of(launch)>>>(*args);
    CHECK_LAUNCH("unpack");
    return STATUS_OK;
}
