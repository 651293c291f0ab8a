/* cuBLASLt with a table of plans.
 *
 * The library is column-major: it is asked for y^T (n_out x n_rows) = w x^T, where w [n_out][n_in] is its n_in x n_out matrix, to be
 * transposed, and x [n_rows][n_in] its n_in x n_rows matrix: both are read along k, and the bias runs along its rows.
 *
 * Split sums are allowed only where partial results go to the workspace and are added in a step of their own: that order is fixed, and a
 * stream has a workspace to itself. */
#include "kernels/cuda/blas.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_PLANS = 256,        /* buckets times matrices of a model fit; exact prefill brings ever new row counts: the oldest plan makes room */
    ALIGNMENT_MOST = 256, /* bytes; what the heuristic takes for granted unless told */
};

/* All that the heuristic may look at. No padding: compared by memcmp. */
struct plan_key {
    int64_t n_rows, n_out, n_in, ldx, ldw, ldy;
    uint64_t workspace_bytes;
    uint32_t align_x, align_w, align_y, align_bias; /* align_bias 0: no bias */
    uint32_t dtype, unused;
};

struct plan {
    struct plan_key key;
    cublasLtMatmulDesc_t operation; /* NULL: a free place */
    cublasLtMatrixLayout_t x, w, y;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_blas {
    cublasLtHandle_t handle;
    struct plan plans[N_PLANS];
    int n_plans, next; /* `next` is replaced once the table is full */
};

#define TRY_BLAS(call)                                                                                                  \
    do {                                                                                                                \
        cublasStatus_t blas_status_ = (call);                                                                           \
        if (blas_status_ != CUBLAS_STATUS_SUCCESS)                                                                      \
            FAIL(STATUS_FAILED, "cuBLASLt: %s: %s", #call, cublasLtGetStatusString(blas_status_));                      \
    } while (0)

int cuda_blas_open(struct cuda_blas **out) {
    *out = NULL;
    struct cuda_blas *blas;
    TRY(base_alloc(&blas, 1, sizeof *blas));
    cublasStatus_t status = cublasLtCreate(&blas->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        free(blas);
        FAIL(STATUS_FAILED, "cuBLASLt: cublasLtCreate: %s", cublasLtGetStatusString(status));
    }
    *out = blas;
    return STATUS_OK;
}

/* Frees what a whole or half-made plan has. Recorded graphs keep their own copies of what a launch needs. */
static void plan_deinit(struct plan *plan) {
    if (plan->y)
        cublasLtMatrixLayoutDestroy(plan->y);
    if (plan->w)
        cublasLtMatrixLayoutDestroy(plan->w);
    if (plan->x)
        cublasLtMatrixLayoutDestroy(plan->x);
    if (plan->operation)
        cublasLtMatmulDescDestroy(plan->operation);
    memset(plan, 0, sizeof *plan);
}

void cuda_blas_close(struct cuda_blas *blas) {
    if (!blas)
        return;
    for (int i = 0; i < blas->n_plans; i++)
        plan_deinit(&blas->plans[i]);
    cublasLtDestroy(blas->handle);
    free(blas);
}

/* The largest power of two that divides the address, up to ALIGNMENT_MOST. */
static uint32_t alignment_of(const void *pointer) {
    uintptr_t bits = (uintptr_t)pointer | ALIGNMENT_MOST;
    return (uint32_t)(bits & (~bits + 1));
}

static struct plan_key key_of(const struct blas_product *p) {
    return (struct plan_key){
        .n_rows = p->n_rows, .n_out = p->n_out, .n_in = p->n_in, .ldx = p->ldx, .ldw = p->ldw, .ldy = p->ldy,
        .workspace_bytes = p->workspace_bytes, .align_x = alignment_of(p->x), .align_w = alignment_of(p->w),
        .align_y = alignment_of(p->y), .align_bias = p->bias ? alignment_of(p->bias) : 0, .dtype = (uint32_t)p->dtype,
    };
}

static int set_operation(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes) {
    TRY_BLAS(cublasLtMatmulDescSetAttribute(operation, attribute, value, bytes));
    return STATUS_OK;
}

static int describe(struct plan *plan, const struct blas_product *p) {
    const struct plan_key *k = &plan->key;
    cudaDataType_t type = p->dtype == DTYPE_F32 ? CUDA_R_32F : p->dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtEpilogue_t bias = CUBLASLT_EPILOGUE_BIAS;
    TRY_BLAS(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TRY(set_operation(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    if (p->bias) {
        TRY(set_operation(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &bias, sizeof bias));
        TRY(set_operation(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias));
    }
    TRY_BLAS(cublasLtMatrixLayoutCreate(&plan->w, type, (uint64_t)k->n_in, (uint64_t)k->n_out, k->ldw));
    TRY_BLAS(cublasLtMatrixLayoutCreate(&plan->x, type, (uint64_t)k->n_in, (uint64_t)k->n_rows, k->ldx));
    TRY_BLAS(cublasLtMatrixLayoutCreate(&plan->y, CUDA_R_32F, (uint64_t)k->n_out, (uint64_t)k->n_rows, k->ldy));
    return STATUS_OK;
}

static int set_preferences(cublasLtMatmulPreference_t preference, const struct plan_key *k) {
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* besides none, which is always allowed */
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        const void *value;
        size_t bytes;
    } wishes[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &k->workspace_bytes, sizeof k->workspace_bytes},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &k->align_w, sizeof k->align_w},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &k->align_x, sizeof k->align_x},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &k->align_y, sizeof k->align_y},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &k->align_y, sizeof k->align_y},
    };
    for (size_t i = 0; i < sizeof wishes / sizeof *wishes; i++)
        TRY_BLAS(cublasLtMatmulPreferenceSetAttribute(preference, wishes[i].attribute, wishes[i].value, wishes[i].bytes));
    return STATUS_OK;
}

