#include "chunk_database.h"

#include <algorithm>

namespace host {

namespace {

// The last i in [0, count) with base[i] <= value.
int64_t last_at_or_before(const uint8_t* base, int64_t count, int64_t value) {
    int64_t low = 0;
    while (count > 1) {
        const int64_t half = count / 2;
        low = load64(base, low + half) <= value ? low + half : low;
        count -= half;
    }
    return low;
}

// The finalizer of SplitMix64, as in `megatron_retro/data/order.py`.
uint64_t mix(uint64_t value) {
    value += 0x9E3779B97F4A7C15ull;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

}  // namespace

int64_t TokenFile::document_start(int64_t document) const {
    if (document < 0 || document > num_documents) {
        throw DamagedFile(prefix + " has " + std::to_string(num_documents) + " documents, but number " +
                          std::to_string(document) + " is read");
    }
    const int64_t sequence = load64(documents, document);
    if (sequence < 0 || sequence > num_sequences) {
        throw DamagedFile(prefix + ".idx: document " + std::to_string(document) + " begins at sequence " +
                          std::to_string(sequence) + " of " + std::to_string(num_sequences));
    }
    if (sequence == num_sequences) return num_tokens;
    const int64_t pointer = load64(pointers, sequence);
    if (pointer < 0 || (pointer & (item_bytes - 1)) || pointer > num_tokens * item_bytes) {
        throw DamagedFile(prefix + ".idx: sequence " + std::to_string(sequence) + " begins at byte " +
                          std::to_string(pointer) + " of " + std::to_string(num_tokens * item_bytes));
    }
    return pointer / item_bytes;
}

int64_t TokenFile::document_of(int64_t token) const {
    int64_t low = 0, count = num_documents;
    while (count > 1) {
        const int64_t half = count / 2;
        low = document_start(low + half) <= token ? low + half : low;
        count -= half;
    }
    return low;
}

int64_t TokenFile::token(int64_t offset) const {
    if (item_bytes == 2) {
        uint16_t value;
        std::memcpy(&value, tokens + 2 * offset, 2);
        return value;
    }
    int32_t value;
    std::memcpy(&value, tokens + 4 * offset, 4);
    return value;
}

int64_t ChunkDatabase::document_of(int64_t chunk) const {
    return last_at_or_before(chunks_before, num_documents, chunk);
}

size_t ChunkDatabase::corpus_of(int64_t document) const {
    size_t number = corpora.size() - 1;
    while (corpora[number].documents_before > document) --number;
    return number;
}

bool ChunkDatabase::keeps(const Thinning& thinning, int64_t chunk, int64_t document) const {
    const uint64_t hash = mix(uint64_t(thinning.by_chunk ? chunk : document));
    return (hash >> 1) < thinning.limits[corpus_of(document)];
}

template <typename Token>
int64_t ChunkDatabase::copy(int64_t chunk, int64_t length, Token* target) const {
    const int64_t document = document_of(chunk);
    const Corpus& corpus = corpora[corpus_of(document)];
    const TokenFile& file = corpus.file;
    const int64_t local = document - corpus.documents_before + corpus.first_document;
    const int64_t begin = file.document_start(local);
    int64_t end = file.document_start(local + 1);
    if (eod >= 0 && end > begin && file.token(end - 1) == eod) --end;
    const int64_t before = load64(chunks_before, document);
    // Every chunk of a document has a token, so its number within the document is smaller than the document is long.
    if (before < 0 || before > chunk || chunk - before >= end - begin || (chunk - before) * chunk_length >= end - begin) {
        throw DamagedFile(path + ": chunk " + std::to_string(chunk) + " does not lie in document " +
                          std::to_string(document) + ", whose chunks begin at " + std::to_string(before) +
                          " and whose tokens are " + std::to_string(begin) + " to " + std::to_string(end) + " of " +
                          file.prefix);
    }
    const int64_t start = begin + (chunk - before) * chunk_length;
    const int64_t count = std::min(length, end - start);
    if (file.item_bytes == sizeof(Token)) {
        std::memcpy(target, file.tokens + start * file.item_bytes, count * sizeof(Token));
    } else {
        for (int64_t place = 0; place < count; ++place) target[place] = Token(file.token(start + place));
    }
    return count;
}

template int64_t ChunkDatabase::copy<uint16_t>(int64_t, int64_t, uint16_t*) const;
template int64_t ChunkDatabase::copy<int32_t>(int64_t, int64_t, int32_t*) const;

void select_neighbors(const ChunkDatabase& database, const uint8_t* packed, int64_t saved, DocumentRange excluded,
                      const Thinning& thinning, int64_t wanted, int64_t* chosen) {
    int64_t found = 0;
    for (int64_t place = 0; place < saved && found < wanted; ++place) {
        int64_t id = 0;
        std::memcpy(&id, packed + place * id_bytes, id_bytes);
        if (id == none_bits) continue;
        if (excluded.first < excluded.last || thinning.limits) {
            const int64_t document = database.document_of(id);
            if (document >= excluded.first && document < excluded.last) continue;
            if (thinning.limits && !database.keeps(thinning, id, document)) continue;
        }
        chosen[found++] = id;
    }
    std::fill(chosen + found, chosen + wanted, int64_t(-1));
}

}  // namespace host
