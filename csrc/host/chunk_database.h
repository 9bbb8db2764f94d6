// A mapped token file, and a chunk database over several of them.
//
// The arrays of an .idx stand at odd addresses, so numbers are loaded byte-wise (one instruction on x86 and Arm). No
// number from a file is trusted: one that leads outside its array throws DamagedFile, which names it.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace host {

struct DamagedFile : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline int64_t load64(const uint8_t* base, int64_t index) {
    int64_t value;
    std::memcpy(&value, base + 8 * index, 8);
    return value;
}

struct TokenFile {
    std::string prefix;
    const uint8_t* tokens;  // nullptr: not mapped; then `token` and `copy` are not for it
    int64_t num_tokens;
    int64_t item_bytes;  // 2 (uint16) or 4 (int32)
    const uint8_t* pointers;
    int64_t num_sequences;
    const uint8_t* documents;
    int64_t num_documents;

    // The first token of a document; that of document `num_documents` is the end of the stream. In [0, num_tokens].
    int64_t document_start(int64_t document) const;
    int64_t document_of(int64_t token) const;
    // `offset` must be in [0, num_tokens).
    int64_t token(int64_t offset) const;
};

struct Corpus {
    TokenFile file;
    int64_t first_document;    // of the token file
    int64_t documents_before;  // of the database
};

struct DocumentRange {
    int64_t first, last;  // documents [first, last) of the database
};

// The part of a database that counts: per corpus, the number below which a halved hash (of a document or chunk) is kept.
struct Thinning {
    const uint64_t* limits;  // nullptr: everything counts
    bool by_chunk;
};

struct ChunkDatabase {
    std::string path;
    std::vector<Corpus> corpora;
    const uint8_t* chunks_before;  // num_documents + 1 numbers
    int64_t num_documents;
    int64_t chunk_length;
    int64_t eod;  // -1: none

    int64_t document_of(int64_t chunk) const;
    size_t corpus_of(int64_t document) const;
    bool keeps(const Thinning& thinning, int64_t chunk, int64_t document) const;

    // Copies the tokens of a chunk and what follows in its document; returns how many there are, at most `length`.
    template <typename Token>
    int64_t copy(int64_t chunk, int64_t length, Token* target) const;
};

// The first `wanted` of a row's packed ids whose document is not excluded and is kept; the rest is -1.
void select_neighbors(const ChunkDatabase& database, const uint8_t* packed, int64_t saved, DocumentRange excluded,
                      const Thinning& thinning, int64_t wanted, int64_t* chosen);

constexpr int id_bytes = 5;
constexpr int64_t none_bits = (int64_t(1) << 40) - 1;

}  // namespace host