static int choose_algorithm(struct cuda_blas *blas, struct plan *plan) {
    const struct plan_key *k = &plan->key;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found = {0};
    int n_found = 0;
    TRY_BLAS(cublasLtMatmulPreferenceCreate(&preference));
    int status = set_preferences(preference, k);
    cublasStatus_t answer = CUBLAS_STATUS_SUCCESS;
    if (status == STATUS_OK)
        answer = cublasLtMatmulAlgoGetHeuristic(blas->handle, plan->operation, plan->w, plan->x, plan->y, plan->y, preference, 1, &found,
                                                &n_found);
    cublasLtMatmulPreferenceDestroy(preference);
    TRY(status);
    if (answer != CUBLAS_STATUS_SUCCESS || n_found < 1 || found.state != CUBLAS_STATUS_SUCCESS)
        FAIL(STATUS_FAILED, "cuBLASLt: no algorithm for %s [%lld, %lld] times [%lld, %lld]^T (ldx %lld, ldw %lld, ldy %lld; aligned to "
             "x %u, w %u, y %u, bias %u bytes): %s", dtype_name((enum dtype)k->dtype), (long long)k->n_rows, (long long)k->n_in,
             (long long)k->n_out, (long long)k->n_in, (long long)k->ldx, (long long)k->ldw, (long long)k->ldy, k->align_x, k->align_w,
             k->align_y, k->align_bias, cublasLtGetStatusString(answer));
    plan->algorithm = found.algo;
    return STATUS_OK;
}

static int find_plan(struct cuda_blas *blas, const struct blas_product *p, struct plan **out) {
    struct plan_key key = key_of(p);
    for (int i = 0; i < blas->n_plans; i++)
        if (memcmp(&blas->plans[i].key, &key, sizeof key) == 0) {
            *out = &blas->plans[i];
            return STATUS_OK;
        }
    struct plan made = {.key = key};
    int status = describe(&made, p);
    if (status == STATUS_OK)
        status = choose_algorithm(blas, &made);
    if (status < 0) {
        plan_deinit(&made);
        return status;
    }
    if (blas->n_plans < N_PLANS) {
        *out = &blas->plans[blas->n_plans++];
    } else {
        *out = &blas->plans[blas->next];
        blas->next = (blas->next + 1) % N_PLANS;
        plan_deinit(*out);
    }
    **out = made;
    return STATUS_OK;
}

int cuda_blas_product(struct cuda_blas *blas, const struct blas_product *p) {
    const float one = 1, zero = 0;
    struct plan *plan;
    TRY(find_plan(blas, p, &plan));
    if (p->bias)
        TRY(set_operation(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias));
    TRY_BLAS(cublasLtMatmul(blas->handle, plan->operation, &one, p->w, plan->w, p->x, plan->x, &zero, p->y, plan->y, p->y, plan->y,
                            &plan->algorithm, p->workspace, p->workspace_bytes, (cudaStream_t)p->stream));
    return STATUS_OK;
}
