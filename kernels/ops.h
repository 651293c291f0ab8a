/* The operations: what a backend computes. One plain struct of arguments each, one typed function to launch it.
 *
 * Conventions: every pointer is device memory unless its comment says host; float unless typed; row-major with the shape in
 * the field's comment. `n_rows` is the size of the buffers (the bucket a graph was recorded for), *live the number
 * of rows that count in this step (device memory, may be NULL: all): rows beyond need not be computed and are never read by
 * an operation that matters. Rows of one sequence follow each other in a step with ascending positions, all in one block.
 * Operations cannot fail; what could go wrong is checked before a launch. */
#pragma once

#include "kernels/backend.h"
#include "kernels/page.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- what changes from step to step: one upload, read by operations ---------------------------------------------- */

enum {
    STEP_MAX_ROWS = 256,     /* rows of one step: decoding sequences plus prompt tokens */
    STEP_MAX_BIAS = 300,     /* logit_bias entries of a sequence (OpenAI's limit) */
    STEP_MAX_TOP = 20,       /* alternatives reported with a log-probability (OpenAI's limit) */
};

struct step_row {
    int32_t seq;      /* slot of the sequence; -1: padding */
    int32_t token;    /* id, or -1: what the slot sampled last (it may not have left the device yet) */
    int32_t position; /* of the token, from 0 */
    int32_t first;    /* index of the first row of this step that belongs to the same sequence */
};

struct step_flush {   /* block `block` of slot `seq` is quantized before this step's rows are appended */
    int32_t seq;
    int32_t block;
    int32_t page;     /* this rank's page for it; -1: another rank's block */
    int32_t local;    /* its index in this rank's page table row */
};

struct step_logit {
    int32_t row;      /* row whose logits are wanted */
    int32_t target;   /* token whose log-probability is wanted; -1: none */
};

struct step_input {
    int64_t step;
    int32_t n_rows, n_flush, n_logits, n_sample; /* the first n_sample entries of `logit` are sampled */
    struct step_row row[STEP_MAX_ROWS];
    struct step_flush flush[STEP_MAX_ROWS];
    struct step_logit logit[STEP_MAX_ROWS];
};

/* Per slot, written when a sequence is admitted. Sampling fields with OpenAI's meaning. */
struct seq_params {
    int32_t owner_offset; /* r: block j belongs to cp rank (j + r) mod cp */
    int32_t top_k;        /* 0: off */
    uint64_t seed;
    int32_t choice;
    float temperature;    /* 0: greedy (so is less than 1e-5) */
    float top_p;          /* 1: off */
    float min_p;          /* 0: off */
    float presence_penalty, frequency_penalty;
    float repetition_penalty; /* 1: off */
    int32_t n_bias;
    int32_t bias_id[STEP_MAX_BIAS]; /* distinct ids */
    float bias[STEP_MAX_BIAS];
};

/* Which blocks a rank owns and where they lie. window_blocks W: the token at position p sees blocks j < F(p) = max(0, p/G - W)
 * in pages (G = KV_BLOCK), the blocks F(p) .. p/G in the 16-bit slots. The owner's blocks are numbered locally: j / cp. */
struct cache_layout {
    int cp_rank, cp_size;
    int window_blocks; /* W */
    int n_slots;       /* 16-bit block slots of a sequence on this rank: slot (j / cp) % n_slots holds block j */
    int sink;          /* first tokens kept in 16 bit; they leave block 0's page and live in the sink store once it is flushed */
    int n_kv_heads;    /* of this rank */
    int head_dim;
};

HOST_DEVICE static inline bool cache_owns(const struct cache_layout *c, int64_t block, int64_t owner_offset) {
    return (block + owner_offset) % c->cp_size == c->cp_rank;
}

/* How many of the blocks 0 .. n-1 this rank owns. */
HOST_DEVICE static inline int64_t cache_n_owned(const struct cache_layout *c, int64_t n, int64_t owner_offset) {
    int64_t first = ((c->cp_rank - owner_offset) % c->cp_size + c->cp_size) % c->cp_size;
    return n > first ? (n - first + c->cp_size - 1) / c->cp_size : 0;
}

/* F(p): blocks that the token at `position` sees quantized. */
HOST_DEVICE static inline int64_t cache_n_flushed(const struct cache_layout *c, int64_t position) {
    int64_t n = position / KV_BLOCK - c->window_blocks;
    return n > 0 ? n : 0;
}

