// Python's view of the vision tower.

#include "bindings.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tile_store.h"
#include "tiles.h"
#include "vision_tower.h"

namespace {

constexpr size_t kLayerMatrices = 5, kLayerVectors = 7;

// The weights as tiles, and what runs them.
class VisionTower {
   public:
    VisionTower(const std::string& dtype, const std::string& patches_dtype, int64_t heads, int64_t merged, float epsilon, const py::array& patches,
                const std::vector<std::vector<py::array>>& matrices, const std::vector<std::vector<Array<float>>>& vectors,
                const std::vector<bool>& is_full, const std::vector<py::array>& last_matrices,
                const std::vector<Array<float>>& last_vectors, bool pack, int n_threads) {
        require(has_tiles(), "this processor has no fast products of bfloat16");
        require(n_threads > 0 && n_threads <= 1024, "n_threads must be from 1 to 1024");
        require(!matrices.empty() && matrices.size() == vectors.size() && matrices.size() == is_full.size(),
                "matrices, vectors and is_full must be of one number of layers");
        require(last_matrices.size() == 2 && last_vectors.size() == 3, "the merger has two matrices and three vectors");
        require(matrices[0].size() == kLayerMatrices, "a layer has the matrices qkv, output, gate, up, down");
        const Matrix first = view_matrix(patches, patches_dtype), gate = view_matrix(matrices[0][2], dtype);
        const Matrix last = view_matrix(last_matrices[1], dtype);
        TowerShape& s = weights_.shape;
        s = {first.rows, first.cols, heads, gate.cols, last.cols, merged, epsilon};
        require(heads > 0 && merged > 0 && merged <= 1024 && s.hidden > 0 && s.out > 0 && s.hidden % kTileDepth == 0 && s.hidden % heads == 0 && s.head_dim() % kTile == 0 &&
                    s.out % kTileDepth == 0,
                "hidden and out must be multiples of 32, head_dim of 16");
        require(s.patch_dim > 0 && s.mlp > 0 && gate.rows == s.hidden && last.rows == s.wide(), "a matrix does not fit the others");
        require(!pack || (s.hidden % kPanel == 0 && s.out % kPanel == 0), "hidden and out must be multiples of 64 to be packed");
        weights_.is_packed = pack;
        const auto bytes = pack ? filled_bytes : tiled_bytes;
        const int64_t layer = bytes(s.hidden, 3 * s.hidden) + bytes(s.hidden, s.hidden) + 2 * bytes(s.hidden, up_to(s.mlp, kTileDepth)) +
                              bytes(s.mlp, s.hidden);
        store_.reserve(tiled_bytes(s.patch_dim, s.hidden) + static_cast<int64_t>(matrices.size()) * layer + bytes(s.wide(), s.wide()) +
                           bytes(s.wide(), s.out));
        weights_.patches = store_.tiles(checked(patches, patches_dtype, s.patch_dim, s.hidden), 1);
        for (size_t i = 0; i < matrices.size(); ++i) add_layer(dtype, matrices[i], vectors[i], is_full[i]);
        weights_.last_norm = vector(last_vectors[0], s.hidden);
        weights_.first = matrix(last_matrices[0], dtype, s.wide(), s.wide());
        weights_.first_bias = vector(last_vectors[1], s.wide());
        weights_.second = matrix(last_matrices[1], dtype, s.wide(), s.out);
        weights_.second_bias = vector(last_vectors[2], s.out);
        tower_ = std::make_unique<Tower>(weights_, n_threads);
    }

    Array<float> run(const Array<float>& patches, const Array<float>& cos, const Array<float>& sin,
                     const Array<int64_t>& order, const Array<int64_t>& window_starts, bool alone) {
        const TowerShape& s = weights_.shape;
        require(patches.ndim() == 3 && patches.shape(1) > 0 && patches.shape(2) == s.patch_dim,
                "patches must be (batch, n_patches, patch_dim)");
        const int64_t n = patches.shape(1);
        for (const auto* table : {&cos, &sin}) {
            require(table->ndim() == 2 && table->shape(0) == n && table->shape(1) == s.head_dim(),
                    "cos and sin must be (n_patches, head_dim)");
        }
        TowerImage image{n, nullptr, cos.data(), sin.data(), checked_order(order, n), checked_starts(window_starts, n)};
        Array<float> out({patches.shape(0), static_cast<py::ssize_t>(n / s.merged), static_cast<py::ssize_t>(s.out)});
        const float* const from = patches.data();
        float* const to = out.mutable_data();
        const int64_t batch = patches.shape(0);
        py::gil_scoped_release release;
        for (int64_t i = 0; i < batch; ++i) {
            image.patches = from + i * n * s.patch_dim;
            tower_->run(image, alone, to + i * (n / s.merged) * s.out);
        }
        return out;
    }

