#include "top_candidates.h"

#include <cmath>
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

// Rounding to bfloat16 changes a number by at most 2^-8 of it: a product of two rounded factors, sums in float
// included, by kFactors of the lengths of the two vectors, and the sum, once rounded, by kSum of itself.
constexpr float kFactors = 0.0085f, kSum = 0.00393f;

// Which scores may be above a threshold, by their rounded products; false if none may.
WIDEST bool may_be_above(const uint16_t* products, const float* offsets, const float* lengths, float slack,
                         float threshold, int64_t count, uint8_t* above) {
  uint8_t any = 0;
  for (int64_t place = 0; place < count; ++place) {
    const uint32_t bits = uint32_t(products[place]) << 16;
    float product;
    std::memcpy(&product, &bits, 4);
    above[place] = product + kSum * std::fabs(product) + slack * lengths[place] + offsets[place] > threshold;
    any |= above[place];
  }
  return any != 0;
}

// In sixteen parts, so that it is done by vectors of any width in the same order.
WIDEST float dot(const float* left, const float* right, int64_t count) {
  constexpr int64_t parts = 16;
  float sums[parts] = {};
  int64_t place = 0;
  for (; place + parts <= count; place += parts)
    for (int64_t part = 0; part < parts; ++part) sums[part] += left[place + part] * right[place + part];
  for (; place < count; ++place) sums[0] += left[place] * right[place];
  float sum = 0;
  for (float part : sums) sum += part;
  return sum;
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
  const int64_t* id = ids.data();
  const float *product = products.data(), *offset = offsets.data();
  over_queries(rows, num_ids, [&](int64_t place, int64_t number) {
    offer_row(number, product + place * num_ids, offset, id, num_ids);
  });
}

void TopCandidates::offer_rounded(const Array<int64_t>& rows, const Array<uint16_t>& products,
                                  const Array<float>& offsets, const Array<int64_t>& ids, const Array<float>& queries,
                                  const Array<float>& vectors) {
  const int64_t num_rows = rows.size(), num_ids = ids.size();
  require(products.ndim() == 2 && products.shape(0) >= num_rows && products.shape(1) >= num_ids,
          "products are [rows, ids], or more of both");
  require(queries.ndim() == 2 && queries.shape(0) == num_queries_, "one vector per query");
  require(vectors.ndim() == 2 && vectors.shape(0) == num_ids && vectors.shape(1) == queries.shape(1),
          "one vector per id, as wide as a query's");
  require(offsets.size() == num_ids, "one offset per id");
  const int64_t dimension = queries.shape(1);
  std::vector<float> lengths(num_ids);
  for (int64_t place = 0; place < num_ids; ++place) {
    const float* vector = vectors.data() + place * dimension;
    lengths[place] = std::sqrt(dot(vector, vector, dimension));
  }
  const Tile tile{offsets.data(), vectors.data(), lengths.data(), ids.data(), num_ids, dimension};
  const uint16_t* product = products.data();
  const float* query = queries.data();
  const int64_t width = products.shape(1);
  over_queries(rows, num_ids, [&](int64_t place, int64_t number) {
    offer_rounded_row(number, product + place * width, query + number * dimension, tile);
  });
}

template <typename Offer>
void TopCandidates::over_queries(const Array<int64_t>& rows, int64_t num_ids, const Offer& offer) {
  const int64_t* row = rows.data();
  for (int64_t place = 0; place < rows.size(); ++place)
    require(row[place] >= 0 && row[place] < num_queries_, "a row is no query");
  const int64_t num_rows = rows.size();
  py::gil_scoped_release release;
  over_rows(num_rows, threads_, num_ids, [&](int64_t first, int64_t last) {
    for (int64_t place = first; place < last; ++place) {
      if (place + 2 * kAhead < last) PREFETCH(&queries_[row[place + 2 * kAhead]]);
      if (place + kAhead < last) {
        const int64_t next = row[place + kAhead];
        PREFETCH(&kept_[next * capacity_ + queries_[next].count]);
      }
      offer(place, row[place]);
    }
  });
}

void TopCandidates::offer_row(int64_t number, const float* products, const float* offsets, const int64_t* ids,
                              int64_t count) {
  const Query& query = queries_[number];
  float scores[kStride];
  uint8_t above[kStride];
  for (int64_t start = 0; start < count; start += kStride) {
    const int64_t size = std::min(kStride, count - start);
    if (!scores_above(products + start, offsets + start, query.threshold, size, scores, above)) continue;
    for (int64_t place = next_set(above, 0, size); place < size; place = next_set(above, place + 1, size)) {
      if (scores[place] > query.threshold) consider(number, scores[place], ids[start + place]);
    }
  }
}

void TopCandidates::offer_rounded_row(int64_t number, const uint16_t* products, const float* vector,
                                      const Tile& tile) {
  Query& query = queries_[number];
  if (query.length < 0) query.length = std::sqrt(dot(vector, vector, tile.dimension));
  const float slack = kFactors * query.length;
  uint8_t above[kStride];
  for (int64_t start = 0; start < tile.count; start += kStride) {
    const int64_t size = std::min(kStride, tile.count - start);
    if (!may_be_above(products + start, tile.offsets + start, tile.lengths + start, slack, query.threshold, size,
                      above))
      continue;
    for (int64_t place = next_set(above, 0, size); place < size; place = next_set(above, place + 1, size)) {
      const int64_t item = start + place;
      const float score = dot(vector, tile.vectors + item * tile.dimension, tile.dimension) + tile.offsets[item];
      if (score > query.threshold) consider(number, score, tile.ids[item]);
    }
  }
}

void TopCandidates::consider(int64_t number, float score, int64_t id) {
  Query& query = queries_[number];
  if (id >= query.excluded_first && id < query.excluded_last) return;
  kept_[number * capacity_ + query.count++] = {score, id};
  if (query.count == capacity_) shrink(number);
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
