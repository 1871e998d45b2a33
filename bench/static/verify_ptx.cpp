// For verify_ptx.py: by nvcc one kernel as PTX, by a C++ compiler a program that prints what it would be launched with,
// as JSON: the parameters in words of four bytes, at which of them a pointer begins, the grid and the shared memory.
#ifdef PA_FORWARD
#include "cuda/attention/fwd.h"
using Given = prefixattn::cuda::FwdLaunch;
using Kernel = prefixattn::cuda::FwdShort<prefixattn::hw::BF16, 64, PA_FORWARD, true>;
#else
#include "cuda/attention/bwd.h"
using Given = prefixattn::cuda::BwdLaunch;
using Kernel = prefixattn::cuda::BwdPrefix<prefixattn::hw::BF16, 64>;
#endif

#ifdef __CUDACC__
template const char *prefixattn::hw::launch<Kernel>(hw::Grid, int, const Given &, hw::Stream);
#else
#include <cstdio>
#include <cstdlib>

using namespace prefixattn;
using namespace prefixattn::cuda;

namespace {

constexpr uintptr_t kSomewhere = 0xabcd0000dead0000u;  // stands for the address of any tensor

Strided rows(int64_t heads, int64_t n) { return {(void *)kSomewhere, heads * n * 64, n * 64, 64}; }

void print(const Given &x, hw::Grid grid, int shared_bytes) {
    uint32_t words[sizeof x / 4];
    std::memcpy(words, &x, sizeof x);
    std::printf("{\"grid\": [%d, %d, %d], \"shared\": %d, \"words\": [", grid.x, grid.y, grid.z, shared_bytes);
    for (size_t i = 0; i < sizeof x / 4; ++i) std::printf("%s%u", i ? ", " : "", words[i]);
    std::printf("], \"pointers\": [");
    const char *between = "";
    for (size_t i = 0; i + 1 < sizeof x / 4; i += 2)
        if (words[i + 1] == kSomewhere >> 32) std::printf("%s%d", between, (int)i), between = ", ";
    std::printf("]}\n");
}

}  // namespace

int main(int, char **words) {
    const int64_t B = std::atoi(words[1]), H = std::atoi(words[2]), L = std::atoi(words[3]), S = std::atoi(words[4]);
    const int64_t P = std::atoi(words[5]), wants_lse = std::atoi(words[6]);
    const Device device{163 * 1024, 1};
#ifdef PA_FORWARD
    FwdParams p{};
#else
    BwdParams p{};
#endif
    p.dtype = DType::kBFloat16;
    p.B = B, p.H = p.Hkv = H, p.L = L, p.S = S, p.T = 1, p.P = P, p.D = 64;
    p.scale = 0.125f;
    p.q = p.out = rows(H, L);
    p.k = p.v = rows(H, S);
    p.prefix_k = p.prefix_v = rows(H, P);
    p.lse = wants_lse ? (void *)kSomewhere : nullptr;
    Given x;
    std::memset((void *)&x, 0, sizeof x);
#ifdef PA_FORWARD
    x = fwd_launch(p);
    share_queries(x, device);
    print(x, {(int)(H / x.heads), (int)B, x.parts}, Kernel::shared_bytes(x));
#else
    p.dout = p.q;
    p.dprefix_k = p.dprefix_v = p.prefix_k;
    const BwdPlanned plan = plan_bwd_of<64>(p, device);
    x = plan.params;
    plan.scratch.lay_out(x, (void *)kSomewhere);
    print(x, {x.runs, (int)H, PrefixPass<64>::chunks(p)}, PrefixPass<64>::shared_bytes(p));
#endif
}
#endif
