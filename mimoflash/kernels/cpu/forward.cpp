// The interface to Python: a handle that keeps a model's working memory, and one call for each kind of pass.
// 0 is success; -1 says that there was no memory. What is wrong with the input is found in Python, before the call.
#include "forward.h"

#include <new>

using namespace mimoflash;

namespace {

// Runs f, which may ask for memory.
template <class F>
int guarded(F f) {
    try {
        f();
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

template <class Pass, class Input>
int run_pass(const Model& model, Workspace& memory, const Input& input, int threads) {
    return guarded([&] {
        memory.reset();
        Pass pass(model, memory, input, threads);
        parallel(threads, [&](Team& team) { pass.run(team); });
        pass.finish();
    });
}

}  // namespace

extern "C" {

#define PUBLIC __attribute__((visibility("default")))

PUBLIC void* mf_workspace() {
    return new (std::nothrow) Workspace;
}

PUBLIC void mf_release(void* workspace) {
    delete static_cast<Workspace*>(workspace);
}

PUBLIC int mf_forward(const Model* model, void* workspace, const Step* step, int threads) {
    return run_pass<Forward>(*model, *static_cast<Workspace*>(workspace), *step, threads);
}

PUBLIC int mf_draft(const Model* model, void* workspace, const DraftStep* step, int threads) {
    return run_pass<Drafting>(*model, *static_cast<Workspace*>(workspace), *step, threads);
}

PUBLIC int mf_sample(
    const float* logits, const float* raw, int64_t stride, int rows, int vocab, const float* temperature,
    const float* top_p, const int32_t* top_k, const float* min_p, const uint64_t* seed, const int64_t* position,
    int32_t* tokens, float* logprobs, float* sampling_logprobs, int threads) {
    const SampleJob job{logits, raw, stride, rows, vocab, temperature, top_p, top_k, min_p, seed, position, tokens,
                        logprobs, sampling_logprobs};
    static thread_local Workspace memory;
    return guarded([&] {
        memory.reset();
        threads = std::min(threads, rows);
        RowSampler* samplers = memory.take<RowSampler>(threads);
        for (int i = 0; i < threads; ++i) new (samplers + i) RowSampler(memory, vocab);
        parallel(threads, [&](Team& team) { sample(team, job, samplers); });
    });
}

}  // extern "C"
