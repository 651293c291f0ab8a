/* See dnn.h. The attention is the graph of small operations that cuDNN's engines recognize as one:
 *
 *     scores = Q K^T * scale;  masked = row + n_keys - n_rows >= column ? scores : -inf;  weights = softmax(masked);  O = weights V
 *
 * Where every row sees all keys (decoding, for comparison) there is no mask.
 *
 * Only Q, K, V and O exist in memory. O is 16 bit there: it is put into the upper half of our float result and widened from there. */
#include "kernels/cuda/dnn.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<cudnn_graph.h>)
#include <cudnn_graph.h>

enum {
    DNN_OLDEST = 91000,          /* 9.10: takes -inf as a mask; device properties without a handle came with 9.8 */
    DNN_MAX_KEPT = 96,           /* descriptors of one plan: 57 of the graph and the heuristics, 2 per engine */
    DNN_MAX_ENGINES = 8,         /* proposals of the heuristics that are tried */
    DNN_N_PLANS = 32,            /* shapes remembered: a rank's two chunks of the prompt lengths that come again */
    DNN_MIN_ROWS = 1024,         /* below, tiles of rows are too few for cuDNN's kernel to be the faster one */
    DNN_ROUND = 1024,            /* lengths that are multiples of this recur */
    DNN_MIN_ROUND_KEYS = 2048,   /* of such a length */
};

/* Floating-point operations of one call from which on cuDNN is used. A plan is compiled for its exact shape, which takes up to a second
 * (9.14 has no attention engine for dynamic shapes); a model of 32 layers calls it 32 times; on an H100 (16K tokens, 32/8 heads of 128)
 * cuDNN 9.14 made 604 TFLOP/s and our kernel 390, which saves 0.9 s per 10^15 operations. So it pays from 3.4e13 on: 64K tokens. That is
 * for a length that comes once. Round lengths come again: windows of an evaluation, prompts cut to a context, measurements; for them the
 * plan is soon paid for (4K tokens: 535 and 353 TFLOP/s). Shorter prompts of any other length have our kernel: attention is a small part
 * of their time. */
#define DNN_MIN_OPERATIONS 3.4e13

/* The calls taken from the library. */
#define DNN_CALLS(X)                \
    X(cudnnGetVersion)              \
    X(cudnnGetErrorString)          \
    X(cudnnGetLastErrorString)      \
    X(cudnnCreate)                  \
    X(cudnnDestroy)                 \
    X(cudnnSetStream)               \
    X(cudnnBackendCreateDescriptor) \
    X(cudnnBackendDestroyDescriptor)\
    X(cudnnBackendSetAttribute)     \
    X(cudnnBackendGetAttribute)     \
    X(cudnnBackendFinalize)         \
    X(cudnnBackendExecute)

struct dnn_calls {
#define DNN_POINTER(name) __typeof__(&name) name;
    DNN_CALLS(DNN_POINTER)
#undef DNN_POINTER
};

typedef cudnnBackendDescriptor_t descriptor; /* a pointer of the library's */

struct dnn_shape {
    int64_t n_rows, n_keys, n; /* n_keys = first + n_rows: what the last row sees; n: stride of K and V planes */
    int32_t n_heads, n_kv_heads, head_dim, dtype;
    int32_t decode; /* 0: causal, q and O by rows, K and V of a head together; 1: no mask, q and O by heads, K and V apart */
    int32_t batch;
};

struct dnn_plan {
    struct dnn_shape shape;
    descriptor plan;           /* NULL: cuDNN refused the shape */
    int64_t workspace;         /* bytes */
    int64_t last_use;          /* 0: free */
    descriptor kept[DNN_MAX_KEPT]; /* all that the plan was made of, in the order of making */
    int n_kept;
};

struct cuda_dnn {
    void *library;
    struct dnn_calls call;
    cudnnHandle_t handle;      /* made at first use, like the next: it loads large libraries and allocates */
    descriptor device;         /* properties of the device */
    char version[32];
    int64_t n_uses;
    bool failed;               /* handle or device could not be made: not tried again */
    bool refused;              /* a refusal has been logged */
    struct dnn_plan plans[DNN_N_PLANS];
};

