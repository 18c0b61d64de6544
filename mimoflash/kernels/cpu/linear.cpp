#include "linear.h"

#include "dense.h"
#include "quantised.h"

namespace mimoflash {
namespace {

int pieces_of(const LinearJob& job) {
    return ((job.w->n + COLUMNS - 1) / COLUMNS) * ((job.rows + ROWS - 1) / ROWS);
}

void run(const LinearJob& job, int index) {
    const int blocks = (job.w->n + COLUMNS - 1) / COLUMNS;
    const int column = index % blocks * COLUMNS, row = index / blocks * ROWS;
    Piece piece{job, column, std::min(COLUMNS, job.w->n - column), row, std::min(ROWS, job.rows - row)};
    switch (job.w->kind) {
        case F32: return dense<float>(piece);
        case BF16: return dense<bf16>(piece);
        case INT8: return quantised<false>(piece);
        case INT4: return quantised<true>(piece);
    }
}

}  // namespace

void quantise(Team& team, Activations& x) {
    for (int64_t row; (row = team.next()) < x.rows;) quantise_row(x, static_cast<int>(row));
}

// Each thread begins with a run of its own of pieces side by side, as memory and prefetching like it; the second half
// is dealt piece by piece, so that nobody waits for a thread that was held up.
void linear(Team& team, const LinearJob* jobs, int count) {
    const int threads = team.shared.threads.load(std::memory_order_relaxed);
    int64_t pieces = 0, before = 0;  // of all jobs; of those before this one
    for (int i = 0; i < count; ++i) pieces += pieces_of(jobs[i]);
    const int64_t own = pieces / (2 * threads), own_end = (team.id + 1) * own;
    int job = 0;
    for (int64_t piece = own_end - own;; ++piece) {
        if (piece >= own_end) piece = threads * own + team.next();
        while (job < count && piece >= before + pieces_of(jobs[job])) before += pieces_of(jobs[job++]);
        if (job == count) return;
        run(jobs[job], static_cast<int>(piece - before));
    }
}

}  // namespace mimoflash

using namespace mimoflash;

extern "C" {

#define PUBLIC __attribute__((visibility("default")))

// How many of base, avx2, avx512 this machine runs. Asked of the base library.
PUBLIC int mf_instruction_sets() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    const bool foundation = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    const bool lengths = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return foundation && lengths && __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
    return 1;
#endif
}

// Which state of the structures that Python shares this was compiled with: see mimoflash/kernels/compile.py.
PUBLIC const char* mf_interface() {
    return MF_INTERFACE;
}

// The thread pool to use: addresses of GOMP_parallel and omp_get_num_threads of one OpenMP library.
PUBLIC void mf_thread_pool(void* parallel, void* team_size) {
    gomp_parallel = reinterpret_cast<GompParallel>(parallel);
    omp_team_size = reinterpret_cast<int (*)()>(team_size);
}

PUBLIC void mf_quantise(Activations* x, int threads) {
    parallel(threads, [=](Team& team) { quantise(team, *x); });
}

PUBLIC void mf_linear(const LinearJob* jobs, int count, int threads) {
    parallel(threads, [=](Team& team) { linear(team, jobs, count); });
}

// Reads memory and does nothing else: what the machine's memory allows a linear layer (benchmarks/linear.py).
PUBLIC int mf_read(const void* from, int64_t bytes, int threads) {
    std::atomic<int> any{0};
    parallel(threads, [&](Team& team) {
        constexpr int64_t CHUNK = 1 << 16;
        Ints all{};
        for (int64_t at; (at = CHUNK * team.next()) + CHUNK <= bytes;) {
            const char* chunk = static_cast<const char*>(from) + at;
            for (int64_t i = 0; i < CHUNK; i += sizeof all) {
                Ints here;
                memcpy(&here, chunk + i, sizeof here);
                all |= here;
            }
        }
        any |= all[0];
    });
    return any;
}

}  // extern "C"
