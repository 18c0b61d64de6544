// Memory for the intermediate results of a call, kept from call to call so that a step asks the system for none.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace mimoflash {

class Workspace {
public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    ~Workspace() { release(); }

    // Everything taken is free again. What did not fit into one block last time will now.
    void reset() {
        if (blocks.size() > 1) {
            size_t total = 0;
            for (const Block& block : blocks) total += block.size;
            release();
            add(total);
        }
        used = 0;
    }

    // `count` values, uninitialised, on a line of the cache. Throws std::bad_alloc.
    template <class T>
    T* take(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (blocks.empty() || used + bytes > blocks.back().size) {
            add(bytes < 1 << 20 ? 1 << 20 : bytes);
            used = 0;
        }
        char* from = blocks.back().data + used;
        used += bytes;
        return reinterpret_cast<T*>(from);
    }

private:
    struct Block {
        char* data;
        size_t size;
    };
    std::vector<Block> blocks;
    size_t used = 0;  // of the last block

    void add(size_t size) {
        blocks.reserve(blocks.size() + 1);
        void* data = std::aligned_alloc(64, (size + 63) / 64 * 64);
        if (data == nullptr) throw std::bad_alloc();
        blocks.push_back({static_cast<char*>(data), size});
    }

    void release() {
        for (const Block& block : blocks) std::free(block.data);
        blocks.clear();
    }
};

}  // namespace mimoflash
