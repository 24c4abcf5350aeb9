// Executes the text of a CUDA kernel on the CPU. tinydet/emulate.py puts this file, the macros and kernels/prelude.h before a .cu file
// and one EXPORT(kernel) for each kernel after it, and g++ makes a shared library of them. No kernel file includes it.
//
// Blocks run one after another, in one thread of the operating system. The threads of a block are fibres: each runs until it ends or
// waits, at __syncthreads or in a warp collective; then the next one goes on. Whoever comes last releases the others. So a launch can be
// repeated exactly, and what CUDA leaves undefined (a barrier that some threads miss, a lane absent from a shuffle) is seen and reported.
// A kernel that never waits runs as a plain loop. Not modelled: the order in which memory is seen by others, bank conflicts, speed.
//
// Everywhere g++'s own checks are compiled in (array bounds, alignment, null pointers, shifts, division by 0; handlers at the end).
// -DEMULATE_ADDRESS -fsanitize=address finds all other accesses outside an array, -DEMULATE_THREAD -fsanitize=thread races inside a block;
// with -DEMULATE_BLOCKS too, races between blocks (and none in shared memory, which each block uses anew).
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

// ---- Words of the language ----------------------------------------------------------------------------------------------------------

#define TINY_HOST                                           // prelude.h: no GPU here
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define DYN_SHARED(T, name) T* name = (T*)cpu::dynamic
#ifdef EMULATE_ADDRESS
#define __shared__ static                                   // AddressSanitizer puts red zones round ordinary variables only
#else
#define __shared__ static __attribute__((section("shm")))   // all of them in one place, which is filled anew before each block
#endif
#define assert(ok) ((ok) ? (void)0 : cpu::fail(__LINE__, "assert(%s) failed", #ok))

#define VECTORS(T, base, align2, align4) \
    struct __align__(align2) T##2 { base x, y; };         static inline T##2 make_##T##2(base x, base y) { return {x, y}; } \
    struct T##3 { base x, y, z; };                        static inline T##3 make_##T##3(base x, base y, base z) { return {x, y, z}; } \
    struct __align__(align4) T##4 { base x, y, z, w; }; \
    static inline T##4 make_##T##4(base x, base y, base z, base w) { return {x, y, z, w}; }
VECTORS(float, float, 8, 16)
VECTORS(double, double, 16, 16)
VECTORS(int, int, 8, 16)
VECTORS(uint, unsigned, 8, 16)
VECTORS(uchar, unsigned char, 2, 4)
#undef VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static uint3 threadIdx, blockIdx;                           // of the thread that runs now: every switch sets them
static dim3 blockDim, gridDim;
static const int warpSize = 32;

// ---- Fibres: a stack each, and a jump from one to another ---------------------------------------------------------------------------

#define QUIET __attribute__((no_sanitize("address", "thread", "undefined")))      // the scheduler itself is not watched
#ifdef EMULATE_ADDRESS
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t), __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
extern "C" void __asan_poison_memory_region(const void*, size_t), __asan_unpoison_memory_region(const void*, size_t);
#else
static inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
static inline void __asan_poison_memory_region(const void*, size_t) {}
static inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif
#ifdef EMULATE_THREAD
extern "C" void *__tsan_get_current_fiber(), *__tsan_create_fiber(unsigned);
extern "C" void __tsan_switch_to_fiber(void*, unsigned), __tsan_set_fiber_name(void*, const char*), __tsan_destroy_fiber(void*);
extern "C" void __tsan_acquire(void*), __tsan_release(void*);
extern "C" void AnnotateBenignRaceSized(const char*, int, const void*, size_t, const char*);
#endif

