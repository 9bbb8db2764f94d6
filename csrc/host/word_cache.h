// An exact cache for tokenizers whose pieces never cross certain places of a text.
//
// A text is cut at those places into units; a unit is tokenized once, by the tokenizer itself, and remembered.
// Which places are safe is decided per tokenizer in `megatron_retro/data/word_boundaries.py`; here they are applied.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "byte_level.h"

namespace host {

enum class Strip { nothing, one_space, all_spaces };

struct Boundaries {
    std::array<bool, 256> spaces{};         // bytes that a unit may begin with, after something that is not one
    std::array<bool, 128> closed{};         // ASCII that no unit may end with when a space follows
    std::vector<uint32_t> closed_wide;      // other code points of that kind, ascending
    bool wide_closed = false;               // no unit ends with a character beyond ASCII
    // Every "\n" begins a unit; the empty key stands for what the tokenizer puts before a text that begins so.
    bool newline_starts = false;
    Strip strip = Strip::nothing;           // what a unit's key leaves out at its front
    bool gpt2_cuts = false;                 // units also end where GPT-2's pattern surely cuts
    std::vector<std::string> atoms;         // a text that holds one of these is not cut so
};

class WordCache {
public:
    WordCache(Boundaries boundaries, size_t memory_limit);

    // Plain words are merged here instead of being asked for.
    void use_merges(ByteLevelMerges merges) { merges_.emplace(std::move(merges)); }

    // Cuts a text; units that are not known yet are collected.
    void scan(std::string_view text);
    // The keys whose ids are wanted, in order; valid until `fill` returns.
    std::vector<std::string_view> missing() const;
    // The ids of one missing key; to be called for each, in order.
    void fill(const std::vector<int32_t>& ids);
    // How many tokens each scanned text has, and all tokens. Then a new round of texts may begin.
    std::vector<int64_t> lengths() const;
    int64_t total() const;
    template <typename Token>
    void emit(Token* target) const;
    void finish();
    void forget();
    size_t size() const { return entries_.size(); }

private:
    struct Entry {
        uint64_t key_start;
        uint64_t ids_start;
        uint32_t key_length;
        int32_t num_ids;  // -1: not known yet
        char key[24];     // if it fits
    };
    struct Waiting {
        std::string_view key;
        uint64_t hash;
    };

    void scan_words(std::string_view text);
    void scan_units(std::string_view text);
    bool holds_atom(std::string_view text) const;
    void add_unit(std::string_view unit, bool is_first);
    void settle(uint32_t entry, const std::vector<int32_t>& ids);
    void await(std::string_view key);
    void look_up();
    uint32_t entry_of(std::string_view key, uint64_t hash);
    const char* key_of(const Entry& entry) const;
    void grow();
    size_t memory() const;

    Boundaries boundaries_;
    std::optional<ByteLevelMerges> merges_;
    std::vector<int32_t> merged_;
    size_t memory_limit_;
    std::vector<uint64_t> table_;  // hash tag in the high half, entry + 1 in the low one
    std::vector<Entry> entries_;
    std::vector<char> keys_;
    std::vector<int32_t> ids_;
    std::vector<uint32_t> missing_;
    std::vector<Waiting> waiting_;
    size_t filled_ = 0;
    std::vector<uint32_t> units_;
    std::vector<size_t> text_ends_;
};

}  // namespace host
