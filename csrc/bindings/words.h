// fastlm._cpu.Words: the words of texts, for fastlm/backends/cpu/words.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu/words.h"
#include "cpu/words_bpe.h"

namespace fastlm::bindings {

// A call's texts, which stay as long as the views of them, and what was found of them.
struct WordsFound {
  pybind11::list texts;
  Words::Found found;
};

inline std::string_view utf8(pybind11::handle text) {
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!data) throw pybind11::error_already_set();
  return {data, (size_t)size};
}

inline pybind11::list ids_of(const Words::Found& found) {
  pybind11::list ids;
  for (const Words::Encoded& text : found.texts) ids.append(pybind11::bytes(text.ids));
  return ids;
}

// (pieces, classes, ids of the 256 bytes, merges, tokens that are taken whole)
using BpeParts = std::tuple<std::vector<int>, pybind11::bytes, std::vector<int32_t>,
                            std::vector<std::array<int32_t, 3>>, std::vector<std::pair<pybind11::bytes, int32_t>>>;

inline std::unique_ptr<const WordBpe> make_bpe(const BpeParts& parts) {
  const auto& [pieces, classes, byte_ids, merges, whole] = parts;
  std::vector<Piece> kinds;
  for (const int piece : pieces) kinds.push_back((Piece)piece);
  std::vector<WordBpe::Merge> rules;
  for (const auto& [left, right, made] : merges) rules.push_back({left, right, made});
  std::unordered_map<std::string, int32_t> tokens;
  for (const auto& [token, id] : whole) tokens.emplace(std::string(token), id);
  return std::make_unique<const WordBpe>(kinds, std::string(classes), byte_ids, rules, std::move(tokens));
}

inline void define_words(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<WordsFound>(m, "WordsFound");
  py::class_<Words>(m, "Words")
      .def(py::init([](int cut, int id_bytes, int64_t most_bytes, const std::optional<BpeParts>& bpe) {
        return std::make_unique<Words>((Cut)cut, id_bytes, most_bytes, bpe ? make_bpe(*bpe) : nullptr);
      }))
      // (what `fill` takes, words to encode); the first is None where there are none, and the second the ids.
      .def("find",
           [](Words& words, const py::sequence& given, int threads) -> py::tuple {
             auto made = std::make_unique<WordsFound>();
             made->texts = py::list(given);
             std::vector<std::string_view> texts;
             for (const py::handle text : made->texts) texts.push_back(utf8(text));
             {
               const py::gil_scoped_release nogil;
               made->found = words.find(texts, threads);
             }
             if (made->found.unknown.empty()) return py::make_tuple(py::none(), ids_of(made->found));
             py::list unknown;
             for (const std::string_view word : made->found.unknown) unknown.append(py::str(word.data(), word.size()));
             return py::make_tuple(std::move(made), unknown);
           })
      .def("fill",
           [](Words& words, WordsFound& made, const std::vector<py::bytes>& given) {
             std::vector<std::string_view> ids;
             for (const py::bytes& one : given) ids.push_back(one);
             {
               const py::gil_scoped_release nogil;
               words.fill(made.found, ids);
             }
             return ids_of(made.found);
           })
      .def("cut",  // the words of a text, for the tests
           [](const Words& words, const py::str& text) {
             const std::string_view all = utf8(text);
             py::list found;
             const char* const end = all.data() + all.size();
             for (const char* p = all.data(); p < end;) {
               const char* const next = words.end_of(p, end);
               found.append(py::str(p, next - p));
               p = next;
             }
             return found;
           })
      .def("bytes", &Words::bytes, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &Words::size, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastlm::bindings
