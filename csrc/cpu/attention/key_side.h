// What a chunk of keys brings to the tiles of the backward.
#pragma once
#include "cpu/attention/panels.h"

namespace prefixattn {
namespace PA_ISA {

// A chunk of one head's keys and values: prefix rows or own keys, never both.
template <class Storage, class Dot>
class KeySide {
    using Ops = Operands<Storage, Dot>;
    using Rows = typename Ops::Rows;
    using Columns = typename Ops::Columns;

  public:
    Rows k{}, v{};
    Columns columns{};  // of keys, for dQ
    // Of tiles' arithmetic instead of these three, packed: keys and values by rows, and keys by columns.
    char *key_tiles, *value_tiles, *key_columns;
    int64_t j0 = 0;  // prefix row or own key
    int n = 0;
    bool prefix = false;
    float gain = 1;   // what prefix dropout multiplies kept elements by
    KeptPrefix kept;  // and which it keeps

    void allocate(const CpuBwdParams &p, Arena &arena, int keys) {
        const bool copies = Ops::kWiden || p.prefix_dropout_p > 0;
        k_copy_ = arena.take<float>(copies ? keys * p.D : 0);
        v_copy_ = arena.take<float>(copies ? keys * p.D : 0);
        if constexpr (Dot::kTiles) {
            key_tiles = arena.template take<char>(RowTiles<Dot>::bytes(keys, p.D));
            value_tiles = arena.template take<char>(RowTiles<Dot>::bytes(keys, p.D));
            key_columns = arena.template take<char>(ColumnTiles<Dot>::bytes(keys, p.D));
        } else {
            columns_ = arena.take<uint32_t>(Ops::column_words(keys, p.D));
        }
        if (p.prefix_dropout_p > 0) kept.allocate(arena, keys, p.D);
    }

    void load(const CpuBwdParams &p, int64_t b, int64_t g, bool is_prefix, int64_t first, int count, bool with_dq) {
        j0 = first, n = count, prefix = is_prefix;
        const int D = (int)p.D;
        gain = prefix ? prefix_gain(p.prefix_dropout_p) : 1;
        if (prefix) {
            if (p.prefix_dropout_p > 0) kept.draw(dropout_seed(p), p.prefix_dropout_p, b * p.Hkv + g, j0, n, j0 + n);
            k = Ops::prefix_rows(p, p.prefix_k, kept, b, g, j0, n, kDropsPrefixK, k_copy_);
            v = Ops::prefix_rows(p, p.prefix_v, kept, b, g, j0, n, kDropsPrefixV, v_copy_);
        } else {
            k = Ops::rows(p.k, b, g, j0, n, D, k_copy_);
            v = Ops::rows(p.v, b, g, j0, n, D, v_copy_);
        }
        if constexpr (Dot::kTiles) {
            RowTiles<Dot>::pack(joined(k), D, key_tiles);
            RowTiles<Dot>::pack(joined(v), D, value_tiles);
            if (with_dq) ColumnTiles<Dot>::pack(joined(k), D, key_columns);
        } else if (with_dq) {
            columns = Ops::columns(k, n, D, columns_);
        }
    }

    // Memory rows d0 .. d0 + count in the place of values.
    void load_memory(const CpuBwdParams &p, int64_t b, int64_t h, int d0, int count) {
        j0 = d0, n = count;
        v = Ops::rows(p.memory, memory_row(p, b), h, d0, count, (int)p.D, v_copy_);
        if constexpr (Dot::kTiles) RowTiles<Dot>::pack(joined(v), (int)p.D, value_tiles);
    }

  private:
    JoinedRows joined(const Rows &x) const { return {x.data, x.stride, n, nullptr, 0, n}; }

    float *k_copy_, *v_copy_;
    uint32_t *columns_;
};

}  // namespace PA_ISA
}  // namespace prefixattn
