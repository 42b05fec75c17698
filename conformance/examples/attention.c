/* One step of span-masked attention in C, forward and backward, as a backend for refspan's conformance suite.
 *
 *     cc -std=c99 -O2 -o attention attention.c -lm
 *     refspan check --backend exec:./attention
 *
 * It speaks the protocol of docs/protocol.md: a line of JSON, then the tensors that it names as npy files. Numbers are
 * read into doubles, whatever their type, and written back as the type of `query` (of `span` for masks and gradients
 * of spans). The names are those of the specification: B batch rows, H heads, M queries, N memories, D numbers a head,
 * P positions.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_TENSORS 8

typedef struct {
    char name[32];
    int rank;
    size_t shape[4], count;
    char type[4]; /* "<f4", "<f8" or "<i8" */
    double *x;
} Tensor;

static void fail(const char *why) {
    fprintf(stderr, "attention: %s\n", why);
    exit(1);
}

static void *allocate(size_t count) {
    void *memory = calloc(count ? count : 1, sizeof(double));
    if (!memory) fail("out of memory");
    return memory;
}

/* --- messages ---------------------------------------------------------------------------------------------------- */

/* Where the value of a key begins in a line of JSON, or NULL. No string of ours holds a quotation mark. */
static const char *value_of(const char *line, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *at = strstr(line, quoted);
    if (!at) return NULL;
    at += strlen(quoted);
    return at + strspn(at, " :");
}

static double number(const char *line, const char *key) {
    const char *at = value_of(line, key);
    return at ? strtod(at, NULL) : 0;
}

static int is(const char *line, const char *key, const char *word) {
    const char *at = value_of(line, key);
    size_t n = strlen(word);
    return at && at[0] == '"' && !strncmp(at + 1, word, n) && at[n + 1] == '"';
}

static void read_all(void *into, size_t bytes) {
    if (bytes && fread(into, 1, bytes, stdin) != bytes) fail("the input ends in the middle of a tensor");
}

/* An npy file: magic and version (8 bytes), length of the header (2), a Python dict as text, the numbers. */
static void read_tensor(Tensor *t) {
    unsigned char start[10];
    read_all(start, 10);
    if (memcmp(start, "\x93NUMPY\x01\x00", 8)) fail("not an npy file of version 1.0");
    size_t length = start[8] + 256 * start[9];
    char *header = allocate(length + 1);
    read_all(header, length);
    header[length] = 0;
    const char *type = strstr(header, "'descr': '"), *shape = strstr(header, "'shape': (");
    if (!type || !shape) fail("an npy header without descr or shape");
    memcpy(t->type, type + 10, 3);
    t->type[3] = 0;
    t->rank = 0, t->count = 1;
    for (const char *at = shape + 10; *at != ')';) {
        char *end;
        size_t size = strtoull(at, &end, 10);
        if (end == at || t->rank == 4) fail("an npy header with a shape that is none of ours");
        t->shape[t->rank++] = size, t->count *= size;
        at = end + strspn(end, ", ");
    }
    free(header);
    size_t width = t->type[2] - '0';
    char *raw = allocate(t->count * width);
    read_all(raw, t->count * width);
    t->x = allocate(t->count);
    for (size_t i = 0; i < t->count; i++) {
        if (!strcmp(t->type, "<f4")) t->x[i] = ((float *)raw)[i];
        else if (!strcmp(t->type, "<f8")) t->x[i] = ((double *)raw)[i];
        else if (!strcmp(t->type, "<i8")) t->x[i] = (double)((int64_t *)raw)[i];
        else fail("a dtype other than float32, float64 and int64");
    }
    free(raw);
}

static void write_tensor(const double *x, const char *type, int rank, const size_t *shape) {
    char text[256], header[128];
    size_t count = 1, at = 0;
    for (int i = 0; i < rank; i++) {
        at += snprintf(text + at, sizeof text - at, "%zu,", shape[i]);
        count *= shape[i];
    }
    text[at] = 0;
    int n = snprintf(header, 118, "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", type, text);
    memset(header + n, ' ', 117 - n);
    header[117] = '\n';
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, stdout); /* 0x76 = 118 bytes of header */
    fwrite(header, 1, 118, stdout);
    for (size_t i = 0; i < count; i++) {
        float narrow = (float)x[i];
        if (type[2] == '4') fwrite(&narrow, 4, 1, stdout);
        else fwrite(&x[i], 8, 1, stdout);
    }
}

