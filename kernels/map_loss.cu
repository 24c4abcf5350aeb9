// Pseudo-gradients of average precision after non-maximum suppression. real is float or double. Python side: tinydet/ops/map_loss.py
// variants: real=float; real=double
// flags: --fmad=false
// (no fused multiply-add: a last bit decides at the thresholds)
//
// c classes of K candidates each: image by image (start), best first in each, at most 256 to an image; `words` of 64 bits hold a set
// of them. A thread each, blocks of 256, no shared memory; the loops are those of map_loss.py, but for its shortcut for a kept window without
// neighbours within the step: here each such window has its NMS anew.
//
// map_loss_overlaps   of a candidate: near, the others of its image with IoU > nms; gt, the object that it overlaps most, as a number
//                     within class and image, -1 below `match`, -2 if that is difficult
// map_loss_keep       of a class and image: greedy NMS; flags: 1 the first kept on its object, 0 false, -1 what does not count
// map_loss_values     of a class: AP
// map_loss_gradients  of a candidate: the finite step or, with env, the envelope. Another score edits the list of its class where it
//                     holds its own image, in some ten places; then a walk through the TPs. 1.2 KB of local memory.
//
// By arithmetic, nothing of it measured: 128 images x 100 candidates x 10 classes are 128,000 threads, each with two walks over some
// 100 candidates and 100 TPs: 5e7 steps in all, below a millisecond on an H100.

#define WORDS 4
#define FIRST (-1)
#define LAST (1 << 30)
typedef unsigned long long Bits;

struct Ranking
{
    const double* score;
    const int* row;
    const Bits* near;
    const int* gt;
    const u8* kept;
    const int *flag, *place, *tops, *entries;
    int K, words, P, mode;
};

struct Sets
{
    Bits on[WORDS], off[WORDS], gone[WORDS], claimed[WORDS];
    int edits[64 * WORDS + 1];
};

static __device__ bool holds(const Bits* set, int j)
{
    return set[j / 64] >> (j % 64) & 1;
}

static __device__ void put(Bits* set, int j)
{
    set[j / 64] |= 1ULL << (j % 64);
}

static __device__ bool claim(Bits* claimed, int g)
{
    bool first = g >= 0 && !holds(claimed, g);
    if (first) put(claimed, g);
    return first;
}

static __device__ void clear(Bits* set)
{
    for (int w = 0; w < WORDS; w++)
        set[w] = 0;
}

// NMS of an image's candidates but those gone; both sets are written
static __device__ void greedy(const Bits* near, int words, int first, int end, Bits* gone, Bits* kept)
{
    clear(kept);
    for (int j = 0; j < end - first; j++)
        if (!holds(gone, j)) {
            put(kept, j);
            for (int w = 0; w < words; w++)
                gone[w] |= near[(first + j) * words + w];
        }
}

// whether a window of score v in that row ranks above candidate j
static __device__ bool above(double v, int row, const Ranking& k, int j)
{
    return v > k.score[j] || (v == k.score[j] && row < k.row[j]);
}

// one TP more, number k at that rank, in a walk from the last to the first; best: precision there or below
static __device__ void add(int k, int rank, int P, int mode, double& best, double& total)
{
    double precision = (double)k / rank;
    best = fmax(best, precision);
    total += mode == 0 ? precision : best * (mode == 1 ? 1 : 10 * k / P - 10 * (k - 1) / P + (k == 1));
}

// AP after the edits, which lie in order of place: from the last TP to the first
static __device__ double walk(const int* tops, int K, int P, int mode, const int* edits, int count)
{
    int t = tops[K], dp = 0, dk = 0;
    double best = 0, total = 0;
    for (int e = 0; e < count; e++) {
        dp += edits[e] % 9 / 3 - 1;
        dk += edits[e] % 3 - 1;
    }
    for (int e = count; e >= 0; e--) {
        int edit = e > 0 ? edits[e - 1] : 4, p = e > 0 ? edit / 9 : -1, entry = edit % 9 / 3 - 1, hit = edit % 3 - 1;
        for (; t > 0 && tops[t - 1] >= p + (entry < 1); t--)        // an entry comes in above the one at its place
            add(t + dk, tops[t - 1] + dp + 1, P, mode, best, total);
        if (e > 0) {
            dp -= entry;
            if (hit == 1)
                add(t + dk, p + dp + 1, P, mode, best, total);
            else if (hit == -1)
                t--;
            dk -= hit;
        }
    }
    return total / (mode == 2 ? 11 : P);
}

