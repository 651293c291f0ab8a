/* From logits to tokens on the CPU: penalties and bias, what a vocabulary shard knows of a row (sample), and the merge of the
 * shards. The rules of one token are kernels/sampling.h, the noise kernels/philox.h, the filters filter.c.
 *
 * A row is cut into fixed chunks (sample.h); each gives a record and a sum in double, merged in order. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sample.h"
#include "kernels/sampling.h"

/* ---- logits_process ---------------------------------------------------------------------------------------------- */

static void process_chunk(const struct seq_params *p, const uint32_t *words, const float *x, int64_t first_id, int64_t n, float *y) {
    const float repetition = p->repetition_penalty, frequency = p->frequency_penalty, presence = p->presence_penalty;
    if (sampling_has_penalty(p)) {
        for (int64_t j = 0; j < n; j++)
            y[j] = sampling_penalize(sampling_clean(x[j]), words[j], repetition, frequency, presence);
    } else {
        for (int64_t j = 0; j < n; j++)
            y[j] = sampling_clean(x[j]);
    }
    for (int b = 0; b < p->n_bias; b++) {
        int64_t j = p->bias_id[b] - first_id;
        if (j >= 0 && j < n)
            y[j] += p->bias[b];
    }
    const float divisor = sampling_is_greedy(p) ? 1 : p->temperature;
    for (int64_t j = 0; j < n; j++)
        y[j] = sampling_clean(y[j] / divisor);
}

void cpu_logits_process(const struct logits_process_args *args) {
    struct sample_split split = sample_split_of(args->counts.vocab_count);
    int64_t n_rows = min_i64(args->n_sample, args->in->n_sample);
#pragma omp parallel for schedule(static) if (n_rows * split.n_chunks > 1)
    for (int64_t item = 0; item < n_rows * split.n_chunks; item++) {
        int64_t row = item / split.n_chunks, begin = item % split.n_chunks * split.chunk;
        int64_t seq = sampling_row(args->in, row)->seq;
        process_chunk(&args->params[seq], args->counts.words + seq * split.n + begin, args->logits + row * split.n + begin,
                      args->counts.vocab_begin + begin, min_i64(split.chunk, split.n - begin),
                      args->processed + row * split.n + begin);
    }
}

/* ---- sample ------------------------------------------------------------------------------------------------------ */

struct partial { /* one chunk's record; its sum in double */
    struct sample_record record;
    double sum;
};

/* Raw logits: max, sum of e^(x - max) in SAMPLE_LANES interleaved sums, the best STEP_MAX_TOP. */
static void scan_logits(const float *x, int64_t first_id, int64_t n, bool top, struct partial *out) {
    struct sample_record *r = &out->record;
    float y[SAMPLE_BLOCK];
    r->max = sampling_clean(sample_max(x, n));
    if (!(r->max >= -FLT_MAX))
        return;
    double lanes[SAMPLE_LANES] = {0};
    for (int64_t begin = 0; begin < n; begin += SAMPLE_BLOCK) {
        int64_t n_block = min_i64(SAMPLE_BLOCK, n - begin);
        for (int64_t j = 0; j < SAMPLE_BLOCK; j++)
            y[j] = j < n_block ? sampling_clean(x[begin + j]) : -INFINITY;
        for (int64_t j = 0; j < SAMPLE_BLOCK; j += SAMPLE_LANES)
            for (int64_t lane = 0; lane < SAMPLE_LANES; lane++)
                lanes[lane] += sampling_exp((double)y[j + lane] - (double)r->max);
        if (!top || !(sample_max(y, SAMPLE_BLOCK) > r->top_logit[STEP_MAX_TOP - 1]))
            continue;
        for (int64_t j = 0; j < n_block; j++)
            if (y[j] > r->top_logit[STEP_MAX_TOP - 1])
                sampling_top_insert(r, y[j], (int32_t)(first_id + begin + j));
    }
    for (int lane = 0; lane < SAMPLE_LANES; lane++)
        out->sum += lanes[lane];
}

struct draw { /* what one row is drawn with */
    uint64_t seed;
    int32_t choice, position;
    bool greedy;
    uint32_t floor;
};

static void draw_block(const struct draw *d, const float *x, int64_t first_id, int64_t n, struct sample_record *r) {
    uint32_t high[SAMPLE_BLOCK];
    if (!d->greedy)
        for (int64_t j = 0; j < n; j++)
            high[j] = (uint32_t)(philox_bits(d->seed, d->choice, d->position, (int32_t)(first_id + j)) >> 32);
    for (int64_t j = 0; j < n; j++) {
        int32_t id = (int32_t)(first_id + j);
        float key = x[j];
        if (sampling_image(key) < d->floor)
            continue;
        if (!d->greedy) {
            if ((double)x[j] + philox_gumbel_bound(high[j]) <= (double)r->best_key)
                continue;
            key = (float)((double)x[j] + philox_gumbel(philox_bits(d->seed, d->choice, d->position, id)));
        }
        if (key > r->best_key) { /* ids ascend, so a tie keeps the lower one */
            r->best_key = key;
            r->best_id = id;
        }
    }
}

/* A block in which even the largest noise cannot help its best token is left out: nobody's noise is computed. */
static void draw_chunk(const struct draw *d, const float *x, int64_t first_id, int64_t n, struct sample_record *r) {
    for (int64_t begin = 0; begin < n; begin += SAMPLE_BLOCK) {
        int64_t n_block = min_i64(SAMPLE_BLOCK, n - begin);
        float max = sample_max(x + begin, n_block);
        if (sampling_image(max) < d->floor)
            continue;
        if ((double)max + (d->greedy ? 0 : PHILOX_GUMBEL_MAX) > (double)r->best_key)
            draw_block(d, x + begin, first_id + begin, n_block, r);
    }
}

