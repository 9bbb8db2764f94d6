#include "overlap.h"

#include <cstring>
#include <limits>

namespace {

struct Pairs {
  int64_t rows, length, per_row, candidate_length;
  const int32_t *texts, *candidates;
  const uint8_t *texts_present, *candidates_present;
};

Pairs checked(const Array<int32_t>& texts, const Array<uint8_t>& texts_present, const Array<int32_t>& candidates,
              const Array<uint8_t>& candidates_present) {
  require(texts.ndim() == 2 && candidates.ndim() == 3, "texts are [rows, length], candidates [rows, number, length]");
  require(texts.shape(0) == candidates.shape(0), "texts and candidates have different numbers of rows");
  require(texts.size() == texts_present.size() && candidates.size() == candidates_present.size(),
          "a mask has another size than its tokens");
  return {texts.shape(0),  texts.shape(1),    candidates.shape(1),  candidates.shape(2),
          texts.data(),    candidates.data(), texts_present.data(), candidates_present.data()};
}

// One row of the table of common runs; `previous` and `current` have one leading zero.
WIDEST void next_runs(int32_t token, const int32_t* other, int64_t length, const uint16_t* previous, uint16_t* current) {
  for (int64_t place = 0; place < length; ++place)
    current[place + 1] = static_cast<uint16_t>(other[place] == token ? previous[place] + 1 : 0);
}

WIDEST uint16_t largest_run(const uint16_t* runs, int64_t length) {
  uint16_t best = 0;
  for (int64_t place = 0; place < length; ++place) best = runs[place] > best ? runs[place] : best;
  return best;
}

int32_t longest_run(const int32_t* text, const uint8_t* present, int64_t length, const std::vector<int32_t>& other,
                    std::vector<uint16_t>& previous, std::vector<uint16_t>& current) {
  const int64_t other_length = static_cast<int64_t>(other.size());
  std::fill(previous.begin(), previous.end(), 0);
  uint16_t best = 0;
  for (int64_t place = 0; place < length; ++place) {
    if (present[place]) {
      next_runs(text[place], other.data(), other_length, previous.data(), current.data());
      best = std::max(best, largest_run(current.data() + 1, other_length));
    } else {
      std::fill(current.begin(), current.end(), 0);
    }
    std::swap(previous, current);
  }
  return best;
}

void sorted_tokens(const int32_t* tokens, const uint8_t* present, int64_t length, std::vector<int32_t>& out) {
  out.clear();
  for (int64_t place = 0; place < length; ++place)
    if (present[place]) out.push_back(tokens[place]);
  std::sort(out.begin(), out.end());
}

// Calls visit(token, count in text, count in candidate) for every distinct token that both have.
template <typename Visit>
void shared_tokens(const std::vector<int32_t>& text, const std::vector<int32_t>& candidate, const Visit& visit) {
  size_t left = 0, right = 0;
  while (left < text.size() && right < candidate.size()) {
    if (text[left] < candidate[right]) {
      ++left;
    } else if (text[left] > candidate[right]) {
      ++right;
    } else {
      const int32_t token = text[left];
      int64_t in_text = 0, in_candidate = 0;
      while (left < text.size() && text[left] == token) ++left, ++in_text;
      while (right < candidate.size() && candidate[right] == token) ++right, ++in_candidate;
      visit(token, in_text, in_candidate);
    }
  }
}

// Fills one number per pair from the sorted tokens of both.
template <typename Score>
py::array_t<float> scores_of_sorted(const Pairs& pairs, int64_t threads, const Score& score) {
  py::array_t<float> result({pairs.rows, pairs.per_row});
  float* out = result.mutable_data();
  py::gil_scoped_release release;
  over_rows(pairs.rows, threads, pairs.per_row * pairs.candidate_length * 10, [&](int64_t first, int64_t last) {
    std::vector<int32_t> text, candidate;
    for (int64_t row = first; row < last; ++row) {
      sorted_tokens(pairs.texts + row * pairs.length, pairs.texts_present + row * pairs.length, pairs.length, text);
      for (int64_t pair = row * pairs.per_row; pair < (row + 1) * pairs.per_row; ++pair) {
        const int64_t start = pair * pairs.candidate_length;
        sorted_tokens(pairs.candidates + start, pairs.candidates_present + start, pairs.candidate_length, candidate);
        out[pair] = score(text, candidate);
      }
    }
  });
  return result;
}

float from_bfloat16(uint16_t stored) {
  const uint32_t bits = static_cast<uint32_t>(stored) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

WIDEST float squared_distance(const float* query, const uint16_t* vector, int64_t dimension) {
  float lanes[16] = {0};
  int64_t place = 0;
  for (; place + 16 <= dimension; place += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const float gap = query[place + lane] - from_bfloat16(vector[place + lane]);
      lanes[lane] += gap * gap;
    }
  for (; place < dimension; ++place) {
    const float gap = query[place] - from_bfloat16(vector[place]);
    lanes[0] += gap * gap;
  }
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

}  // namespace

py::array_t<int32_t> longest_common_runs(const Array<int32_t>& texts, const Array<uint8_t>& texts_present,
                                         const Array<int32_t>& candidates, const Array<uint8_t>& candidates_present,
                                         int64_t threads) {
  const Pairs pairs = checked(texts, texts_present, candidates, candidates_present);
  py::array_t<int32_t> result({pairs.rows, pairs.per_row});
  int32_t* out = result.mutable_data();
  py::gil_scoped_release release;
  over_rows(pairs.rows, threads, pairs.per_row * pairs.length * 20, [&](int64_t first, int64_t last) {
    std::vector<int32_t> other(pairs.candidate_length);
    std::vector<uint16_t> previous(pairs.candidate_length + 1), current(pairs.candidate_length + 1);
    for (int64_t pair = first * pairs.per_row; pair < last * pairs.per_row; ++pair) {
      const int64_t row = pair / pairs.per_row, start = pair * pairs.candidate_length;
      for (int64_t place = 0; place < pairs.candidate_length; ++place)
        other[place] = pairs.candidates_present[start + place] ? pairs.candidates[start + place] : -1;
      out[pair] = longest_run(pairs.texts + row * pairs.length, pairs.texts_present + row * pairs.length, pairs.length,
                              other, previous, current);
    }
  });
  return result;
}

py::array_t<float> bm25_scores(const Array<int32_t>& texts, const Array<uint8_t>& texts_present,
                               const Array<int32_t>& candidates, const Array<uint8_t>& candidates_present,
                               const Array<float>& weights, double k1, double b, double mean_length, int64_t threads) {
  const Pairs pairs = checked(texts, texts_present, candidates, candidates_present);
  const float* weight = weights.data();
  const int64_t vocabulary = weights.size();
  return scores_of_sorted(pairs, threads, [=](const std::vector<int32_t>& text, const std::vector<int32_t>& candidate) {
    const double norm = k1 * (1 - b + b * static_cast<double>(candidate.size()) / mean_length);
    double total = 0;
    shared_tokens(text, candidate, [&](int32_t token, int64_t, int64_t count) {
      if (token >= 0 && token < vocabulary) total += weight[token] * count * (k1 + 1) / (count + norm);
    });
    return static_cast<float>(total);
  });
}

py::array_t<float> token_overlaps(const Array<int32_t>& texts, const Array<uint8_t>& texts_present,
                                  const Array<int32_t>& candidates, const Array<uint8_t>& candidates_present,
                                  int64_t threads) {
  const Pairs pairs = checked(texts, texts_present, candidates, candidates_present);
  return scores_of_sorted(pairs, threads, [](const std::vector<int32_t>& text, const std::vector<int32_t>& candidate) {
    int64_t shared = 0;
    shared_tokens(text, candidate, [&](int32_t, int64_t left, int64_t right) { shared += std::min(left, right); });
    return text.empty() ? 0.0F : static_cast<float>(shared) / static_cast<float>(text.size());
  });
}

py::array_t<int64_t> keep_other_documents(const Array<int64_t>& candidates, const Array<int64_t>& first,
                                  const Array<int64_t>& last, int64_t keep) {
  require(candidates.ndim() == 2, "candidates are [rows, number]");
  const int64_t rows = candidates.shape(0), number = candidates.shape(1);
  require(first.size() == rows && last.size() == rows, "one interval per row");
  py::array_t<int64_t> result({rows, keep});
  const int64_t *candidate = candidates.data(), *low = first.data(), *high = last.data();
  int64_t* out = result.mutable_data();
  py::gil_scoped_release release;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* begin = out + row * keep;
    int64_t* end = begin;
    for (int64_t place = row * number; place < (row + 1) * number && end < begin + keep; ++place) {
      const int64_t id = candidate[place];
      if (id < 0 || (id >= low[row] && id < high[row]) || std::find(begin, end, id) != end) continue;
      *end++ = id;
    }
    std::fill(end, begin + keep, int64_t{-1});
  }
  return result;
}

py::array_t<float> candidate_distances(const Array<float>& queries, const Array<int64_t>& candidates,
                                      const py::array_t<uint16_t>& vectors, int64_t threads) {
  require(queries.ndim() == 2 && candidates.ndim() == 2 && vectors.ndim() == 2, "all three are matrices");
  require(queries.shape(0) == candidates.shape(0) && queries.shape(1) == vectors.shape(1), "shapes do not match");
  require(vectors.strides(1) == 2 && vectors.strides(0) == 2 * vectors.shape(1), "vectors are not contiguous");
  const int64_t rows = candidates.shape(0), number = candidates.shape(1), dimension = queries.shape(1);
  const int64_t *id = candidates.data(), num_vectors = vectors.shape(0);
  for (int64_t place = 0; place < rows * number; ++place) require(id[place] < num_vectors, "a candidate has no vector");
  py::array_t<float> result({rows, number});
  const float* query = queries.data();
  const uint16_t* vector = vectors.data();
  float* out = result.mutable_data();
  py::gil_scoped_release release;
  constexpr int64_t ahead = 4;
  over_rows(rows, threads, number * dimension, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t place = row * number; place < (row + 1) * number; ++place) {
        if (place + ahead < last * number && id[place + ahead] >= 0)
          for (int64_t part = 0; part < dimension; part += 32) PREFETCH(vector + id[place + ahead] * dimension + part);
        out[place] = id[place] < 0
                         ? std::numeric_limits<float>::infinity()
                         : squared_distance(query + row * dimension, vector + id[place] * dimension, dimension);
      }
  });
  return result;
}
