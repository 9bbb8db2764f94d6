#include "top_candidates.h"

#include <cstring>

namespace {

constexpr int64_t kStride = 64, kAhead = 4;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Scores of one stride, and which of them are above a threshold; false if none is.
WIDEST bool scores_above(const float* products, const float* offsets, float threshold, int64_t count, float* scores,
                         uint8_t* above) {
  uint8_t any = 0;
  for (int64_t place = 0; place < count; ++place) {
    scores[place] = products[place] + offsets[place];
    above[place] = scores[place] > threshold;
    any |= above[place];
  }
  return any != 0;
}

// The first marked place from `place` on, or `count`; words of eight are passed over at once.
int64_t next_set(const uint8_t* marks, int64_t place, int64_t count) {
  for (uint64_t word = 0; place + 8 <= count; place += 8) {
    std::memcpy(&word, marks + place, 8);
    if (word != 0) break;
  }
  while (place < count && !marks[place]) ++place;
  return place;
}

}  // namespace

TopCandidates::TopCandidates(int64_t num_queries, int64_t keep, int64_t threads)
    : num_queries_(num_queries),
      keep_(keep),
      capacity_(keep + std::max<int64_t>(32, keep / 2)),
      threads_(threads),
      kept_(num_queries * capacity_),
      queries_(num_queries) {
  require(keep > 0, "keep is at least 1");
}

void TopCandidates::exclude(const Array<int64_t>& first, const Array<int64_t>& last) {
  require(first.size() == num_queries_ && last.size() == num_queries_, "one interval per query");
  for (int64_t query = 0; query < num_queries_; ++query) {
    queries_[query].excluded_first = first.data()[query];
    queries_[query].excluded_last = last.data()[query];
  }
}

void TopCandidates::offer(const Array<int64_t>& rows, const Array<float>& products, const Array<float>& offsets,
                          const Array<int64_t>& ids) {
  const int64_t num_rows = rows.size(), num_ids = ids.size();
  require(products.ndim() == 2 && products.shape(0) == num_rows && products.shape(1) == num_ids,
          "products are [rows, ids]");
  require(offsets.size() == num_ids, "one offset per id");
  const int64_t *row = rows.data(), *id = ids.data();
  const float *product = products.data(), *offset = offsets.data();
  for (int64_t place = 0; place < num_rows; ++place)
    require(row[place] >= 0 && row[place] < num_queries_, "a row is no query");
  py::gil_scoped_release release;
  over_rows(num_rows, threads_, num_ids, [&](int64_t first, int64_t last) {
    for (int64_t place = first; place < last; ++place) {
      if (place + 2 * kAhead < last) PREFETCH(&queries_[row[place + 2 * kAhead]]);
      if (place + kAhead < last) {
        const int64_t next = row[place + kAhead];
        PREFETCH(&kept_[next * capacity_ + queries_[next].count]);
      }
      offer_row(row[place], product + place * num_ids, offset, id, num_ids);
    }
  });
}

void TopCandidates::offer_row(int64_t number, const float* products, const float* offsets, const int64_t* ids,
                              int64_t count) {
  Query& query = queries_[number];
  Candidate* kept = kept_.data() + number * capacity_;
  float scores[kStride];
  uint8_t above[kStride];
  for (int64_t start = 0; start < count; start += kStride) {
    const int64_t size = std::min(kStride, count - start);
    if (!scores_above(products + start, offsets + start, query.threshold, size, scores, above)) continue;
    for (int64_t place = next_set(above, 0, size); place < size; place = next_set(above, place + 1, size)) {
      if (!(scores[place] > query.threshold)) continue;
      const int64_t id = ids[start + place];
      if (id >= query.excluded_first && id < query.excluded_last) continue;
      kept[query.count++] = {scores[place], id};
      if (query.count == capacity_) shrink(number);
    }
  }
}

void TopCandidates::shrink(int64_t number) {
  Query& query = queries_[number];
  const auto begin = kept_.begin() + number * capacity_;
  const auto better = [](const Candidate& left, const Candidate& right) {
    return left.score > right.score || (left.score == right.score && left.id < right.id);
  };
  std::nth_element(begin, begin + keep_ - 1, begin + query.count, better);
  query.count = int32_t(keep_);
  query.threshold = (begin + keep_ - 1)->score;
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
        std::sort(begin, begin + queries_[query].count, [](const Candidate& left, const Candidate& right) {
          return left.score > right.score || (left.score == right.score && left.id < right.id);
        });
        for (int64_t place = 0; place < keep_; ++place) {
          const bool found = place < queries_[query].count;
          score[query * keep_ + place] = found ? (begin + place)->score : kLowest;
          id[query * keep_ + place] = found ? (begin + place)->id : -1;
        }
      }
    });
  }
  return py::make_tuple(scores, ids);
}
