// The Python face of the data layer's C++. Shapes and types are checked here; errors get their names in Python.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "parallel.h"
#include "chunk_database.h"

namespace py = pybind11;

namespace host {

namespace {

constexpr int64_t cost_of_lookup = 800;
constexpr int64_t longest_chunk = int64_t(1) << 20;  // times a number of tokens it stays below 2^63

using Ids = py::array_t<int64_t, py::array::c_style>;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

const uint8_t* bytes_of(const py::array& array, int64_t item_bytes) {
    require(array.ndim() == 1 && array.itemsize() == item_bytes, "an array of another shape or type");
    require(array.size() < 2 || array.strides(0) == item_bytes, "an array that is not contiguous");
    return static_cast<const uint8_t*>(array.data());
}

// A database that keeps the arrays alive which it points into.
struct OwnedDatabase {
    ChunkDatabase database;
    py::list owners;
};

// The stream is an array, or (number of tokens, bytes of one) where it is not mapped.
TokenFile make_file(std::string prefix, const py::object& stream, const py::array& pointers,
                    const py::array& documents) {
    const uint8_t* tokens = nullptr;
    int64_t num_tokens, item_bytes;
    if (py::isinstance<py::array>(stream)) {
        const py::array array = py::cast<py::array>(stream);
        num_tokens = array.size(), item_bytes = array.itemsize();
        tokens = bytes_of(array, item_bytes);
    } else {
        std::tie(num_tokens, item_bytes) = py::cast<std::pair<int64_t, int64_t>>(stream);
    }
    require(item_bytes == 2 || item_bytes == 4, "tokens of 2 or 4 bytes");
    require(documents.size() > 0, "document boundaries begin with a zero");
    return {std::move(prefix),      tokens, num_tokens, item_bytes, bytes_of(pointers, 8), int64_t(pointers.size()),
            bytes_of(documents, 8), int64_t(documents.size()) - 1};
}

// A corpus is (prefix, stream, pointers, documents, first document, documents before it in the database).
OwnedDatabase make_database(std::string path, const py::list& corpora, const py::array& chunks_before,
                            int64_t chunk_length, int64_t eod) {
    require(chunks_before.size() > 1 && py::len(corpora) > 0 && chunk_length > 0, "a database without chunks");
    require(chunk_length <= longest_chunk, "a chunk longer than any");
    OwnedDatabase owned{{std::move(path), {}, bytes_of(chunks_before, 8), int64_t(chunks_before.size()) - 1,
                         chunk_length, eod},
                        py::list()};
    owned.owners.append(chunks_before);
    int64_t before = 0;
    for (const py::handle& item : corpora) {
        auto [prefix, stream, pointers, documents, first_document, documents_before] =
            py::cast<std::tuple<std::string, py::object, py::array, py::array, int64_t, int64_t>>(item);
        const bool is_first = owned.database.corpora.empty();
        require(is_first ? documents_before == 0 : documents_before >= before, "corpora are not in order");
        for (const py::object& array : {stream, py::object(pointers), py::object(documents)}) owned.owners.append(array);
        TokenFile file = make_file(prefix, stream, pointers, documents);
        require(first_document >= 0 && first_document <= file.num_documents, "a corpus begins outside its file");
        require(documents_before <= owned.database.num_documents, "a corpus begins outside the database");
        owned.database.corpora.push_back({std::move(file), first_document, documents_before});
        before = documents_before;
    }
    return owned;
}

template <typename Token>
py::tuple gather_as(const ChunkDatabase& database, const Ids& ids, int64_t length, int threads) {
    const int64_t rows = ids.size();
    py::array_t<Token> tokens({rows, length});
    py::array_t<bool> mask({rows, length});
    const int64_t* id = ids.data();
    Token* to = tokens.mutable_data();
    bool* where = mask.mutable_data();
    {
        py::gil_scoped_release released;
        over_rows(rows, threads, cost_of_lookup, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                Token* target = to + row * length;
                const int64_t count = id[row] < 0 ? 0 : database.copy(id[row], length, target);
                std::memset(target + count, 0, (length - count) * sizeof(Token));
                std::memset(where + row * length, 1, count);
                std::memset(where + row * length + count, 0, length - count);
            }
        });
    }
    return py::make_tuple(tokens, mask);
}

