// What two pieces of text share, token by token.
#pragma once

#include "arrays.h"

// Longest run of tokens that text i has in common with each of its candidates; masked positions match nothing.
py::array_t<int32_t> longest_common_runs(const Array<int32_t>& texts, const Array<uint8_t>& texts_present,
                                         const Array<int32_t>& candidates, const Array<uint8_t>& candidates_present,
                                         int64_t threads);

// BM25 of each candidate for its text, `weights` being the inverse document frequency by token id; with k1 so large
// and b = 0 that saturation vanishes it is the weighted overlap.
py::array_t<float> bm25_scores(const Array<int32_t>& texts, const Array<uint8_t>& texts_present,
                               const Array<int32_t>& candidates, const Array<uint8_t>& candidates_present,
                               const Array<float>& weights, double k1, double b, double mean_length, int64_t threads);

// Share of a text's tokens that a candidate has too (as multisets).
py::array_t<float> token_overlaps(const Array<int32_t>& texts, const Array<uint8_t>& texts_present,
                                  const Array<int32_t>& candidates, const Array<uint8_t>& candidates_present,
                                  int64_t threads);

// The first `keep` candidates of each row that are no absence (-1), lie outside [first, last) and are not repeated.
py::array_t<int64_t> keep_other_documents(const Array<int64_t>& candidates, const Array<int64_t>& first,
                                  const Array<int64_t>& last, int64_t keep);

// Squared distances of each query to its candidates' vectors, kept as bfloat16; infinite for an absent candidate.
py::array_t<float> candidate_distances(const Array<float>& queries, const Array<int64_t>& candidates,
                                       const py::array_t<uint16_t>& vectors, int64_t threads);