/* One layer's cache on this rank. All 16-bit stores hold values of type format.window. */
struct cache_layer {
    struct page_format format;
    uint8_t *pages;      /* [page][kv_head][record_bytes] */
    int64_t page_stride; /* bytes from page to page: n_kv_heads * record_bytes */
    void *window;        /* [seq][slot][kv_head][K=0,V=1][KV_BLOCK][head_dim] */
    void *sink;          /* [seq][kv_head][K,V][sink][head_dim]; NULL without sink */
    float *states;       /* [seq][kv_head][features * head_dim + features]: S (features x head_dim), then P; NULL: no correction */
    int features;        /* D; 0: no correction */
    const float *phi_k;  /* [kv_head][2][head_dim][D/2]: W1, W2 (KVLinC eq. 6); NULL: no correction */
    const float *phi_q;  /* [kv_head or head][2][head_dim][D/2] */
    bool phi_q_per_head; /* one phi_q per query head */
    const float *gate;   /* [kv_head]: factor on phi_k; NULL: 1 */
    bool states_exact_v; /* S sums V instead of V^q */
    /* What pages leave out of their keys (kvlinc+, DESIGN, 3). Token o of block j scores scale * (q' . page key + (R_-jG q) . mean[o]), with
     * q' = q H (orthonormal Sylvester-Hadamard) if rotate_k, else q. The sink and the 16-bit slots hold whole keys; so do pages whose K
     * part is in 16 bits: both fields need format.k_bits < 16. */
    bool rotate_k;
    const float *mean;     /* [kv_head][KV_BLOCK][head_dim]: R_o mu, the mean key before RoPE turned to o; NULL: nothing is left out */
    const float *inv_freq; /* [head_dim/2]: R turns pairs (i, i + d/2) by float(position) * inv_freq[i]; needed with mean */
};

/* ---- partial results of attention ---------------------------------------------------------------------------------
 * One record of partial_stride() floats per (row, head): Y[head_dim], then C_n[head_dim] when there is a correction, then
 * m, l, C_d, 0. No token: m = -inf, l = 0, Y = 0. l and Y are sums shifted by this record's own m; C_n, C_d are unscaled
 * (Algorithm 1, lines 13-15: added once to sums shifted by the global max). */
HOST_DEVICE static inline int partial_stride(int head_dim, bool correction) { return head_dim * (correction ? 2 : 1) + 4; }
HOST_DEVICE static inline int partial_tail(int head_dim, bool correction) { return head_dim * (correction ? 2 : 1); }

/* ---- the list ------------------------------------------------------------------------------------------------------ */

#define OPS(X)          \
    X(step_begin)       \
    X(embed)            \
    X(rmsnorm)          \
    X(add_rmsnorm)      \
    X(matmul)           \
    X(rope)             \
    X(flush)            \
    X(append)           \
    X(attend)           \
    X(attend_step)      \
    X(correct)          \
    X(merge_max)        \
    X(merge_rescale)    \
    X(merge_divide)     \
    X(merge_stats)      \
    X(merge_scale)      \
    X(merge_gather)     \
    X(silu_mul)         \
    X(add)              \
    X(kv_place)         \
    X(attend_exact)     \
    X(flush_exact)      \
    X(rows_place)       \
    X(rows_pick)        \
    X(rows_put)         \
    X(logits_process)   \
    X(filter_begin)     \
    X(filter_count)     \
    X(filter_narrow)    \
    X(sample)           \
    X(sample_merge)     \
    X(seq_begin)        \
    X(unpack)           \
    X(fill_random)

enum op_id {
#define OP_ID(name) OP_##name,
    OPS(OP_ID)
#undef OP_ID
    OP_COUNT
};

/* Reads the step's input: tokens[i] (resolved; -1 for padding) and positions[i] of every row. */
struct step_begin_args {
    const struct step_input *in;
    int n_rows;
    const int32_t *last_token; /* [max_seqs] */
    int32_t *tokens;           /* [n_rows] */
    int32_t *positions;        /* [n_rows] */
};

/* x[i] = table[tokens[i] - vocab_begin] where this rank holds the row, else 0 (the sum over ranks is the embedding). */
struct embed_args {
    int n_rows;
    const int32_t *live;
    const int32_t *tokens;
    const void *table; /* [vocab_count][hidden], dtype */
    enum dtype dtype;
    int64_t vocab_begin, vocab_count;
    int hidden;
    float *x; /* [n_rows][hidden] */
};