/* ---- descriptors ---------------------------------------------------------------------------------------------------
 * A graph is built by calls that do nothing once one of them has failed; the failure is looked at when all is said. */

struct builder {
    const struct cuda_dnn *dnn;
    struct dnn_plan *plan;
    cudnnStatus_t status;
    const char *what; /* failed */
    descriptor operations[20]; /* 16 are needed */
    int n_operations;
};

static void note(struct builder *b, cudnnStatus_t status, const char *what) {
    if (b->status == CUDNN_STATUS_SUCCESS && status != CUDNN_STATUS_SUCCESS) {
        b->status = status;
        b->what = what;
    }
}

static descriptor make(struct builder *b, cudnnBackendDescriptorType_t type, const char *what) {
    descriptor d = NULL;
    if (b->status == CUDNN_STATUS_SUCCESS && b->plan->n_kept == DNN_MAX_KEPT)
        note(b, CUDNN_STATUS_INTERNAL_ERROR, "too many descriptors");
    if (b->status == CUDNN_STATUS_SUCCESS)
        note(b, b->dnn->call.cudnnBackendCreateDescriptor(type, &d), what);
    if (d)
        b->plan->kept[b->plan->n_kept++] = d;
    return d;
}

static void set(struct builder *b, descriptor d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                const void *values, const char *what) {
    if (b->status == CUDNN_STATUS_SUCCESS)
        note(b, b->dnn->call.cudnnBackendSetAttribute(d, name, type, n, values), what);
}

static void set_descriptor(struct builder *b, descriptor d, cudnnBackendAttributeName_t name, descriptor value, const char *what) {
    set(b, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value, what);
}

static void finish(struct builder *b, descriptor d, const char *what) {
    if (b->status == CUDNN_STATUS_SUCCESS)
        note(b, b->dnn->call.cudnnBackendFinalize(d), what);
}

/* ---- the graph ----------------------------------------------------------------------------------------------------- */

enum uid {
    UID_Q = 1, UID_K, UID_V, UID_O, UID_SCALE, N_UNMASKED = UID_SCALE,
    UID_N_KEYS, UID_N_ROWS, UID_MASKED, N_GIVEN = UID_MASKED, /* only with a mask */
    UID_INNER,
};
enum place { IN_MEMORY, BY_VALUE, INNER }; /* tensors that are INNER have ids from UID_INNER on */

struct tensor_shape {
    int64_t dims[4], strides[4]; /* batch, head, row, column */
};

static descriptor tensor(struct builder *b, int64_t uid, enum place place, cudnnDataType_t type, struct tensor_shape shape) {
    const char *what = "tensor";
    descriptor d = make(b, CUDNN_BACKEND_TENSOR_DESCRIPTOR, what);
    int64_t align = 16;
    bool inner = place == INNER, by_value = place == BY_VALUE;
    set(b, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid, what);
    set(b, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type, what);
    set(b, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, shape.dims, what);
    set(b, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, shape.strides, what);
    set(b, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &align, what);
    set(b, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &inner, what);
    set(b, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value, what);
    finish(b, d, what);
    return d;
}

static descriptor scalar(struct builder *b, enum uid uid, cudnnDataType_t type) {
    return tensor(b, uid, BY_VALUE, type, (struct tensor_shape){{1, 1, 1, 1}, {1, 1, 1, 1}});
}

/* A result that never leaves the kernel: rows x columns per head. */
static descriptor inner(struct builder *b, cudnnDataType_t type, int64_t columns) {
    const struct dnn_shape *s = &b->plan->shape;
    int64_t heads = s->n_heads, rows = s->n_rows;
    return tensor(b, UID_INNER + b->plan->n_kept, INNER, type,
                  (struct tensor_shape){{s->batch, heads, rows, columns}, {heads * rows * columns, rows * columns, columns, 1}});
}

static void add_operation(struct builder *b, descriptor operation, const char *what) {
    finish(b, operation, what);
    if (b->status == CUDNN_STATUS_SUCCESS)
        b->operations[b->n_operations++] = operation;
}

