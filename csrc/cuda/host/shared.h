// A block's shared memory, and who wrote and read each two bytes of it. An access is an error if it lies outside, is
// not aligned, reads what nobody wrote, touches what an asynchronous copy may still change, or has no order with
// another thread's access of which one is a write.
#pragma once
#include "cuda/host/state.h"

namespace prefixattn::host {

enum class Cell : uint8_t { kUnwritten, kWritten, kPending, kNone };

class SharedMemory {
  public:
    void start(uint32_t size) {
        size_ = size;
        const size_t units = (size + 1) / kUnit;
        bytes_.assign(size + kAlign, kPoison);
        at_ = bytes_.data() + (kAlign - (uintptr_t)bytes_.data() % kAlign) % kAlign;
        writes_.assign(units, Write{});
        readers_.assign(units, 0);
        for (int w = 0; w < the.warps_in_block; ++w)
            if (reads_[w].size() < units) reads_[w].resize(units);
    }

    // `together`: the lane gives the address of what the warp reads, so that the reader is no lane by itself.
    const unsigned char *read(uint32_t at, uint32_t bytes, const Lane &lane, Here here, bool together) {
        check_place(at, bytes, lane, here, "reads");
        const int w = lane.thread / kLanes, l = lane.thread % kLanes;
        const Clock &clock = the.warps[(size_t)w]->clock;
        const uint32_t epoch = clock.seen[w];
        const Read mine{epoch, (uint8_t)l, (uint8_t)(together ? l ^ 1 : l), sites.number(here)};
        Write passed(0, 0, Cell::kNone, 0);
        for (uint32_t u = at / kUnit; u < (at + bytes) / kUnit; ++u) {
            const Write &write = writes_[u];
            if (!(write == passed)) {
                check_read(write, u, lane, clock, here, together);
                passed = write;
            }
            Read &read = reads_[w][u];
            if ((readers_[u] >> w & 1) && read.epoch == epoch) {
                if (read.lane != l)
                    read.other = (uint8_t)l;
                else if (together && read.other == l)
                    read.other = mine.other;
            } else {
                read = mine;
                readers_[u] |= 1u << w;
            }
        }
        return at_ + at;
    }

    unsigned char *write(uint32_t at, uint32_t bytes, const Lane &lane, Here here, Cell cell) {
        check_place(at, bytes, lane, here, cell == Cell::kPending ? "copies" : "writes");
        const int w = lane.thread / kLanes;
        const Clock &clock = the.warps[(size_t)w]->clock;
        const Write mine(clock.seen[w], lane.thread, cell, sites.number(here));
        Write passed(0, 0, Cell::kNone, 0);
        for (uint32_t u = at / kUnit; u < (at + bytes) / kUnit; ++u) {
            Write &write = writes_[u];
            if (!(write == passed)) {
                check_write(write, u, lane, clock, here);
                passed = write;
            }
            if (readers_[u]) check_readers(u, lane, clock, here);
            readers_[u] = 0;
            write = mine;
        }
        return at_ + at;
    }

    // An asynchronous copy counts as a write of its thread at the wait.
    unsigned char *arrive(uint32_t at, uint32_t bytes, const Lane &lane) {
        const int w = lane.thread / kLanes;
        for (uint32_t u = at / kUnit; u < (at + bytes) / kUnit; ++u) {
            writes_[u].epoch = the.warps[(size_t)w]->clock.seen[w];
            writes_[u].cell = (uint32_t)Cell::kWritten;
        }
        return at_ + at;
    }
    void poison(uint32_t at, uint32_t bytes) { std::memset(at_ + at, kPoison, bytes); }

  private:
    static constexpr uint32_t kUnit = 2, kAlign = 128;
    static constexpr unsigned char kPoison = 0xff;  // NaN in all types

    struct Write {  // the last
        uint32_t epoch = 0;
        uint32_t thread : 10, cell : 2, site : 16;
        Write() : thread(0), cell((uint32_t)Cell::kUnwritten), site(0) {}
        Write(uint32_t epoch, int thread, Cell cell, uint16_t site)
            : epoch(epoch), thread((uint32_t)thread & 1023), cell((uint32_t)cell & 3), site(site) {}
        bool is(Cell other) const { return cell == (uint32_t)other; }
        bool operator==(const Write &o) const {
            return epoch == o.epoch && thread == o.thread && cell == o.cell && site == o.site;
        }
    };
    struct Read {  // the last of a warp
        uint32_t epoch;
        uint8_t lane, other;  // which read in that epoch; the same: no other
        uint16_t site;        // of the first
    };

    void check_place(uint32_t at, uint32_t bytes, const Lane &lane, Here here, const char *what) const {
        if (at > size_ || size_ - at < bytes)
            fail(here, lane.thread, format("%s %u bytes at shared byte %d of %u", what, bytes, (int)at, size_));
        if (at % bytes)
            fail(here, lane.thread, format("%s %u bytes at shared byte %u, which is not aligned", what, bytes, at));
    }
    static std::string writer(const Write &w) {
        return format("thread %d wrote at %s", (int)w.thread, text_of(sites[(uint16_t)w.site]).c_str());
    }
    static std::string copier(const Write &w) {
        return format("an asynchronous copy of thread %d (%s) still fills", (int)w.thread,
                      text_of(sites[(uint16_t)w.site]).c_str());
    }
    void check_read(const Write &write, uint32_t u, const Lane &lane, const Clock &clock, Here here,
                    bool together) const {
        if (write.is(Cell::kUnwritten))
            fail(here, lane.thread, format("reads shared byte %u, which nobody has written yet", u * kUnit));
        if (write.is(Cell::kPending))
            fail(here, lane.thread, format("reads shared byte %u, which %s", u * kUnit, copier(write).c_str()));
        const bool own =
            (int)write.thread == lane.thread && together && write.epoch == clock.seen[lane.thread / kLanes];
        if (own || !is_before((int)write.thread, write.epoch, lane.thread, clock))
            fail(here, lane.thread,
                 format("reads shared byte %u, which %s with no barrier between", u * kUnit, writer(write).c_str()));
    }
    void check_write(const Write &write, uint32_t u, const Lane &lane, const Clock &clock, Here here) const {
        if (write.is(Cell::kUnwritten)) return;
        if (write.is(Cell::kPending))
            fail(here, lane.thread, format("writes shared byte %u, which %s", u * kUnit, copier(write).c_str()));
        if (!is_before((int)write.thread, write.epoch, lane.thread, clock))
            fail(here, lane.thread,
                 format("writes shared byte %u, which %s with no barrier between", u * kUnit, writer(write).c_str()));
    }
    void check_readers(uint32_t u, const Lane &lane, const Clock &clock, Here here) const {
        const int w = lane.thread / kLanes, l = lane.thread % kLanes;
        for (uint32_t rest = readers_[u]; rest; rest &= rest - 1) {
            const int r = __builtin_ctz(rest);
            const Read &read = reads_[r][u];
            const int reader = r == w && read.lane == l ? read.other : read.lane;
            if (!is_before(r * kLanes + reader, read.epoch, lane.thread, clock))
                fail(here, lane.thread,
                     format("writes shared byte %u, which thread %d read at %s with no barrier between", u * kUnit,
                            r * kLanes + reader, text_of(sites[read.site]).c_str()));
        }
    }

    uint32_t size_ = 0;
    std::vector<unsigned char> bytes_;
    unsigned char *at_ = nullptr;
    std::vector<Write> writes_;
    std::vector<uint32_t> readers_;        // warps that read since the last write
    std::vector<Read> reads_[kMostWarps];  // of those
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