namespace cpu {

const size_t STACK = 256 << 10, GAP = 64 << 10;             // of a thread, and below it: address space, memory once it is touched
const int MOST = 1024;                                      // threads of a block
#ifdef EMULATE_BLOCKS
const int SETS = 2;                                         // of fibres: neighbouring blocks take turns, so that nothing orders them
#else
const int SETS = 1;
#endif

struct Process {                                            // what the libraries of a process share; emulate.py owns it
    char *stacks, *signal_stack, *arena;
    size_t guarded, arena_size;
    void** races;                                           // what ThreadSanitizer knows the fibres by: it has 8128 for all libraries
};
struct Fibre {
    char* bottom;
    size_t size;
    void *top, *fake, *race;                                // where its registers lie while it waits; what the sanitizers know it by
    ucontext_t context;                                     // its registers where there is no assembly below
};
static Fibre fibres[SETS * MOST], home;                     // home: Python's own stack

#if defined(__x86_64__) && !defined(EMULATE_UCONTEXT)
// Push what a call must preserve, and pop it from the other stack. swapcontext does the same with a system call, five times as slow.
__attribute__((naked, noinline)) QUIET static void swap_stacks(void** from, void* to) {
    __asm__("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
            "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
QUIET static void swap(Fibre& from, Fibre& to) { swap_stacks(&from.top, to.top); }
QUIET static void prepare(Fibre& f, void (*entry)()) {
    void** top = (void**)(f.bottom + f.size);               // from here downwards: no return address, entry, six registers
    memset(top - 8, 0, 64);
    top[-2] = (void*)entry;
    f.top = top - 8;
}
#else
QUIET static void swap(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }
QUIET static void prepare(Fibre& f, void (*entry)()) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.bottom, f.context.uc_stack.ss_size = f.size;
    makecontext(&f.context, entry, 0);
}
#endif

QUIET static void jump(Fibre& from, Fibre& to) {
    __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#ifdef EMULATE_THREAD
    __tsan_switch_to_fiber(to.race, 1);                     // 1: the switch itself orders nothing
#endif
    swap(from, to);
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}

// Fibre i begins at `entry` when somebody jumps to it next.
QUIET static void arm(Process& process, int i, void (*entry)()) {
    Fibre& f = fibres[i];
    for (; process.guarded <= (size_t)i; process.guarded++)
        mprotect(process.stacks + process.guarded * (GAP + STACK), GAP, PROT_NONE);       // an overflow must not reach the next stack
    f.bottom = process.stacks + i * (GAP + STACK) + GAP;
    f.size = STACK;
    __asan_unpoison_memory_region(f.bottom, f.size);
    prepare(f, entry);
#ifdef EMULATE_THREAD
    if (!process.races[i]) process.races[i] = __tsan_create_fiber(0);
    f.race = process.races[i];
#endif
}

// ---- The scheduler ------------------------------------------------------------------------------------------------------------------

enum State { FRESH, READY, AT_BARRIER, IN_WARP, FINISHED };
struct Thread {
    uint3 index;
    int number, line;                                       // line of the kernel file in which it waits
    State state;
    unsigned mask;
    void* payload;                                          // what it brings to a warp collective
    Fibre* fibre;
};
struct Warp { unsigned waiting, finished; };                // a bit for each lane
union Slot {                                                // an argument
    struct { char* address; size_t bytes; };
    char number[16];
};
struct Launch {                                             // as emulate.py packs it
    long long grid[3], block[3], shared, order, seed;       // order: 0 forward, 1 reverse, 2 random
    Process* process;
    Slot arguments[];
};

static const Launch* launched;
static void (*call)(const Slot*);                           // runs the kernel for the current thread
static Slot arguments[64];
static Thread threads[MOST], *current;
static Warp warps[MOST / 32];
static int count, finished;                                 // threads of the block, and those that have ended
static int queue[MOST], head, queued;                       // numbers of those that can run, in turn
static int order[MOST];                                     // in which threads begin and leave a barrier
static int idle[MOST], idlers, used;                        // fibres whose thread has ended; fibres used so far by this block
static int waiting, barrier_line, votes, verdict;           // at __syncthreads
static int set;                                             // which set of fibres this block uses
static unsigned long long seed;
static char *dynamic, message[2000];
static char meeting[2][MOST / 32 + 2];                      // addresses that stand for warps, barrier and fence in ThreadSanitizer

QUIET static const char* name(const Thread& t) {            // can be used up to four times in a message
    static char text[4][48];
    static int turn;
    snprintf(text[++turn % 4], 48, "thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z);
    return text[turn % 4];
}

// End the launch with this report. What lies on the stacks of the threads stays there, unused.
__attribute__((noreturn, format(printf, 2, 3))) QUIET static void fail(int line, const char* text, ...) {
    int n = snprintf(message, sizeof message, "block (%u,%u,%u) %s", blockIdx.x, blockIdx.y, blockIdx.z, name(*current));
    if (line) n += snprintf(message + n, sizeof message - n, " %s:%d", KERNEL_FILE, line);
    n += snprintf(message + n, sizeof message - n, ": ");
    va_list list;
    va_start(list, text);
    vsnprintf(message + n, sizeof message - n, text, list);
    va_end(list);
    jump(*current->fibre, home);
    __builtin_unreachable();
}

QUIET static void arrange(int* list, long long n) {         // 0 .. n - 1 in the order of this launch
    for (long long i = 0; i < n; i++) list[i] = launched->order == 1 ? n - 1 - i : i;
    for (long long i = n; launched->order == 2 && i > 1; i--) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        int &other = list[(seed >> 33) % i], last = list[i - 1];
        list[i - 1] = other, other = last;
    }
}

QUIET static void push(Thread& t) {
    t.state = READY;
    queue[(head + queued++) % MOST] = t.number;
}

QUIET static void make_current(Thread& t) {
    current = &t;
    threadIdx = t.index;
}

static void life();

QUIET static Fibre& fibre_for(Thread& t) {
#ifdef EMULATE_THREAD
    int i = set * MOST + t.number;                          // always the same: ThreadSanitizer takes the fibre for the thread
#else
    int i = idlers ? idle[--idlers] : used++;
#endif
    arm(*launched->process, i, life);
    return *(t.fibre = &fibres[i]);
}

QUIET static void deadlock() {
    Thread *stuck = nullptr, *other = nullptr;
    for (int i = 0; i < count; i++)
        if (threads[i].state == IN_WARP) stuck = &threads[i];       // there is one: had all been at the barrier, they would have left it
        else if (threads[i].state == AT_BARRIER) other = &threads[i];
    unsigned absent = stuck->mask & ~warps[stuck->number / 32].waiting;
    make_current(*stuck);
    if (!other) fail(stuck->line, "deadlock, it waits for lanes %08x of its warp", absent);
    fail(stuck->line, "deadlock, it waits for lanes %08x of its warp, %s at the barrier in line %d", absent, name(*other), other->line);
}

// The current thread waits or has ended: run the others in the queue until its turn comes.
QUIET static void next() {
    Thread& me = *current;
    bool ended = me.state == FINISHED;
    if (!queued) {
        if (finished < count) deadlock();
        return jump(*me.fibre, home);
    }
    Thread& t = threads[queue[head]];
    head = (head + 1) % MOST, queued--;
    make_current(t);
    if (&t == &me) return;
#ifndef EMULATE_THREAD
    if (ended && t.state == FRESH) {                        // life() goes on with it on the same stack: no jump
        t.fibre = me.fibre;
        return;
    }
    if (ended) idle[idlers++] = me.fibre - fibres;
#endif
    jump(*me.fibre, t.state == FRESH ? fibre_for(t) : *t.fibre);
}

QUIET static void life() {                                  // what a fibre does: it runs one thread after another
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!home.bottom) home.bottom = (char*)bottom, home.size = size;
    for (;;) {
        call(arguments);
        Thread& me = *current;
        Warp& warp = warps[me.number / 32];
        me.state = FINISHED, finished++;
        warp.finished |= 1u << me.number % 32;
        if (waiting) fail(0, "it returned while others wait at the barrier in line %d", barrier_line);
        for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
            Thread& lane = threads[me.number / 32 * 32 + __builtin_ctz(rest)];
            if (lane.mask >> me.number % 32 & 1)
                fail(0, "it returned while %s waits for it in line %d, mask %08x", name(lane), lane.line, lane.mask);
        }
        next();
    }
}

