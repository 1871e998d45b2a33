// A block's shared memory, and who wrote and read each two bytes of it. An access is an error if it lies outside, is
// not aligned, reads what nobody wrote, touches what an asynchronous copy may still change, or has no order with
// another thread's access of which one is a write.
#pragma once
#include "cuda/host/state.h"

namespace prefixattn::host {

enum class Cell : uint8_t { kUnwritten, kWritten, kPending };

class SharedMemory {
  public:
    void start(uint32_t size) {
        size_ = size;
        bytes_.assign(size + kAlign, kPoison);
        at_ = bytes_.data() + (kAlign - (uintptr_t)bytes_.data() % kAlign) % kAlign;
        chunks_.start((size + kChunk - 1) / kChunk);
        units_.start((size + kChunk - 1) / kChunk * kUnits);
        is_split_.assign((size + kChunk - 1) / kChunk, 0);
    }

    // `together`: the lane gives the address of what the warp reads, so that the reader is no lane by itself.
    const unsigned char *read(uint32_t at, uint32_t bytes, const Lane &lane, Here here, bool together) {
        check_place(at, bytes, lane, here, "reads");
        const Access access = access_of(lane, here, together);
        const uint32_t chunk = at / kChunk;
        if (bytes == kChunk && !is_split_[chunk]) {
            read_cell(chunks_, chunk, at, access);
        } else {
            split(chunk);
            for (uint32_t b = at; b < at + bytes; b += kUnit) read_cell(units_, b / kUnit, b, access);
        }
        return at_ + at;
    }

    unsigned char *write(uint32_t at, uint32_t bytes, const Lane &lane, Here here, Cell cell) {
        check_place(at, bytes, lane, here, cell == Cell::kPending ? "copies" : "writes");
        const Access access = access_of(lane, here, false);
        const Write mine(access.epoch, lane.thread, cell, access.site);
        const uint32_t chunk = at / kChunk;
        if (bytes == kChunk) {
            if (!is_split_[chunk]) check_cell(chunks_, chunk, at, access);
            for (uint32_t b = at; is_split_[chunk] && b < at + bytes; b += kUnit)
                check_cell(units_, b / kUnit, b, access);
            is_split_[chunk] = 0;
            chunks_.set(chunk, mine);
            return at_ + at;
        }
        split(chunk);
        for (uint32_t b = at; b < at + bytes; b += kUnit) {
            check_cell(units_, b / kUnit, b, access);
            units_.set(b / kUnit, mine);
        }
        return at_ + at;
    }

    // An asynchronous copy counts as a write of its thread at the wait. Nothing has split its chunk, or, if it is of
    // fewer bytes, made a whole of it again.
    unsigned char *arrive(uint32_t at, uint32_t bytes, const Lane &lane) {
        if (bytes == kChunk) land(chunks_.writes[at / kChunk], lane);
        for (uint32_t b = at; bytes < kChunk && b < at + bytes; b += kUnit) land(units_.writes[b / kUnit], lane);
        return at_ + at;
    }
    void poison(uint32_t at, uint32_t bytes) { std::memset(at_ + at, kPoison, bytes); }

  private:
    static constexpr uint32_t kUnit = 2, kChunk = 16, kUnits = kChunk / kUnit, kAlign = 128;
    static constexpr unsigned char kPoison = 0xff;  // NaN in all types

    struct Write {
        uint32_t epoch = 0;
        uint32_t thread : 10, cell : 2, site : 16;
        Write() : thread(0), cell((uint32_t)Cell::kUnwritten), site(0) {}
        Write(uint32_t epoch, int thread, Cell cell, uint16_t site)
            : epoch(epoch), thread((uint32_t)thread & 1023), cell((uint32_t)cell & 3), site(site) {}
        bool is(Cell other) const { return cell == (uint32_t)other; }
    };
    static void land(Write &write, const Lane &lane) {
        const int w = lane.thread / kLanes;
        write.epoch = the.warps[(size_t)w]->clock.seen[w];
        write.cell = (uint32_t)Cell::kWritten;
    }
    struct Read {
        uint32_t epoch;
        uint8_t lane, other;  // which read in that epoch; the same: no other
        uint16_t site;        // of the first
    };
    // What is kept of each two bytes, or of 16 that have always been accessed as one.
    struct Cells {
        std::vector<Write> writes;            // the last
        std::vector<uint32_t> readers;        // warps that read since
        std::vector<Read> reads[kMostWarps];  // the last of those
        void start(size_t count) {
            writes.assign(count, Write{});
            readers.assign(count, 0);
            for (int w = 0; w < the.warps_in_block; ++w)
                if (reads[w].size() < count) reads[w].resize(count);
        }
        void set(uint32_t i, Write write) {
            writes[i] = write;
            readers[i] = 0;
        }
    };
    struct Access {
        const Lane &lane;
        const Clock &clock;
        Here here;
        bool together;
        int warp;
        uint32_t epoch;
        uint16_t site;
    };
    static Access access_of(const Lane &lane, Here here, bool together) {
        const int w = lane.thread / kLanes;
        const Clock &clock = the.warps[(size_t)w]->clock;
        return {lane, clock, here, together, w, clock.seen[w], sites.number(here)};
    }