/* out[i] = x[r] * weight / sqrt(mean(x[r]^2) + eps), r = i, or pick[i].row (n live = *live). */
struct rmsnorm_args {
    int n_rows;
    const int32_t *live;
    const struct step_logit *pick; /* NULL: r = i */
    const float *x;                /* [..][hidden] */
    const float *weight;           /* [hidden] */
    float eps;
    int hidden;
    float *out; /* [n_rows][hidden] */
};

/* x += y, and out[i] = rmsnorm(x[i]) * weight: `add` and `rmsnorm` of the same rows in one, with their bits. */
struct add_rmsnorm_args {
    int n_rows;
    const int32_t *live;
    float *x;            /* [n_rows][hidden] */
    const float *y;      /* [n_rows][hidden] */
    const float *weight; /* [hidden] */
    float eps;
    int hidden;
    float *out; /* [n_rows][hidden], neither x nor y */
};

/* y[i][o] = bias[o] + sum_k x[i * ldx + k] w[o][k]; products of w's dtype widened to float, sums in float. */
struct matmul_args {
    int n_rows;
    const int32_t *live;
    const float *x; /* rows ldx floats apart, n_in used */
    int64_t ldx;
    const void *w; /* [n_out][n_in], dtype F32, F16 or BF16 */
    enum dtype dtype;
    const float *bias; /* [n_out] or NULL */
    int64_t n_in, n_out;
    float *y; /* rows ldy floats apart */
    int64_t ldy;
};

/* Rotates q and k of each row (half-split pairs: (i, i + d/2), angle = float(position) * inv_freq[i] in float, as transformers
 * does) and rounds q, k, v once to `dtype`: q [n][n_heads][d], k and v [n][n_kv_heads][d]. */
struct rope_args {
    int n_rows;
    const int32_t *live;
    const float *qkv; /* [n_rows][(n_heads + 2 n_kv_heads) * d]: q heads, k heads, v heads */
    const int32_t *positions; /* [n_rows]; not written by the operation just before this one */
    const float *inv_freq; /* [d/2] */
    const float *q_norm, *k_norm; /* [head_dim] or NULL: RMSNorm of each head before it is turned */
    float norm_eps;
    int n_heads, n_kv_heads, head_dim;
    enum dtype dtype;
    void *q, *k, *v;
};

/* Quantizes the blocks of in->flush that this rank owns: encodes window block -> page, copies the sink tokens of block 0 to the
 * sink store, adds phi_k(K - K^q)^T V^q to S and its column sums to P (flushed tokens only, sink left out), and notes the page
 * in the page table when `write_table` is set (once per step: the table is common to all layers). */
struct flush_args {
    const struct step_input *in;
    const struct seq_params *params; /* [max_seqs] */
    struct cache_layout layout;
    struct cache_layer layer;
    int32_t *page_table; /* [max_seqs][table_stride] */
    int64_t table_stride;
    bool write_table;
};

/* Copies k, v of each row into the 16-bit slot of its block, where this rank owns it. */
struct append_args {
    const struct step_input *in;
    const struct seq_params *params;
    struct cache_layout layout;
    struct cache_layer layer;
    const void *k, *v; /* [n_rows][n_kv_heads][d], window dtype */
};

/* Partial attention of every row over what this rank owns of its sequence: pages j < F(p), sink, 16-bit blocks up to p itself.
 * Scores scale * q.k; the exact max; K's and V's scales folded out of the inner loop. Writes Y, m, l of each record. */
struct attend_args {
    const struct step_input *in;
    int n_rows;
    const struct seq_params *params;
    struct cache_layout layout;
    struct cache_layer layer;
    const int32_t *page_table;
    int64_t table_stride;
    int n_heads; /* query heads of this rank, a multiple of layout.n_kv_heads */
    float scale; /* 1/sqrt(d) */
    const void *q; /* [n_rows][n_heads][d], window dtype */
    float *partial; /* [n_rows][n_heads][stride] */
    int stride;
};

/* A step in which every row is its own sequence: attend, correct where the layer has states, and with `out` the merge of one rank; in one go
 * where the backend can. With `out` what is left of `partial` is undefined. */
