// Byte-level BPE of plain ASCII words, and where GPT-2's splitting pattern cuts between ASCII characters.
//
// Words that are anything else go to the tokenizer's own library; see `megatron_retro/data/word_boundaries.py`.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace host {

// Whether GPT-2's pattern surely cuts between text[place - 1] and text[place]; both must be ASCII to be sure.
bool surely_cut(std::string_view text, size_t place);

struct Merge {
    int32_t left, right, merged;  // in order of rank
};

class ByteLevelMerges {
public:
    ByteLevelMerges(const std::array<int32_t, 256>& bytes, const std::vector<Merge>& merges);

    // Ids of a word that the pattern does not cut; false where that is not sure.
    bool encode(std::string_view word, std::vector<int32_t>& ids) const;

private:
    struct Slot {
        uint64_t pair = ~uint64_t(0);
        int32_t rank = 0, merged = 0;
    };

    const Slot* find(int32_t left, int32_t right) const;

    std::array<int32_t, 256> bytes_;
    std::vector<Slot> slots_;
};

}  // namespace host
