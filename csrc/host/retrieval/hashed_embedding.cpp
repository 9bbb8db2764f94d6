// Chunks as signed random projections of their hashed n-grams: no weights, the same bits on every machine.
//
// Every distinct n-gram hashes to a vector of signs; a chunk is their sum, weighted by length (in integers), scaled to
// length one. The cosine of two chunks then estimates the share of n-grams they have in common.
#include "hashed_embedding.h"

#include <cmath>

namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Distinct hashes of the n-grams of one length; an n-gram does not cross a masked position.
void ngram_hashes(const int32_t* tokens, const uint8_t* present, int64_t length, int size, std::vector<uint64_t>& out) {
  out.clear();
  for (int64_t start = 0; start + size <= length; ++start) {
    uint64_t hash = mix(static_cast<uint64_t>(size));
    bool whole = true;
    for (int offset = 0; offset < size; ++offset) {
      whole = whole && present[start + offset];
      hash = mix(hash ^ static_cast<uint64_t>(static_cast<uint32_t>(tokens[start + offset])));
    }
    if (whole) out.push_back(hash);
  }
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
}

WIDEST void add_signs(uint32_t word, int32_t weight, int32_t* sums) {
  for (uint32_t bit = 0; bit < 32; ++bit) sums[bit] += static_cast<int32_t>((word >> bit) & 1U) * weight;
}

void embed_row(const int32_t* tokens, const uint8_t* present, int64_t length, const std::vector<int32_t>& weights,
               int64_t dimension, float* out, std::vector<uint64_t>& hashes, std::vector<int32_t>& sums) {
  std::fill(sums.begin(), sums.end(), 0);
  int32_t total = 0;
  for (int size = 1; size <= static_cast<int>(weights.size()); ++size) {
    const int32_t weight = weights[size - 1];
    ngram_hashes(tokens, present, length, size, hashes);
    for (uint64_t hash : hashes) {
      total += weight;
      for (int64_t word = 0; word < dimension / 64; ++word) {
        const uint64_t signs = mix(hash + static_cast<uint64_t>(word) * 0xd1342543de82ef95ULL);
        add_signs(static_cast<uint32_t>(signs), weight, &sums[word * 64]);
        add_signs(static_cast<uint32_t>(signs >> 32), weight, &sums[word * 64 + 32]);
      }
    }
  }
  int64_t squares = 0;
  for (int32_t& sum : sums) {
    sum = 2 * sum - total;
    squares += static_cast<int64_t>(sum) * sum;
  }
  const double scale = squares > 0 ? 1.0 / std::sqrt(static_cast<double>(squares)) : 0.0;
  for (int64_t column = 0; column < dimension; ++column) out[column] = static_cast<float>(sums[column] * scale);
}

}  // namespace

py::array_t<float> embed_hashed(const Array<int32_t>& tokens, const Array<uint8_t>& present,
                                const std::vector<int32_t>& weights, int64_t dimension, int64_t threads) {
  require(tokens.ndim() == 2 && present.ndim() == 2, "tokens and present are [chunks, length]");
  require(tokens.shape(0) == present.shape(0) && tokens.shape(1) == present.shape(1), "present has another shape");
  require(dimension > 0 && dimension % 64 == 0, "the dimension is a multiple of 64");
  const int64_t count = tokens.shape(0), length = tokens.shape(1);
  py::array_t<float> result({count, dimension});
  const int32_t* token = tokens.data();
  const uint8_t* mask = present.data();
  float* out = result.mutable_data();
  py::gil_scoped_release release;
  over_rows(count, threads, length * dimension / 4, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> hashes;
    std::vector<int32_t> sums(dimension);
    for (int64_t row = first; row < last; ++row)
      embed_row(token + row * length, mask + row * length, length, weights, dimension, out + row * dimension,
                hashes, sums);
  });
  return result;
}