struct attend_step_args {
    struct attend_args attend;
    float *out; /* [n_rows][n_heads * d], padding: 0, rows from in->n_rows on: anything; NULL: records in attend.partial */
};

/* C_n = phi_q(q) S, C_d = phi_q(q).P from this rank's states into the records; phi(x) = [softmax(x W1), softmax(x W2)], q unscaled. */
struct correct_args {
    const struct step_input *in;
    int n_rows;
    struct cache_layout layout;
    struct cache_layer layer;
    int n_heads;
    const void *q;
    float *partial;
    int stride;
};

/* Ways to combine (DESIGN, 4). `allreduce`: merge_max writes m [n_rows][n_heads]; all-reduce max; merge_rescale writes
 * [n_rows][n_heads][d + 1] = (e^(m_r - m) Y + C_n | e^(m_r - m) l + C_d); all-reduce sum; merge_divide writes out. */
struct merge_max_args {
    int n_rows;
    const int32_t *live;
    int n_heads, head_dim;
    bool correction;
    const float *partial;
    float *max;
};
struct merge_rescale_args {
    int n_rows;
    const int32_t *live;
    int n_heads, head_dim;
    bool correction;
    const float *partial;
    const float *max; /* global */
    float *sums;      /* [n_rows][n_heads][d + 1] */
};
struct merge_divide_args {
    int n_rows;
    const int32_t *live;
    int n_heads, head_dim;
    const float *sums;
    float *out; /* [n_rows][n_heads * d]; 0 where the denominator is 0 (padding) */
};
/* `fused`: merge_stats writes (m, l, C_d) [n_rows][n_heads][3]; all-gather; merge_scale writes this rank's share of the output,
 * (e^(m_r - m) Y + C_n) / (sum_r e^(m_r - m) l_r + C_d,r): the sum over ranks happens in o_proj's all-reduce. */
struct merge_stats_args {
    int n_rows;
    const int32_t *live;
    int n_heads, head_dim;
    bool correction;
    const float *partial;
    float *stats;
};
struct merge_scale_args {
    int n_rows;
    const int32_t *live;
    int n_heads, head_dim;
    bool correction;
    const float *partial; /* own */
    const float *stats;   /* [n_ranks][n_rows][n_heads][3] */
    int n_ranks;
    float *out; /* [n_rows][n_heads * d] */
};
/* `gather`, and the end of attention on one rank (n_ranks = 1): all ranks' records, added in rank order. */
struct merge_gather_args {
    int n_rows;
    const int32_t *live;
    int n_heads, head_dim;
    bool correction;
    const float *partial; /* [n_ranks][n_rows][n_heads][stride] */
    int n_ranks;
    float *out;
};

/* out[i][j] = silu(gate_up[i][j]) * gate_up[i][n + j]. */
struct silu_mul_args {
    int n_rows;
    const int32_t *live;
    const float *gate_up; /* [n_rows][2 n] */
    int64_t n;
    float *out; /* [n_rows][n] */
};

struct add_args { /* x += y */
    int n_rows;
    const int32_t *live;
    int hidden;
    float *x;
    const float *y;
};

/* ---- exact prefill of one prompt of n tokens (DESIGN, 5) ----------------------------------------------------------
 * Queries are split into 2 cp contiguous chunks of `chunk` = ceil(n / (2 cp)) tokens (the last may be short or empty); rank r has
 * chunks r and 2cp-1-r, one after the other: local row i stands for position r*chunk + i (i < chunk) or (2cp-1-r)*chunk + i - chunk. */
HOST_DEVICE static inline int64_t prefill_position(int64_t row, int rank, int cp, int64_t chunk) {
    return row < chunk ? rank * chunk + row : (2 * cp - 1 - rank) * chunk + row - chunk;
}

/* Puts gathered K and V [rank][K, V][2 chunk][n_kv_heads][d] into position order: kv [n_kv_heads][K, V][n][d]. */
struct kv_place_args {
    const void *gathered;
    int cp_size;
    int64_t chunk, n;
    int n_kv_heads, head_dim;
    enum dtype dtype;
    void *kv;
};