static void multiply(struct builder *b, descriptor left, descriptor right, descriptor result, const char *what) {
    descriptor kind = make(b, CUDNN_BACKEND_MATMUL_DESCRIPTOR, what);
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    set(b, kind, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute, what);
    finish(b, kind, what);
    descriptor operation = make(b, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_MATMUL_DESC, kind, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_MATMUL_ADESC, left, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_MATMUL_BDESC, right, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_MATMUL_CDESC, result, what);
    add_operation(b, operation, what);
}

static void reduce(struct builder *b, cudnnReduceTensorOp_t mode, descriptor from, descriptor result, const char *what) {
    descriptor kind = make(b, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, what);
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    set(b, kind, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute, what);
    set(b, kind, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode, what);
    finish(b, kind, what);
    descriptor operation = make(b, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_REDUCTION_DESC, kind, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, from, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, result, what);
    add_operation(b, operation, what);
}

/* result = mode(x, y, choice); y and choice may be NULL. `axis`: of an index, else -1. */
struct pointwise {
    cudnnPointwiseMode_t mode;
    cudnnDataType_t compute;
    descriptor x, y, choice, result;
    int64_t axis;
};

static void pointwise(struct builder *b, struct pointwise p, const char *what) {
    descriptor kind = make(b, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, what);
    set(b, kind, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &p.mode, what);
    set(b, kind, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &p.compute, what);
    if (p.axis >= 0)
        set(b, kind, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &p.axis, what);
    finish(b, kind, what);
    descriptor operation = make(b, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, p.x, what);
    if (p.y)
        set_descriptor(b, operation, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, p.y, what);
    if (p.choice)
        set_descriptor(b, operation, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, p.choice, what);
    set_descriptor(b, operation, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, p.result, what);
    add_operation(b, operation, what);
}

/* One result of type `type` and width `columns` from x and y. */
static descriptor combine(struct builder *b, cudnnPointwiseMode_t mode, cudnnDataType_t compute, descriptor x, descriptor y,
                          cudnnDataType_t type, int64_t columns, const char *what) {
    descriptor result = inner(b, type, columns);
    pointwise(b, (struct pointwise){mode, compute, x, y, NULL, result, -1}, what);
    return result;
}

static descriptor index_of(struct builder *b, descriptor scores, int64_t axis, const char *what) {
    descriptor result = inner(b, CUDNN_DATA_INT32, b->plan->shape.n_keys);
    pointwise(b, (struct pointwise){CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, scores, NULL, NULL, result, axis}, what);
    return result;
}

/* -inf where the key comes after the row's position, n_keys - n_rows + row. */
static descriptor add_mask(struct builder *b, descriptor scores) {
    int64_t n_keys = b->plan->shape.n_keys;
    descriptor row = index_of(b, scores, 2, "row index"), column = index_of(b, scores, 3, "column index");
    descriptor keys = scalar(b, UID_N_KEYS, CUDNN_DATA_INT32), rows = scalar(b, UID_N_ROWS, CUDNN_DATA_INT32);
    row = combine(b, CUDNN_POINTWISE_ADD, CUDNN_DATA_INT32, row, keys, CUDNN_DATA_INT32, n_keys, "row + keys");
    row = combine(b, CUDNN_POINTWISE_SUB, CUDNN_DATA_INT32, row, rows, CUDNN_DATA_INT32, n_keys, "row - rows");
    descriptor seen = combine(b, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, row, column, CUDNN_DATA_BOOLEAN, n_keys, "row >= column");
    descriptor result = inner(b, CUDNN_DATA_FLOAT, n_keys);
    pointwise(b, (struct pointwise){CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, scores, scalar(b, UID_MASKED, CUDNN_DATA_FLOAT), seen,
                                    result, -1}, "mask");
    return result;
}

