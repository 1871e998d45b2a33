// Operands of products over tiles, packed so that every tile is whole and lies in one piece: what tensors have not is
// zeros. A key head's virtual keys are packed, the prefix's rows in use and the own keys behind them without a seam.
// Every tile has its second plane behind it, where there are two.
#pragma once
#include "cpu/attention/operands.h"
#include "cpu/parallel.h"
#include "cpu/tile_product.h"

namespace prefixattn {
namespace PA_ISA {

constexpr int kGroup = 2 * kTile;  // keys that a word of each of a tile's rows sums over

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Some virtual keys' rows: `n_prefix` of a prefix, then own ones.
struct JoinedRows {
    const char *prefix;
    ptrdiff_t prefix_stride;  // bytes
    int n_prefix;
    const char *own;
    ptrdiff_t own_stride;
    int n;

    const char *row(int r) const {
        return r < n_prefix ? prefix + r * prefix_stride : own + (r - n_prefix) * own_stride;
    }
};

// A, where the sum runs along the rows: [rows / 16][D / 32][planes][16 rows][32 numbers]. Scores read keys so.
template <class Dot>
struct RowTiles {
    using Storage = typename Dot::Storage;
    static constexpr int64_t kBytes = Dot::kPlanes * kTileBytes;

    static int64_t steps(int64_t D) { return up(D, kGroup) / kGroup; }
    static int64_t bytes(int64_t n, int64_t D) { return up(n, kGroup) / kTile * steps(D) * kBytes; }

    // From row r on, a multiple of 16.
    static TileStream stream(const char *tiles, int r, int D) {
        const ptrdiff_t tile = steps(D) * kBytes;
        return {tiles + r / kTile * tile, 64, tile, kBytes, kTileBytes};
    }

    // `n` up to the next whole group.
    static void pack(const JoinedRows &x, int D, char *dst) {
        const int K = (int)steps(D), rows = (int)up(x.n, kGroup);
        for (int r = 0; r < rows; ++r) {
            char *to = dst + (int64_t)(r / kTile) * K * kBytes + r % kTile * 64;
            const char *from = r < x.n ? x.row(r) : nullptr;
            for (int k = 0; k < K; ++k, to += kBytes) {
                const char *src = from ? from + kGroup * sizeof(Storage) * k : nullptr;
                if constexpr (Dot::kPlanes == 2)
                    split((const float *)src, min_of(D - kGroup * k, kGroup), to);
                else
                    copy(src, 2 * (D - kGroup * k), to);
            }
        }
    }

  private:
    static void split(const float *src, int n, char *dst) {
        bf16 *to = (bf16 *)dst;
        if (src) split_row(src, n, to, kTileBytes / 2);
        const int from = src ? n : 0;
        for (int plane = 0; plane < 2; ++plane)
            std::memset(to + plane * kTileBytes / 2 + from, 0, sizeof(bf16) * (kGroup - from));
    }

    static void copy(const char *src, int bytes, char *dst) {
#if defined(PA_AVX512)
        const int words = !src ? 0 : bytes < 64 ? bytes / 4 : 16;
        _mm512_store_si512(dst, _mm512_maskz_loadu_epi32((__mmask16)((1u << words) - 1), src));
#else
        const int n = !src ? 0 : bytes < 64 ? bytes : 64;
        std::memcpy(dst, src, n);
        std::memset(dst + n, 0, 64 - n);
#endif
    }
};

// A, where the sum runs over the rows: [rows / 32][D / 16][planes][16 of D][16 pairs of rows]. Outputs read values so,
// and dq keys.
template <class Dot>
struct ColumnTiles {
    using Storage = typename Dot::Storage;
    static constexpr int64_t kBytes = Dot::kPlanes * kTileBytes;

    static int64_t bytes(int64_t n, int64_t D) { return up(n, kGroup) / kGroup * group(D); }

    // From row r on, a multiple of 32.
    static TileStream stream(const char *tiles, int r, int D) {
        return {tiles + r / kGroup * group(D), 64, kBytes, group(D), kTileBytes};
    }

