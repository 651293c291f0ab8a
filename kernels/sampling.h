/* The sampler's rules for one token, one row or one record, without loops over the vocabulary: what every backend must do alike.
 * kernels/cpu/{sample,filter}.c, and the GPU's files of those names, only spread them over tokens. Every product and sum that
 * decides a token is rounded once (or is an explicit fma), so with contraction off all devices get the same bits.
 *
 * C11, C++17 and CUDA compile this file. */
#pragma once

#include <float.h>
#include <string.h>

#include "kernels/ops.h"
#include "kernels/philox.h"

#define SAMPLING_IN_PROMPT 0x80000000u /* struct seq_counts */
#define SAMPLING_GENERATED 0x7fffffffu

/* Below this a temperature is 0: logits / temperature would lose what tells them apart. */
#define SAMPLING_MIN_TEMPERATURE 1e-5f

HOST_DEVICE static inline bool sampling_is_greedy(const struct seq_params *p) {
    return !(p->temperature >= SAMPLING_MIN_TEMPERATURE);
}

/* A logit as all of the sampler reads it: NaN counts as -inf, +inf as the largest float, -0 as 0. */
HOST_DEVICE static inline float sampling_clean(float x) {
    x = x > FLT_MAX ? FLT_MAX : x;
    return x == x ? x + 0.0f : -INFINITY;
}

/* Whether seq_counts can change a logit at all. */
HOST_DEVICE static inline bool sampling_has_penalty(const struct seq_params *p) {
    return p->repetition_penalty != 1 || p->frequency_penalty != 0 || p->presence_penalty != 0;
}

/* Repetition penalty as in transformers (a token of the prompt or of the answer), then frequency and presence as OpenAI's. */
HOST_DEVICE static inline float sampling_penalize(float x, uint32_t word, float repetition, float frequency, float presence) {
    float repeated = x > 0 ? x / repetition : x * repetition;
    float generated = (float)(int32_t)(word & SAMPLING_GENERATED);
    float cost = frequency * generated;
    x = word ? repeated : x;
    x = x - cost;
    return generated > 0 ? x - presence : x;
}

