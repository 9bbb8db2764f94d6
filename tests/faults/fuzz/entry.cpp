// What libFuzzer calls, or `replay.cpp`. An exception is an answer; a sanitizer ends the process.
#include "inputs.h"

#include <cstdio>

namespace {

const std::function<void(fuzz::Bytes&)>* fuzzed = nullptr;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* name = std::getenv("FUZZED_ENTRY");
  const auto found = entries.find(name ? name : "");
  if (found == entries.end()) {
    for (const auto& entry : entries) std::printf("%s\n", entry.first.c_str());
    std::exit(name ? 1 : 0);
  }
  fuzzed = &found->second;
  pybind11::initialize_interpreter();
  pybind11::module_::import("numpy");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  try {
    (*fuzzed)(bytes);
  } catch (const std::exception&) {  // refused: of ours, of NumPy's or of memory
  }
  return 0;
}