/* The engines want the log-sum-exp in the graph, though nobody reads it. */
static descriptor add_softmax(struct builder *b, descriptor scores, cudnnDataType_t type) {
    int64_t n_keys = b->plan->shape.n_keys;
    cudnnDataType_t f = CUDNN_DATA_FLOAT;
    descriptor max = inner(b, f, 1), sum = inner(b, f, 1);
    reduce(b, CUDNN_REDUCE_TENSOR_MAX, scores, max, "max");
    descriptor shifted = combine(b, CUDNN_POINTWISE_SUB, f, scores, max, f, n_keys, "score - max");
    descriptor weights = combine(b, CUDNN_POINTWISE_EXP, f, shifted, NULL, f, n_keys, "exp");
    reduce(b, CUDNN_REDUCE_TENSOR_ADD, weights, sum, "sum");
    descriptor log_sum = combine(b, CUDNN_POINTWISE_LOG, f, sum, NULL, f, 1, "log");
    combine(b, CUDNN_POINTWISE_ADD, f, max, log_sum, f, 1, "max + log");
    return combine(b, CUDNN_POINTWISE_DIV, f, weights, sum, type, n_keys, "weights / sum");
}

static descriptor add_attention(struct builder *b) {
    const struct dnn_shape *s = &b->plan->shape;
    int64_t d = s->head_dim, heads = s->n_heads, kv_heads = s->n_kv_heads, rows = s->n_rows, keys = s->n_keys, plane = s->n * d;
    cudnnDataType_t type = s->dtype == DTYPE_F16 ? CUDNN_DATA_HALF : CUDNN_DATA_BFLOAT16;
    struct tensor_shape queries = {{s->batch, heads, rows, d}, {rows * heads * d, d, heads * d, 1}};
    if (s->decode) {
        queries.strides[1] = rows * d;
        queries.strides[2] = d;
    }
    descriptor q = tensor(b, UID_Q, IN_MEMORY, type, queries);
    int64_t head = s->decode ? plane : 2 * plane, all = kv_heads * head;
    descriptor k = tensor(b, UID_K, IN_MEMORY, type, (struct tensor_shape){{s->batch, kv_heads, d, keys}, {all, head, 1, d}});
    descriptor v = tensor(b, UID_V, IN_MEMORY, type, (struct tensor_shape){{s->batch, kv_heads, keys, d}, {all, head, d, 1}});
    descriptor o = tensor(b, UID_O, IN_MEMORY, type, queries);
    descriptor products = inner(b, CUDNN_DATA_FLOAT, keys);
    multiply(b, q, k, products, "Q K");
    descriptor scale = scalar(b, UID_SCALE, CUDNN_DATA_FLOAT);
    descriptor scores = combine(b, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, products, scale, CUDNN_DATA_FLOAT, keys, "scale");
    multiply(b, add_softmax(b, s->decode ? scores : add_mask(b, scores), type), v, o, "weights V");
    descriptor graph = make(b, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "graph");
    set(b, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, b->n_operations, b->operations, "graph");
    finish(b, graph, "graph");
    return graph;
}

/* ---- plans --------------------------------------------------------------------------------------------------------- */

/* One engine's plan, where it can be made and its workspace fits. */
static void try_engine(struct builder *b, descriptor engine) {
    descriptor plan = make(b, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, "plan");
    int64_t bytes = 0, n = 0;
    set_descriptor(b, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, engine, "plan");
    set_descriptor(b, plan, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, b->dnn->device, "plan");
    finish(b, plan, "plan");
    if (b->status == CUDNN_STATUS_SUCCESS)
        note(b, b->dnn->call.cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, &bytes),
             "workspace");
    if (b->status == CUDNN_STATUS_SUCCESS && bytes > (int64_t)CUDA_SCRATCH_BYTES)
        note(b, CUDNN_STATUS_NOT_SUPPORTED, "workspace beyond the scratch memory");
    if (b->status == CUDNN_STATUS_SUCCESS) {
        b->plan->plan = plan;
        b->plan->workspace = bytes;
    }
}

