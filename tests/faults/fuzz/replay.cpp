// Runs a fuzz target over files without libFuzzer, where there is no clang.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerInitialize(int*, char***);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t);

int main(int count, char** words) {
  LLVMFuzzerInitialize(&count, &words);
  for (int place = 1; place < count; ++place) {
    std::ifstream stream(words[place], std::ios::binary);
    const std::vector<char> content{std::istreambuf_iterator<char>(stream), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(content.data()), content.size());
  }
  std::printf("%d inputs\n", count - 1);
}
