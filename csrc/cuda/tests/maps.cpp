// Prints where fragments and tiles lie, as JSON for tests/native/cuda/test_maps.py, which compares them with the
// layouts of another library. Each map is read off what a function leaves in registers or memory, or off the addresses
// it asks for.
#include "cuda/tests/watch.h"  // before all that includes hw.h

using namespace prefixattn;

#include "cuda/attention/bwd_key_side.h"
#include "tests/check.h"

using namespace prefixattn::cuda;

namespace {

constexpr int kLanes = hw::kWarp;

// {"a": [..], "b": [[..], [..]]} as it is written
struct Json {
    int depth = 0;
    bool first = true;
    void open(const char *bracket) {
        comma();
        std::printf("%s", bracket);
        ++depth, first = true;
    }
    void close(const char *bracket) {
        std::printf("%s", bracket);
        --depth, first = false;
        if (depth == 1) std::printf("\n");
    }
    void key(const std::string &name) {
        comma();
        std::printf("\"%s\": ", name.c_str());
        first = true;
    }
    void number(int x) {
        comma();
        std::printf("%d", x);
    }
    void numbers(const int *x, int count) {
        open("[");
        for (int i = 0; i < count; ++i) number(x[i]);
        close("]");
    }

  private:
    void comma() {
        if (!first) std::printf(", ");
        first = false;
    }
};
Json json;

// What bodies leave: numbers by lane, and the rows that lanes gave to ldmatrix.
int by_lane[kLanes][64];
int given[kLanes];
alignas(16) uint16_t global[32 * 128];

template <void (*body)()>
struct Warp {
    struct Params {};
    static constexpr int kThreads = kLanes, kMinBlocks = 1;
    static constexpr const char *kName = "map";
    PA_DEVICE static void run(const Params &) { body(); }
};
template <void (*body)()>
void run() {
    const char *error = hw::launch<Warp<body>>({}, 16 * 1024, {}, nullptr);
    CHECK(!error, "%s", error);
}

int *mine() { return by_lane[hw::lane()]; }
void put(int at, uint32_t both) {
    mine()[2 * at] = (int)(both & 0xffff);
    mine()[2 * at + 1] = (int)(both >> 16);
}
void print_lanes(const char *name, int count) {
    json.key(name);
    json.open("[");
    for (int l = 0; l < kLanes; ++l) json.numbers(by_lane[l], count);
    json.close("]");
}

// accumulators: [lane][row, column of each element]
void accumulator() {
    for (int i = 0; i < 4; ++i) mine()[2 * i] = row_of(i), mine()[2 * i + 1] = column_of(i);
}

// mma: every element of A that is 1 with every element of B that is 1, and where a 1 is then. [lane * elements +
// element]
template <class E>
void probe_mma() {
    for (int a = 0; a < kLanes * 8; ++a)
        for (int b = 0; b < kLanes * 4; ++b) {
            const auto one = [](bool there, int i) { return hw::pack<E>(there && !(i & 1), there && (i & 1)); };
            uint32_t fa[4], fb[2];
            for (int i = 0; i < 4; ++i) fa[i] = one(a / 8 == hw::lane() && a % 8 / 2 == i, a % 8);
            for (int i = 0; i < 2; ++i) fb[i] = one(b / 4 == hw::lane() && b % 4 / 2 == i, b % 4);
            float c[4] = {};
            hw::mma<E>(c, fa, fb);
            for (int i = 0; i < 4; ++i)
                if (c[i] != 0.f) {
                    const int found[] = {a, b, hw::lane() * 4 + i};
                    json.numbers(found, 3);
                }
        }
}
template <class E>
void print_mma(const char *name) {
    json.key(name);
    json.open("[");
    run<probe_mma<E>>();
    json.close("]");
}

// A tile whose element (row, column) holds row * width + column, and its loads.
template <class T, int width>
T numbered(int rows) {
    const T tile{hw::shared_begin()};
    for (int i = hw::lane(); i < rows * width / kPiece; i += kLanes) {
        hw::Words4 words;
        for (int j = 0; j < 4; ++j) words.x[j] = (uint32_t)(8 * i + 2 * j) | (uint32_t)(8 * i + 2 * j + 1) << 16;
        hw::store_shared(tile.piece(i / (width / kPiece), i % (width / kPiece)), words);
    }
    hw::sync_warp();
    return tile;
}
void put_a(const uint32_t (&a)[4]) {
    for (int i = 0; i < 4; ++i) put(i, a[i]);
}
void put_b(const TwoB &b) {
    for (int i = 0; i < 2; ++i) put(i, b.first[i]), put(2 + i, b.second[i]);
}

int at_row, at_column;  // of the load in question
enum class Which { kA, kB, kBTransposed };

template <int W, Which which, bool lanes>
void load() {
    const auto tile = numbered<Tile<W>, W>(32);
    uint32_t a[4];
    if constexpr (which == Which::kA) {
        if constexpr (lanes)
            Lanes<W>().load_a(a, tile, at_row, at_column);
        else
            load_a(a, tile, at_row, at_column);
        put_a(a);
    } else if constexpr (which == Which::kB) {
        put_b(lanes ? Lanes<W>().load_b(tile, at_row, at_column) : load_b(tile, at_row, at_column));
    } else {
        put_b(lanes ? Lanes<W>().load_b_transposed(tile, at_row, at_column)
                    : load_b_transposed(tile, at_row, at_column));
    }
}
void load_ds() {
    uint32_t a[4];
    load_a_transposed(a, numbered<DsTile, 32>(32), at_row, at_column);
    put_a(a);
}

template <void (*body)()>
void print_load(const char *operand, const char *by, int width) {
    for (at_row = 0; at_row <= 16; at_row += 8)
        for (at_column = 0; at_column < width; at_column += 16) {
            host::watch = [](host::Touch what, uint32_t at, uint32_t, const host::Lane &lane, host::Here) {
                if (what == host::Touch::kMatrix) given[lane.thread] = (int)at;
            };
            run<body>();
            host::watch = nullptr;
            json.open("{");
            json.key("operand");
            std::printf("\"%s\"", operand);
            json.first = false;
            json.key("by");
            std::printf("\"%s\"", by);
            json.first = false;
            json.key("width"), json.number(width);
            json.key("row"), json.number(at_row);
            json.key("column"), json.number(at_column);
            json.key("given"), json.numbers(given, kLanes);
            print_lanes("held", 8);
            json.close("}");
        }
}
template <int W>
void print_loads() {
    print_load<load<W, Which::kA, false>>("a", "tiles.h", W);
    print_load<load<W, Which::kB, false>>("b", "tiles.h", W);
    print_load<load<W, Which::kBTransposed, false>>("b transposed", "tiles.h", W);
    print_load<load<W, Which::kA, true>>("a", "Lanes", W);
    print_load<load<W, Which::kB, true>>("b", "Lanes", W);
    print_load<load<W, Which::kBTransposed, true>>("b transposed", "Lanes", W);
}

// Byte addresses of pieces: [row][piece].
template <class T>
void print_tile(const char *name, int pieces) {
    json.key(name);
    json.open("[");
    for (int row = 0; row < 32; ++row) {
        int at[16];
        for (int piece = 0; piece < pieces; ++piece) at[piece] = (int)T{hw::shared_begin()}.piece(row, piece).at;
        json.numbers(at, pieces);
    }
    json.close("]");
}

// Accumulators [16][16] side by side, numbered by row * 16 + column, as A; and through the tile of dS, as its A, which
// is of queries and keys.
template <class E>
void accumulators_as_a(uint32_t (&a)[4]) {
    float c[2][4];
    for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) c[n][i] = (float)(row_of(i) * 16 + n * kColumns + column_of(i));
    as_a<E>(a, c[0], c[1]);
}
template <class E>
void put_values(const uint32_t (&a)[4]) {
    for (int i = 0; i < 4; ++i) mine()[2 * i] = (int)hw::low<E>(a[i]), mine()[2 * i + 1] = (int)hw::high<E>(a[i]);
}
template <class E>
void as_left_operand() {
    uint32_t a[4];
    accumulators_as_a<E>(a);
    put_values<E>(a);
}
template <class E>
void through_ds() {
    uint32_t a[4];
    accumulators_as_a<E>(a);
    const DsTile ds{hw::shared_begin()};
    KeySide<E, 64, 1, 32>::store_ds(ds, a, 16, 2);
    hw::sync_warp();
    load_a_transposed(a, ds, 16, 16);
    put_values<E>(a);
}

