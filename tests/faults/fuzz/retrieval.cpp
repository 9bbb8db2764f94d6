// The entry points of `csrc/host/retrieval`: arrays of tokens, scores and kept vectors, which are mapped files.
#include "../../../csrc/host/retrieval/hashed_embedding.h"
#include "../../../csrc/host/retrieval/overlap.h"
#include "../../../csrc/host/retrieval/top_candidates.h"
#include "inputs.h"

namespace {

using fuzz::Bytes;

void fuzz_embed_hashed(Bytes& bytes) {
  const auto tokens = bytes.table<int32_t>();
  const auto present = bytes.table<uint8_t>();
  const auto narrow = bytes.list<int8_t>();  // an embedder's own constants: no file holds them
  const auto sizes = narrow.begin() + std::min<size_t>(narrow.size(), 8);
  embed_hashed(tokens, present, {narrow.begin(), sizes}, bytes.number<int16_t>(), 1);
}

struct Pairs {
  py::array_t<int32_t> texts, candidates;
  py::array_t<uint8_t> texts_present, candidates_present;

  explicit Pairs(Bytes& bytes)
      : texts(bytes.table<int32_t>()),
        candidates(bytes.table<int32_t>(3)),
        texts_present(bytes.table<uint8_t>()),
        candidates_present(bytes.table<uint8_t>(3)) {}
};

void fuzz_longest_common_runs(Bytes& bytes) {
  const Pairs pairs(bytes);
  longest_common_runs(pairs.texts, pairs.texts_present, pairs.candidates, pairs.candidates_present, 1);
}

void fuzz_token_overlaps(Bytes& bytes) {
  const Pairs pairs(bytes);
  token_overlaps(pairs.texts, pairs.texts_present, pairs.candidates, pairs.candidates_present, 1);
}

void fuzz_bm25_scores(Bytes& bytes) {
  const Pairs pairs(bytes);
  const auto weights = bytes.array<float>();
  bm25_scores(pairs.texts, pairs.texts_present, pairs.candidates, pairs.candidates_present, weights, 1.2, 0.75,
                bytes.number<float>(), 1);
}

void fuzz_keep_other_documents(Bytes& bytes) {
  const auto candidates = bytes.table<int64_t>();
  const auto first = bytes.array<int64_t>(), last = bytes.array<int64_t>();
  keep_other_documents(candidates, first, last, bytes.number<int8_t>());
}

void fuzz_candidate_distances(Bytes& bytes) {
  const auto queries = bytes.table<float>();
  const auto candidates = bytes.table<int64_t>();
  candidate_distances(queries, candidates, bytes.table<uint16_t>(), 1);
}

void fuzz_top_candidates(Bytes& bytes) {
  const auto num_queries = bytes.number<int8_t>();
  TopCandidates top(num_queries, bytes.number<int8_t>(), 1);
  for (auto left = bytes.number<uint8_t>() % 4; left > 0; --left) {
    const auto rows = bytes.array<int64_t>(), ids = bytes.array<int64_t>();
    const auto offsets = bytes.array<float>();
    switch (bytes.number<uint8_t>() % 3) {
      case 0:
        top.exclude(rows, ids);
        break;
      case 1:
        top.offer(rows, bytes.table<float>(), offsets, ids);
        break;
      default: {
        const auto products = bytes.table<uint16_t>();
        const auto queries = bytes.table<float>();
        top.offer_rounded(rows, products, offsets, ids, queries, bytes.table<float>());
      }
    }
  }
  top.best();
}

}  // namespace

const fuzz::Entries entries = {{"embed_hashed", fuzz_embed_hashed},
                               {"longest_common_runs", fuzz_longest_common_runs},
                               {"bm25_scores", fuzz_bm25_scores},
                               {"token_overlaps", fuzz_token_overlaps},
                               {"keep_other_documents", fuzz_keep_other_documents},
                               {"candidate_distances", fuzz_candidate_distances},
                               {"top_candidates", fuzz_top_candidates}};