/* The first of the engines that the heuristics propose that works. */
static void choose_engine(struct builder *b, descriptor graph) {
    descriptor engines[DNN_MAX_ENGINES], heuristics = make(b, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, "heuristics");
    cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    int64_t n = 0;
    set_descriptor(b, heuristics, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph, "heuristics");
    set(b, heuristics, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode, "heuristics");
    set_descriptor(b, heuristics, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, b->dnn->device, "heuristics");
    finish(b, heuristics, "heuristics");
    for (int i = 0; i < DNN_MAX_ENGINES; i++)
        engines[i] = make(b, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, "engine");
    if (b->status == CUDNN_STATUS_SUCCESS)
        note(b, b->dnn->call.cudnnBackendGetAttribute(heuristics, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                                      DNN_MAX_ENGINES, &n, engines), "engines");
    if (b->status == CUDNN_STATUS_SUCCESS && n == 0)
        note(b, CUDNN_STATUS_NOT_SUPPORTED, "no engine for this shape");
    struct builder first = *b; /* the failure that is reported is that of the best engine */
    for (int i = 0; i < n && i < DNN_MAX_ENGINES && !b->plan->plan; i++) {
        struct builder attempt = *b;
        try_engine(&attempt, engines[i]);
        if (i == 0)
            first = attempt;
    }
    if (!b->plan->plan)
        *b = first;
}

static void plan_free(const struct cuda_dnn *dnn, struct dnn_plan *plan) {
    while (plan->n_kept > 0)
        dnn->call.cudnnBackendDestroyDescriptor(plan->kept[--plan->n_kept]);
    *plan = (struct dnn_plan){0};
}

/* Fills an empty plan; plan->plan stays NULL where cuDNN refuses, which is remembered like a plan and logged the first time. */
static void plan_build(struct cuda_dnn *dnn, struct dnn_plan *plan, const struct dnn_shape *shape) {
    struct builder b = {.dnn = dnn, .plan = plan, .status = CUDNN_STATUS_SUCCESS};
    double start = base_seconds();
    char text[512] = "";
    plan->shape = *shape;
    choose_engine(&b, add_attention(&b));
    char name[128];
    snprintf(name, sizeof name, "%lld rows over %lld keys, %d/%d heads of %d, %s", (long long)shape->n_rows, (long long)shape->n_keys,
             shape->n_heads, shape->n_kv_heads, shape->head_dim, dtype_name((enum dtype)shape->dtype));
    if (plan->plan) {
        log_debug("cuDNN %s: plan for %s: %.0f ms, %lld bytes of workspace", dnn->version, name, 1e3 * (base_seconds() - start),
                  (long long)plan->workspace);
        return;
    }
    dnn->call.cudnnGetLastErrorString(text, sizeof text);
    if (!dnn->refused)
        log_info("%scuDNN %s refuses %s: %s: %s; %s", shape->decode ? "" : "exact attention by our own kernel: ", dnn->version, name,
                 b.what ? b.what : "?", dnn->call.cudnnGetErrorString(b.status), text);
    dnn->refused = true;
}

/* The shape's plan; NULL: it is new. */
static struct dnn_plan *plan_recall(struct cuda_dnn *dnn, const struct dnn_shape *shape) {
    for (int i = 0; i < DNN_N_PLANS; i++) {
        struct dnn_plan *plan = &dnn->plans[i];
        if (plan->last_use && memcmp(&plan->shape, shape, sizeof *shape) == 0) {
            plan->last_use = ++dnn->n_uses;
            return plan;
        }
    }
    return NULL;
}

/* The shape's plan, made if it is new in place of the one unused for longest, whose kernel may still be running on `stream`. */
static int plan_find(struct cuda_dnn *dnn, const struct dnn_shape *shape, cudaStream_t stream, struct dnn_plan **out) {
    struct dnn_plan *oldest = &dnn->plans[0];
    *out = plan_recall(dnn, shape);
    if (*out)
        return STATUS_OK;
    for (int i = 1; i < DNN_N_PLANS; i++)
        if (dnn->plans[i].last_use < oldest->last_use)
            oldest = &dnn->plans[i];
    if (oldest->plan) {
        cudaError_t error = cudaStreamSynchronize(stream);
        if (error != cudaSuccess)
            FAIL(STATUS_FAILED, "CUDA: cuDNN's attention: %s", cudaGetErrorString(error));
    }
    plan_free(dnn, oldest);
    plan_build(dnn, oldest, shape);
    oldest->last_use = ++dnn->n_uses;
    *out = oldest;
    return STATUS_OK;
}

