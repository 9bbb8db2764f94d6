// The best candidates of many queries, offered a block of scores at a time; larger scores are better.
#pragma once

#include <limits>

#include "arrays.h"

class TopCandidates {
 public:
  TopCandidates(int64_t num_queries, int64_t keep, int64_t threads);

  // Ids in [first, last) of its row are never candidates of a query: the chunks of its own documents.
  void exclude(const Array<int64_t>& first, const Array<int64_t>& last);

  // The score of query rows[i] and vector ids[j] is products[i, j] + offsets[j]; rows are distinct.
  void offer(const Array<int64_t>& rows, const Array<float>& products, const Array<float>& offsets,
             const Array<int64_t>& ids);

  // The same from products that were rounded to bfloat16 after a product of rounded factors: those which may be among
  // the best, by the largest error that rounding can make, are computed again from `queries` (all) and `vectors`.
  void offer_rounded(const Array<int64_t>& rows, const Array<uint16_t>& products, const Array<float>& offsets,
                     const Array<int64_t>& ids, const Array<float>& queries, const Array<float>& vectors);

  // (scores, ids), best first, equal scores by id; -inf and -1 where there are fewer than `keep`.
  py::tuple best();

 private:
  struct Candidate {
    float score;
    int64_t id;
  };
  // What a visit of a query touches lies together: queries come in any order, and each would miss the cache anew.
  struct alignas(32) Query {
    int64_t excluded_first = 0, excluded_last = 0;
    int32_t count = 0;
    float threshold = -std::numeric_limits<float>::infinity();
    float length = -1;  // of its vector, where products are rounded; computed when first met
  };
  // The tile of vectors that rounded products are of.
  struct Tile {
    const float *offsets, *vectors, *lengths;
    const int64_t* ids;
    int64_t count, dimension;
  };
  void offer_row(int64_t query, const float* products, const float* offsets, const int64_t* ids, int64_t count);
  void offer_rounded_row(int64_t query, const uint16_t* products, const float* vector, const Tile& tile);
  void consider(int64_t query, float score, int64_t id);
  // Calls offer(place, row) for each row, what the next rows touch fetched ahead.
  template <typename Offer>
  void over_queries(const Array<int64_t>& rows, int64_t num_ids, const Offer& offer);
  void shrink(int64_t query);

  int64_t num_queries_, keep_, capacity_, threads_;
  std::vector<Candidate> kept_;
  std::vector<Query> queries_;
};
