// megatron_retro.retrieval._native. The Python faces, which say what each function means, are in retrieval/native.py.
#include "hashed_embedding.h"
#include "overlap.h"
#include "top_candidates.h"

#include <pybind11/stl.h>

PYBIND11_MODULE(_native, module) {
  module.doc() = "Host-side C++ of retrieval: hashed embeddings, best candidates, shared tokens";
  module.def("embed_hashed", &embed_hashed);
  module.def("longest_common_runs", &longest_common_runs);
  module.def("bm25_scores", &bm25_scores);
  module.def("token_overlaps", &token_overlaps);
  module.def("keep_other_documents", &keep_other_documents);
  module.def("candidate_distances", &candidate_distances);
  py::class_<TopCandidates>(module, "TopCandidates")
      .def(py::init<int64_t, int64_t, int64_t>())
      .def("exclude", &TopCandidates::exclude)
      .def("offer", &TopCandidates::offer)
      .def("offer_rounded", &TopCandidates::offer_rounded)
      .def("best", &TopCandidates::best);
}
