// Sentencepiece's unigram segmentation of single words, to the last bit.
//
// The library adds scores in 32 bits from the start of a text, so where two segmentations of a word are nearly equal the
// choice depends on all words before it. A word is therefore kept with the margin of its best segmentation: where
// rounding cannot reach the margin the kept ids stand, elsewhere the word is segmented again from the running score.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace host {

struct UnigramPiece {
    std::string text;
    float score;
    int32_t id;
    bool is_unused;
};

class UnigramWords {
public:
    // `byte_ids` has 256 ids where unknown characters fall back to bytes, else nothing.
    UnigramWords(const std::vector<UnigramPiece>& pieces, float unknown_score, int32_t unknown_id,
                 std::vector<int32_t> byte_ids);

    // Keeps a normalized word; returns its number.
    int32_t add(std::string_view word);
    void clear();
    size_t memory() const;

    // Appends the ids of one text, given as numbers of words.
    void append(const int32_t* words, int64_t count, std::vector<int32_t>& ids) const;

private:
    struct Node {
        int32_t id;   // -1: unknown
        float score;
        int32_t end;  // in the word
    };
    struct Word {
        uint64_t text_start, ids_start, scores_start;
        uint32_t text_length, num_ids, num_scores;
        float margin, weight;
        uint32_t characters;
    };
    struct Edge {
        uint64_t key = 0;  // parent node + 1 and byte
        int32_t child = 0;
    };
    struct Arrival {
        double score = 0;
        double second = 0;
        int32_t start = -1, id = -1;
        float piece = 0;
        bool has_second = false;
    };

    template <typename Begin, typename Update>
    void each_piece(std::string_view word, const Begin& begin, const Update& update) const;
    float segment(std::string_view word, float before, std::vector<Node>& nodes) const;
    Word measured(std::string_view word);
    void push_ids(std::string_view word, const std::vector<Node>& nodes, std::vector<int32_t>& ids) const;
    int32_t child_of(int32_t node, uint8_t byte) const;
    void insert(const UnigramPiece& piece);
    int32_t make_child(int32_t node, uint8_t byte);
    void grow();

    std::vector<Edge> edges_;
    size_t num_edges_ = 0;
    std::vector<int32_t> piece_of_node_;
    std::vector<UnigramPiece> pieces_;
    float unknown_score_;
    int32_t unknown_id_;
    std::vector<int32_t> byte_ids_;
    std::vector<Arrival> arrivals_;
    std::vector<Word> words_;
    std::string texts_;
    std::vector<int32_t> ids_;
    std::vector<float> scores_;
};

}  // namespace host
