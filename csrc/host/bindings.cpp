// The Python face of the data layer's C++; arguments are checked in Python, where errors have names.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "byte_level.h"
#include "charsmap.h"
#include "parallel.h"
#include "token_source.h"
#include "unigram.h"
#include "word_cache.h"

namespace py = pybind11;

namespace host {

namespace {

const uint8_t* bytes_of(const py::array& array) { return static_cast<const uint8_t*>(array.data()); }

// A chunk store that keeps the arrays it points into alive.
struct OwnedStore {
    ChunkStore store;
    py::list owners;
};

TokenSource source_of(const py::array& stream, const py::array& pointers, const py::array& documents) {
    return {bytes_of(stream),    int64_t(stream.size()),    int64_t(stream.itemsize()), bytes_of(pointers),
            int64_t(pointers.size()), bytes_of(documents), int64_t(documents.size()) - 1};
}

OwnedStore make_store(const py::list& corpora, const py::array& chunks_before, int64_t chunk_length, int64_t eod) {
    OwnedStore owned{{{}, bytes_of(chunks_before), int64_t(chunks_before.size()) - 1, chunk_length, eod}, py::list()};
    owned.owners.append(chunks_before);
    for (const py::handle& item : corpora) {
        const auto parts = py::cast<py::tuple>(item);
        for (int place = 0; place < 3; ++place) owned.owners.append(parts[place]);
        owned.store.corpora.push_back({source_of(py::cast<py::array>(parts[0]), py::cast<py::array>(parts[1]),
                                                 py::cast<py::array>(parts[2])),
                                       py::cast<int64_t>(parts[3]), py::cast<int64_t>(parts[4])});
    }
    return owned;
}

template <typename Token>
void gather_rows(const ChunkStore& store, const int64_t* ids, int64_t rows, int64_t length, int threads, Token* tokens,
                 bool* mask) {
    over_rows(rows, threads, [=, &store](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t count = ids[row] < 0 ? 0 : store.copy(ids[row], length, tokens + row * length);
            std::memset(tokens + row * length + count, 0, (length - count) * sizeof(Token));
            std::memset(mask + row * length, 1, count);
            std::memset(mask + row * length + count, 0, length - count);
        }
    });
}

template <typename Token>
py::tuple gather_as(const ChunkStore& store, const py::array_t<int64_t>& ids, int64_t length, int threads) {
    const int64_t rows = ids.size();
    py::array_t<Token> tokens({rows, length});
    py::array_t<bool> mask({rows, length});
    {
        const int64_t* from = ids.data();
        Token* to = tokens.mutable_data();
        bool* where = mask.mutable_data();
        py::gil_scoped_release released;
        gather_rows(store, from, rows, length, threads, to, where);
    }
    return py::make_tuple(tokens, mask);
}

py::tuple gather(const OwnedStore& owned, const py::array_t<int64_t, py::array::c_style>& ids, int64_t length,
                 int64_t item_bytes, int threads) {
    return item_bytes == 2 ? gather_as<uint16_t>(owned.store, ids, length, threads)
                           : gather_as<int32_t>(owned.store, ids, length, threads);
}

// Rows are grouped by sample; `excluded` has one interval of documents per sample, `limits` one number per corpus or
// nothing, when everything counts.
py::array_t<int64_t> select(const OwnedStore& owned, const py::array_t<uint8_t, py::array::c_style>& packed,
                            const py::array_t<int64_t, py::array::c_style>& excluded, int64_t wanted,
                            const py::array_t<uint64_t, py::array::c_style>& limits, bool by_chunk, int threads) {
    if (limits.size() != 0 && size_t(limits.size()) != owned.store.corpora.size())
        throw std::invalid_argument("one limit per corpus, or none");
    const Thinning thinning{limits.size() ? limits.data() : nullptr, by_chunk};
    const int64_t rows = packed.shape(0), row_bytes = packed.shape(1);
    const int64_t per_sample = rows / std::max<int64_t>(1, excluded.shape(0));
    py::array_t<int64_t> chosen({rows, wanted});
    const uint8_t* from = packed.data();
    const int64_t* intervals = excluded.data();
    int64_t* to = chosen.mutable_data();
    py::gil_scoped_release released;
    over_rows(rows, threads, [=, &owned](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t* interval = intervals + 2 * (row / per_sample);
            select_neighbors(owned.store, from + row * row_bytes, row_bytes / id_bytes, {interval[0], interval[1]},
                             thinning, wanted, to + row * wanted);
        }
    });
    return chosen;
}

py::array_t<int64_t> chunk_documents(const OwnedStore& owned, const py::array_t<int64_t, py::array::c_style>& ids) {
    py::array_t<int64_t> found(ids.size());
    for (int64_t place = 0; place < ids.size(); ++place) {
        found.mutable_data()[place] = owned.store.document_of(ids.data()[place]);
    }
    return found;
}

py::array_t<int64_t> token_documents(const py::array& stream, const py::array& pointers, const py::array& documents,
                                     const py::array_t<int64_t, py::array::c_style>& offsets) {
    const TokenSource source = source_of(stream, pointers, documents);
    py::array_t<int64_t> found(offsets.size());
    for (int64_t place = 0; place < offsets.size(); ++place) {
        found.mutable_data()[place] = source.document_of(offsets.data()[place]);
    }
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
    return int32_t(value);
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
        for (Py_ssize_t place = 0; place < count; ++place) *target++ = Token(id_of(PyList_GET_ITEM(list.ptr(), place)));
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
    module.doc() = "Gathers from mapped token files and the exact word cache of tokenizers.";
    py::class_<OwnedStore>(module, "ChunkStore")
        .def(py::init(&make_store), py::arg("corpora"), py::arg("chunks_before"), py::arg("chunk_length"),
             py::arg("eod"))
        .def("gather", &gather, py::arg("ids"), py::arg("length"), py::arg("item_bytes"), py::arg("threads"))
        .def("select", &select, py::arg("packed"), py::arg("excluded"), py::arg("wanted"), py::arg("limits"),
             py::arg("by_chunk"), py::arg("threads"))
        .def("documents", &chunk_documents, py::arg("ids"));
    module.def("token_documents", &token_documents, py::arg("stream"), py::arg("pointers"), py::arg("documents"),
               py::arg("offsets"));
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
