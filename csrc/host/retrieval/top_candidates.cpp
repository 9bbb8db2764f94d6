#include "top_candidates.h"

#include <limits>

namespace {

constexpr int64_t kStride = 64;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

WIDEST float largest(const float* values, int64_t count) {
  float best = kLowest;
  for (int64_t place = 0; place < count; ++place) best = values[place] > best ? values[place] : best;
  return best;
}

}  // namespace

TopCandidates::TopCandidates(int64_t num_queries, int64_t keep, int64_t threads)
    : num_queries_(num_queries),
      keep_(keep),
      capacity_(keep + std::max<int64_t>(32, keep / 2)),
      threads_(threads),
      kept_(num_queries * capacity_),
      counts_(num_queries, 0),
      excluded_first_(num_queries, 0),
      excluded_last_(num_queries, 0),
      thresholds_(num_queries, kLowest) {
  require(keep > 0, "keep is at least 1");
}

void TopCandidates::exclude(const Array<int64_t>& first, const Array<int64_t>& last) {
  require(first.size() == num_queries_ && last.size() == num_queries_, "one interval per query");
  excluded_first_.assign(first.data(), first.data() + num_queries_);
  excluded_last_.assign(last.data(), last.data() + num_queries_);
}

void TopCandidates::offer(const Array<int64_t>& rows, const Array<float>& scores, const Array<int64_t>& ids) {
  const int64_t num_rows = rows.size(), num_ids = ids.size();
  require(scores.ndim() == 2 && scores.shape(0) == num_rows && scores.shape(1) == num_ids, "scores are [rows, ids]");
  const int64_t *row = rows.data(), *id = ids.data();
  const float* score = scores.data();
  for (int64_t place = 0; place < num_rows; ++place)
    require(row[place] >= 0 && row[place] < num_queries_, "a row is no query");
  py::gil_scoped_release release;
  over_rows(num_rows, threads_, num_ids, [&](int64_t first, int64_t last) {
    for (int64_t place = first; place < last; ++place) offer_row(row[place], score + place * num_ids, id, num_ids);
  });
}

void TopCandidates::offer_row(int64_t query, const float* scores, const int64_t* ids, int64_t count) {
  for (int64_t start = 0; start < count; start += kStride) {
    const int64_t stop = std::min(start + kStride, count);
    if (!(largest(scores + start, stop - start) > thresholds_[query])) continue;
    for (int64_t place = start; place < stop; ++place) {
      if (!(scores[place] > thresholds_[query])) continue;
      if (ids[place] >= excluded_first_[query] && ids[place] < excluded_last_[query]) continue;
      kept_[query * capacity_ + counts_[query]++] = {scores[place], ids[place]};
      if (counts_[query] == capacity_) shrink(query);
    }
  }
}

void TopCandidates::shrink(int64_t query) {
  const auto begin = kept_.begin() + query * capacity_;
  const auto better = [](const Candidate& left, const Candidate& right) {
    return left.score > right.score || (left.score == right.score && left.id < right.id);
  };
  std::nth_element(begin, begin + keep_ - 1, begin + counts_[query], better);
  counts_[query] = keep_;
  thresholds_[query] = (begin + keep_ - 1)->score;
}

py::tuple TopCandidates::best() {
  py::array_t<float> scores({num_queries_, keep_});
  py::array_t<int64_t> ids({num_queries_, keep_});
  float* score = scores.mutable_data();
  int64_t* id = ids.mutable_data();
  {
    py::gil_scoped_release release;
    over_rows(num_queries_, threads_, keep_ * 20, [&](int64_t first, int64_t last) {
      for (int64_t query = first; query < last; ++query) {
        const auto begin = kept_.begin() + query * capacity_;
        std::sort(begin, begin + counts_[query], [](const Candidate& left, const Candidate& right) {
          return left.score > right.score || (left.score == right.score && left.id < right.id);
        });
        for (int64_t place = 0; place < keep_; ++place) {
          const bool found = place < counts_[query];
          score[query * keep_ + place] = found ? (begin + place)->score : kLowest;
          id[query * keep_ + place] = found ? (begin + place)->id : -1;
        }
      }
    });
  }
  return py::make_tuple(scores, ids);
}