// ThreadSanitizer: what threads first .. last - 1 of `mask` did comes before what they do from now on. The scheduler tells it for all of
// them at once: told by each in its turn, the later work of the first would seem ordered too.
QUIET static void order_memory(int first, int last, unsigned mask, char* where) {
#ifdef EMULATE_THREAD
    void* me = __tsan_get_current_fiber();
    for (int pass = 0; pass < 2; pass++)
        for (int i = first; i < last; i++)
            if (mask >> i % 32 & 1) {
                __tsan_switch_to_fiber(threads[i].fibre->race, 1);
                pass ? __tsan_acquire(where) : __tsan_release(where);
            }
    __tsan_switch_to_fiber(me, 1);
#endif
}

// ---- __syncthreads and warp collectives ---------------------------------------------------------------------------------------------

QUIET static int barrier(int line, int vote) {
    Thread& me = *current;
    for (int i = 0; finished && i < count; i++)
        if (threads[i].state == FINISHED) fail(line, "it waits at a barrier, but %s has returned", name(threads[i]));
    if (waiting && line != barrier_line) fail(line, "it waits at this barrier, others at the one in line %d", barrier_line);
    me.state = AT_BARRIER;
    me.line = barrier_line = line;
    votes += vote != 0;
    if (++waiting == count) {
        verdict = votes;
        votes = waiting = 0;
        order_memory(0, count, -1, &meeting[set][MOST / 32]);
        if (launched->order == 2) arrange(order, count);
        for (int i = 0; i < count; i++) push(threads[order[i]]);
    }
    next();
    return verdict;
}

// Wait for the lanes of `mask`. The last to come calls f(payloads): a pointer for each lane, null for one that is not there.
template <class F> QUIET static void collective(unsigned mask, void* payload, int line, bool orders, F f) {
    Thread& me = *current;
    int lane = me.number % 32, first = me.number - lane, lanes = count - first < 32 ? count - first : 32;
    unsigned exist = lanes < 32 ? (1u << lanes) - 1 : -1;
    Warp& warp = warps[first / 32];
    if (!(mask >> lane & 1)) fail(line, "mask %08x of a warp collective must name its caller, lane %d", mask, lane);
    if (unsigned gone = warp.finished & mask) fail(line, "it waits for %s, which has returned", name(threads[first + __builtin_ctz(gone)]));
    if (unsigned there = warp.waiting & mask) {
        Thread& other = threads[first + __builtin_ctz(there)];
        if (other.line != line || other.mask != mask)
            fail(line, "it waits here with mask %08x, %s in line %d with mask %08x", mask, name(other), other.line, other.mask);
    }
    me.state = IN_WARP, me.line = line, me.mask = mask, me.payload = payload;
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) == (mask & exist)) {
        void* payloads[32] = {};
        int turn[32];
        arrange(turn, 32);
        for (int i : turn)
            if (mask & exist & 1u << i) {
                payloads[i] = threads[first + i].payload;
                push(threads[first + i]);
            }
        warp.waiting &= ~mask;
        if (orders) order_memory(first, first + lanes, mask, &meeting[set][first / 32]);
        f(payloads);
    }
    next();
}

template <class T> struct Brought { T value; int from; T result; };