/* Causal attention in 16 bit of query rows at positions first, first + 1, ... (n_rows of them) over positions 0 .. own of kv. */
struct attend_exact_args {
    int64_t n_rows, first, n; /* n: tokens in kv */
    int n_heads, n_kv_heads, head_dim;
    float scale;
    enum dtype dtype;
    const void *q;  /* [n_rows][n_heads][d] */
    const void *kv; /* [n_kv_heads][K, V][n][d] */
    float *out;     /* [n_rows][n_heads * d] */
};

/* After the attention: blocks 0 .. n_flush-1 of slot `seq` that this rank owns go from kv into `pages` (device array, one page id
 * per owned block in local order) with S, P, sink as in `flush`; the rest goes to the 16-bit slots. */
struct flush_exact_args {
    int seq;
    int64_t n, n_flush;
    int32_t owner_offset;
    struct cache_layout layout;
    struct cache_layer layer;
    const int32_t *page_table; /* the slot's row, already written */
    const void *kv;
};

/* Gathered rows in position order: from [rank][2 chunk][width] -> to [n][width]. */
struct rows_place_args {
    const float *from;
    int cp_size;
    int64_t chunk, n;
    int64_t width;
    float *to;
};

/* Between this rank's rows in chunk order, [2 chunk][width], and the positions first .. first+count-1 in order, [count][width].
 * rows_pick: to[i] = own row of position first + i, 0 where it is another rank's (the sum over the cp ranks is all of them).
 * rows_put: own row of position first + i = from[i]; other ranks' positions are skipped. */
struct rows_pick_args {
    const float *from;
    int cp_rank, cp_size;
    int64_t chunk;
    int64_t first, count;
    int64_t width;
    float *to;
};
#define rows_put_args rows_pick_args

/* ---- logits to tokens (DESIGN, 5: sampling) -------------------------------------------------------------------------
 * Each rank holds the logits of its vocabulary shard: logits [n_logits][vocab_count]. For the first n_sample rows
 * logits_process writes `processed`: repetition, frequency and presence penalty, logit bias, then division by temperature
 * (not when greedy). The filters find, for each sampled row, the exact smallest processed logit that top-k, then top-p of what
 * is left, then min-p allow (ties stay); a greedy row has no filters. The rules of one token and one row, which all backends share,
 * are in kernels/sampling.h. Only rows below in->n_logits and in->n_sample are computed; a sequence is sampled once in a step.
 * Logits may be anything: NaN counts as -inf, +inf as the largest float. If no processed logit of a row is above -inf, id 0 is taken. A shard
 * may be empty; shards ascend with the rank. */
struct seq_counts { /* [max_seqs][vocab_count] words: bit 31 = in the prompt, the rest = times generated */
    uint32_t *words;
    int64_t vocab_begin, vocab_count;
};

struct logits_process_args {
    const struct step_input *in;
    int n_sample;
    const struct seq_params *params;
    struct seq_counts counts;
    const float *logits;
    float *processed; /* [n_sample][vocab_count]; never NaN, +inf or -0 */
};

/* Filters by radix descent over the order-preserving 32-bit image of a float, 11 + 11 + 10 bits, first for k then for p: six rounds of
 * filter_count (histogram of this shard), an all-reduce sum, filter_narrow. Masses are integers of 2^-40 of e^(x - max), so the sums do not
 * depend on the layout. filter_begin needs the row's global max: filter_begin with find_max, an all-reduce max, filter_begin without.
 * Rounds 0..2 may be left out when no row uses top-k, rounds 3 and 4 when none uses top-p; filter_narrow of round 5 also applies
 * min-p, so it must run (and the count before it). */
enum { FILTER_BINS = 2048, FILTER_ROUNDS = 6 };
struct filter_state { /* one per sampled row, the same on all ranks */
    float max;            /* global max of the processed logits */
    uint32_t floor;       /* image below which tokens are out (decided so far); at first that of -FLT_MAX: -inf is never a candidate */
    uint32_t prefix;      /* digits found in the running search, which looks at images that begin with them */
    uint32_t active;      /* bit 0: the search for k is on, bit 1: the search for p */
    uint64_t remaining;   /* count or mass still to be found among images that begin with prefix */
};
struct filter_begin_args { /* the state before round 0, from max[i]; with `find_max`: this shard's maximum is written to max[i], no more */
    const struct step_input *in;
    int n_sample;
    const struct seq_params *params;
    int64_t vocab_count;
    const float *processed;
    bool find_max;
    float *max; /* [n_sample]: in or out */
    struct filter_state *state;
};
struct filter_count_args {
    const struct step_input *in;
    int n_sample;
    int round; /* 0..2: top-k, 3..5: top-p */
    int64_t vocab_count;
    const float *processed;
    const struct filter_state *state;
    uint64_t *bins; /* [n_sample][FILTER_BINS + 1]: count or mass per bin; last entry, in round 3: mass of all tokens at or above floor */
};
struct filter_narrow_args {
    const struct step_input *in;
    int n_sample;
    int round;
    const struct seq_params *params;
    const uint64_t *bins; /* summed over ranks */
    struct filter_state *state;
};

