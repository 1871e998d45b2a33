// Global memory of a launch: which tensors there are, if the test says so, and who stored what. Two threads that store
// to one address, or one that loads what another stored, need an order: a barrier within a block; between blocks a
// fence and a ticket after the store, and a ticket of the same counter and a fence before the load.
#pragma once
#include <unordered_map>

#include "cuda/host/state.h"

namespace prefixattn::host {

enum class Load { kPlain, kCached, kFresh };

struct Region {
    const unsigned char *begin, *end;
    bool writable;
};

class GlobalMemory {
  public:
    void start_launch() {
        pages_.clear();
        recent_key_ = 0;
        recent_ = nullptr;
        counters_.clear();
    }
    void start_block() {
        stored_.clear();
        tickets_.clear();
        acquired_.clear();
    }

    void allow(Region region) { regions_.push_back(region); }
    void forget_regions() { regions_.clear(); }

    void check_load(const void *from, uint32_t bytes, Load how, Here here, const char *what = "loads") {
        check_place(from, bytes, false, here, what);
        if (pages_.empty()) return;
        Page *page = find(from);
        if (!page) return;
        for (uint32_t u = unit_of(from), i = 0; i < (bytes + 1) / kUnit; ++i) {
            const Store &s = page->stores[u + i];
            if (!s.block) continue;
            if (how == Load::kCached)
                fail(here, format("loads %p through the cache of constants, which %s", from, storer(s).c_str()));
            if (!is_ordered(s))
                fail(here, format("%s %p, which %s, with no order between", what, from, storer(s).c_str()));
        }
    }
    void check_store(void *to, uint32_t bytes, Here here) {
        check_place(to, bytes, true, here, "stores");
        Page &page = make(to);
        const Lane &lane = *the.lane;
        const int w = lane.thread / kLanes;
        const Store mine{the.block_index + 1,   the.warp->clock.seen[w], (uint32_t)lane.fences.size(),
                         (uint16_t)lane.thread, sites.number(here),      0};
        for (uint32_t u = unit_of(to), i = 0; i < bytes / kUnit; ++i) {
            Store &s = page.stores[u + i];
            if (s.block && !is_ordered(s))
                fail(here, format("stores to %p, which %s, with no order between", to, storer(s).c_str()));
            s = mine;
            stored_.push_back(&s);
        }
    }

    void fence() {
        Lane &lane = *the.lane;
        lane.fences.push_back(own_epoch());
        lane.fenced = the.warp->clock;
        for (const Ticket &t : tickets_)
            if (sees(t) && !has_acquired(t.counter)) acquired_.push_back({lane.thread, own_epoch(), t.counter});
    }
    void take_ticket(const void *counter, Here here) {
        check_place(counter, 4, true, here, "counts at");
        const uint32_t number = counters_.emplace(counter, (uint32_t)counters_.size() + 1).first->second;
        tickets_.push_back({the.lane->thread, own_epoch(), number});
        for (Store *s : stored_)
            if (!s->counter && is_fenced(*s)) s->counter = number;
    }

  private:
    static constexpr uint32_t kUnit = 2, kPageBytes = 256;

    struct Store {                       // the last of two bytes
        uint32_t block = 0;              // its index and 1; 0: nobody's
        uint32_t epoch = 0, fences = 0;  // how often its thread had fenced
        uint16_t thread = 0, site = 0;
        uint32_t counter = 0;  // whose ticket tells of it
    };
    struct Page {
        Store stores[kPageBytes / kUnit];
    };
    struct Ticket {  // or a fence after it
        int thread;
        uint32_t epoch, counter;
    };

