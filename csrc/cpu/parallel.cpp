#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace prefixattn {
namespace {

// The entry point that GCC emits for `#pragma omp parallel`; libgomp and libomp both export it. Calling the one that
// torch has loaded, instead of linking a runtime of our own, keeps one pool of threads in the process.
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

struct Runtime {
    GompParallel parallel = nullptr;
    std::string file;
    std::string torch;  // the folder of libtorch_cpu, whose runtime is preferred to another package's
};

int find_torch(dl_phdr_info *info, size_t, void *data) {
    const std::string path = info->dlpi_name ? info->dlpi_name : "";
    const size_t base = path.find_last_of('/') + 1;
    if (path.compare(base, 12, "libtorch_cpu") != 0) return 0;
    static_cast<Runtime *>(data)->torch = path.substr(0, base);
    return 1;
}

int find_openmp(dl_phdr_info *info, size_t, void *data) {
    auto *runtime = static_cast<Runtime *>(data);
    const std::string path = info->dlpi_name ? info->dlpi_name : "";
    const size_t base = path.find_last_of('/') + 1;
    if (path.compare(base, 7, "libgomp") != 0 && path.compare(base, 6, "libomp") != 0 &&
        path.compare(base, 7, "libiomp") != 0)
        return 0;
    const bool torchs = !runtime->torch.empty() && path.compare(0, base, runtime->torch) == 0;
    if (runtime->parallel && !torchs) return 0;
    void *library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    void *symbol = library ? dlsym(library, "GOMP_parallel") : nullptr;
    if (!symbol) return 0;
    runtime->parallel = reinterpret_cast<GompParallel>(symbol);
    runtime->file = path;
    return torchs;
}

const Runtime &runtime() {
    static const Runtime found = [] {
        Runtime r;
        dl_iterate_phdr(find_torch, &r);
        dl_iterate_phdr(find_openmp, &r);
        return r;
    }();
    return found;
}

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t units;
    void (*body)(void *, int64_t);
    void *context;
};

void run_loop(void *data) {
    auto *loop = static_cast<Loop *>(data);
    for (int64_t unit; (unit = loop->next.fetch_add(1, std::memory_order_relaxed)) < loop->units;)
        loop->body(loop->context, unit);
}

struct Scratch {
    void *data = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(data); }
};

}  // namespace

void parallel_for(int64_t units, int threads, void (*body)(void *, int64_t), void *context) {
    Loop loop;
    loop.units = units;
    loop.body = body;
    loop.context = context;
    if (threads > units) threads = static_cast<int>(units);
    if (threads > 1 && runtime().parallel)
        runtime().parallel(run_loop, &loop, static_cast<unsigned>(threads), 0);
    else
        run_loop(&loop);
}

void *thread_scratch(size_t bytes) {
    thread_local Scratch scratch;
    if (scratch.bytes < bytes) {
        std::free(scratch.data);
        scratch.data = std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
        scratch.bytes = scratch.data ? bytes : 0;
    }
    return scratch.data;
}

const char *openmp_runtime() { return runtime().file.c_str(); }

}  // namespace prefixattn