    static void pack(const JoinedRows &x, int D, char *dst) {
        alignas(64) static const Storage kZeros[kMaxHeadDim] = {};
        for (int r0 = 0; r0 < x.n; r0 += kGroup) {
            const Storage *rows[kGroup];
            for (int i = 0; i < kGroup; ++i) rows[i] = r0 + i < x.n ? (const Storage *)x.row(r0 + i) : kZeros;
            for (int d = 0; d < D; d += kTile, dst += kBytes) tile(rows, d, min_of(kTile, D - d), dst);
        }
    }

  private:
    static int64_t group(int64_t D) { return up(D, kTile) / kTile * kBytes; }

    // dst[d][i] = elements d0 + d of rows 2 i and 2 i + 1.
    static void tile(const Storage *const *rows, int d0, int n, char *dst) {
        alignas(64) uint32_t pairs[Dot::kPlanes * kTile * kTile];
        for (int i = 0; i < kTile; ++i) put(rows[2 * i] + d0, rows[2 * i + 1] + d0, n, pairs + i * kTile);
        for (int plane = 0; plane < Dot::kPlanes; ++plane)
            transpose(pairs + plane * kTile * kTile, 4 * kTile, kTile, kTile, (float *)(dst + plane * kTileBytes),
                      kTile);
    }

    static void put(const Storage *low, const Storage *high, int n, uint32_t *to) {
        if constexpr (Dot::kPlanes == 2) {
            split_pairs(low, high, n, to, kTile * kTile);
        } else {
#if defined(PA_AVX512)
            const __mmask16 present = (__mmask16)((1u << n) - 1);
            const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, low));
            const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, high));
            _mm512_store_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
#else
            for (int d = 0; d < kTile; ++d) to[d] = d < n ? low[d].bits | (uint32_t)high[d].bits << 16 : 0u;
#endif
        }
    }
};

// Whole groups of rows of the prefixes, packed once for all samples and units; rows past them are packed with own keys.
template <class Dot>
class PrefixTiles {
    using Rows = RowTiles<Dot>;
    using Columns = ColumnTiles<Dot>;
    static constexpr int64_t kMostBytes = 4 << 20;  // of the calling thread's own memory

  public:
    explicit PrefixTiles(const AttnParams &p) : p_(p), rows_(p.P / kGroup * kGroup) {}

    // Nothing is packed where a row may be read once only, or differs by sample.
    void pack(int threads) {
        const int64_t heads = p_.T * p_.Hkv, bytes = heads * (key_bytes() + value_bytes());
        if (p_.T >= p_.B || p_.prefix_dropout_p > 0 || bytes == 0 || bytes > kMostBytes) return;
        data_ = (char *)call_scratch((size_t)bytes);
        parallel_for(heads, threads, pack_head, this);
    }

    // Of a sample's prefix, of which it uses `length` rows, those packed here.
    int64_t rows(int64_t length) const { return data_ ? length / kGroup * kGroup : 0; }
    const char *keys(int64_t row, int64_t g) const {
        return data_ + (row * p_.Hkv + g) * (key_bytes() + value_bytes());
    }
    const char *values(int64_t row, int64_t g) const { return keys(row, g) + key_bytes(); }

  private:
    int64_t key_bytes() const { return Rows::bytes(rows_, p_.D); }
    int64_t value_bytes() const { return Columns::bytes(rows_, p_.D); }

    static void pack_head(void *context, int64_t unit) {
        const PrefixTiles &x = *(const PrefixTiles *)context;
        const int64_t row = unit / x.p_.Hkv, g = unit % x.p_.Hkv;
        const auto rows = [&](const Strided &t) {
            constexpr int64_t kSize = sizeof(typename Dot::Storage);
            return JoinedRows{
                at(t, row, g, 0, kSize), (ptrdiff_t)(t.stride2 * kSize), (int)x.rows_, nullptr, 0, (int)x.rows_};
        };
        Rows::pack(rows(x.p_.prefix_k), (int)x.p_.D, (char *)x.keys(row, g));
        Columns::pack(rows(x.p_.prefix_v), (int)x.p_.D, (char *)x.values(row, g));
    }

    const AttnParams &p_;
    const int64_t rows_;
    char *data_ = nullptr;
};

}  // namespace PA_ISA
}  // namespace prefixattn