/* What a shard knows of one logits row, gathered and merged. */
struct sample_record {
    float max, sum;       /* of the raw logits: sum = sum e^(x - max) */
    float target;         /* raw logit of the target; -inf if it is not in this shard */
    float best_key;       /* sampled rows: largest processed + Gumbel noise (greedy: processed); -inf: no candidate */
    int32_t best_id;      /* no candidate: vocab_begin (empty shard, or a row only scored: INT32_MAX) */
    float best_logit;     /* raw logit of best_id */
    int32_t top_id[STEP_MAX_TOP];
    float top_logit[STEP_MAX_TOP]; /* raw, descending, ties: lower id first; -inf beyond the end */
    int32_t pad[2];
};
/* Gumbel-max: argmax of float(processed + g), ties: lower id. g from Philox4x32-10 keyed by the sequence's seed, counter (id,
 * position of the new token = the row's position + 1, choice, 0): kernels/philox.h. */
struct sample_args {
    const struct step_input *in;
    int n_logits, n_sample;
    bool filtered; /* state is read */
    bool top;      /* top_id, top_logit are wanted */
    const struct seq_params *params;
    int64_t vocab_begin, vocab_count;
    const float *logits;    /* [n_logits][vocab_count] */
    const float *processed; /* [n_sample][vocab_count] */
    const struct filter_state *state;
    struct sample_record *records; /* [n_logits] */
};

struct sample_result { /* one per logits row, copied to the host */
    int32_t token;         /* sampled; -1 for a row that is only scored */
    float logprob;         /* of token: log-softmax of the raw logits; 0 for a row that is only scored */
    float target_logprob;  /* of the row's target; 0 without one */
    int32_t n_top;         /* 0 unless `top` */
    int32_t top_id[STEP_MAX_TOP];      /* -1 beyond n_top */
    float top_logprob[STEP_MAX_TOP];   /* -inf beyond n_top */
};
/* Merges the shards' records in rank order (ties: lower id), sets last_token, counts the token where this shard holds it. */
struct sample_merge_args {
    const struct step_input *in;
    int n_logits, n_sample;
    bool top;
    int n_ranks;
    const struct sample_record *records; /* [n_ranks][n_logits] */
    int32_t *last_token;                 /* [max_seqs] */
    struct seq_counts counts;
    struct sample_result *results; /* [n_logits] */
};

/* A slot is taken: its params are copied, its counts zeroed and the prompt's tokens marked. (Its S and P are zeroed by stream_zero.) */
struct seq_begin_args {
    int seq;
    const struct seq_params *from; /* device: uploaded with the prompt */
    struct seq_params *params;
    const int32_t *prompt; /* device */
    int64_t n_prompt;
    struct seq_counts counts;
};

/* For tests and export: one record -> float K [KV_BLOCK][d], V [KV_BLOCK][d]. */
struct unpack_args {
    struct page_format format;
    const uint8_t *record;
    float *k, *v;
};

/* Made-up numbers for measurements, uniform from low to high: value (r, c) depends on seed and first + r * stride + c only, so that any rank
 * makes any slice of a matrix, with the same bits on every backend (kernels/fill.h). */
struct fill_random_args {
    void *data; /* [n_rows][n_columns] */
    enum dtype dtype; /* F32, F16 or BF16 */
    int64_t n_rows, n_columns;
    int64_t first, stride;
    uint64_t seed;
    float low, high;
};

#define OP_LAUNCH(name)                                                                            \
    static inline int op_##name(struct stream *stream, const struct name##_args *args) {           \
        return stream_launch(stream, OP_##name, args, sizeof *args);                               \
    }
OPS(OP_LAUNCH)
#undef OP_LAUNCH

#ifdef __cplusplus
}
#endif