template <class T> QUIET static T shuffle(unsigned mask, T value, int from, int line) {
    Brought<T> mine = {value, from};
    memset(&mine.result, 0xFF, sizeof(T));                  // what a lane that is not there delivers
    collective(mask, &mine, line, false, [](void** payloads) QUIET {
        for (int i = 0; i < 32; i++)
            if (auto to = (Brought<T>*)payloads[i])
                if (auto source = (Brought<T>*)payloads[to->from]) memcpy(&to->result, &source->value, sizeof(T));
    });
    return mine.result;
}

// The same for all lanes: f(f(value of a lane, value of the next), ...).
template <class T, class F> QUIET static T fold(unsigned mask, T value, int line, F f) {
    Brought<T> mine = {value, 0, value};
    collective(mask, &mine, line, false, [f](void** payloads) QUIET {
        Brought<T>* all = nullptr;
        for (int i = 0; i < 32; i++)
            if (auto lane = (Brought<T>*)payloads[i]) {
                if (all) all->result = f(all->result, lane->value);
                else all = lane;
            }
        for (int i = 0; i < 32; i++)
            if (auto lane = (Brought<T>*)payloads[i]) lane->result = all->result;
    });
    return mine.result;
}

static inline int lane() { return current->number % 32; }

}  // namespace cpu

#define LINE int line = __builtin_LINE()                    // a last parameter that holds the caller's line

static inline void __syncthreads(LINE) { cpu::barrier(line, 0); }
static inline int __syncthreads_count(int vote, LINE) { return cpu::barrier(line, vote); }
static inline int __syncthreads_or(int vote, LINE) { return cpu::barrier(line, vote) > 0; }
static inline int __syncthreads_and(int vote, LINE) { return cpu::barrier(line, vote) == cpu::count; }

static inline void __syncwarp(unsigned mask = -1, LINE) { cpu::collective(mask, nullptr, line, true, [](void**) {}); }
static inline unsigned __ballot_sync(unsigned mask, int vote, LINE) {
    return cpu::fold(mask, vote ? 1u << cpu::lane() : 0u, line, [](unsigned a, unsigned b) QUIET { return a | b; });
}
static inline int __any_sync(unsigned mask, int vote, LINE) { return __ballot_sync(mask, vote, line) != 0; }
static inline int __all_sync(unsigned mask, int vote, LINE) { return __ballot_sync(mask, !vote, line) == 0; }
#define REDUCE(name, T, value) \
    static inline T __reduce_##name##_sync(unsigned mask, T v, LINE) { \
        return cpu::fold(mask, v, line, [](T a, T b) QUIET { return value; }); \
    }
REDUCE(add, unsigned, a + b) REDUCE(min, unsigned, a < b ? a : b) REDUCE(max, unsigned, a > b ? a : b)
REDUCE(add, int, a + b) REDUCE(min, int, a < b ? a : b) REDUCE(max, int, a > b ? a : b)
REDUCE(and, unsigned, a & b) REDUCE(or, unsigned, a | b) REDUCE(xor, unsigned, a ^ b)

// Shuffles within segments of `width` lanes. A lane whose source lies outside its segment gets its own value back.
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, LINE) {
    return cpu::shuffle(mask, v, (cpu::lane() & -width) + (from & (width - 1)), line);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, LINE) {
    int lane = cpu::lane();
    return cpu::shuffle(mask, v, (lane & (width - 1)) < (int)by ? lane : lane - (int)by, line);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, LINE) {
    int lane = cpu::lane();
    return cpu::shuffle(mask, v, (lane & (width - 1)) + (int)by >= width ? lane : lane + (int)by, line);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, LINE) {
    int lane = cpu::lane(), from = lane ^ by;
    return cpu::shuffle(mask, v, from >= (lane & -width) + width ? lane : from, line);      // an earlier segment may be read
}

#undef LINE
#undef REDUCE

static inline void __threadfence() {
#ifdef EMULATE_THREAD
    __tsan_release(&cpu::meeting[0][cpu::MOST / 32 + 1]);
    __tsan_acquire(&cpu::meeting[0][cpu::MOST / 32 + 1]);
#endif
}
static inline void __threadfence_block() { __threadfence(); }

// ---- Mathematics --------------------------------------------------------------------------------------------------------------------
// CUDA overloads each function for float and double. Declared here, since <math.h> takes as long to compile as all the rest.

