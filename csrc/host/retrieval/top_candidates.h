// The best candidates of many queries, offered a block of scores at a time; larger scores are better.
#pragma once

#include "arrays.h"

class TopCandidates {
 public:
  TopCandidates(int64_t num_queries, int64_t keep, int64_t threads);

  // Ids in [first, last) of its row are never candidates of a query: the chunks of its own documents.
  void exclude(const Array<int64_t>& first, const Array<int64_t>& last);

  // scores[i, j] is what query rows[i] and vector ids[j] have in common; rows are distinct.
  void offer(const Array<int64_t>& rows, const Array<float>& scores, const Array<int64_t>& ids);

  // (scores, ids), best first, equal scores by id; -inf and -1 where there are fewer than `keep`.
  py::tuple best();

 private:
  struct Candidate {
    float score;
    int64_t id;
  };
  void offer_row(int64_t query, const float* scores, const int64_t* ids, int64_t count);
  void shrink(int64_t query);

  int64_t num_queries_, keep_, capacity_, threads_;
  std::vector<Candidate> kept_;
  std::vector<int64_t> counts_, excluded_first_, excluded_last_;
  std::vector<float> thresholds_;
};