// how many entries of the list lie above (v, row)
static __device__ int rank_of(const Ranking& k, double v, int row)
{
    int low = 0, high = k.entries[k.K];
    while (low < high) {
        int middle = (low + high) / 2;
        if (above(v, row, k, k.entries[middle]))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// AP if of this image `others` are kept, and i, if it is not -1, at (v, row)
static __device__ double value(const Ranking& k, int first, int end, const Bits* others, int i, double v, int row, Sets& s)
{
    int count = 0, seat = end + 1;
    clear(s.claimed);
    if (i >= 0 && k.gt[i] != -2)
        for (seat = first; seat < end && !above(v, row, k, seat); seat++) {}
    for (int j = first; j <= end; j++) {
        if (j == seat)
            s.edits[count++] = 9 * rank_of(k, v, row) + 7 + claim(s.claimed, k.gt[i]);
        if (j < end) {
            int flag = holds(others, j - first) && k.gt[j] != -2 ? claim(s.claimed, k.gt[j]) : -1, old = k.flag[j];
            if (flag != old)
                s.edits[count++] = 9 * k.place[j] + 3 * ((flag >= 0) - (old >= 0) + 1) + (flag == 1) - (old == 1) + 1;
        }
    }
    return walk(k.tops, k.K, k.P, k.mode, s.edits, count);
}

// on: the others kept while i is kept; off: while it is not. Returns the blocker, -1 if there is none
static __device__ int states(const Ranking& k, int first, int end, int i, Sets& s)
{
    Bits* same = k.kept[i] ? s.on : s.off;
    clear(s.gone);
    for (int w = 0; w < k.words && !k.kept[i]; w++)
        s.gone[w] = k.near[i * k.words + w];
    put(s.gone, i - first);
    greedy(k.near, k.words, first, end, s.gone, k.kept[i] ? s.off : s.on);
    clear(same);
    for (int j = first; j < end; j++)
        if (k.kept[j] && j != i)
            put(same, j - first);
    for (int j = first; j < end; j++)
        if (holds(s.off, j - first) && holds(k.near + i * k.words, j - first))
            return j;
    return -1;
}

// slope of the finite step
static __device__ double difference(const Ranking& k, int first, int end, int i, double now, double delta, Sets& s)
{
    const Bits* near = k.near + i * k.words;
    double high = k.score[i] + delta, low = k.score[i] - delta, down;
    int row = k.row[i], j = k.kept[i] ? i + 1 : first;
    if (!k.kept[i]) {
        while (!(k.kept[j] && holds(near, j - first)))
            j++;
        if (!above(high, row, k, j))
            return 0;
        states(k, first, end, i, s);
        return (value(k, first, end, s.on, i, high, row, s) - now) / (2 * delta);
    }
    int blocker = states(k, first, end, i, s);
    if (blocker >= 0 && !above(low, row, k, blocker))
        down = value(k, first, end, s.off, -1, low, row, s);
    else if (k.gt[i] == -2)
        return 0;
    else
        down = value(k, first, end, s.on, i, low, row, s);
    return (value(k, first, end, s.on, i, high, row, s) - down) / (2 * delta);
}

// slope of the envelope: one walk up the list and one down, from i's place
static __device__ double envelope(const Ranking& k, int first, int end, int i, double now, double reach, double least, Sets& s)
{
    int blocker = states(k, first, end, i, s), g = k.gt[i], row = k.row[i], length = k.entries[k.K];
    int same = -1, base, rank, hits = 0, at = first;
    double own = k.score[i], v = own, f0 = now, sum = 0;
    bool kept = k.kept[i];
    if (!kept) {                                                    // nothing happens below the blocker: from just above it
        v = k.score[blocker];
        row = FIRST;
        if (v - own > reach)
            return 0;
        f0 = value(k, first, end, s.on, i, v, row, s);
    }
    rank = base = rank_of(k, v, row);
    while (hits < k.tops[k.K] && k.tops[hits] < rank)
        hits++;
    while (at < end && !above(v, row, k, at))
        at++;
    clear(s.gone);                                                  // which others are TPs without i
    clear(s.claimed);
    for (int j = first; j < end; j++) {
        bool in = holds(s.on, j - first) && k.gt[j] != -2, hit = in && claim(s.claimed, k.gt[j]);
        if (hit) {
            put(s.gone, j - first);
            if (k.gt[j] == g)
                same = j;
        }
        if (!in)
            s.on[(j - first) / 64] &= ~(1ULL << ((j - first) % 64));
        if (j < at) {
            rank += in - (k.flag[j] >= 0);
            hits += hit - (k.flag[j] == 1);
        }
    }
    for (int side = 1; side >= (kept ? -1 : 1); side -= 2) {
        double f = f0, low = 0, high = 0, b = v;
        int j = at - (side > 0), e = base - (side > 0), r = rank, h = hits;
        bool mine, is_true = g >= 0 && (same < 0 || same >= at), moved = !kept;
        while (true) {
            while (first <= j && j < end && !holds(s.on, j - first))
                j -= side;
            while (0 <= e && e < length && first <= k.entries[e] && k.entries[e] < end)
                e -= side;
            bool other = 0 <= e && e < length;
            int x = -1;
            mine = first <= j && j < end;
            if (g != -2 && (mine || other)) {
                mine = mine && (!other || (k.place[j] > e) == (side > 0));
                x = mine ? j : k.entries[e];
                if (fabs(k.score[x] - own) > reach || (side < 0 && blocker >= 0 && k.score[x] <= k.score[blocker]))
                    x = -1;
            }
            if (moved && (x < 0 || k.score[x] != b)) {              // all of one score are passed
                if (k.mode)
                    f = value(k, first, end, s.on, i, b, side > 0 ? FIRST : LAST, s);
                double slope = side * (f - now) / fmax(fabs(b - own), least);
                low = fmin(low, slope);
                high = fmax(high, slope);
            }
            if (x < 0)
                break;
            bool hit = mine ? holds(s.gone, j - first) : k.flag[x] == 1;
            b = k.score[x];
            moved = true;
            r -= side > 0;
            h -= hit && side > 0;
            if (x == same)
                is_true = side > 0;
            else if (hit != is_true)
                f += side * (is_true ? 1 : -1) * (h + 1) * (1.0 / (r + 1) - 1.0 / (r + 2)) / k.P;
            r += side < 0;
            h += hit && side < 0;
            *(mine ? &j : &e) -= side;
        }
        if (side < 0 && blocker >= 0 && own - k.score[blocker] <= reach) {
            double slope = (now - value(k, first, end, s.off, -1, own, row, s)) / fmax(own - k.score[blocker], least);
            low = fmin(low, slope);
            high = fmax(high, slope);
        }
        sum += low + high;
    }
    return sum / 2;
}

// intersection, and union, of two boxes
static __device__ real shared_area(const real* a, const real* b, real one, real& all)
{
    real zero = 0, w = fmax(fmin(a[2], b[2]) - fmax(a[0], b[0]) + one, zero), h = fmax(fmin(a[3], b[3]) - fmax(a[1], b[1]) + one, zero);
    real own = fmax(a[2] - a[0] + one, zero) * fmax(a[3] - a[1] + one, zero);
    real other = fmax(b[2] - b[0] + one, zero) * fmax(b[3] - b[1] + one, zero);
    all = own + other - w * h;
    return w * h;
}

extern "C" __global__
void map_loss_overlaps(const real* box, const int* start, const int* image, const real* gt_box, const int* gt_start, const u8* hard,
                       unsigned long long* near, int* gt, int n, int K, int images, int words, real nms, real match, real one)
{
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    int c = t / K, i = t % K, first = start[image[i]], end = start[image[i] + 1], at = c * images + image[i], found = -1;
    real best = -1, all;
    for (int w = 0; w < words; w++) {
        Bits bits = 0;
        for (int j = first + 64 * w; j < min(end, first + 64 * w + 64); j++) {
            real inter = shared_area(box + 4 * t, box + 4 * (c * K + j), one, all);
            if (i != j && all > 0 && inter > nms * all)
                bits |= 1ULL << (j - first - 64 * w);
        }
        near[t * words + w] = bits;
    }
    for (int r = gt_start[at]; r < gt_start[at + 1]; r++) {
        real inter = shared_area(box + 4 * t, gt_box + 4 * r, one, all), iou = all > 0 ? inter / all : real(0);
        if (iou > best) {
            best = iou;
            found = iou < match ? -1 : hard[r] ? -2 : r - gt_start[at];
        }
    }
    gt[t] = found;
}

extern "C" __global__
void map_loss_keep(const unsigned long long* near, const int* gt, const int* start, u8* kept, int* flags, int n, int K, int images,
                   int words)
{
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    int c = t / images, first = start[t % images], end = start[t % images + 1];
    Bits gone[WORDS], in[WORDS], claimed[WORDS];
    clear(gone);
    clear(claimed);
    greedy(near + c * K * words, words, first, end, gone, in);
    for (int j = first; j < end; j++) {
        bool keep = holds(in, j - first);
        kept[c * K + j] = keep;
        flags[c * K + j] = keep && gt[c * K + j] != -2 ? claim(claimed, gt[c * K + j]) : -1;
    }
}

extern "C" __global__
void map_loss_values(const int* tops, const int* P, double* aps, int n, int K, int mode)
{
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < n)
        aps[c] = walk(tops + c * (K + 1), K, P[c], mode, nullptr, 0);
}

extern "C" __global__
void map_loss_gradients(const int* start, const int* image, const double* score, const int* rows, const unsigned long long* near,
                        const int* gt, const u8* kept, const int* flags, const int* place, const int* tops, const int* entries,
                        const int* P, const double* aps, const double* widths, double* g, int n, int K, int words, int mode, int env)
{
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    int c = t / K, i = t % K, first = start[image[i]], end = start[image[i] + 1], from = c * K, line = c * (K + 1);
    Ranking k = {score + from, rows + from, near + from * words, gt + from, kept + from, flags + from, place + from, tops + line,
                 entries + line, K, words, P[c], mode};
    Sets s;
    const double* width = widths + 3 * c;                           // delta, reach, least
    g[t] = env ? envelope(k, first, end, i, aps[c], width[1], width[2], s) : difference(k, first, end, i, aps[c], width[0], s);
}
