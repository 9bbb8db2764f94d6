#include "unigram.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace host {

namespace {

// Where the best score before a character is below this, the library counts from zero again.
constexpr float lowest_score = -100000;

size_t character_length(uint8_t lead) { return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

uint64_t key_of(int32_t node, uint8_t byte) { return (uint64_t(node) + 1) << 8 | byte; }

size_t slot_of(uint64_t key, size_t count) {
    const uint64_t mixed = key * 0x9E3779B97F4A7C15ull;
    return (mixed ^ mixed >> 29) & (count - 1);
}

// The distance between neighbouring 32-bit numbers of this size.
float spacing(float size) { return std::nextafter(size, std::numeric_limits<float>::infinity()) - size; }

}  // namespace

UnigramWords::UnigramWords(const std::vector<UnigramPiece>& pieces, float unknown_score, int32_t unknown_id,
                           std::vector<int32_t> byte_ids)
    : edges_(1024), piece_of_node_(1, -1), pieces_(pieces), unknown_score_(unknown_score), unknown_id_(unknown_id),
      byte_ids_(std::move(byte_ids)) {
    for (const UnigramPiece& piece : pieces_) insert(piece);
}

void UnigramWords::insert(const UnigramPiece& piece) {
    int32_t node = 0;
    for (const char byte : piece.text) node = make_child(node, uint8_t(byte));
    piece_of_node_[size_t(node)] = int32_t(&piece - pieces_.data());
}

int32_t UnigramWords::child_of(int32_t node, uint8_t byte) const {
    const uint64_t key = key_of(node, byte);
    for (size_t slot = slot_of(key, edges_.size());; slot = (slot + 1) & (edges_.size() - 1)) {
        if (edges_[slot].key == key) return edges_[slot].child;
        if (edges_[slot].key == 0) return -1;
    }
}

int32_t UnigramWords::make_child(int32_t node, uint8_t byte) {
    const int32_t found = child_of(node, byte);
    if (found >= 0) return found;
    if (2 * ++num_edges_ > edges_.size()) grow();
    const uint64_t key = key_of(node, byte);
    size_t slot = slot_of(key, edges_.size());
    while (edges_[slot].key != 0) slot = (slot + 1) & (edges_.size() - 1);
    edges_[slot] = {key, int32_t(piece_of_node_.size())};
    piece_of_node_.push_back(-1);
    return edges_[slot].child;
}

void UnigramWords::grow() {
    std::vector<Edge> old(2 * edges_.size());
    old.swap(edges_);
    for (const Edge& edge : old) {
        if (edge.key == 0) continue;
        size_t slot = slot_of(edge.key, edges_.size());
        while (edges_[slot].key != 0) slot = (slot + 1) & (edges_.size() - 1);
        edges_[slot] = edge;
    }
}

// Calls begin(start) for every character and then update(start, end, score, id) for every piece that starts there, in the
// library's order; id -1 is an unknown character.
template <typename Begin, typename Update>
void UnigramWords::each_piece(std::string_view word, const Begin& begin, const Update& update) const {
    for (size_t start = 0; start < word.size();) {
        begin(start);
        const size_t single = std::min(character_length(uint8_t(word[start])), word.size() - start);
        bool has_single = false;
        int32_t node = 0;
        for (size_t end = start; end < word.size();) {
            node = child_of(node, uint8_t(word[end]));
            if (node < 0) break;
            ++end;
            const int32_t number = piece_of_node_[size_t(node)];
            if (number < 0 || pieces_[size_t(number)].is_unused) continue;
            update(start, end, pieces_[size_t(number)].score, pieces_[size_t(number)].id);
            has_single = has_single || end - start == single;
        }
        if (!has_single) update(start, start + single, unknown_score_, -1);
        start += single;
    }
}

// The library's own arithmetic, all of it in 32 bits. Returns the score behind the word.
float UnigramWords::segment(std::string_view word, float before, std::vector<Node>& nodes) const {
    struct Best {
        float score = 0;
        int32_t start = -1, id = -1;
        float piece = 0;
    };
    std::vector<Best> best(word.size() + 1);
    best[0].score = before;
    const auto count_again = [&](size_t start) {
        const float lowered = best[start].score;
        if (lowered >= lowest_score) return;
        for (size_t end = start; end <= word.size(); ++end) {
            if (end == start || best[end].start != -1) best[end].score -= lowered;
        }
    };
    each_piece(word, count_again, [&](size_t start, size_t end, float score, int32_t id) {
        const float candidate = score + best[start].score;
        Best& target = best[end];
        if (target.start == -1 || candidate > target.score) {
            target = {candidate, int32_t(start), id, score};
        }
    });
    nodes.clear();
    for (int32_t end = int32_t(word.size()); end > 0; end = best[size_t(end)].start) {
        nodes.push_back({best[size_t(end)].id, best[size_t(end)].piece, end});
    }
    std::reverse(nodes.begin(), nodes.end());
    return best[word.size()].score;
}

// The best segmentation without rounding, and by how much it wins at every border that it has.
UnigramWords::Word UnigramWords::measured(std::string_view word) {
    arrivals_.assign(word.size() + 1, {});
    uint32_t characters = 0;
    const auto nothing = [](size_t) {};
    each_piece(word, nothing, [&](size_t start, size_t end, float score, int32_t id) {
        const double candidate = double(score) + arrivals_[start].score;
        Arrival& target = arrivals_[end];
        if (target.start == -1 || candidate > target.score) {
            if (target.start != -1) target.second = target.score, target.has_second = true;
            target.score = candidate, target.start = int32_t(start), target.id = id, target.piece = score;
        } else if (!target.has_second || candidate > target.second) {
            target.second = candidate, target.has_second = true;
        }
    });
    for (const char byte : word) characters += (uint8_t(byte) & 0xC0) != 0x80;
    double margin = std::numeric_limits<float>::max();
    std::vector<Node> nodes;
    for (int32_t end = int32_t(word.size()); end > 0; end = arrivals_[size_t(end)].start) {
        const Arrival& arrival = arrivals_[size_t(end)];
        if (arrival.has_second) margin = std::min(margin, arrival.score - arrival.second);
        nodes.push_back({arrival.id, arrival.piece, end});
    }
    std::reverse(nodes.begin(), nodes.end());
    const float weight = float(characters) * std::fabs(unknown_score_);
    Word kept{texts_.size(), ids_.size(), scores_.size(), uint32_t(word.size()), 0, uint32_t(nodes.size()),
              float(margin), weight, characters};
    push_ids(word, nodes, ids_);
    for (const Node& node : nodes) scores_.push_back(node.score);
    kept.num_ids = uint32_t(ids_.size() - kept.ids_start);
    return kept;
}

void UnigramWords::push_ids(std::string_view word, const std::vector<Node>& nodes, std::vector<int32_t>& ids) const {
    bool was_unknown = false;
    int32_t start = 0;
    for (const Node& node : nodes) {
        if (node.id >= 0) {
            ids.push_back(node.id);
        } else if (!byte_ids_.empty()) {
            for (int32_t place = start; place < node.end; ++place) {
                ids.push_back(byte_ids_[uint8_t(word[size_t(place)])]);
            }
        } else if (!was_unknown) {
            ids.push_back(unknown_id_);
        }
        was_unknown = node.id < 0;
        start = node.end;
    }
}

int32_t UnigramWords::add(std::string_view word) {
    words_.push_back(measured(word));
    texts_.append(word);
    return int32_t(words_.size()) - 1;
}

void UnigramWords::append(const int32_t* words, int64_t count, std::vector<int32_t>& ids) const {
    float score = 0;
    std::vector<Node> nodes;
    for (int64_t place = 0; place < count; ++place) {
        const Word& word = words_[size_t(words[place])];
        const float reach = float(word.characters + 2) * 4 * spacing(std::fabs(score) + word.weight);
        if (word.margin > reach && score - word.weight > lowest_score) {
            ids.insert(ids.end(), ids_.begin() + std::ptrdiff_t(word.ids_start),
                       ids_.begin() + std::ptrdiff_t(word.ids_start + word.num_ids));
            const float* piece = scores_.data() + word.scores_start;
            for (uint32_t number = 0; number < word.num_scores; ++number) {
                score = piece[number] + score;
            }
        } else {
            const std::string_view text(texts_.data() + word.text_start, word.text_length);
            score = segment(text, score, nodes);
            push_ids(text, nodes, ids);
        }
    }
}

void UnigramWords::clear() {
    words_ = {};
    texts_ = {};
    ids_ = {};
    scores_ = {};
}

size_t UnigramWords::memory() const {
    return words_.size() * sizeof(Word) + texts_.size() + 4 * (ids_.size() + scores_.size());
}

}  // namespace host
