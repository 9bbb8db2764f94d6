// The entry points of `csrc/host`: what reads mapped token files, chunk databases and neighbour tables.
#include "../../../csrc/host/bindings.cpp"
#include "inputs.h"

namespace {

using fuzz::Bytes;

py::array stream_of(Bytes& bytes, bool narrow) {
  return narrow ? py::array(bytes.array<uint16_t>()) : py::array(bytes.array<int32_t>());
}

host::OwnedDatabase database_of(Bytes& bytes) {
  const auto options = bytes.number<uint8_t>();
  py::list corpora;
  for (int number = 0; number <= options % 3; ++number) {
    const py::array stream = stream_of(bytes, options & 4);
    const py::array pointers = bytes.array<int64_t>(), documents = bytes.array<int64_t>();
    const auto first = bytes.number(), before = bytes.number();
    corpora.append(py::make_tuple("file", stream, pointers, documents, first, before));
  }
  const py::array chunks_before = bytes.array<int64_t>();
  const auto chunk_length = bytes.number(), eod = bytes.number();
  return host::make_database("database", corpora, chunks_before, chunk_length, eod);
}

void fuzz_gather(Bytes& bytes) {
  const auto database = database_of(bytes);
  const auto length = bytes.number<uint8_t>(), options = bytes.number<uint8_t>();
  host::gather(database, bytes.array<int64_t>(), length, options & 1 ? 2 : 4, 1 + (options & 2));
}

void fuzz_select(Bytes& bytes) {
  const auto database = database_of(bytes);
  const auto wanted = bytes.number<int8_t>();
  const auto options = bytes.number<uint8_t>();
  const auto packed = bytes.table<uint8_t>();
  const auto excluded = bytes.table<int64_t>();
  host::select(database, packed, excluded, wanted, bytes.array<uint64_t>(), options & 1, 1 + (options & 2));
}

void fuzz_documents(Bytes& bytes) {
  const auto database = database_of(bytes);
  host::chunk_documents(database, bytes.array<int64_t>());
}

void fuzz_token_documents(Bytes& bytes) {
  const py::array stream = stream_of(bytes, bytes.number<uint8_t>() & 4);
  const py::array pointers = bytes.array<int64_t>(), documents = bytes.array<int64_t>();
  host::token_documents("file", stream, pointers, documents, bytes.array<int64_t>());
}

}  // namespace

const fuzz::Entries entries = {{"gather", fuzz_gather},
                               {"select", fuzz_select},
                               {"documents", fuzz_documents},
                               {"token_documents", fuzz_token_documents}};
