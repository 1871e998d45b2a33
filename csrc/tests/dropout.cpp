// Philox's words, and that what dropout keeps is drawn from the counters that api/semantics.h says.
#include "check.h"
#include "cpu/attention/philox.h"
#include "cpu/pack.h"

using namespace prefixattn;
using namespace prefixattn::PA_ISA;

namespace {

// What the authors publish with their code.
const struct {
    uint32_t counter[4], key[2], words[4];
} kKnown[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u}},
    {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408F276Du, 0x41C83B0Eu, 0xA20BC7C6u, 0x6D5451FDu}},
    {{0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u},
     {0xA4093822u, 0x299F31D0u},
     {0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u}},
};

void published() {
    for (const auto &known : kKnown) {
        const uint64_t seed = known.key[0] | (uint64_t)known.key[1] << 32;
        const uint32_t *c = known.counter;
        const PhiloxWords found = philox4x32(seed, {{c[0], c[1], c[2], c[3]}});
        vu words[4];
        philox(seed, vu{} + c[0], vu{} + c[1], c[2], c[3], words);
        for (int w = 0; w < 4; ++w) {
            CHECK(found.x[w] == known.words[w], "word %d is %08x, expected %08x", w, found.x[w], known.words[w]);
            for (int i = 0; i < VL; ++i)
                CHECK(words[w][i] == known.words[w], "word %d of lane %d is %08x, expected %08x", w, i,
                      (unsigned)words[w][i], known.words[w]);
        }
    }
}

void lanes_are_apart() {
    for (int round = 0; round < 1000; ++round) {
        vu x0, x1, words[4];
        for (int i = 0; i < VL; ++i) x0[i] = check::generator()(), x1[i] = check::generator()();
        const uint32_t c2 = check::generator()(), c3 = check::generator()();
        const uint64_t seed = check::generator()() | (uint64_t)check::generator()() << 32;
        philox(seed, x0, x1, c2, c3, words);
        for (int i = 0; i < VL; ++i) {
            const PhiloxWords right = philox4x32(seed, {{x0[i], x1[i], c2, c3}});
            for (int w = 0; w < 4; ++w)
                CHECK(words[w][i] == right.x[w], "word %d of lane %d is %08x, expected %08x", w, i,
                      (unsigned)words[w][i], right.x[w]);
        }
    }
}

constexpr uint64_t kSeed = 0x123456789abcdef0ull;
constexpr double kP = 0.37;

bool kept(int64_t row, int64_t column, int64_t head, int draw) {
    const PhiloxWords words = philox4x32(kSeed, dropout_counter(row, column, head, draw));
    return words.x[dropout_word(column)] >= Keep(kP).threshold;
}

// Keys in any order, one at a time, over blocks of queries that begin anywhere.
void of_attention() {
    for (int64_t l0 : {0, 48, 200}) {
        const int n = l0 == 48 ? VL : kLanes;
        AttentionDropout dropout(kSeed, kP, 7, l0, n);
        for (int64_t j : {0, 1, 2, 3, 4, 9, 11, 10, 1030, 5}) {
            float multiplier[kLanes];
            dropout.row(j, multiplier);
            for (int i = 0; i < n; ++i) {
                const float right = kept(l0 + i, j, 7, kDropsAttention) ? Keep(kP).scale : 0;
                CHECK(multiplier[i] == right, "query %d, key %d: %g, expected %g", (int)(l0 + i), (int)j, multiplier[i],
                      right);
            }
        }
    }
}

void of_a_prefix() {
    for (int D : {8, 24, 64, 72, 128, 256}) {
        alignas(64) char room[2 * 10 * 4 * sizeof(uint64_t)];
        Arena arena(room);
        KeptPrefix kept_rows;
        kept_rows.allocate(arena, 10, D);
        kept_rows.draw(kSeed, kP, 3, 5, 4, 12);  // reads on: rows 5 .. 12
        for (int draw : {kDropsPrefixK, kDropsPrefixV})
            for (int row = 5; row < 12; ++row) {
                const uint64_t *found = kept_rows.row(row, draw);
                std::vector<float> src(D), zeroed(D), added(D, 1.f);
                std::vector<uint16_t> halves(D), halves_kept(D);
                for (int d = 0; d < D; ++d) src[d] = (float)(d + 1), halves[d] = (uint16_t)(d + 1);
                keep_elements(src.data(), found, D, zeroed.data());
                keep_elements(halves.data(), found, D, halves_kept.data());
                add_kept(src.data(), 2.f, found, D, added.data());
                for (int d = 0; d < D; ++d) {
                    const bool right = kept(row, d, 3, draw);
                    CHECK((found[d / 64] >> d % 64 & 1) == right, "D %d, row %d, element %d", D, row, d);
                    CHECK(zeroed[d] == (right ? src[d] : 0), "D %d, element %d: %g", D, d, zeroed[d]);
                    CHECK(halves_kept[d] == (right ? halves[d] : 0), "D %d, element %d: %d", D, d, halves_kept[d]);
                    CHECK(added[d] == (right ? 1 + 2 * src[d] : 1), "D %d, element %d: %g", D, d, added[d]);
                }
            }
    }
}

}  // namespace

int main() {
    published();
    lanes_are_apart();
    of_attention();
    of_a_prefix();
    return check::result();
}
