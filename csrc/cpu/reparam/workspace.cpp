// Sizes that the instruction sets share; compiled once for the base instruction set.
#include "api/reparam.h"

namespace prefixattn {
namespace {
int64_t padded(int64_t lanes) { return (lanes + 15) / 16 * 16 + 16; }  // as the longest vector pads it
}  // namespace

// Rows of a chunk give one share of dh, [P, M]. All shares together stay near a twenty-fifth of the matrix, but for
// large P, where a few are needed to have work for all threads.
int64_t step_chunks(const ReparamSizes &s) {
    const int64_t blocks = (s.O + 127) / 128;
    int64_t chunks = s.O / (25 * s.P);
    chunks = chunks < 16 ? 16 : chunks > 64 ? 64 : chunks;
    chunks = (chunks + s.G - 1) / s.G;
    return chunks < blocks ? chunks : blocks;
}

int64_t reparam_fwd_workspace(const ReparamSizes &s) { return s.G * padded(s.P) * padded(s.M); }

int64_t reparam_step_workspace(const ReparamSizes &s) { return s.G * (1 + step_chunks(s)) * s.P * padded(s.M); }

}  // namespace prefixattn