/* The order-preserving image of a clean logit: a < b exactly when image(a) < image(b). */
HOST_DEVICE static inline uint32_t sampling_image(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* Image of -FLT_MAX: the floor of a row without filters. A token at -inf is never a candidate. */
#define SAMPLING_LOWEST 0x00800000u

/* e^x for x <= 0, 0 below -700, within 2 units in the last place: our own, because the C library's is neither vectorized nor the
 * same on a GPU. x = n log 2 + r with |r| <= log(2)/2, Taylor's series of e^r to r^13, times 2^n put into the exponent. */
HOST_DEVICE static inline double sampling_exp(double x) {
    const double log2_e = 1.4426950408889634, shift = 6755399441055744.0 + 1023; /* 1.5 * 2^52: the sum's low bits hold n + 1023 */
    const double ln2_high = 0x1.62e42fefa39efp-1, ln2_low = 0x1.abc9e3b39803fp-56;
    double y = x < -700 ? -700 : x;
    double t = y * log2_e + shift;
    double n = t - shift;
    double r = fma(n, -ln2_low, fma(n, -ln2_high, y));
    double e = 1.0 / 6227020800;
    e = fma(e, r, 1.0 / 479001600);
    e = fma(e, r, 1.0 / 39916800);
    e = fma(e, r, 1.0 / 3628800);
    e = fma(e, r, 1.0 / 362880);
    e = fma(e, r, 1.0 / 40320);
    e = fma(e, r, 1.0 / 5040);
    e = fma(e, r, 1.0 / 720);
    e = fma(e, r, 1.0 / 120);
    e = fma(e, r, 1.0 / 24);
    e = fma(e, r, 1.0 / 6);
    e = fma(e, r, 0.5);
    e = fma(e, r, 1.0);
    e = fma(e, r, 1.0);
    uint64_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits <<= 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return x < -700 ? 0 : e * power;
}

/* ---- filters ----------------------------------------------------------------------------------------------------- */

enum { FILTER_TOP_K = 1, FILTER_TOP_P = 2 }; /* bits of filter_state.active */

/* Mass of a token in units of 2^-40 of the most likely one's: 2^20 tokens at the maximum sum to 2^60. */
HOST_DEVICE static inline uint64_t sampling_mass(float x, float max) {
    return (uint64_t)(int64_t)(sampling_exp((double)x - (double)max) * 1099511627776.0 + 0.5);
}

/* Digits of an image, high to low: 11, 11, 10 bits. `round` counts from 0 within a search. */
HOST_DEVICE static inline int sampling_digit_shift(int round) { return round == 0 ? 21 : round == 1 ? 10 : 0; }
HOST_DEVICE static inline int sampling_digit_bits(int round) { return round == 2 ? 10 : 11; }

/* The bin of an image in this round (0..5), or -1: below the floor, or outside of the digits already found. */
HOST_DEVICE static inline int sampling_bin(const struct filter_state *s, int round, uint32_t image) {
    int part = round % 3;
    int shift = sampling_digit_shift(part), bits = sampling_digit_bits(part);
    if (image < s->floor || (part > 0 && image >> (shift + bits) != s->prefix))
        return -1;
    return (int)(image >> shift & ((1u << bits) - 1));
}

HOST_DEVICE static inline bool sampling_is_active(const struct filter_state *s, int round) {
    return (s->active & (round < 3 ? FILTER_TOP_K : FILTER_TOP_P)) != 0;
}

HOST_DEVICE static inline void sampling_filter_begin(const struct seq_params *p, float max, struct filter_state *s) {
    s->max = max;
    s->floor = SAMPLING_LOWEST;
    s->prefix = 0;
    s->active = 0;
    s->remaining = 0;
    if (sampling_is_greedy(p))
        return;
    if (p->top_k > 0) {
        s->active |= FILTER_TOP_K;
        s->remaining = (uint64_t)p->top_k;
    }
    if (p->top_p < 1)
        s->active |= FILTER_TOP_P;
}

/* min-p: x >= max + log(min_p), the bound rounded up to a float, so exactly the tokens that fulfil it in double stay. */
HOST_DEVICE static inline void sampling_filter_min_p(const struct seq_params *p, struct filter_state *s) {
    if (sampling_is_greedy(p) || !(p->min_p > 0) || !(s->max >= -FLT_MAX))
        return;
    double bound = (double)s->max + (p->min_p < 1 ? log((double)p->min_p) : 0);
    if (bound < -(double)FLT_MAX)
        return;
    float nearest = sampling_clean((float)bound);
    uint32_t image = sampling_image(nearest) + ((double)nearest < bound ? 1 : 0);
    s->floor = image > s->floor ? image : s->floor;
}

/* One row's step after the sum over ranks has three parts: aim, the search for the highest digit at which the count or mass from above,
 * that digit's included, reaches `remaining` (serial here, a parallel sum on a GPU), settle. `total`: the entry after the bins. */
HOST_DEVICE static inline void sampling_filter_aim(const struct seq_params *p, int round, uint64_t total, struct filter_state *s) {
    if (round == 3) {
        double target = ceil((double)p->top_p * (double)total);
        s->remaining = target >= 1 ? (uint64_t)target : 1; /* top_p <= 0 leaves the most likely token */
    }
    if (round % 3 == 0)
        s->prefix = 0;
}

/* `above`: what lies in the digits above `digit`; digit -1: all of them together do not reach `remaining`. */
HOST_DEVICE static inline void sampling_filter_settle(const struct seq_params *p, int round, int digit, uint64_t above,
                                                      struct filter_state *s) {
    if (sampling_is_active(s, round)) {
        if (digit < 0) { /* fewer tokens than k, or none at all: the floor stays */
            s->active &= ~(uint32_t)(round < 3 ? FILTER_TOP_K : FILTER_TOP_P);
        } else {
            s->remaining -= above;
            s->prefix = s->prefix << sampling_digit_bits(round % 3) | (uint32_t)digit;
            if (round % 3 == 2)
                s->floor = s->prefix; /* a token's image, at or above the floor before */
        }
    }
    if (round == FILTER_ROUNDS - 1)
        sampling_filter_min_p(p, s);
}

HOST_DEVICE static inline void sampling_filter_narrow(const struct seq_params *p, int round, const uint64_t *bins,
                                                      struct filter_state *s) {
    int digit = -1;
    uint64_t above = 0;
    if (sampling_is_active(s, round)) {
        sampling_filter_aim(p, round, bins[FILTER_BINS], s);
        digit = (1 << sampling_digit_bits(round % 3)) - 1;
        for (; digit >= 0 && above + bins[digit] < s->remaining; digit--)
            above += bins[digit];
    }
    sampling_filter_settle(p, round, digit, above, s);
}

/* ---- records ----------------------------------------------------------------------------------------------------- */

/* The row of logits entry i. Its new token's position, which the noise is drawn for, is row.position + 1. */
HOST_DEVICE static inline const struct step_row *sampling_row(const struct step_input *in, int64_t i) {
    return &in->row[in->logit[i].row];
}

HOST_DEVICE static inline bool sampling_better(float a, int32_t a_id, float b, int32_t b_id) {
    return a > b || (a == b && a_id < b_id);
}

/* Nothing seen: loses against every token, merges with anything. */
HOST_DEVICE static inline void sampling_record_clear(struct sample_record *r) {
    memset(r, 0, sizeof *r);
    r->max = r->target = r->best_key = r->best_logit = -INFINITY;
    r->best_id = INT32_MAX;
    for (int t = 0; t < STEP_MAX_TOP; t++) {
        r->top_id[t] = -1;
        r->top_logit[t] = -INFINITY;
    }
}

/* Puts a token into the sorted list if it belongs there. */
HOST_DEVICE static inline void sampling_top_insert(struct sample_record *r, float logit, int32_t id) {
    int t = STEP_MAX_TOP - 1;
    if (!(logit >= -FLT_MAX) || !sampling_better(logit, id, r->top_logit[t], r->top_id[t]))
        return;
    for (; t > 0 && sampling_better(logit, id, r->top_logit[t - 1], r->top_id[t - 1]); t--) {
        r->top_logit[t] = r->top_logit[t - 1];
        r->top_id[t] = r->top_id[t - 1];
    }
    r->top_logit[t] = logit;
    r->top_id[t] = id;
}

/* into += from, but for the sum of exponentials, which is the caller's: it needs more bits than a record has. */
HOST_DEVICE static inline void sampling_record_merge(struct sample_record *into, const struct sample_record *from, bool top) {
    into->max = from->max > into->max ? from->max : into->max;
    into->target = from->target > into->target ? from->target : into->target;
    if (sampling_better(from->best_key, from->best_id, into->best_key, into->best_id)) {
        into->best_key = from->best_key;
        into->best_id = from->best_id;
        into->best_logit = from->best_logit;
    }
    for (int t = 0; top && t < STEP_MAX_TOP && from->top_id[t] >= 0; t++)
        sampling_top_insert(into, from->top_logit[t], from->top_id[t]);
}

/* sum * e^(max - new_max): 0 for what saw nothing. */
HOST_DEVICE static inline double sampling_rescale(double sum, float max, float new_max) {
    return max >= -FLT_MAX ? sum * sampling_exp((double)max - (double)new_max) : 0;
}

/* `log_total` is -inf when every logit is: then so is every log-probability. */
HOST_DEVICE static inline float sampling_logprob(float logit, double log_total) {
    return log_total > -INFINITY ? (float)((double)logit - log_total) : -INFINITY;
}