static struct draw draw_of(const struct sample_args *args, int64_t row) {
    const struct step_row *step_row = sampling_row(args->in, row);
    const struct seq_params *p = &args->params[step_row->seq];
    struct draw d;
    d.seed = p->seed;
    d.choice = p->choice;
    d.position = step_row->position + 1;
    d.greedy = sampling_is_greedy(p);
    d.floor = args->filtered && !d.greedy ? args->state[row].floor : SAMPLING_LOWEST;
    return d;
}

static void sample_chunk(const struct sample_args *args, int64_t row, int64_t begin, int64_t n, struct partial *out) {
    const float *logits = args->logits + row * args->vocab_count;
    sampling_record_clear(&out->record);
    out->sum = 0;
    scan_logits(logits + begin, args->vocab_begin + begin, n, args->top, out);
    if (row >= args->in->n_sample || row >= args->n_sample || n == 0)
        return;
    struct draw d = draw_of(args, row);
    struct sample_record *r = &out->record;
    draw_chunk(&d, args->processed + row * args->vocab_count + begin, args->vocab_begin + begin, n, r);
    if (r->best_id == INT32_MAX) /* no candidate */
        r->best_id = (int32_t)(args->vocab_begin + begin);
    r->best_logit = sampling_clean(logits[r->best_id - args->vocab_begin]);
}

/* Chunks in order, then what only the whole row knows. */
static void sample_row(const struct sample_args *args, int64_t row, const struct partial *chunks, int64_t n_chunks) {
    struct sample_record *r = &args->records[row];
    sampling_record_clear(r);
    for (int64_t c = 0; c < n_chunks; c++)
        sampling_record_merge(r, &chunks[c].record, args->top);
    double sum = 0;
    for (int64_t c = 0; c < n_chunks; c++)
        sum += sampling_rescale(chunks[c].sum, chunks[c].record.max, r->max);
    r->sum = (float)sum;
    int64_t target = args->in->logit[row].target - args->vocab_begin;
    if (args->in->logit[row].target >= 0 && target >= 0 && target < args->vocab_count)
        r->target = sampling_clean(args->logits[row * args->vocab_count + target]);
}

void cpu_sample(const struct sample_args *args) {
    struct sample_split split = sample_split_of(args->vocab_count);
    int64_t n_rows = min_i64(args->n_logits, args->in->n_logits);
    struct partial partial[SAMPLE_MAX_CHUNKS];
    for (int64_t first = 0; first < n_rows; first += split.n_group) {
        int64_t n_group = min_i64(split.n_group, n_rows - first);
#pragma omp parallel for schedule(dynamic) if (n_group * split.n_chunks > 1)
        for (int64_t item = 0; item < n_group * split.n_chunks; item++) {
            int64_t begin = item % split.n_chunks * split.chunk;
            sample_chunk(args, first + item / split.n_chunks, begin, min_i64(split.chunk, split.n - begin), &partial[item]);
        }
        for (int64_t i = 0; i < n_group; i++)
            sample_row(args, first + i, partial + i * split.n_chunks, split.n_chunks);
    }
}

/* ---- sample_merge ------------------------------------------------------------------------------------------------ */

static void merge_row(const struct sample_merge_args *args, int64_t row) {
    struct sample_record all;
    double sum = 0;
    sampling_record_clear(&all);
    for (int rank = 0; rank < args->n_ranks; rank++)
        sampling_record_merge(&all, &args->records[(int64_t)rank * args->n_logits + row], args->top);
    for (int rank = 0; rank < args->n_ranks; rank++) {
        const struct sample_record *r = &args->records[(int64_t)rank * args->n_logits + row];
        sum += sampling_rescale((double)r->sum, r->max, all.max);
    }
    double log_total = sum > 0 ? (double)all.max + log(sum) : -INFINITY;
    struct sample_result *out = &args->results[row];
    bool sampled = row < args->in->n_sample && row < args->n_sample;
    out->token = sampled ? all.best_id : -1;
    out->logprob = sampled ? sampling_logprob(all.best_logit, log_total) : 0;
    out->target_logprob = args->in->logit[row].target >= 0 ? sampling_logprob(all.target, log_total) : 0;
    out->n_top = 0;
    for (int t = 0; t < STEP_MAX_TOP; t++) {
        out->top_id[t] = all.top_id[t];
        out->top_logprob[t] = sampling_logprob(all.top_logit[t], log_total);
        out->n_top += all.top_id[t] >= 0;
    }
    if (!sampled)
        return;
    int64_t seq = sampling_row(args->in, row)->seq, local = all.best_id - args->counts.vocab_begin;
    args->last_token[seq] = all.best_id;
    if (local >= 0 && local < args->counts.vocab_count)
        args->counts.words[seq * args->counts.vocab_count + local]++;
}

void cpu_sample_merge(const struct sample_merge_args *args) {
    int64_t n_rows = min_i64(args->n_logits, args->in->n_logits);
#pragma omp parallel for schedule(static) if (n_rows > 16)
    for (int64_t row = 0; row < n_rows; row++)
        merge_row(args, row);
}

/* ---- seq_begin --------------------------------------------------------------------------------------------------- */

void cpu_seq_begin(const struct seq_begin_args *args) {
    const struct seq_counts *counts = &args->counts;
    uint32_t *words = counts->words + (int64_t)args->seq * counts->vocab_count;
    args->params[args->seq] = *args->from;
    memset(words, 0, (size_t)counts->vocab_count * sizeof *words);
    for (int64_t i = 0; i < args->n_prompt; i++) {
        int64_t local = args->prompt[i] - counts->vocab_begin;
        if (local >= 0 && local < counts->vocab_count)
            words[local] = SAMPLING_IN_PROMPT;
    }
}
