// What the parts of the bindings share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "rows.h"

namespace py = pybind11;
using namespace medreasoner;

// With py::arg().noconvert() this type refuses other element types and strided arrays instead of copying them.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline void require(bool condition, const char* message) {
    if (!condition) refuse(message);
}

// A weight matrix (rows, columns) of the element type that is named.
Matrix view_matrix(const py::array& weight, const std::string& dtype);

void bind_decoder(py::module_& m);
void bind_tower(py::module_& m);
void bind_prompts(py::module_& m);
void bind_encoder(py::module_& m);