// 16 rows of a tensor as A: [lane][8 numbers of each 16 columns]
template <int D>
void rows_in_registers() {
    auto pieces = load_rows<D>((const hw::BF16 *)global, D, 16);
    uint32_t a[D / kStep][4];
    rows_as_a<D>(a, pieces);
    for (int k = 0; k < D / kStep; ++k)
        for (int i = 0; i < 4; ++i) put(4 * k + i, a[k][i]);
}
template <int D>
void print_rows(const char *name) {
    for (int i = 0; i < 16 * D; ++i) global[i] = (uint16_t)i;
    run<rows_in_registers<D>>();
    print_lanes(name, D / 2);
}

// What accumulators [16][D] leave in a tensor: there the number at (row, column) is lane * D / 2 + element.
template <int D>
void rows_in_memory() {
    float c[D / kColumns][4];
    for (int n = 0; n < D / kColumns; ++n)
        for (int i = 0; i < 4; ++i) c[n][i] = (float)(hw::lane() * (D / 2) + 4 * n + i);
    const float one[2] = {1.f, 1.f};
    store_rows<hw::FP16, D>((hw::FP16 *)global, D, 16, c, one);  // which has the integers to 2048
}
template <int D>
void print_memory(const char *name) {
    run<rows_in_memory<D>>();
    json.key(name);
    json.open("[");
    for (int row = 0; row < 16; ++row) {
        int x[D];
        for (int i = 0; i < D; ++i) x[i] = (int)hw::to_float(hw::FP16{global[row * D + i]});
        json.numbers(x, D);
    }
    json.close("]");
}

}  // namespace

int main() {
    json.open("{");
    run<accumulator>();
    print_lanes("accumulator", 8);
    print_mma<hw::BF16>("mma bf16");
    print_mma<hw::FP16>("mma fp16");
    json.key("loads");
    json.open("[");
    print_loads<64>();
    print_loads<128>();
    print_load<load_ds>("a transposed", "DsTile", 32);
    json.close("]");
    json.key("tiles");
    json.open("{");
    print_tile<Tile<64>>("64", 8);
    print_tile<Tile<128>>("128", 16);
    print_tile<DsTile>("32", 4);
    json.close("}");
    run<as_left_operand<hw::BF16>>();
    print_lanes("as_a bf16", 8);
    run<as_left_operand<hw::FP16>>();
    print_lanes("as_a fp16", 8);
    run<through_ds<hw::BF16>>();
    print_lanes("through dS bf16", 8);
    run<through_ds<hw::FP16>>();
    print_lanes("through dS fp16", 8);
    print_rows<64>("rows_as_a 64");
    print_rows<128>("rows_as_a 128");
    print_memory<64>("store_rows 64");
    print_memory<128>("store_rows 128");
    json.close("}\n");
    return check::result();
}
