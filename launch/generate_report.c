/* Speeds are of the whole job: decode counts all choices from the first token to the last. Bytes are the engine's, exact. */
#include "launch/generate_report.h"

#include "launch/units.h"

void generate_times_token(struct generate_times *times) {
    times->last = base_seconds();
    if (times->n_tokens++ == 0)
        times->first = times->last;
}

static void print_speed(int n_prompt, int n_choices, const struct generate_times *times, FILE *stream) {
    fprintf(stream, "prompt    %d tokens", n_prompt);
    if (n_choices > 1)
        fprintf(stream, ", for each of %d choices", n_choices);
    double prefill = times->prefill_s > 0 ? times->prefill_s : times->first - times->submitted; /* stopped: by the clock */
    if (prefill > 0)
        fprintf(stream, "; prefill %.4g tokens/s (%.2f s)", (double)n_prompt * n_choices / prefill, prefill);
    fprintf(stream, "\nnew       %lld tokens", (long long)times->n_tokens);
    if (times->n_tokens > 1 && times->last > times->first)
        fprintf(stream, "; decode %.4g tokens/s (%.2f s)", (double)(times->n_tokens - 1) / (times->last - times->first),
                times->last - times->first);
    fputc('\n', stream);
}

static void print_cache(const struct run *run, int n_prompt, int n_choices, const struct generate_times *times, FILE *stream) {
    struct engine_memory memory;
    char held[UNITS_TEXT], plain[UNITS_TEXT], one[UNITS_TEXT];
    engine_memory(run->engine, &memory);
    int64_t plain_bytes = memory.cache_tokens * memory.elements_per_token * 2; /* 16 bit */
    fprintf(stream, "cache     %s, %s allocated for %lld tokens; 16 bit would take %s (%.2fx)\n",
            engine_cache_name(run->engine), units_bytes(memory.cache, held), (long long)memory.cache_tokens,
            units_bytes(plain_bytes, plain), memory.cache ? (double)plain_bytes / (double)memory.cache : 0.0);
    if (memory.page_tokens > 0)
        fprintf(stream, "pages     %s for %lld tokens, %.3f bits per element; the rest is for the newest tokens in 16 bit%s\n",
                units_bytes(memory.pages, one), (long long)memory.page_tokens,
                8.0 * (double)memory.pages / ((double)memory.page_tokens * (double)memory.elements_per_token),
                memory.states ? ", S and P, and tables" : " and tables");
    int64_t n = n_prompt + times->n_tokens / n_choices;
    int64_t bytes = engine_sequence_bytes(run->engine, n);
    fprintf(stream, "sequence  %s at %lld tokens, %.2f bits per element, window and states included\n",
            units_bytes(bytes, one), (long long)n, 8.0 * (double)bytes / ((double)n * (double)memory.elements_per_token));
}

void generate_report(const struct run *run, int n_prompt, int n_choices, const struct generate_times *times, FILE *stream) {
    const struct grid *grid = engine_grid(run->engine);
    int threads = run->options->engine.threads ? run->options->engine.threads : run->place.n_cores;
    fprintf(stream, "\nranks     %d = dp %d x tp %d x cp %d, merge %s, device %s, %d thread%s each; loaded in %.1f s\n",
            comm_size(run->world), grid->dp, grid->tp, grid->cp, engine_merge_name(run->engine),
            engine_device(run->engine), threads, threads == 1 ? "" : "s", run->load_s);
    print_speed(n_prompt, n_choices, times, stream);
    print_cache(run, n_prompt, n_choices, times, stream);
}