/* --- the specification ------------------------------------------------------------------------------------------- */

/* Clauses PAST and MASK. */
static double mask_of(double span, double distance, double ramp) {
    if (distance < 1) return 0;
    double m = 1 + (span - distance) / ramp;
    return m < 0 ? 0 : m > 1 ? 1 : m;
}

static void soft_mask(const Tensor *span, const Tensor *age, size_t M, double ramp) {
    size_t B = span->shape[0], N = span->shape[1], shape[] = {B, M, N};
    double *mask = allocate(B * M * N);
    for (size_t b = 0; b < B; b++)
        for (size_t m = 0; m < M; m++)
            for (size_t i = 0; i < N; i++)
                mask[(b * M + m) * N + i] = mask_of(span->x[b * N + i], age->x[b * N + i] + m, ramp);
    write_tensor(mask, span->type, 3, shape);
    free(mask);
}

static double dot(const double *x, const double *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static void add(double *into, double factor, const double *x, size_t n) {
    for (size_t i = 0; i < n; i++) into[i] += factor * x[i];
}

typedef struct {
    const Tensor *query, *key, *value, *span, *age, *position; /* position: NULL for none */
    double ramp;
} Step;

/* The position embedding of this distance, or NULL (clause LOGIT). */
static const double *embedding(const Step *s, double distance, size_t D) {
    if (!s->position || distance < 1 || distance > s->position->shape[0]) return NULL;
    return s->position->x + ((size_t)distance - 1) * D;
}

/* Clauses LOGIT, WEIGHT and EMPTY for one query: masks m and shares exp(s) / Z, so that weights are a = m * share. */
static void weigh(const Step *s, size_t b, size_t h, size_t m, double *mask, double *share) {
    size_t H = s->query->shape[1], M = s->query->shape[2], D = s->query->shape[3], N = s->key->shape[2];
    const double *q = s->query->x + ((b * H + h) * M + m) * D;
    double peak = -INFINITY, total = 0;
    for (size_t i = 0; i < N; i++) {
        double distance = s->age->x[b * N + i] + m;
        const double *p = embedding(s, distance, D);
        mask[i] = mask_of(s->span->x[b * N + i], distance, s->ramp);
        share[i] = (dot(q, s->key->x + ((b * H + h) * N + i) * D, D) + (p ? dot(q, p, D) : 0)) / sqrt((double)D);
        if (mask[i] > 0 && share[i] > peak) peak = share[i];
    }
    for (size_t i = 0; i < N; i++) {
        share[i] = mask[i] > 0 ? exp(share[i] - peak) : 0; /* what has expired has no say, however large its logit */
        total += mask[i] * share[i];
    }
    for (size_t i = 0; i < N; i++) share[i] = total > 0 ? share[i] / total : 0;
}

/* Clause OUTPUT. */
static void forward(const Step *s) {
    size_t B = s->query->shape[0], H = s->query->shape[1], M = s->query->shape[2], D = s->query->shape[3];
    size_t N = s->key->shape[2];
    double *out = allocate(B * H * M * D), *mask = allocate(N), *share = allocate(N);
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < H; h++)
            for (size_t m = 0; m < M; m++) {
                weigh(s, b, h, m, mask, share);
                for (size_t i = 0; i < N; i++)
                    add(out + ((b * H + h) * M + m) * D, mask[i] * share[i], s->value->x + ((b * H + h) * N + i) * D, D);
            }
    write_tensor(out, s->query->type, 4, s->query->shape);
    free(out), free(mask), free(share);
}

/* Clause GRAD. With g the gradient of the output, c = sum_i a_i (g . v_i) and da_i = g . v_i:
 *     dv_i += a_i g      ds_i = a_i (da_i - c)      dm_i = exp(s_i) / Z (da_i - c)      de_i += dm_i / R on the ramp */
