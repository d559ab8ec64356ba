// Weights that Python gives by their names, as the bindings of SAM's kernels take them.
#pragma once

#include <string>
#include <vector>

#include "bindings.h"
#include "tile_store.h"

// Reads them one by one, and keeps what was made of them.
class GivenWeights {
   protected:
    GivenWeights(const std::string& dtype, const py::dict& weights) : dtype_(dtype), given_(weights) {}

    py::array array(const std::string& name) const {
        require(given_.contains(name.c_str()), ("a weight is missing: " + name).c_str());
        return given_[name.c_str()].cast<py::array>();
    }

    // The view lasts as long as the array.
    Matrix checked(const py::array& array, const std::string& name, int64_t rows, int64_t cols) const {
        const Matrix view = view_matrix(array, dtype_);
        require(view.rows == rows && view.cols == cols, (name + " does not fit the others").c_str());
        return view;
    }

    // As floats, filled up with zeros to a multiple of 32.
    const float* vector(const std::string& name, int64_t size) {
        const py::array given = array(name);
        require(given.dtype().kind() == 'f', (name + " must be floats").c_str());
        const auto found = py::array_t<float, py::array::c_style | py::array::forcecast>(given);
        require(found.size() == size, (name + " does not fit the others").c_str());
        float* const kept = room(up_to(size, 2 * kTile));
        std::copy(found.data(), found.data() + size, kept);
        return kept;
    }

    // Zeros that stay where they are.
    float* room(int64_t size) { return vectors_.emplace_back(static_cast<size_t>(size), 0.f).data(); }

    // Lets go of what was given.
    void forget() { given_ = py::dict(); }

    std::string dtype_;
    TileStore store_;

   private:
    py::dict given_;
    std::vector<std::vector<float>> vectors_;
};