/* ---- execution ----------------------------------------------------------------------------------------------------- */

/* Handle and device, once. Where that fails our own kernel does all from then on. */
static bool is_ready(struct cuda_dnn *dnn) {
    char text[512] = "";
    if (dnn->handle || dnn->failed)
        return !dnn->failed;
    const char *what = "cudnnCreate";
    cudnnStatus_t status = dnn->call.cudnnCreate(&dnn->handle);
    if (status == CUDNN_STATUS_SUCCESS) {
        what = "device properties";
        status = dnn->call.cudnnBackendCreateDescriptor(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &dnn->device);
    }
    if (status == CUDNN_STATUS_SUCCESS)
        status = dnn->call.cudnnBackendSetAttribute(dnn->device, CUDNN_ATTR_DEVICEPROP_HANDLE, CUDNN_TYPE_HANDLE, 1, &dnn->handle);
    if (status == CUDNN_STATUS_SUCCESS)
        status = dnn->call.cudnnBackendFinalize(dnn->device);
    dnn->failed = status != CUDNN_STATUS_SUCCESS;
    if (dnn->failed) {
        dnn->call.cudnnGetLastErrorString(text, sizeof text);
        log_info("exact attention by our own kernel: cuDNN %s: %s: %s; %s", dnn->version, what, dnn->call.cudnnGetErrorString(status),
                 text);
    } else {
        log_info("cuDNN %s is there, for exact attention of long prompts", dnn->version);
    }
    return !dnn->failed;
}

static int execute(struct cuda_dnn *dnn, const struct dnn_plan *plan, const struct cuda_launch *launch, const void *q, const void *k,
                   const void *v, float scale, void *o) {
    int32_t n_keys = (int32_t)plan->shape.n_keys, n_rows = (int32_t)plan->shape.n_rows;
    float masked = -INFINITY;
    int64_t n_given = plan->shape.decode ? N_UNMASKED : N_GIVEN;
    const int64_t uids[N_GIVEN] = {UID_Q, UID_K, UID_V, UID_O, UID_SCALE, UID_N_KEYS, UID_N_ROWS, UID_MASKED};
    void *const pointers[N_GIVEN] = {(void *)(uintptr_t)q, (void *)(uintptr_t)k, (void *)(uintptr_t)v, o,
                                     &scale, &n_keys, &n_rows, &masked};
    struct dnn_plan pack = {0};
    struct builder b = {.dnn = dnn, .plan = &pack, .status = CUDNN_STATUS_SUCCESS};
    char text[512] = "";
    descriptor d = make(&b, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, "variant pack");
    set(&b, d, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n_given, uids, "variant pack");
    set(&b, d, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n_given, pointers, "variant pack");
    set(&b, d, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &launch->scratch, "variant pack");
    finish(&b, d, "variant pack");
    if (b.status == CUDNN_STATUS_SUCCESS)
        note(&b, dnn->call.cudnnSetStream(dnn->handle, (cudaStream_t)launch->stream), "stream");
    if (b.status == CUDNN_STATUS_SUCCESS)
        note(&b, dnn->call.cudnnBackendExecute(dnn->handle, plan->plan, d), "execution");
    if (b.status != CUDNN_STATUS_SUCCESS)
        dnn->call.cudnnGetLastErrorString(text, sizeof text);
    plan_free(dnn, &pack);
    if (b.status != CUDNN_STATUS_SUCCESS)
        FAIL(STATUS_FAILED, "cuDNN %s: attention of %lld rows over %lld keys: %s: %s; %s", dnn->version, (long long)plan->shape.n_rows,
             (long long)plan->shape.n_keys, b.what, dnn->call.cudnnGetErrorString(b.status), text);
    return STATUS_OK;
}

