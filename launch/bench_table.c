/* Printing rows. Text columns are wide enough for what bench writes into them; CSV holds full precision. */
#include "launch/bench_table.h"

#include <errno.h>
#include <string.h>

#include "launch/units.h"

enum { CELL_BYTES = 32, PREDICTION_BYTES = 96 };

int bench_table_open(const char *csv, struct bench_table *table) {
    *table = (struct bench_table){.csv_path = csv};
    if (!csv)
        return STATUS_OK;
    table->csv = fopen(csv, "we");
    if (!table->csv)
        FAIL(STATUS_INPUT, "option csv: %s: %s", csv, strerror(errno));
    fprintf(table->csv, "section,item,cache,batch,tokens,ms,best_ms,rate,unit,bytes,flop,share,of,predicted_ms,predicted_ratio,note\n");
    return STATUS_OK;
}

/* ---- CSV -------------------------------------------------------------------------------------------------------------- */

static void put_text(FILE *csv, const char *text, char end) {
    if (text && strpbrk(text, ",\"\n")) {
        fputc('"', csv);
        for (; *text; text++) {
            if (*text == '"')
                fputc('"', csv);
            fputc(*text, csv);
        }
        fputc('"', csv);
    } else if (text) {
        fputs(text, csv);
    }
    fputc(end, csv);
}

static void put_number(FILE *csv, double value) {
    if (value != 0)
        fprintf(csv, "%.9g", value);
    fputc(',', csv);
}

static void put_csv(FILE *csv, const struct bench_row *r) {
    put_text(csv, r->section, ',');
    put_text(csv, r->item, ',');
    put_text(csv, r->cache, ',');
    put_number(csv, r->batch);
    put_number(csv, (double)r->tokens);
    put_number(csv, r->ms);
    put_number(csv, r->best_ms);
    put_number(csv, r->rate);
    put_text(csv, r->unit, ',');
    put_number(csv, r->bytes);
    put_number(csv, r->flop);
    put_number(csv, r->share);
    put_text(csv, r->of, ',');
    put_number(csv, r->predicted_ms);
    put_number(csv, r->ms > 0 ? r->predicted_ms / r->ms : 0);
    put_text(csv, r->note, '\n');
}

/* ---- text ------------------------------------------------------------------------------------------------------------- */

static const char *cell(char text[CELL_BYTES], const char *format, double value) {
    text[0] = '\0';
    if (value != 0)
        snprintf(text, CELL_BYTES, format, value);
    return text;
}

/* Three digits at least, no exponent. */
static const char *number(char text[CELL_BYTES], double value) {
    return cell(text, value < 0.1 ? "%.4f" : value < 10 ? "%.3f" : value < 100 ? "%.2f" : value < 1000 ? "%.1f" : "%.0f", value);
}

static void put_head(void) {
    printf("%-10s %-26s %-7s %5s %7s %10s %10s %9s %-8s %9s %7s  %s\n", "", "", "cache", "batch", "tokens", "ms", "best ms", "rate", "", "bytes",
           "GFLOP", "reached");
}

/* "plan said 7.9 ms, 3 % less"; "" without a prediction. */
static const char *prediction(char text[PREDICTION_BYTES], const struct bench_row *r) {
    char ms[CELL_BYTES];
    text[0] = '\0';
    if (r->predicted_ms <= 0 || r->ms <= 0)
        return text;
    double more = 100 * (r->predicted_ms / r->ms - 1);
    snprintf(text, PREDICTION_BYTES, ", plan said %s ms, %.0f %% %s", number(ms, r->predicted_ms), more < 0 ? -more : more,
             more < 0 ? "less" : "more");
    return text;
}

static void put_row(const struct bench_row *r) {
    char said[PREDICTION_BYTES];
    char batch[CELL_BYTES], tokens[CELL_BYTES], ms[CELL_BYTES], best[CELL_BYTES], rate[CELL_BYTES], flop[CELL_BYTES], share[CELL_BYTES];
    char bytes[UNITS_TEXT] = "";
    if (r->bytes > 0)
        units_bytes((int64_t)r->bytes, bytes);
    printf("%-10s %-26s %-7s %5s %7s %10s %10s %9s %-8s %9s %7s  %s%s%s%s%s%s\n", r->section, r->item, r->cache ? r->cache : "",
           cell(batch, "%.0f", r->batch), cell(tokens, "%.0f", (double)r->tokens), number(ms, r->ms), number(best, r->best_ms),
           number(rate, r->rate),
           r->unit ? r->unit : "", bytes, number(flop, r->flop * 1e-9), cell(share, "%.1f %%", 100 * r->share),
           r->of ? " of " : "", r->of ? r->of : "", r->note && r->share != 0 ? ", " : "", r->note ? r->note : "", prediction(said, r));
}

static void note(struct bench_table *t, const char *path) {
    if (t->status == STATUS_OK)
        t->status = base_fail(STATUS_FAILED, __FILE__, __LINE__, "%s: %s", path, strerror(errno));
}

void bench_table_add(struct bench_table *t, const struct bench_row *row) {
    if (strcmp(row->section, t->section) != 0 && t->section[0])
        putchar('\n');
    snprintf(t->section, sizeof t->section, "%s", row->section);
    if (strcmp(row->section, "machine") == 0) {
        printf("%-10s %-10s %s\n", row->section, row->item, row->note ? row->note : "");
    } else {
        if (!t->headed)
            put_head();
        t->headed = true;
        put_row(row);
    }
    if (t->csv) {
        put_csv(t->csv, row);
        if (fflush(t->csv) != 0)
            note(t, t->csv_path);
    }
    if (fflush(stdout) != 0)
        note(t, "standard output");
}

int bench_table_close(struct bench_table *t) {
    FILE *csv = t->csv;
    t->csv = NULL;
    if (csv && fclose(csv) != 0)
        note(t, t->csv_path);
    return t->status;
}