    void split(uint32_t chunk) {
        if (is_split_[chunk]) return;
        is_split_[chunk] = 1;
        const uint32_t readers = chunks_.readers[chunk];
        for (uint32_t u = chunk * kUnits; u < (chunk + 1) * kUnits; ++u) {
            units_.writes[u] = chunks_.writes[chunk];
            units_.readers[u] = readers;
            for (uint32_t rest = readers; rest; rest &= rest - 1) {
                const int w = __builtin_ctz(rest);
                units_.reads[w][u] = chunks_.reads[w][chunk];
            }
        }
    }

    static void read_cell(Cells &cells, uint32_t i, uint32_t at, const Access &a) {
        const Write &write = cells.writes[i];
        const bool own = a.together && (int)write.thread == a.lane.thread && write.epoch == a.epoch;
        if (!write.is(Cell::kWritten) || own || !is_before((int)write.thread, write.epoch, a.lane.thread, a.clock))
            report(write, at, a, a.together ? "reads for its warp" : "reads");
        const uint8_t l = (uint8_t)(a.lane.thread % kLanes), other = a.together ? l ^ 1 : l;
        Read &read = cells.reads[a.warp][i];
        if ((cells.readers[i] >> a.warp & 1) && read.epoch == a.epoch) {
            if (read.lane != l)
                read.other = l;
            else if (a.together)
                read.other = other;
        } else {
            read = {a.epoch, l, other, a.site};
            cells.readers[i] |= 1u << a.warp;
        }
    }
    static void check_cell(const Cells &cells, uint32_t i, uint32_t at, const Access &a) {
        const Write &write = cells.writes[i];
        const bool ordered = is_before((int)write.thread, write.epoch, a.lane.thread, a.clock);
        if (write.is(Cell::kPending) || (write.is(Cell::kWritten) && !ordered)) report(write, at, a, "writes");
        for (uint32_t rest = cells.readers[i]; rest; rest &= rest - 1) {
            const int w = __builtin_ctz(rest);
            const Read &read = cells.reads[w][i];
            const bool own = w * kLanes + read.lane == a.lane.thread;
            const int reader = w * kLanes + (own ? read.other : read.lane);
            if (!is_before(reader, read.epoch, a.lane.thread, a.clock))
                fail(a.here, a.lane.thread,
                     format("writes shared byte %u, which thread %d read at %s with no barrier between", at, reader,
                            text_of(sites[read.site]).c_str()));
        }
    }

    void check_place(uint32_t at, uint32_t bytes, const Lane &lane, Here here, const char *what) const {
        if (at > size_ || size_ - at < bytes)
            fail(here, lane.thread, format("%s %u bytes at shared byte %d of %u", what, bytes, (int)at, size_));
        if (at % bytes)
            fail(here, lane.thread, format("%s %u bytes at shared byte %u, which is not aligned", what, bytes, at));
    }
    [[noreturn]] static void report(const Write &w, uint32_t at, const Access &a, const char *what) {
        const std::string place = text_of(sites[(uint16_t)w.site]);
        const int writer = (int)w.thread;
        std::string words = format("%s shared byte %u, which ", what, at);
        if (w.is(Cell::kUnwritten))
            words += "nobody has written yet";
        else if (w.is(Cell::kPending))
            words += format("an asynchronous copy of thread %d (%s) still fills", writer, place.c_str());
        else
            words += format("thread %d wrote at %s with no barrier between", writer, place.c_str());
        fail(a.here, a.lane.thread, std::move(words));
    }

    uint32_t size_ = 0;
    std::vector<unsigned char> bytes_;
    unsigned char *at_ = nullptr;
    Cells chunks_, units_;
    std::vector<uint8_t> is_split_;  // chunks whose cells are those of their units
};
inline SharedMemory shared;

inline void load_shared(uint32_t at, void *value, uint32_t bytes, Here here) {
    std::memcpy(value, shared.read(at, bytes, *the.lane, here, false), bytes);
    the.counts.shared_load_bytes += bytes;
}
inline void store_shared(uint32_t at, const void *value, uint32_t bytes, Here here) {
    std::memcpy(shared.write(at, bytes, *the.lane, here, Cell::kWritten), value, bytes);
    the.counts.shared_store_bytes += bytes;
}

}  // namespace prefixattn::host