    static uint32_t own_epoch() { return the.warp->clock.seen[the.warp->index]; }
    static uint32_t unit_of(const void *at) { return (uint32_t)((uintptr_t)at % kPageBytes / kUnit); }
    static bool sees(const Ticket &t) { return is_before(t.thread, t.epoch, the.lane->thread, the.warp->clock); }
    bool has_acquired(uint32_t counter) const {
        for (const Ticket &t : acquired_)
            if (t.counter == counter && sees(t)) return true;
        return false;
    }
    bool is_ordered(const Store &s) const {
        if (s.block == the.block_index + 1) return is_before(s.thread, s.epoch, the.lane->thread, the.warp->clock);
        return s.counter && has_acquired(s.counter);
    }
    // By a fence that the ticket's thread made after it saw the store, or by one of the store's own thread that the
    // ticket's thread has seen.
    static bool is_fenced(const Store &s) {
        const Lane &lane = *the.lane;
        if (s.thread == lane.thread) return s.fences < lane.fences.size();
        if (!lane.fences.empty() && is_before(s.thread, s.epoch, lane.thread, lane.fenced)) return true;
        const Lane &own = the.warps[s.thread / kLanes]->lanes[s.thread % kLanes];
        return s.fences < own.fences.size() && is_before(s.thread, own.fences[s.fences], lane.thread, the.warp->clock);
    }
    std::string storer(const Store &s) const {
        const uint32_t index = s.block - 1, x = (uint32_t)the.grid[0], y = (uint32_t)the.grid[1];
        return format("thread %d of block (%u, %u, %u) stored at %s", s.thread, index % x, index / x % y, index / x / y,
                      text_of(sites[s.site]).c_str());
    }

    void check_place(const void *at, uint32_t bytes, bool writes, Here here, const char *what) {
        if ((uintptr_t)at % bytes)
            fail(here, format("%s %u bytes at global address %p, which is not aligned", what, bytes, at));
        if (regions_.empty()) return;
        const auto *begin = static_cast<const unsigned char *>(at);
        const auto holds = [&](const Region &r) { return r.begin <= begin && begin + bytes <= r.end; };
        if (recent_region_ < regions_.size() && holds(regions_[recent_region_]) &&
            (!writes || regions_[recent_region_].writable))
            return;
        bool found = false;
        for (size_t i = 0; i < regions_.size(); ++i)
            if (holds(regions_[i])) {
                found = true;
                recent_region_ = i;
                if (!writes || regions_[i].writable) return;
            }
        const char *why = found ? "which no kernel may write" : "which is outside of all tensors";
        fail(here, format("%s %u bytes at global address %p, %s%s", what, bytes, at, why, nearest(begin).c_str()));
    }
    std::string nearest(const unsigned char *at) const {
        const Region *best = nullptr;
        for (const Region &r : regions_)
            if (at >= r.begin && (!best || r.begin > best->begin)) best = &r;
        if (!best) return "";
        return format(" (byte %lld of a tensor of %lld)", (long long)(at - best->begin),
                      (long long)(best->end - best->begin));
    }

    // Loads of what nobody stores ask as often as others, so that the answer "none" is remembered too.
    Page *find(const void *at) {
        const uintptr_t key = (uintptr_t)at / kPageBytes;
        if (key != recent_key_) {
            const auto found = pages_.find(key);
            recent_ = found == pages_.end() ? nullptr : found->second.get();
            recent_key_ = key;
        }
        return recent_;
    }
    Page &make(const void *at) {
        if (Page *page = find(at)) return *page;
        std::unique_ptr<Page> &made = pages_[recent_key_];
        made = std::make_unique<Page>();
        recent_ = made.get();
        return *recent_;
    }

    std::vector<Region> regions_;
    size_t recent_region_ = 0;
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
    uintptr_t recent_key_ = 0;
    Page *recent_ = nullptr;
    std::unordered_map<const void *, uint32_t> counters_;
    std::vector<Store *> stored_;  // by this block
    std::vector<Ticket> tickets_, acquired_;
};
inline GlobalMemory global;

inline void load_global(const void *from, void *value, uint32_t bytes, Load how, Here here) {
    global.check_load(from, bytes, how, here);
    std::memcpy(value, from, bytes);
    the.counts.load_bytes += bytes;
}
inline void store_global(void *to, const void *value, uint32_t bytes, Here here) {
    global.check_store(to, bytes, here);
    std::memcpy(to, value, bytes);
    the.counts.store_bytes += bytes;
}
inline void fence_device() { global.fence(); }
inline uint32_t ticket(uint32_t *counter, Here here) {
    global.take_ticket(counter, here);
    return (*counter)++;
}

}  // namespace prefixattn::host
