#include "word_cache.h"

#include <algorithm>
#include <cstring>

namespace host {

namespace {

constexpr size_t first_slots = 1 << 14;
constexpr size_t most_waiting = 512;
constexpr size_t ahead = 8;

uint64_t load_tail(const char* bytes, size_t count) {
    uint64_t value = 0;
    std::memcpy(&value, bytes, count);
    return value;
}

uint64_t hash_of(std::string_view key) {
    uint64_t state = 0x9E3779B97F4A7C15ull ^ key.size();
    const char* at = key.data();
    size_t left = key.size();
    for (; left >= 8; at += 8, left -= 8) {
        state = (state ^ load_tail(at, 8)) * 0xBF58476D1CE4E5B9ull;
        state ^= state >> 29;
    }
    state = (state ^ load_tail(at, left)) * 0x94D049BB133111EBull;
    return state ^ (state >> 32);
}

// The code point that ends just before `end`, in valid UTF-8.
uint32_t code_point_before(const char* begin, const char* end) {
    const char* at = end - 1;
    while (at > begin && (uint8_t(*at) & 0xC0) == 0x80) --at;
    const uint8_t lead = uint8_t(*at);
    uint32_t point = lead < 0x80 ? lead : lead < 0xE0 ? lead & 0x1F : lead < 0xF0 ? lead & 0x0F : lead & 0x07;
    for (++at; at < end; ++at) point = point << 6 | (uint8_t(*at) & 0x3F);
    return point;
}

bool at_newline(const char* at, const char* end) { return at < end && *at == '\n'; }

bool may_end(const Boundaries& boundaries, const char* begin, const char* end) {
    const uint8_t last = uint8_t(end[-1]);
    if (last < 128) return !boundaries.closed[last];
    if (boundaries.wide_closed) return false;
    const auto& wide = boundaries.closed_wide;
    return !std::binary_search(wide.begin(), wide.end(), code_point_before(begin, end));
}

}  // namespace

WordCache::WordCache(Boundaries boundaries, size_t memory_limit)
    : boundaries_(std::move(boundaries)), memory_limit_(memory_limit), table_(first_slots) {}

void WordCache::scan(std::string_view text) {
    if (boundaries_.gpt2_cuts && !holds_atom(text)) scan_words(text);
    else scan_units(text);
    look_up();
    text_ends_.push_back(units_.size());
}

bool WordCache::holds_atom(std::string_view text) const {
    const auto& atoms = boundaries_.atoms;
    return std::any_of(atoms.begin(), atoms.end(),
                       [&](const std::string& atom) { return text.find(atom) != std::string_view::npos; });
}

void WordCache::scan_words(std::string_view text) {
    const char* const begin = text.data();
    size_t unit = 0;
    for (size_t place = 1; place < text.size(); ++place) {
        const bool spaced = boundaries_.spaces[uint8_t(text[place])] && !boundaries_.spaces[uint8_t(text[place - 1])] &&
                            may_end(boundaries_, begin, begin + place);
        if (!spaced && !surely_cut(text, place)) continue;
        add_unit(text.substr(unit, place - unit), unit == 0);
        unit = place;
    }
    if (unit < text.size()) add_unit(text.substr(unit), unit == 0);
}

void WordCache::scan_units(std::string_view text) {
    const char* const begin = text.data();
    const char* const end = begin + text.size();
    const char* unit = begin;
    const auto& spaces = boundaries_.spaces;
    if (boundaries_.newline_starts && at_newline(begin, end)) await({});
    for (const char* at = begin; at < end; ++at) {
        const uint8_t byte = uint8_t(*at);
        if (byte == '\n' && boundaries_.newline_starts) {
            if (at > unit) add_unit({unit, size_t(at - unit)}, unit == begin);
            unit = at;
            continue;
        }
        if (!spaces[byte] || at == unit) continue;
        const char* after = at + 1;
        while (after < end && spaces[uint8_t(*after)]) ++after;
        const bool newline = boundaries_.newline_starts && at_newline(after, end);
        if (after < end && !newline && !spaces[uint8_t(at[-1])] && may_end(boundaries_, begin, at)) {
            add_unit({unit, size_t(at - unit)}, unit == begin);
            unit = at;
        }
        at = after - 1;
    }
    if (unit < end) add_unit({unit, size_t(end - unit)}, unit == begin);
}

void WordCache::add_unit(std::string_view unit, bool is_first) {
    if (boundaries_.strip == Strip::all_spaces) {
        while (!unit.empty() && boundaries_.spaces[uint8_t(unit.front())]) unit.remove_prefix(1);
        if (unit.empty()) return;
    } else if (boundaries_.strip == Strip::one_space && !is_first && unit.front() == ' ') {
        unit.remove_prefix(1);
    }
    await(unit);
}

void WordCache::await(std::string_view key) {
    waiting_.push_back({key, hash_of(key)});
    if (waiting_.size() == most_waiting) look_up();
}

// Lookups of many keys, the memory of later ones fetched while earlier ones are compared.
void WordCache::look_up() {
    const auto slot_of = [this](size_t place) { return waiting_[place].hash & (table_.size() - 1); };
    for (size_t place = 0; place < waiting_.size(); ++place) {
        if (place + 2 * ahead < waiting_.size()) __builtin_prefetch(&table_[slot_of(place + 2 * ahead)]);
        if (place + ahead < waiting_.size()) {
            const uint32_t number = uint32_t(table_[slot_of(place + ahead)]);
            if (number != 0) __builtin_prefetch(&entries_[number - 1]);
        }
        units_.push_back(entry_of(waiting_[place].key, waiting_[place].hash));
    }
    waiting_.clear();
}

uint32_t WordCache::entry_of(std::string_view key, uint64_t hash) {
    const uint64_t tag = hash >> 32 << 32;
    for (size_t slot = hash & (table_.size() - 1);; slot = (slot + 1) & (table_.size() - 1)) {
        const uint64_t found = table_[slot];
        if (found == 0) {
            const uint32_t number = uint32_t(entries_.size());
            table_[slot] = tag | (number + 1);
            entries_.push_back({keys_.size(), 0, uint32_t(key.size()), -1, {}});
            if (key.size() <= sizeof(Entry::key)) std::memcpy(entries_.back().key, key.data(), key.size());
            else keys_.insert(keys_.end(), key.begin(), key.end());
            if (merges_ && merges_->encode(key, merged_)) settle(number, merged_);
            else missing_.push_back(number);
            if (entries_.size() * 2 > table_.size()) grow();
            return number;
        }
        if ((found >> 32 << 32) != tag) continue;
        const Entry& entry = entries_[uint32_t(found) - 1];
        if (entry.key_length == key.size() && !std::memcmp(key_of(entry), key.data(), key.size())) {
            return uint32_t(found) - 1;
        }
    }
}

void WordCache::grow() {
    table_.assign(table_.size() * 2, 0);
    for (size_t number = 0; number < entries_.size(); ++number) {
        const Entry& entry = entries_[number];
        const uint64_t hash = hash_of({key_of(entry), entry.key_length});
        size_t slot = hash & (table_.size() - 1);
        while (table_[slot] != 0) slot = (slot + 1) & (table_.size() - 1);
        table_[slot] = (hash >> 32 << 32) | (number + 1);
    }
}

std::vector<std::string_view> WordCache::missing() const {
    std::vector<std::string_view> keys;
    keys.reserve(missing_.size() - filled_);
    for (size_t place = filled_; place < missing_.size(); ++place) {
        const Entry& entry = entries_[missing_[place]];
        keys.emplace_back(key_of(entry), entry.key_length);
    }
    return keys;
}

void WordCache::fill(const std::vector<int32_t>& ids) { settle(missing_.at(filled_++), ids); }

void WordCache::settle(uint32_t number, const std::vector<int32_t>& ids) {
    Entry& entry = entries_[number];
    entry.ids_start = ids_.size();
    entry.num_ids = int32_t(ids.size());
    ids_.insert(ids_.end(), ids.begin(), ids.end());
}

std::vector<int64_t> WordCache::lengths() const {
    std::vector<int64_t> lengths;
    lengths.reserve(text_ends_.size());
    size_t unit = 0;
    for (const size_t end : text_ends_) {
        int64_t count = 0;
        for (; unit < end; ++unit) count += entries_[units_[unit]].num_ids;
        lengths.push_back(count);
    }
    return lengths;
}

int64_t WordCache::total() const {
    int64_t count = 0;
    for (const uint32_t unit : units_) count += entries_[unit].num_ids;
    return count;
}

template <typename Token>
void WordCache::emit(Token* target) const {
    for (const uint32_t unit : units_) {
        const Entry& entry = entries_[unit];
        const int32_t* from = ids_.data() + entry.ids_start;
        for (int32_t place = 0; place < entry.num_ids; ++place) *target++ = Token(from[place]);
    }
}

template void WordCache::emit<uint16_t>(uint16_t*) const;
template void WordCache::emit<int32_t>(int32_t*) const;

void WordCache::finish() {
    units_.clear();
    text_ends_.clear();
    missing_.clear();
    filled_ = 0;
    if (memory() > memory_limit_) forget();
}

const char* WordCache::key_of(const Entry& entry) const {
    return entry.key_length <= sizeof(entry.key) ? entry.key : keys_.data() + entry.key_start;
}

size_t WordCache::memory() const {
    return table_.size() * sizeof(uint64_t) + entries_.size() * sizeof(Entry) + keys_.size() + ids_.size() * 4;
}

void WordCache::forget() {
    table_ = std::vector<uint64_t>(first_slots);
    entries_ = {};
    keys_ = {};
    ids_ = {};
}

}  // namespace host