static void backward(const Step *s, const Tensor *grad_out) {
    size_t B = s->query->shape[0], H = s->query->shape[1], M = s->query->shape[2], D = s->query->shape[3];
    size_t N = s->key->shape[2];
    double *dq = allocate(s->query->count), *dk = allocate(s->key->count), *dv = allocate(s->key->count);
    double *de = allocate(s->span->count), *dp = allocate(s->position ? s->position->count : 0);
    double *mask = allocate(N), *share = allocate(N), *da = allocate(N);
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < H; h++)
            for (size_t m = 0; m < M; m++) {
                size_t row = ((b * H + h) * M + m) * D;
                const double *q = s->query->x + row, *g = grad_out->x + row;
                double c = 0;
                weigh(s, b, h, m, mask, share);
                for (size_t i = 0; i < N; i++) {
                    da[i] = dot(g, s->value->x + ((b * H + h) * N + i) * D, D);
                    c += mask[i] * share[i] * da[i];
                }
                for (size_t i = 0; i < N; i++) {
                    size_t memory = ((b * H + h) * N + i) * D;
                    double distance = s->age->x[b * N + i] + m, a = mask[i] * share[i];
                    double ds = a * (da[i] - c) / sqrt((double)D);
                    const double *p = embedding(s, distance, D);
                    add(dv + memory, a, g, D);
                    add(dk + memory, ds, q, D);
                    add(dq + row, ds, s->key->x + memory, D);
                    if (p) {
                        add(dq + row, ds, p, D);
                        add(dp + (p - s->position->x), ds, q, D);
                    }
                    if (mask[i] > 0 && mask[i] < 1) de[b * N + i] += share[i] * (da[i] - c) / s->ramp;
                }
            }
    write_tensor(dq, s->query->type, 4, s->query->shape);
    write_tensor(dk, s->query->type, 4, s->key->shape);
    write_tensor(dv, s->query->type, 4, s->value->shape);
    write_tensor(de, s->span->type, 2, s->span->shape);
    if (s->position) write_tensor(dp, s->query->type, 2, s->position->shape);
    free(dq), free(dk), free(dv), free(de), free(dp), free(mask), free(share), free(da);
}

/* --- the conversation -------------------------------------------------------------------------------------------- */

static Tensor tensors[MOST_TENSORS];
static int count;

static const Tensor *tensor(const char *name) {
    for (int i = 0; i < count; i++)
        if (!strcmp(tensors[i].name, name)) return &tensors[i];
    return NULL;
}

/* Names are in the line, numbers behind it. */
static void read_tensors(const char *line) {
    const char *at = value_of(line, "tensors");
    count = 0;
    while (at && (at = strpbrk(at, "\"]")) && *at == '"') {
        const char *end = strchr(at + 1, '"');
        if (!end || end - at > 31 || count == MOST_TENSORS) fail("names of tensors that are none of ours");
        snprintf(tensors[count].name, end - at, "%s", at + 1);
        count++;
        at = end + 1;
    }
    for (int i = 0; i < count; i++) read_tensor(&tensors[i]);
}

static void run(const char *line) {
    int seq = (int)number(line, "seq");
    Step s = {tensor("query"), tensor("key"), tensor("value"), tensor("span"), tensor("age"), tensor("position"),
              number(line, "ramp")};
    if (is(line, "operation", "soft_mask")) {
        printf("{\"seq\": %d, \"tensors\": [\"mask\"]}\n", seq);
        soft_mask(s.span, s.age, (size_t)number(line, "queries"), s.ramp);
    } else if (is(line, "operation", "span_attention")) {
        printf("{\"seq\": %d, \"tensors\": [\"output\"]}\n", seq);
        forward(&s);
    } else if (is(line, "operation", "span_attention_backward")) {
        const char *last = s.position ? ", \"position\"" : "";
        printf("{\"seq\": %d, \"tensors\": [\"query\", \"key\", \"value\", \"span\"%s]}\n", seq, last);
        backward(&s, tensor("grad_out"));
    } else {
        printf("{\"seq\": %d, \"not_offered\": true, \"tensors\": []}\n", seq);
    }
}

int main(void) {
    char *line = NULL;
    size_t room = 0, length = 0;
    for (int c; (c = getchar()) != EOF;) {
        if (length + 1 >= room && !(line = realloc(line, room = 2 * room + 256))) fail("out of memory");
        line[length] = (char)c, line[++length] = 0;
        if (c != '\n') continue;
        length = 0;
        if (is(line, "cmd", "stop")) break;
        read_tensors(line);
        if (is(line, "cmd", "start"))
            puts("{\"version\": 1, \"name\": \"attention.c\", \"dtypes\": [\"float32\", \"float64\"], \"operations\": "
                 "[\"soft_mask\", \"span_attention\", \"span_attention_backward\"], \"tensors\": []}");
        else run(line);
        for (int i = 0; i < count; i++) free(tensors[i].x);
        fflush(stdout);
    }
    free(line);
    return 0;
}
