#include "byte_level.h"

#include <cstddef>

namespace host {

namespace {

enum Class : uint8_t { wide, space, letter, digit, other, control };

constexpr size_t longest_word = 64;

constexpr Class class_of(uint8_t byte) {
    if (byte >= 128) return wide;
    if (byte == ' ' || byte == '\n' || byte == '\t' || byte == '\r') return space;
    if (byte < 33 || byte == 127) return control;
    if ((byte | 32) >= 'a' && (byte | 32) <= 'z') return letter;
    return byte >= '0' && byte <= '9' ? digit : other;
}

struct Classes {
    std::array<Class, 256> of{};
    constexpr Classes() {
        for (int byte = 0; byte < 256; ++byte) of[byte] = class_of(uint8_t(byte));
    }
};

constexpr Classes classes;

Class at(std::string_view text, size_t place) { return classes.of[uint8_t(text[place])]; }

bool is_visible(Class kind) { return kind == letter || kind == digit || kind == other; }

// An optional space and one run of letters, of digits or of other signs; or white space alone.
bool is_one_word(std::string_view word) {
    size_t place = word.size() > 1 && word[0] == ' ' && at(word, 1) != space ? 1 : 0;
    const Class kind = at(word, place);
    if (!is_visible(kind) && kind != space) return false;
    for (; place < word.size(); ++place) {
        if (at(word, place) != kind) return false;
    }
    return true;
}

uint64_t pair_of(int32_t left, int32_t right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }

size_t slot_of(uint64_t pair, size_t count) {
    const uint64_t mixed = pair * 0x9E3779B97F4A7C15ull;
    return (mixed ^ mixed >> 32) & (count - 1);
}

}  // namespace

bool surely_cut(std::string_view text, size_t place) {
    const Class before = at(text, place - 1), after = at(text, place);
    if (is_visible(before) && is_visible(after)) return before != after && text[place - 1] != '\'';
    if (before == space && is_visible(after)) return text[place - 1] != ' ';
    // The last of a run of white space before a word stands apart: with the word if it is a space, else alone.
    return after == space && place + 1 < text.size() && is_visible(at(text, place + 1));
}

ByteLevelMerges::ByteLevelMerges(const std::array<int32_t, 256>& bytes, const std::vector<Merge>& merges)
    : bytes_(bytes), slots_(16) {
    while (slots_.size() < 2 * merges.size()) slots_.resize(2 * slots_.size());
    for (size_t rank = 0; rank < merges.size(); ++rank) {
        const uint64_t pair = pair_of(merges[rank].left, merges[rank].right);
        size_t slot = slot_of(pair, slots_.size());
        while (slots_[slot].pair != ~uint64_t(0)) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = {pair, int32_t(rank), merges[rank].merged};
    }
}

const ByteLevelMerges::Slot* ByteLevelMerges::find(int32_t left, int32_t right) const {
    const uint64_t pair = pair_of(left, right);
    for (size_t slot = slot_of(pair, slots_.size());; slot = (slot + 1) & (slots_.size() - 1)) {
        if (slots_[slot].pair == pair) return &slots_[slot];
        if (slots_[slot].pair == ~uint64_t(0)) return nullptr;
    }
}

bool ByteLevelMerges::encode(std::string_view word, std::vector<int32_t>& ids) const {
    if (word.empty() || word.size() > longest_word || !is_one_word(word)) return false;
    ids.clear();
    for (const char byte : word) ids.push_back(bytes_[uint8_t(byte)]);
    while (ids.size() > 1) {
        const Slot* best = nullptr;
        size_t best_place = 0;
        for (size_t place = 0; place + 1 < ids.size(); ++place) {
            const Slot* slot = find(ids[place], ids[place + 1]);
            if (slot != nullptr && (best == nullptr || slot->rank < best->rank)) best = slot, best_place = place;
        }
        if (best == nullptr) break;
        ids[best_place] = best->merged;
        ids.erase(ids.begin() + ptrdiff_t(best_place) + 1);
    }
    return true;
}

}  // namespace host