py::tuple gather(const OwnedDatabase& owned, const Ids& ids, int64_t length, int64_t item_bytes, int threads) {
    require(length >= 0, "a negative length");
    for (const Corpus& corpus : owned.database.corpora) require(corpus.file.tokens, "tokens that are not mapped");
    return item_bytes == 2 ? gather_as<uint16_t>(owned.database, ids, length, threads)
                           : gather_as<int32_t>(owned.database, ids, length, threads);
}

// Rows are grouped by sample; `excluded` has one range of documents per sample, `limits` one number per corpus or
// nothing, when everything counts.
Ids select(const OwnedDatabase& owned, const py::array_t<uint8_t, py::array::c_style>& packed, const Ids& excluded,
           int64_t wanted, const py::array_t<uint64_t, py::array::c_style>& limits, bool by_chunk, int threads) {
    require(packed.ndim() == 2 && packed.shape(1) % id_bytes == 0, "packed ids are [rows, ids of 5 bytes]");
    require(excluded.ndim() == 2 && excluded.shape(1) == 2, "excluded documents are [samples, 2]");
    require(limits.size() == 0 || size_t(limits.size()) == owned.database.corpora.size(), "one limit per corpus");
    require(wanted >= 0, "a negative number of neighbours");
    const Thinning thinning{limits.size() ? limits.data() : nullptr, by_chunk};
    const int64_t rows = packed.shape(0), row_bytes = packed.shape(1), samples = excluded.shape(0);
    const int64_t per_sample = samples ? rows / samples : 1;
    require(rows == per_sample * samples, "every sample has the same number of rows");
    Ids chosen({rows, wanted});
    const uint8_t* from = packed.data();
    const int64_t* ranges = excluded.data();
    int64_t* to = chosen.mutable_data();
    {
        py::gil_scoped_release released;
        over_rows(rows, threads, cost_of_lookup, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const int64_t* range = ranges + 2 * (row / per_sample);
                select_neighbors(owned.database, from + row * row_bytes, row_bytes / id_bytes, {range[0], range[1]},
                                 thinning, wanted, to + row * wanted);
            }
        });
    }
    return chosen;
}

Ids chunk_documents(const OwnedDatabase& owned, const Ids& ids) {
    Ids found(ids.size());
    int64_t* to = found.mutable_data();
    for (int64_t place = 0; place < ids.size(); ++place) to[place] = owned.database.document_of(ids.data()[place]);
    return found;
}

Ids token_documents(const std::string& prefix, const py::object& stream, const py::array& pointers,
                    const py::array& documents, const Ids& offsets) {
    const TokenFile file = make_file(prefix, stream, pointers, documents);
    Ids found(offsets.size());
    int64_t* to = found.mutable_data();
    for (int64_t place = 0; place < offsets.size(); ++place) to[place] = file.document_of(offsets.data()[place]);
    return found;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Reads of mapped token files and chunk databases.";
    py::register_exception<DamagedFile>(module, "DamagedFile", PyExc_ValueError);
    py::class_<OwnedDatabase>(module, "ChunkDatabase")
        .def(py::init(&make_database), py::arg("path"), py::arg("corpora"), py::arg("chunks_before"),
             py::arg("chunk_length"), py::arg("eod"))
        .def("gather", &gather, py::arg("ids"), py::arg("length"), py::arg("item_bytes"), py::arg("threads"))
        .def("select", &select, py::arg("packed"), py::arg("excluded"), py::arg("wanted"), py::arg("limits"),
             py::arg("by_chunk"), py::arg("threads"))
        .def("documents", &chunk_documents, py::arg("ids"));
    module.def("token_documents", &token_documents, py::arg("prefix"), py::arg("stream"), py::arg("pointers"),
               py::arg("documents"), py::arg("offsets"));
}

}  // namespace host
