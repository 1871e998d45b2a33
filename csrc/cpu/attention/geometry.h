// Which queries and keys a piece of work covers. Scores are kept transposed, a key to a row and a query to a lane:
// softmax then runs down the lanes, and keys and values are operands that need no packing.
#pragma once
#include "cpu/attention/samples.h"

namespace prefixattn {
namespace PA_ISA {

struct QueryBlock {
    int64_t l0;  // first query
    int lanes;   // queries
    int width;   // lanes rounded up to vectors: the row stride of everything transposed
};

// Blocks are whole units of lanes, vectors or what tiles sum over.
inline int64_t query_blocks(int64_t L, int unit = VL) { return ((L + unit - 1) / unit * unit + kLanes - 1) / kLanes; }

// They differ by at most one unit: of vectors of 16, 197 queries are 64 + 48 + 48 + 37, not 64 + 64 + 64 + 5.
inline QueryBlock query_block(int64_t L, int64_t i, int unit = VL) {
    const int64_t units = (L + unit - 1) / unit, n = query_blocks(L, unit);
    const int64_t u0 = (units * i + n - 1) / n, u1 = (units * (i + 1) + n - 1) / n;
    const int64_t end = u1 * unit < L ? u1 * unit : L;
    return {u0 * unit, (int)(end - u0 * unit), (int)((u1 - u0) * unit)};
}

struct Range {
    int64_t begin, end;
};

template <class X>
inline X min_of(X a, X b) {
    return a < b ? a : b;
}
template <class X>
inline X max_of(X a, X b) {
    return a > b ? a : b;
}

inline const char *at(const Strided &t, int64_t i0, int64_t i1, int64_t i2, int64_t element) {
    return (const char *)t.data + (i0 * t.stride0 + i1 * t.stride1 + i2 * t.stride2) * element;
}

// Asks for rows j0 .. j0 + n, of D numbers, to be near when they are read, or written.
template <bool kWrite>
inline void fetch_ahead(const Strided &t, int64_t i0, int64_t i1, int64_t j0, int64_t n, int64_t D, int64_t element) {
    if (!t.data) return;
    for (int64_t j = j0; j < j0 + n; ++j) {
        const char *row = at(t, i0, i1, j, element);
        for (int64_t x = 0; x < D * element; x += 64) __builtin_prefetch(row + x, kWrite, 2);
    }
}

// Query l sees keys l + first .. l + last, of those there are.
struct Band {
    int64_t first, last;
};
constexpr int64_t kFar = INT64_MAX / 4;  // no bound, and no overflow when it is added to

template <class Params>
Band own_band(const Params &p) {
    const int64_t offset = causal_offset(p);
    return {p.window_left < 0 ? -kFar : offset - p.window_left, p.causal             ? offset
                                                                : p.window_right < 0 ? kFar
                                                                                     : offset + p.window_right};
}
// Of a sample's prefix, by its rows.
template <class Params>
Band prefix_band(const Params &p, int64_t length) {
    return {p.prefix_in_window ? length + causal_offset(p) - p.window_left : -kFar, kFar};
}

// Of the keys in `all`, those that some query of the block sees.
inline Range seen_keys(Band band, Range all, const QueryBlock &q) {
    const int64_t end = min_of(all.end, q.l0 + q.lanes + band.last);
    const int64_t begin = min_of(max_of(all.begin, q.l0 + band.first), max_of(all.begin, end));
    return {begin, max_of(begin, end)};
}

// Keys s0 .. s0 + n in strips: the first is seen by the whole block, those on the diagonal lack their first `skip`
// lanes altogether (and may need single lanes hidden). Where a strip begins depends on its keys alone, not on s0: the
// order in which a product sums depends on how many lanes it has, and both passes must compute the same score.
struct Strips {
    // strip: its keys. align: strips begin at a multiple of so many rows.
    Strips(Band band, const QueryBlock &q, int64_t s0, int n, int strip, int align)
        : n_(n),
          strip_(strip),
          align_(align),
          width_(q.width),
          diagonal_(q.l0 + band.last - s0),
          passed_(q.l0 + band.first - s0) {}
    template <class F>
    void each(F f) const {  // f(first row, rows, lanes to skip)
        for (int r = 0; r < n_;) {
            const int64_t strip = r > diagonal_ ? (r - diagonal_) / strip_ : 0;
            const int64_t next = (diagonal_ + (strip + 1) * strip_ + align_ - 1) / align_ * align_;
            const int rows = (int)min_of<int64_t>(n_, next) - r;
            f(r, rows, (int)(strip * strip_));
            r += rows;
        }
    }
    // Lanes that see a row are those from first_lane to end_lane.
    int first_lane(int row) const { return (int)min_of<int64_t>(width_, max_of<int64_t>(0, row - diagonal_)); }
    int end_lane(int row) const { return (int)min_of<int64_t>(width_, max_of<int64_t>(0, row - passed_ + 1)); }
    // Rows whose first lanes do not see them begin here, and those whose last lanes do not end here.
    int first_diagonal() const { return (int)max_of<int64_t>(0, min_of<int64_t>(n_, diagonal_ + 1)); }
    int end_passed() const { return (int)max_of<int64_t>(0, min_of<int64_t>(n_, passed_ + width_ - 1)); }

  private:
    int n_, strip_, align_, width_;
    int64_t diagonal_, passed_;  // lane i sees rows passed_ + i .. diagonal_ + i
};

}  // namespace PA_ISA
}  // namespace prefixattn
