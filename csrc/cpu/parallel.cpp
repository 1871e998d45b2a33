#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>
#include <vector>

namespace prefixattn {
namespace {

// The entry point that GCC emits for `#pragma omp parallel`; libgomp and libomp both export it. Calling the one that
// torch has loaded, instead of linking a runtime of our own, keeps one pool of threads in the process.
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

struct Runtime {
    GompParallel parallel = nullptr;
    std::string file;
};

// Only collects: the loader holds a lock here that another thread inside dlopen waits for, so dlopen must not be
// called.
int collect(dl_phdr_info *info, size_t, void *data) {
    if (info->dlpi_name) static_cast<std::vector<std::string> *>(data)->push_back(info->dlpi_name);
    return 0;
}

bool is_named(const std::string &path, const char *name) {
    return path.compare(path.find_last_of('/') + 1, std::char_traits<char>::length(name), name) == 0;
}

std::string folder(const std::string &path) { return path.substr(0, path.find_last_of('/') + 1); }

Runtime find_runtime() {
    std::vector<std::string> loaded;
    dl_iterate_phdr(collect, &loaded);
    std::string torch;  // the folder of libtorch_cpu, whose runtime is preferred to another package's
    for (const std::string &path : loaded)
        if (is_named(path, "libtorch_cpu")) torch = folder(path);
    Runtime found;
    for (const std::string &path : loaded) {
        if (!is_named(path, "libgomp") && !is_named(path, "libomp") && !is_named(path, "libiomp")) continue;
        const bool torchs = !torch.empty() && folder(path) == torch;
        if (found.parallel && !torchs) continue;
        void *library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        void *symbol = library ? dlsym(library, "GOMP_parallel") : nullptr;
        if (!symbol) continue;
        found = {reinterpret_cast<GompParallel>(symbol), path};
        if (torchs) break;
    }
    return found;
}

const Runtime &runtime() {
    static const Runtime found = find_runtime();
    return found;
}

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t units;
    void (*body)(void *, int64_t);
    void *context;
    Region region;
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first
};

void run_loop(void *data) {
    auto *loop = static_cast<Loop *>(data);
    if (loop->region.enter) loop->region.enter();
    try {
        for (int64_t unit; (unit = loop->next.fetch_add(1, std::memory_order_relaxed)) < loop->units;)
            loop->body(loop->context, unit);
    } catch (...) {  // an exception that leaves a thread of the runtime ends the process
        if (!loop->failed.exchange(true)) loop->error = std::current_exception();
        loop->next.store(loop->units, std::memory_order_relaxed);
    }
    if (loop->region.leave) loop->region.leave();
}

struct Scratch {
    void *data = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(data); }
    void *at_least(size_t wanted);
};

class NoScratch : public std::bad_alloc {
  public:
    explicit NoScratch(size_t bytes)
        : words_("no memory for " + std::to_string(bytes) + " bytes of scratch of one thread of the CPU kernels") {}
    const char *what() const noexcept override { return words_.c_str(); }

  private:
    std::string words_;
};

std::atomic<size_t> scratch_limit{0};

void *Scratch::at_least(size_t wanted) {
    const size_t limit = scratch_limit.load(std::memory_order_relaxed);
    if (limit && wanted > limit) throw NoScratch(wanted);
    if (!data || bytes < wanted) {
        std::free(data);
        data = std::aligned_alloc(64, wanted / 4096 * 4096 + 4096);
        bytes = data ? wanted : 0;
        if (!data) throw NoScratch(wanted);
    }
    return data;
}

}  // namespace

void parallel_for(int64_t units, int threads, void (*body)(void *, int64_t), void *context, Region region) {
    Loop loop;
    loop.units = units;
    loop.body = body;
    loop.context = context;
    loop.region = region;
    if (threads > units) threads = static_cast<int>(units);
    if (threads > 1 && runtime().parallel)
        runtime().parallel(run_loop, &loop, static_cast<unsigned>(threads), 0);
    else
        run_loop(&loop);
    if (loop.error) std::rethrow_exception(loop.error);
}

void *thread_scratch(size_t bytes) {
    thread_local Scratch scratch;
    return scratch.at_least(bytes);
}

void *call_scratch(size_t bytes) {
    thread_local Scratch scratch;
    return scratch.at_least(bytes);
}

void limit_scratch(size_t bytes) { scratch_limit.store(bytes, std::memory_order_relaxed); }

const char *openmp_runtime() { return runtime().file.c_str(); }

}  // namespace prefixattn
