// How Python's positional arguments become the members of an op's argument struct, for both modules' bindings.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace fastlm::bindings {

// What Python passes for a T: pointers come as addresses, everything else as it is.
template <class T>
struct Passed {
  using type = T;
  static T taken(const T& value) { return value; }
};
template <class T>
struct Passed<T*> {
  using type = std::uintptr_t;
  static T* taken(type value) { return reinterpret_cast<T*>(value); }
};

template <class Args, class T>
T member_type(T Args::*);
template <auto Member>
using passed = Passed<decltype(member_type(Member))>;

// Defines `name` of m: its arguments fill these members of Args in order, the others are 0, and `op` runs on them.
template <auto... Members, class Args, class Result>
void define(pybind11::module_& m, const char* name, Result (*op)(const Args&)) {
  m.def(
      name,
      [op](typename passed<Members>::type... values) {
        Args args{};
        ((args.*Members = passed<Members>::taken(values)), ...);
        return op(args);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fastlm::bindings