#define MATH_1(name) \
    static inline double name(double x) { return __builtin_##name(x); } \
    static inline float name(float x) { return __builtin_##name##f(x); } \
    static inline float name##f(float x) { return __builtin_##name##f(x); }
#define MATH_2(name) \
    static inline double name(double x, double y) { return __builtin_##name(x, y); } \
    static inline float name(float x, float y) { return __builtin_##name##f(x, y); } \
    static inline float name##f(float x, float y) { return __builtin_##name##f(x, y); } \
    template <class A, class B> static inline double name(A x, B y) { return __builtin_##name(x, y); }
MATH_1(exp) MATH_1(exp2) MATH_1(expm1) MATH_1(log) MATH_1(log2) MATH_1(log10) MATH_1(log1p) MATH_1(sqrt) MATH_1(cbrt)
MATH_1(sin) MATH_1(cos) MATH_1(tan) MATH_1(asin) MATH_1(acos) MATH_1(atan) MATH_1(sinh) MATH_1(cosh) MATH_1(tanh)
MATH_1(erf) MATH_1(erfc) MATH_1(floor) MATH_1(ceil) MATH_1(trunc) MATH_1(round) MATH_1(rint) MATH_1(fabs)
MATH_2(pow) MATH_2(fmod) MATH_2(atan2) MATH_2(hypot) MATH_2(copysign)
#undef MATH_1
#undef MATH_2
static inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
static inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double rsqrt(double x) { return 1 / __builtin_sqrt(x); }
static inline float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
static inline float rsqrtf(float x) { return rsqrt(x); }
template <class T> static inline bool isnan(T x) { return __builtin_isnan(x); }
template <class T> static inline bool isinf(T x) { return __builtin_isinf(x); }
template <class T> static inline bool isfinite(T x) { return __builtin_isfinite(x); }
template <class T> static inline bool signbit(T x) { return __builtin_signbit(x); }

// Of a NaN and a number the number, as CUDA has it for min and max too.
template <class A, class B> static inline decltype(A() + B()) max(A a, B b) {
    decltype(A() + B()) x = a, y = b;
    return x > y || y != y ? x : y;
}
template <class A, class B> static inline decltype(A() + B()) min(A a, B b) {
    decltype(A() + B()) x = a, y = b;
    return x < y || y != y ? x : y;
}
template <class A, class B> static inline decltype(A() + B()) fmax(A a, B b) { return max(a, b); }
template <class A, class B> static inline decltype(A() + B()) fmin(A a, B b) { return min(a, b); }
static inline float fmaxf(float a, float b) { return max(a, b); }
static inline float fminf(float a, float b) { return min(a, b); }
template <class T> static inline decltype(T() + 0) abs(T x) { return x < 0 ? -x : x == 0 ? 0 : x; }

template <class To, class From> static inline To bits_of(From x) {
    To to;
    static_assert(sizeof to == sizeof x);
    memcpy(&to, &x, sizeof to);
    return to;
}
static inline int __float_as_int(float x) { return bits_of<int>(x); }
static inline unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }
static inline float __int_as_float(int x) { return bits_of<float>(x); }
static inline float __uint_as_float(unsigned x) { return bits_of<float>(x); }
static inline long long __double_as_longlong(double x) { return bits_of<long long>(x); }
static inline double __longlong_as_double(long long x) { return bits_of<double>(x); }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
static inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned long long)x * y >> 32; }

#define ROUNDED(T, d) /* operations that no compiler may join to one fma */ \
    static inline T __##d##add_rn(T x, T y) { return x + y; }   static inline T __##d##sub_rn(T x, T y) { return x - y; } \
    static inline T __##d##mul_rn(T x, T y) { return x * y; }   static inline T __##d##div_rn(T x, T y) { return x / y; }
ROUNDED(float, f) ROUNDED(double, d)
#undef ROUNDED
static inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }
static inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
static inline float __frsqrt_rn(float x) { return rsqrt(x); }
static inline float __expf(float x) { return __builtin_expf(x); }                       // the fast ones are exact here
static inline float __logf(float x) { return __builtin_logf(x); }
static inline float __powf(float x, float y) { return __builtin_powf(x, y); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0 ? min(x, 1.f) : 0; }
static inline int __float2int_rd(float x) { return __builtin_floorf(x); }
static inline int __float2int_ru(float x) { return __builtin_ceilf(x); }
static inline int __float2int_rn(float x) { return __builtin_rintf(x); }
static inline int __float2int_rz(float x) { return x; }
template <class T> static inline T __ldg(const T* p) { return *p; }

// ---- Atomic operations: they order nothing else, as in CUDA -------------------------------------------------------------------------

namespace cpu {
template <class T, class F> static inline T update(T* p, F f) {
    T old, now;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do now = f(old);
    while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
}
#define ATOMIC(name, T, now) static inline T atomic##name(T* p, T v) { return cpu::update(p, [=](T old) -> T { return now; }); }
#define ATOMICS(T) \
    ATOMIC(Add, T, old + v) ATOMIC(Exch, T, v) ATOMIC(Min, T, v < old ? v : old) ATOMIC(Max, T, v > old ? v : old) \
    ATOMIC(And, T, old & v) ATOMIC(Or, T, old | v) ATOMIC(Xor, T, old ^ v) \
    static inline T atomicCAS(T* p, T compare, T v) { return cpu::update(p, [=](T old) { return old == compare ? v : old; }); }
ATOMICS(int) ATOMICS(unsigned) ATOMICS(unsigned long long)
ATOMIC(Add, float, old + v) ATOMIC(Add, double, old + v) ATOMIC(Exch, float, v)
ATOMIC(Sub, int, old - v) ATOMIC(Sub, unsigned, old - v)
ATOMIC(Inc, unsigned, old >= v ? 0 : old + 1) ATOMIC(Dec, unsigned, old == 0 || old > v ? v : old - 1)
#undef ATOMIC
#undef ATOMICS

// ---- A launch -----------------------------------------------------------------------------------------------------------------------

namespace cpu {

const size_t GUARD = 1024, SHARED = 227 << 10, KEPT = 64 << 20;         // bytes beside an array, of shared memory, kept between launches
struct Parameter { bool pointer, constant; char kind; int size; };       // kind and bytes of a number, as NumPy has them; of float4: of x
struct Array { char *original, *copy; size_t bytes; bool constant; int argument; };
static Array arrays[64], *end;
alignas(16) static char dynamic_room[GUARD + SHARED + GUARD];
extern "C" __attribute__((weak, visibility("hidden"))) char __start_shm[], __stop_shm[], __ehdr_start[];      // the linker's

__attribute__((format(printf, 1, 2))) QUIET static bool refuse(const char* text, ...) {
    va_list list;
    va_start(list, text);
    vsnprintf(message, sizeof message, text, list);
    va_end(list);
    return false;
}

QUIET static void fill(char* p, size_t n) {                 // with NaN, or -1
#ifdef EMULATE_THREAD
    for (size_t i = 0; i < n; i++) ((volatile char*)p)[i] = -1;     // memset would be seen
#else
    memset(p, 0xFF, n);
#endif
}

QUIET static bool untouched(const char* p) {
    static char expected[GUARD];
    if (!*expected) memset(expected, 0xFF, GUARD);
    return !memcmp(p, expected, GUARD);
}

// The kernel works on copies between guards: a stray read gives NaN or -1, a stray write is seen afterwards. AddressSanitizer has its own.
QUIET static bool copy_in(int n, const Parameter* parameters) {
    Process& process = *launched->process;
    size_t room = 0;
    end = arrays;
    for (int i = 0; i < n; i++) {
        Slot slot = arguments[i] = launched->arguments[i];
        if (!parameters[i].pointer || !slot.address) continue;
        Array* a = arrays;
        while (a < end && (a->original != slot.address || a->bytes != slot.bytes)) a++;
        if (a == end) *end++ = {slot.address, nullptr, slot.bytes, true, i}, room += slot.bytes + 2 * GUARD + 32;
        a->constant &= parameters[i].constant;              // an array that comes twice (an operation in place) has one copy
        arguments[i].bytes = a - arrays;
    }
    for (Array* a = arrays; a < end; a++)
        for (Array* b = arrays; b < a; b++) {
            bool apart = a->original >= b->original + b->bytes || b->original >= a->original + a->bytes || !a->bytes || !b->bytes;
            if (!apart && !(a->constant && b->constant)) return refuse("argument %d and argument %d overlap", b->argument, a->argument);
        }
#ifndef EMULATE_ADDRESS
    if (room > process.arena_size) {
        __builtin_free(process.arena);
        process.arena_size = room < KEPT / 2 ? 2 * room : room;
        process.arena = (char*)__builtin_malloc(process.arena_size);
        if (!process.arena) return process.arena_size = 0, refuse("no memory for copies of the arrays, %zu bytes", room);
    }
#endif
    char* at = process.arena;
    for (Array* a = arrays; a < end; a++) {
        size_t shift = (size_t)a->original % 16;            // the copy is aligned as the original is
#ifdef EMULATE_ADDRESS
        a->copy = (char*)__builtin_malloc(shift + a->bytes) + shift;
#else
        a->copy = (char*)(((size_t)at + 15) / 16 * 16) + GUARD + shift;
        at = a->copy + a->bytes + GUARD;
        fill(a->copy - GUARD, GUARD);
        fill(a->copy + a->bytes, GUARD);
#endif
        memcpy(a->copy, a->original, a->bytes);
    }
    for (int i = 0; i < n; i++)
        if (parameters[i].pointer && arguments[i].address) arguments[i].address = arrays[arguments[i].bytes].copy;
    return true;
}

QUIET static bool copy_out(bool ran) {                      // after a report the arrays stay as they were
    for (Array* a = arrays; ran && a < end; a++) {
#ifndef EMULATE_ADDRESS
        char* guards[2] = {a->copy - GUARD, a->copy + a->bytes};
        for (char* p : guards) {
            if (untouched(p)) continue;
            while (*p == -1) p++;
            ran = refuse("a thread wrote outside argument %d, to byte %lld of %zu (mode 'address' tells where)", a->argument,
                         (long long)(p - a->copy), a->bytes);
        }
#endif
        if (a->constant && memcmp(a->copy, a->original, a->bytes))
            ran = refuse("a thread changed argument %d, which is const", a->argument);
    }
    for (Array* a = arrays; a < end; a++) {
        if (ran && !a->constant) memcpy(a->original, a->copy, a->bytes);
#ifdef EMULATE_ADDRESS
        __builtin_free(a->copy - (size_t)a->original % 16);
#endif
    }
    Process& process = *launched->process;
    if (process.arena_size > KEPT) __builtin_free(process.arena), process.arena = nullptr, process.arena_size = 0;
    return ran;
}

// A crash in a kernel becomes a report.
QUIET static void crashed(int signal, siginfo_t* info, void* context) {
    char *at = (char*)info->si_addr, *bottom = current->fibre->bottom, *code = nullptr;
#ifdef __x86_64__
    code = (char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];           // emulate.py makes a line of it
#endif
    size_t offset = code - __ehdr_start;
    if (at < bottom && at >= bottom - GAP) fail(0, "its stack of %zu KB overflows at code %zx", STACK >> 10, offset);
    fail(0, "it touches memory at %p, in no array at code %zx", at, offset);
}

QUIET static void catch_crashes(bool begin) {
    static struct sigaction before[2], now = {};
    static stack_t stack_before;
    const int signals[2] = {SIGSEGV, SIGBUS};
    now.sa_sigaction = crashed;
    now.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;    // ONSTACK: the fibre's may be full; NODEFER: fail() jumps out of the handler
    stack_t stack = {launched->process->signal_stack, 0, 64 << 10};
    sigaltstack(begin ? &stack : &stack_before, begin ? &stack_before : nullptr);
    for (int i = 0; i < 2; i++) begin ? sigaction(signals[i], &now, &before[i]) : sigaction(signals[i], &before[i], nullptr);
}

// ThreadSanitizer: what Python did comes before what the fibres of these sets do (begin), or the other way round.
QUIET static void order_home(bool begin) {
#ifdef EMULATE_THREAD
    static char where;
    int now = set;
    home.race = __tsan_get_current_fiber();
    for (set = 0; begin && set < SETS; set++)
        for (int i = 0; i < count; i++) __tsan_set_fiber_name(fibre_for(threads[i]).race, name(threads[i]));
    set = now;
    if (begin) __tsan_release(&where);
    for (int i = 0; i < SETS * MOST; i++)
        if (i % MOST < count) {
            __tsan_switch_to_fiber(fibres[i].race, 1);
            begin ? __tsan_acquire(&where) : __tsan_release(&where);
        }
    __tsan_switch_to_fiber(home.race, 1);
    if (!begin) __tsan_acquire(&where);
#endif
}

QUIET static bool run_block(unsigned k) {
    blockIdx = {k % gridDim.x, k / gridDim.x % gridDim.y, k / gridDim.x / gridDim.y};
    fill(__start_shm, __stop_shm - __start_shm);
    fill(dynamic, launched->shared);
    finished = waiting = votes = idlers = used = queued = 0;
    memset(warps, 0, sizeof warps);
    if (launched->order == 2) arrange(order, count);
    for (int i = 0; i < count; i++) push(threads[order[i]]);
    for (int i = 0; i < count; i++) threads[i].state = FRESH;
    make_current(threads[queue[head]]);
    head = (head + 1) % MOST, queued--;
    jump(home, fibre_for(*current));
#ifndef EMULATE_ADDRESS
    if (!*message && !(untouched(dynamic - GUARD) && untouched(dynamic + launched->shared)))
        refuse("a thread of block (%u,%u,%u) wrote outside the dynamic shared memory", blockIdx.x, blockIdx.y, blockIdx.z);
#endif
    return !*message;
}

QUIET static bool run_blocks() {
    size_t blocks = (size_t)gridDim.x * gridDim.y * gridDim.z;
    int* turn = blocks > 0x7fffffff ? nullptr : (int*)__builtin_malloc(blocks * sizeof *turn);
    if (!turn) return refuse("no memory for a list of %zu blocks", blocks);
    arrange(turn, blocks);
#ifdef EMULATE_BLOCKS
    AnnotateBenignRaceSized("", 0, __start_shm, __stop_shm - __start_shm, "shared");
    AnnotateBenignRaceSized("", 0, dynamic_room, sizeof dynamic_room, "shared");
    order_home(true);
#endif
    bool ran = true;
    for (size_t b = 0; ran && b < blocks; b++) {
        set = b % SETS;
        if (SETS == 1) order_home(true);
        ran = run_block(turn[b]);
        if (SETS == 1) order_home(false);
    }
    if (SETS == 2) order_home(false);
    __builtin_free(turn);
#ifdef EMULATE_THREAD
    for (void** race = launched->process->races; !ran && race < launched->process->races + 2 * MOST; race++)
        if (*race) __tsan_destroy_fiber(*race), *race = nullptr;        // to it they would still be inside the kernel
#endif
    return ran;
}

QUIET static bool run(const Launch* l, int n, const Parameter* parameters, void (*kernel)(const Slot*)) {
    const long long *g = l->grid, *b = l->block;
    if (g[0] < 1 || g[1] < 1 || g[2] < 1 || g[0] > 0x7fffffff || g[1] > 65535 || g[2] > 65535)
        return refuse("grid must be 1 .. 2147483647, 1 .. 65535, 1 .. 65535, got %lld, %lld, %lld", g[0], g[1], g[2]);
    if (b[0] < 1 || b[1] < 1 || b[2] < 1 || b[0] > MOST || b[1] > MOST || b[2] > 64 || b[0] * b[1] * b[2] > MOST)
        return refuse("block must be 1 .. 1024, 1 .. 1024, 1 .. 64, at most 1024 threads, got %lld, %lld, %lld", b[0], b[1], b[2]);
    if (l->shared < 0 || l->shared > (long long)SHARED) return refuse("shared must be 0 .. %zu bytes, got %lld", SHARED, l->shared);
    launched = l, call = kernel, seed = l->seed * 2 + 1;
    gridDim = dim3(g[0], g[1], g[2]), blockDim = dim3(b[0], b[1], b[2]);
    count = b[0] * b[1] * b[2];
    for (unsigned i = 0; i < (unsigned)count; i++) {
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        threads[i].number = i;
    }
    arrange(order, count);
    dynamic = dynamic_room + GUARD;
    __asan_unpoison_memory_region(dynamic_room, sizeof dynamic_room);
    fill(dynamic - GUARD, GUARD);
    fill(dynamic + l->shared, GUARD);
    __asan_poison_memory_region(dynamic_room, GUARD);
    __asan_poison_memory_region(dynamic + l->shared, dynamic_room + sizeof dynamic_room - dynamic - l->shared);
    Process& process = *l->process;
    if (!process.stacks) {
        void* got = mmap(nullptr, 2 * MOST * (GAP + STACK), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) return refuse("no address space for %d stacks", 2 * MOST);
        process.stacks = (char*)got;
        process.signal_stack = (char*)__builtin_malloc(64 << 10);
        process.races = (void**)__builtin_calloc(2 * MOST, sizeof(void*));
    }
    *message = 0;
    if (!copy_in(n, parameters)) return false;
    catch_crashes(true);
    bool ran = run_blocks();
    catch_crashes(false);
    fflush(stdout);                                         // of printf in the kernel
    return copy_out(ran);
}

// The parameters of a kernel, read off its type.
template <int... I> struct Numbers {};
template <int n, int... I> struct Upto : Upto<n - 1, n - 1, I...> {};
template <int... I> struct Upto<0, I...> { typedef Numbers<I...> type; };

template <class T> constexpr Parameter described(bool pointer, bool constant) {
    if constexpr (__is_class(T)) return described<decltype(T::x)>(pointer, constant);
    else return {pointer, constant, T(2) == T(1) ? 'b' : T(0.5) != T(0) ? 'f' : T(-1) < T(0) ? 'i' : 'u', sizeof(T)};
}
template <class T> struct Described {
    static_assert(!__is_class(T), "a parameter must be a number or a pointer");
    static constexpr Parameter value = described<T>(false, false);
};
template <class T> struct Described<T*> { static constexpr Parameter value = described<T>(true, false); };
template <class T> struct Described<const T*> { static constexpr Parameter value = described<T>(true, true); };

template <auto kernel> struct Kernel;
template <class... A, void (*kernel)(A...)> struct Kernel<kernel> {
    static constexpr int n = sizeof...(A);
    static_assert(n <= 64, "a kernel may have 64 parameters");
    static constexpr Parameter parameters[n + 1] = {Described<A>::value...};
    template <int... I> QUIET static void each(const Slot* slots, Numbers<I...>) { kernel(*(A*)&slots[I]...); }
    QUIET static void call(const Slot* slots) { each(slots, typename Upto<n>::type()); }
};

QUIET static const char* signature(int n, const Parameter* parameters) {        // such as "pointer const f4,pointer f4,i4,"
    char* at = message;
    *at = 0;
    for (int i = 0; i < n; i++) {
        const Parameter& p = parameters[i];
        at += sprintf(at, "%s%s%c%d,", p.pointer ? "pointer " : "", p.constant ? "const " : "", p.kind, p.size);
    }
    return message;
}

}  // namespace cpu

#define VISIBLE extern "C" __attribute__((visibility("default")))
#define EXPORT(name) \
    VISIBLE bool launch_##name(const cpu::Launch* l) { \
        return cpu::run(l, cpu::Kernel<name>::n, cpu::Kernel<name>::parameters, cpu::Kernel<name>::call); \
    } \
    VISIBLE const char* signature_##name() { return cpu::signature(cpu::Kernel<name>::n, cpu::Kernel<name>::parameters); }
VISIBLE const char* report() { return cpu::message; }

// ---- g++'s own checks ---------------------------------------------------------------------------------------------------------------
// -fsanitize=bounds,alignment,null,shift-exponent,integer-divide-by-zero calls these where a check fails. g++ fixes names and layouts.

namespace cpu {
struct Place { const char* file; unsigned line, column; };
struct Type { unsigned short kind, info; char name[]; };
struct Access { Place place; const Type* type; unsigned char log2_alignment, kind; };
struct Operands { Place place; const Type *left, *right; };
}
#define HANDLER(name, ...) extern "C" __attribute__((visibility("hidden"))) QUIET void __ubsan_handle_##name(__VA_ARGS__)
HANDLER(type_mismatch_v1, cpu::Access* a, size_t address) {
    if (!address) cpu::fail(a->place.line, "it uses a null pointer to %s", a->type->name);
    cpu::fail(a->place.line, "address %#zx of %s must be a multiple of %d", address, a->type->name, 1 << a->log2_alignment);
}
HANDLER(out_of_bounds, cpu::Operands* o, long long index) { cpu::fail(o->place.line, "index %lld lies outside %s", index, o->left->name); }
HANDLER(shift_out_of_bounds, cpu::Operands* o, size_t, long long by) {
    cpu::fail(o->place.line, "it shifts %s by %lld bits", o->left->name, by);
}
HANDLER(divrem_overflow, cpu::Place* place, size_t, size_t) { cpu::fail(place->line, "it divides an integer by 0"); }
#undef HANDLER
#undef QUIET
