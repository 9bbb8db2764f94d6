#include "charsmap.h"

#include <cstring>
#include <stdexcept>
#include <vector>

namespace host {

namespace {

// The longest of sentencepiece's own rules has some 100,000 paths.
constexpr size_t most_visits = 1 << 22;

// A unit of the double array, as Darts-clone packs it.
struct Unit {
    uint32_t bits;
    bool has_leaf() const { return bits >> 8 & 1; }
    uint32_t label() const { return bits & (1u << 31 | 0xFF); }
    uint32_t offset() const { return bits >> 10 << ((bits & 1u << 9) >> 6); }
};

class Rules {
public:
    Rules(const char* data, size_t count) : data_(data), count_(count) {}

    // Walks every rule below `node`; `depth` bytes were read, `spaced` says that one of them was a space.
    bool touches(size_t node, size_t depth, bool spaced, std::string_view spaces) const {
        // A damaged array may lead in circles.
        if (++visits_ > most_visits) throw std::invalid_argument("the normalization rules are damaged");
        if (depth > 64) return true;
        if (spaced && depth > 1) return true;
        const size_t base = node ^ unit(node).offset();
        for (uint32_t label = 1; label < 256; ++label) {
            const size_t child = base ^ label;
            if (child >= count_ || unit(child).label() != label) continue;
            const bool space = spaces.find(char(label)) != std::string_view::npos;
            if (touches(child, depth + 1, spaced || space, spaces)) return true;
        }
        return false;
    }

private:
    Unit unit(size_t place) const {
        if (place >= count_) throw std::invalid_argument("the normalization rules are damaged");
        Unit found;
        std::memcpy(&found.bits, data_ + 4 * place, 4);
        return found;
    }
    const char* data_;
    size_t count_;
    mutable size_t visits_ = 0;
};

}  // namespace

bool rules_touch_spaces(std::string_view charsmap, std::string_view spaces) {
    if (charsmap.empty()) return false;
    uint32_t trie_bytes;
    if (charsmap.size() < 4) throw std::invalid_argument("the normalization rules are damaged");
    std::memcpy(&trie_bytes, charsmap.data(), 4);
    if (trie_bytes % 4 || trie_bytes > charsmap.size() - 4) {
        throw std::invalid_argument("the normalization rules are damaged");
    }
    if (charsmap.substr(4 + trie_bytes).find("\xE2\x96\x81") != std::string_view::npos) return true;
    return Rules(charsmap.data() + 4, trie_bytes / 4).touches(0, 0, false, spaces);
}

}  // namespace host
