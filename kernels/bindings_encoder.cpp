// Python's view of the image encoder.

#include "bindings.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "given_weights.h"
#include "image_encoder.h"
#include "tiles.h"

namespace {

constexpr int64_t kPair = 2 * kTile, kMostGrid = 256, kMostPatch = 64;

// The weights, by names of our own, as tiles and floats, and the threads that run them.
class EncoderOfImages : GivenWeights {
   public:
    EncoderOfImages(const std::string& dtype, const py::dict& weights, int64_t heads, int64_t patch, int64_t grid, const std::vector<int64_t>& windows,
                    float epsilon, bool pack, int n_threads)
        : GivenWeights(dtype, weights) {
        require(has_tiles(), "this processor has no fast products of bfloat16");
        require(n_threads > 0 && n_threads <= 1024, "n_threads must be from 1 to 1024");
        require(patch > 0 && patch <= kMostPatch && grid > 0 && grid <= kMostGrid && grid % kTile == 0, "grid must be a multiple of 16 patches");
        require(!windows.empty(), "there must be a layer");
        for (const int64_t window : windows) require(window > 0 && window <= grid, "windows must be within the grid");
        const py::array first = array("patches"), up = array("0.up"), narrow = array("narrow");
        require(first.ndim() == 2 && up.ndim() == 2 && narrow.ndim() == 2, "matrices must be (in, out)");
        require(std::isfinite(epsilon) && epsilon > 0, "epsilon must be positive");
        EncoderShape& s = w_.shape;
        s = {patch, grid, first.shape(1), heads, up.shape(1), narrow.shape(1), epsilon};
        require(heads > 0 && s.hidden > 0 && s.hidden % kPair == 0 && s.hidden % heads == 0 && s.head_dim() % kTile == 0 && s.mlp > 0 &&
                    s.mlp % kPair == 0 && s.out > 0 && s.out % kPair == 0,
                "hidden, mlp and out must be multiples of 32, head_dim of 16");
        require(first.shape(0) == s.patch_dim() && up.shape(0) == s.hidden && narrow.shape(0) == s.hidden, "a matrix does not fit the others");
        require(!pack || (s.hidden % kPanel == 0 && s.mlp % kPanel == 0), "hidden and mlp must be multiples of 64 to be packed");
        w_.is_packed = pack;
        store_.reserve(all_bytes(windows));
        w_.patches = matrix("patches", s.patch_dim(), s.hidden);
        w_.patches_bias = vector("patches.bias", s.hidden);
        w_.places = vector("places", s.places() * s.hidden);
        for (size_t i = 0; i < windows.size(); ++i) add_layer(std::to_string(i) + ".", windows[i]);
        w_.narrow = matrix("narrow", s.hidden, s.out);
        w_.narrow_norm = norm("narrow_norm", s.out);
        for (int i = 0; i < 9; ++i) w_.neighbours[i] = matrix("neighbour." + std::to_string(i), s.out, s.out);
        w_.last_norm = norm("last_norm", s.out);
        forget();
        encoder_ = std::make_unique<ImageEncoder>(w_, n_threads);
    }

    Array<float> run(const Array<float>& pixels, bool alone) {
        const EncoderShape& s = w_.shape;
        require(pixels.ndim() == 4 && pixels.shape(1) == kColours && pixels.shape(2) == s.side() && pixels.shape(3) == s.side(),
                "pixels must be (batch, 3, side, side)");
        const int64_t batch = pixels.shape(0), in = kColours * s.side() * s.side(), size = s.out * s.places();
        Array<float> out({pixels.shape(0), static_cast<py::ssize_t>(s.out), static_cast<py::ssize_t>(s.grid), static_cast<py::ssize_t>(s.grid)});
        const float* const from = pixels.data();
        float* const to = out.mutable_data();
        const py::gil_scoped_release release;
        for (int64_t i = 0; i < batch; ++i) encoder_->run(from + i * in, alone, to + i * size);
        return out;
    }

   private:
    int64_t all_bytes(const std::vector<int64_t>& windows) const {
        const EncoderShape& s = w_.shape;
        const auto bytes = w_.is_packed ? filled_bytes : tiled_bytes;
        int64_t all = tiled_bytes(s.patch_dim(), s.hidden) + tiled_bytes(s.hidden, s.out) + 9 * tiled_bytes(s.out, s.out);
        for (const int64_t window : windows) {
            all += tiled_bytes(s.head_dim(), 2 * distances(window)) + bytes(s.hidden, 3 * s.hidden) + bytes(s.hidden, s.hidden) +
                   bytes(s.hidden, s.mlp) + bytes(s.mlp, s.hidden);
        }
        return all;
    }

    void add_layer(const std::string& name, int64_t window) {
        const EncoderShape& s = w_.shape;
        EncoderLayer layer{};
        layer.window = window;
        layer.attention_norm = norm(name + "attention_norm", s.hidden);
        layer.qkv = either(name + "qkv", s.hidden, 3 * s.hidden);
        layer.qkv_bias = vector(name + "qkv.bias", 3 * s.hidden);
        layer.offsets = matrix(name + "offsets", s.head_dim(), 2 * distances(window));
        layer.output = either(name + "output", s.hidden, s.hidden);
        layer.output_bias = vector(name + "output.bias", s.hidden);
        layer.mlp_norm = norm(name + "mlp_norm", s.hidden);
        layer.up = either(name + "up", s.hidden, s.mlp);
        layer.up_bias = vector(name + "up.bias", s.mlp);
        layer.down = either(name + "down", s.mlp, s.hidden);
        layer.down_bias = vector(name + "down.bias", s.hidden);
        w_.layers.push_back(layer);
    }

    const uint16_t* matrix(const std::string& name, int64_t rows, int64_t cols) {
        const py::array kept = array(name);
        return store_.tiles(checked(kept, name, rows, cols), 1);
    }

    TiledMatrix either(const std::string& name, int64_t rows, int64_t cols) {
        const py::array kept = array(name);
        return store_.either(checked(kept, name, rows, cols), w_.is_packed);
    }

    ScaleAndBias norm(const std::string& name, int64_t size) { return {vector(name + ".scale", size), vector(name + ".bias", size)}; }

    EncoderWeights w_;
    std::unique_ptr<ImageEncoder> encoder_;
};

}  // namespace

void bind_encoder(py::module_& m) {
    m.def("distances", &distances, py::arg("window"), "Columns of a window's table of relative positions, for each of rows and columns.");
    py::class_<EncoderOfImages>(m, "ImageEncoder", "The weights of SAM's image encoder as tiles, and the threads that run it.")
        .def(py::init<const std::string&, const py::dict&, int64_t, int64_t, int64_t, const std::vector<int64_t>&, float, bool, int>(), py::arg("dtype"),
             py::arg("weights"), py::arg("heads"), py::arg("patch"), py::arg("grid"), py::arg("windows"), py::arg("epsilon"), py::arg("pack") = false, py::arg("n_threads") = 1)
        .def("run", &EncoderOfImages::run, py::arg("pixels").noconvert(), py::arg("alone") = false,
             "Embeddings (batch, out, grid, grid) of images (batch, 3, side, side).");
}
