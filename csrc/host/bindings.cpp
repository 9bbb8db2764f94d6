// The Python face of the data layer's C++. Shapes and types are checked here; errors get their names in Python.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "byte_level.h"
#include "charsmap.h"
#include "parallel.h"
#include "chunk_database.h"
#include "unigram.h"
#include "word_cache.h"

namespace py = pybind11;

namespace host {

namespace {

constexpr int64_t cost_of_lookup = 800;

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

TokenFile make_file(std::string prefix, const py::array& stream, const py::array& pointers,
                    const py::array& documents) {
    require(stream.itemsize() == 2 || stream.itemsize() == 4, "tokens of 2 or 4 bytes");
    require(documents.size() > 0, "document boundaries begin with a zero");
    return {std::move(prefix),          bytes_of(stream, stream.itemsize()), int64_t(stream.size()),
            int64_t(stream.itemsize()), bytes_of(pointers, 8),               int64_t(pointers.size()),
            bytes_of(documents, 8),     int64_t(documents.size()) - 1};
}

// A corpus is (prefix, stream, pointers, documents, first document, documents before it in the database).
OwnedDatabase make_database(std::string path, const py::list& corpora, const py::array& chunks_before,
                            int64_t chunk_length, int64_t eod) {
    require(chunks_before.size() > 1 && py::len(corpora) > 0 && chunk_length > 0, "a database without chunks");
    OwnedDatabase owned{{std::move(path), {}, bytes_of(chunks_before, 8), int64_t(chunks_before.size()) - 1,
                         chunk_length, eod},
                        py::list()};
    owned.owners.append(chunks_before);
    int64_t before = 0;
    for (const py::handle& item : corpora) {
        auto [prefix, stream, pointers, documents, first_document, documents_before] =
            py::cast<std::tuple<std::string, py::array, py::array, py::array, int64_t, int64_t>>(item);
        const bool is_first = owned.database.corpora.empty();
        require(is_first ? documents_before == 0 : documents_before >= before, "corpora are not in order");
        for (const py::array& array : {stream, pointers, documents}) owned.owners.append(array);
        owned.database.corpora.push_back(
            {make_file(prefix, stream, pointers, documents), first_document, documents_before});
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

Ids token_documents(const std::string& prefix, const py::array& stream, const py::array& pointers,
                    const py::array& documents, const Ids& offsets) {
    const TokenFile file = make_file(prefix, stream, pointers, documents);
    Ids found(offsets.size());
    int64_t* to = found.mutable_data();
    for (int64_t place = 0; place < offsets.size(); ++place) to[place] = file.document_of(offsets.data()[place]);
    return found;
}

std::string_view text_of(const py::handle& text) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) throw py::error_already_set();
    return {data, size_t(size)};
}

py::list scan_texts(WordCache& cache, const py::sequence& texts) {
    for (const py::handle& text : texts) cache.scan(text_of(text));
    py::list keys;
    for (const std::string_view key : cache.missing()) keys.append(py::str(key.data(), key.size()));
    return keys;
}

int32_t id_of(PyObject* number) {
    const long value = PyLong_AsLong(number);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (value < 0 || value > std::numeric_limits<int32_t>::max()) throw py::value_error("a token id beyond 31 bits");
    return int32_t(value);
}

template <typename Token>
Token fitting(int32_t id) {
    if (id > int64_t(std::numeric_limits<Token>::max())) throw py::value_error("a token id does not fit the stored type");
    return Token(id);
}

void fill_missing(WordCache& cache, const py::list& found) {
    std::vector<int32_t> ids;
    for (const py::handle& item : found) {
        const auto list = py::cast<py::list>(item);
        ids.clear();
        for (const py::handle& id : list) ids.push_back(id_of(id.ptr()));
        cache.fill(ids);
    }
}

// Lists of ids as one array, and their lengths.
template <typename Token>
py::tuple join_lists(const py::list& lists) {
    py::array_t<int64_t> counts(lists.size());
    int64_t total = 0;
    for (size_t place = 0; place < lists.size(); ++place) {
        const int64_t count = int64_t(PyList_Size(lists[place].ptr()));
        if (count < 0) throw py::error_already_set();
        counts.mutable_data()[place] = count;
        total += count;
    }
    py::array_t<Token> tokens(total);
    Token* target = tokens.mutable_data();
    for (const py::handle& list : lists) {
        const Py_ssize_t count = PyList_GET_SIZE(list.ptr());
        for (Py_ssize_t place = 0; place < count; ++place) {
            *target++ = fitting<Token>(id_of(PyList_GET_ITEM(list.ptr(), place)));
        }
    }
    return py::make_tuple(tokens, counts);
}

UnigramWords make_unigram(const py::list& pieces, float unknown_score, int32_t unknown_id,
                          const std::vector<int32_t>& byte_ids) {
    std::vector<UnigramPiece> found;
    for (const py::handle& item : pieces) {
        const auto [text, score, id, unused] = py::cast<std::tuple<std::string, float, int32_t, bool>>(item);
        found.push_back({text, score, id, unused});
    }
    return UnigramWords(found, unknown_score, unknown_id, byte_ids);
}

py::list add_words(UnigramWords& words, const py::list& normalized) {
    py::list numbers;
    for (const py::handle& word : normalized) {
        py::list one;
        one.append(words.add(text_of(word)));
        numbers.append(one);
    }
    return numbers;
}

// Tokens of all texts and how many each has.
template <typename Token>
py::tuple segment_texts(const UnigramWords& words, const py::array_t<int32_t>& numbers,
                        const py::array_t<int64_t>& counts) {
    std::vector<int32_t> ids;
    py::array_t<int64_t> lengths(counts.size());
    const int32_t* from = numbers.data();
    for (int64_t text = 0; text < counts.size(); ++text) {
        const size_t before = ids.size();
        words.append(from, counts.data()[text], ids);
        from += counts.data()[text];
        lengths.mutable_data()[text] = int64_t(ids.size() - before);
    }
    py::array_t<Token> tokens(int64_t(ids.size()));
    std::copy(ids.begin(), ids.end(), tokens.mutable_data());
    return py::make_tuple(tokens, lengths);
}

ByteLevelMerges make_merges(const std::vector<int32_t>& bytes, const py::list& merges) {
    std::array<int32_t, 256> by_byte;
    require(bytes.size() == 256, "one id per byte");
    std::copy_n(bytes.begin(), 256, by_byte.begin());
    std::vector<Merge> ranked;
    for (const py::handle& item : merges) {
        const auto [left, right, merged] = py::cast<std::tuple<int32_t, int32_t, int32_t>>(item);
        ranked.push_back({left, right, merged});
    }
    return ByteLevelMerges(by_byte, ranked);
}

template <typename Token>
py::tuple emit_as(WordCache& cache) {
    py::array_t<Token> tokens(cache.total());
    cache.emit(tokens.mutable_data());
    const std::vector<int64_t> lengths = cache.lengths();
    py::array_t<int64_t> counts(lengths.size(), lengths.data());
    cache.finish();
    return py::make_tuple(tokens, counts);
}

WordCache make_cache(const std::string& spaces, const std::vector<uint32_t>& closed, bool wide_closed,
                     bool newline_starts, const std::string& strip, bool gpt2_cuts,
                     const std::vector<std::string>& atoms, size_t memory_limit) {
    Boundaries boundaries;
    boundaries.gpt2_cuts = gpt2_cuts;
    boundaries.atoms = atoms;
    for (const char space : spaces) boundaries.spaces[uint8_t(space)] = true;
    for (const uint32_t point : closed) {
        if (point < 128) boundaries.closed[point] = true;
        else boundaries.closed_wide.push_back(point);
    }
    boundaries.wide_closed = wide_closed;
    boundaries.newline_starts = newline_starts;
    boundaries.strip = strip == "all" ? Strip::all_spaces : strip == "one" ? Strip::one_space : Strip::nothing;
    return WordCache(std::move(boundaries), memory_limit);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Reads of mapped token files and chunk databases, and the word cache of tokenizers.";
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
    py::class_<WordCache>(module, "WordCache")
        .def(py::init(&make_cache), py::arg("spaces"), py::arg("closed"), py::arg("wide_closed"),
             py::arg("newline_starts"), py::arg("strip"), py::arg("gpt2_cuts"), py::arg("atoms"),
             py::arg("memory_limit"))
        .def(
            "use_merges",
            [](WordCache& cache, const std::vector<int32_t>& bytes, const py::list& merges) {
                cache.use_merges(make_merges(bytes, merges));
            },
            py::arg("bytes"), py::arg("merges"))
        .def("scan", &scan_texts, py::arg("texts"))
        .def("fill", &fill_missing, py::arg("found"))
        .def("emit16", &emit_as<uint16_t>)
        .def("emit32", &emit_as<int32_t>)
        .def("forget", &WordCache::forget)
        .def("__len__", &WordCache::size);
    py::class_<UnigramWords>(module, "UnigramWords")
        .def(py::init(&make_unigram), py::arg("pieces"), py::arg("unknown_score"), py::arg("unknown_id"),
             py::arg("byte_ids"))
        .def("add", &add_words, py::arg("normalized"))
        .def("clear", &UnigramWords::clear)
        .def_property_readonly("memory", &UnigramWords::memory)
        .def("segment16", &segment_texts<uint16_t>, py::arg("numbers"), py::arg("counts"))
        .def("segment32", &segment_texts<int32_t>, py::arg("numbers"), py::arg("counts"));
    module.def("join16", &join_lists<uint16_t>, py::arg("lists"));
    module.def("join32", &join_lists<int32_t>, py::arg("lists"));
    module.def(
        "rules_touch_spaces",
        [](const py::bytes& charsmap, const py::bytes& spaces) {
            return rules_touch_spaces(std::string_view(charsmap), std::string_view(spaces));
        },
        py::arg("charsmap"), py::arg("spaces"));
}

}  // namespace host