   private:
    void add_layer(const std::string& dtype, const std::vector<py::array>& m, const std::vector<Array<float>>& v, bool is_full) {
        const TowerShape& s = weights_.shape;
        require(m.size() == kLayerMatrices && v.size() == kLayerVectors, "a layer has five matrices and seven vectors");
        const int64_t mlp = up_to(s.mlp, kPanel);
        TowerLayer layer{};
        layer.is_full = is_full;
        layer.attention_norm = vector(v[0], s.hidden);
        layer.qkv = matrix(m[0], dtype, s.hidden, 3 * s.hidden);
        layer.qkv_bias = vector(v[1], 3 * s.hidden);
        layer.output = matrix(m[1], dtype, s.hidden, s.hidden);
        layer.output_bias = vector(v[2], s.hidden);
        layer.mlp_norm = vector(v[3], s.hidden);
        layer.gate_and_up = gate_and_up(checked(m[2], dtype, s.hidden, s.mlp), checked(m[3], dtype, s.hidden, s.mlp));
        layer.gate_bias = vector(v[4], s.mlp, mlp);
        layer.up_bias = vector(v[5], s.mlp, mlp);
        layer.down = matrix(m[4], dtype, s.mlp, s.hidden);
        layer.down_bias = vector(v[6], s.hidden);
        weights_.layers.push_back(layer);
    }

    TiledMatrix gate_and_up(const Matrix& gate, const Matrix& up) {
        if (weights_.is_packed) {
            const uint8_t* const both = store_.packed(gate);
            store_.packed(up);  // right behind it
            return {nullptr, both};
        }
        const int64_t whole = tiled_numbers(gate.rows, up_to(gate.cols, kTileDepth)), own = tiled_numbers(gate.rows, gate.cols);
        auto* const both = reinterpret_cast<uint16_t*>(store_.taken(2 * whole * static_cast<int64_t>(sizeof(uint16_t))));
        const py::gil_scoped_release release;
        tile_matrix(gate, 2, both);
        tile_matrix(up, 2, both + tiled_numbers(gate.rows, kTile));
        std::fill(both + 2 * own, both + 2 * whole, uint16_t{0});  // behind the last panels
        return {both, nullptr};
    }

    static Matrix checked(const py::array& array, const std::string& dtype, int64_t rows, int64_t cols) {
        const Matrix view = view_matrix(array, dtype);
        require(view.rows == rows && view.cols == cols, "a matrix does not fit the others");
        return view;
    }

    TiledMatrix matrix(const py::array& array, const std::string& dtype, int64_t rows, int64_t cols) {
        return store_.either(checked(array, dtype, rows, cols), weights_.is_packed);
    }

    // A copy, filled up with zeros.
    const float* vector(const Array<float>& array, int64_t size, int64_t whole = 0) {
        require(array.ndim() == 1 && array.size() == size, "a vector does not fit the matrices");
        std::vector<float>& kept = vectors_.emplace_back(array.data(), array.data() + size);
        kept.resize(static_cast<size_t>(std::max(size, whole)), 0.f);
        return kept.data();
    }

    std::vector<int64_t> checked_order(const Array<int64_t>& order, int64_t n) const {
        const int64_t merged = weights_.shape.merged;
        require(order.ndim() == 1 && order.size() == n && n % merged == 0, "order must be (n_patches,), whole tokens");
        std::vector<int64_t> found(order.data(), order.data() + n);
        std::vector<bool> is_there(static_cast<size_t>(n / merged), false);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t first = found[static_cast<size_t>(i - i % merged)], own = found[static_cast<size_t>(i)];
            require(first >= 0 && first < n && first % merged == 0 && own == first + i % merged, "the patches of a token must lie together");
            if (i % merged != 0) continue;
            require(!is_there[static_cast<size_t>(first / merged)], "a patch may be there once");
            is_there[static_cast<size_t>(first / merged)] = true;
        }
        return found;
    }

    static std::vector<int64_t> checked_starts(const Array<int64_t>& starts, int64_t n) {
        require(starts.ndim() == 1 && starts.size() >= 2, "window_starts must be (n_windows + 1,)");
        std::vector<int64_t> found(starts.data(), starts.data() + starts.size());
        require(found.front() == 0 && found.back() == n, "window_starts must go from 0 to n_patches");
        for (size_t i = 1; i < found.size(); ++i) require(found[i - 1] < found[i], "window_starts must ascend");
        return found;
    }

    TowerWeights weights_;
    std::vector<std::vector<float>> vectors_;  // whose numbers stay where they are when more are added
    TileStore store_;
    std::unique_ptr<Tower> tower_;
};

}  // namespace

void bind_tower(py::module_& m) {
    m.def("has_tiles", &has_tiles, "Whether kernels multiply tiles of bfloat16 here.");
    m.def("tile_road", &tile_road_name, "How they do.");
    m.def("tile_roads", &tile_road_names, "All ways in which this processor can, slowest first; \"none\" is one.");
    m.def("set_tile_road", &set_tile_road, py::arg("name"), "Choose one of them for what is opened from now on; for tests.");
    py::class_<VisionTower>(m, "VisionTower", "The weights of a vision tower as tiles, and the threads that run it.")
        .def(py::init<const std::string&, const std::string&, int64_t, int64_t, float, const py::array&, const std::vector<std::vector<py::array>>&,
                      const std::vector<std::vector<Array<float>>>&, const std::vector<bool>&, const std::vector<py::array>&,
                      const std::vector<Array<float>>&, bool, int>(),
             py::arg("dtype"), py::arg("patches_dtype"), py::arg("heads"), py::arg("merged"), py::arg("epsilon"), py::arg("patches"), py::arg("matrices"),
             py::arg("vectors"), py::arg("is_full"), py::arg("last_matrices"), py::arg("last_vectors"), py::arg("pack") = false, py::arg("n_threads") = 1)
        .def("run", &VisionTower::run, py::arg("patches").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
             py::arg("order").noconvert(), py::arg("window_starts").noconvert(), py::arg("alone") = false,
             "Tokens (batch, n_patches / merged, out) of images of one size.");
}