/* `out` holds n 16-bit values in its upper half; they become n floats. Of what is left, the first half can be widened in place: floats
 * done .. done + part end at byte 4 (done + part), not after the 16-bit values begin, 2 (n + done), when part <= (n - done) / 2. What is
 * small enough goes through scratch memory instead. */
static int widen(const struct cuda_launch *launch, enum dtype dtype, float *out, int64_t n) {
    const uint16_t *from = (const uint16_t *)out + n;
    int64_t done = 0;
    while ((n - done) * 2 > (int64_t)CUDA_SCRATCH_BYTES) {
        int64_t part = (n - done) / 16 * 8; /* keeps pointers aligned */
        TRY(cuda_attend_exact_widen(launch, dtype, from + done, out + done, part));
        done += part;
    }
    cudaError_t error = cudaMemcpyAsync(launch->scratch, from + done, (size_t)(n - done) * 2, cudaMemcpyDeviceToDevice,
                                        (cudaStream_t)launch->stream);
    if (error != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: attend_exact: copy of %lld values: %s", (long long)(n - done), cudaGetErrorString(error));
    return cuda_attend_exact_widen(launch, dtype, launch->scratch, out + done, n - done);
}

bool cuda_dnn_pays(const struct attend_exact_args *args) {
    double seen = (double)args->n_rows * ((double)args->first + 0.5 * (double)args->n_rows); /* keys, by all rows of a head */
    bool is_round = args->n_rows % DNN_ROUND == 0 && args->first % DNN_ROUND == 0 && args->n % DNN_ROUND == 0;
    return args->n_rows >= DNN_MIN_ROWS && ((is_round && args->first + args->n_rows >= DNN_MIN_ROUND_KEYS) ||
                                            4.0 * seen * args->head_dim * args->n_heads >= DNN_MIN_OPERATIONS);
}

/* The shape's plan: known already, or made now, which needs a stream that is not captured. *out is NULL for a new shape while it is. */
static int plan_take(struct cuda_dnn *dnn, const struct cuda_launch *launch, const struct dnn_shape *shape, struct dnn_plan **out) {
    enum cudaStreamCaptureStatus capture;
    *out = plan_recall(dnn, shape);
    if (*out)
        return STATUS_OK;
    cudaError_t error = cudaStreamIsCapturing((cudaStream_t)launch->stream, &capture);
    if (error != cudaSuccess)
        FAIL(STATUS_FAILED, "CUDA: cuDNN's attention: is the stream captured: %s", cudaGetErrorString(error));
    return capture == cudaStreamCaptureStatusNone ? plan_find(dnn, shape, (cudaStream_t)launch->stream, out) : STATUS_OK;
}

int cuda_dnn_attend(const struct cuda_launch *launch, const struct attend_exact_args *args, bool *done) {
    struct cuda_dnn *dnn = launch->dnn;
    *done = false;
    if ((uintptr_t)args->out % 16 != 0 || !is_ready(dnn))
        return STATUS_OK;
    struct dnn_shape shape = {.n_rows = args->n_rows, .n_keys = args->first + args->n_rows, .n = args->n, .n_heads = args->n_heads,
                              .n_kv_heads = args->n_kv_heads, .head_dim = args->head_dim, .dtype = (int32_t)args->dtype, .batch = 1};
    struct dnn_plan *plan = NULL;
    TRY(plan_take(dnn, launch, &shape, &plan));
    if (!plan || !plan->plan)
        return STATUS_OK;
    int64_t n_values = args->n_rows * args->n_heads * args->head_dim;
    const uint8_t *k = (const uint8_t *)args->kv, *v = k + dtype_bytes(args->dtype, args->n * args->head_dim);
    TRY(execute(dnn, plan, launch, args->q, k, v, args->scale, (uint16_t *)args->out + n_values));
    TRY(widen(launch, args->dtype, args->out, n_values));
    *done = true;
    return STATUS_OK;
}

static struct dnn_shape peer_shape(const struct peer_attention *args) {
    struct dnn_shape shape = {.n_rows = args->n_rows, .n_keys = args->n, .n = args->n, .n_heads = args->n_heads,
                              .n_kv_heads = args->n_kv_heads, .head_dim = args->head_dim, .dtype = (int32_t)args->dtype, .batch = 1};
    if (args->n_rows > 0)
        return shape;
    shape.decode = 1;
    shape.batch = args->batch;
    shape.n_heads = args->grouped ? args->n_kv_heads : args->n_heads;
    shape.n_rows = args->grouped ? args->n_heads / args->n_kv_heads : 1;
    return shape;
}

int cuda_dnn_peer_attend(const struct cuda_launch *launch, const struct peer_attention *args, bool *done) {
    struct cuda_dnn *dnn = launch->dnn;
    *done = false;
    if (!dnn || !is_ready(dnn))
        return STATUS_OK;
    struct dnn_shape shape = peer_shape(args);
    struct dnn_plan *plan = NULL;
    TRY(plan_take(dnn, launch, &shape, &plan));
    if (!plan)
        FAIL(STATUS_USAGE, "cuDNN's attention over %lld keys: the first call of a shape cannot be recorded", (long long)args->n);
    if (!plan->plan)
        return STATUS_OK;
    TRY(execute(dnn, plan, launch, args->q, args->k, args->v, args->scale, args->out));
    *done = true;
    return STATUS_OK;
}

/* ---- the library --------------------------------------------------------------------------------------------------- */

int cuda_dnn_open(struct cuda_dnn **out) {
    struct cuda_dnn *dnn;
    const char *missing = NULL;
    *out = NULL;
    void *library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        log_info("exact attention by our own kernel: %s", dlerror());
        return STATUS_OK;
    }
    TRY(base_alloc(&dnn, 1, sizeof *dnn));
    dnn->library = library;
#define DNN_LOAD(name)                              \
    *(void **)&dnn->call.name = dlsym(library, #name); \
    if (!dnn->call.name)                            \
        missing = #name;
    DNN_CALLS(DNN_LOAD)
#undef DNN_LOAD
    int version = missing ? 0 : (int)dnn->call.cudnnGetVersion();
    snprintf(dnn->version, sizeof dnn->version, "%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    if (version < DNN_OLDEST) {
        log_info("exact attention by our own kernel: cuDNN %s: want %d.%d%s%s", missing ? "9" : dnn->version, DNN_OLDEST / 10000,
                 DNN_OLDEST / 100 % 100, missing ? ", it lacks " : "", missing ? missing : "");
        cuda_dnn_close(dnn);
        return STATUS_OK;
    }
    *out = dnn;
    return STATUS_OK;
}

/* The library stays: it has threads and exit handlers of its own. */
void cuda_dnn_close(struct cuda_dnn *dnn) {
    if (!dnn)
        return;
    for (int i = 0; i < DNN_N_PLANS; i++)
        plan_free(dnn, &dnn->plans[i]);
    if (dnn->device)
        dnn->call.cudnnBackendDestroyDescriptor(dnn->device);
    if (dnn->handle)
        dnn->call.cudnnDestroy(dnn->handle);
    free(dnn);
}

const char *cuda_dnn_version(const struct cuda_dnn *dnn) { return dnn->version; }

#else /* built without cuDNN's headers */

int cuda_dnn_open(struct cuda_dnn **out) {
    *out = NULL;
    log_info("exact attention by our own kernel: built without cuDNN's headers");
    return STATUS_OK;
}
void cuda_dnn_close(struct cuda_dnn *dnn) { (void)dnn; }
const char *cuda_dnn_version(const struct cuda_dnn *dnn) {
    (void)dnn;
    return "";
}
bool cuda_dnn_pays(const struct attend_exact_args *args) {
    (void)args;
    return false;
}
int cuda_dnn_attend(const struct cuda_launch *launch, const struct attend_exact_args *args, bool *done) {
    (void)launch, (void)args;
    *done = false;
    return STATUS_OK;
}
int cuda_dnn_peer_attend(const struct cuda_launch *launch, const struct peer_attention *args, bool *done) {
    (void)launch, (void)args;
    *done = false;
    return STATUS_OK;
}

#endif
