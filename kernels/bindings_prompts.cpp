// Python's view of the mask decoder.

#include "bindings.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "given_weights.h"
#include "mask_decoder.h"
#include "tiles.h"

namespace {

constexpr int64_t kPair = 2 * kTile, kMostHeads = 64, kMostLayers = 64, kMostGrid = 4096;

// The weights, by their names in transformers' SamModel, as tiles and floats.
class PromptDecoder : GivenWeights {
   public:
    PromptDecoder(const std::string& dtype, const py::dict& weights, int64_t heads, int64_t grid, float image_size,
                  int64_t n_layers, int64_t iou_depth, int64_t first_mask, int64_t n_masks, float epsilon,
                  float prompt_epsilon)
        : GivenWeights(dtype, weights) {
        require(has_tiles(), "this processor has no fast products of bfloat16");
        MaskShape& s = w_.shape;
        const py::array q = array("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight");
        const py::array up = array("mask_decoder.transformer.layers.0.mlp.lin1.weight");
        require(q.ndim() == 2 && up.ndim() == 2, "matrices must be (in, out)");
        s = {q.shape(0), q.shape(1), heads, up.shape(1), grid, image_size, first_mask, n_masks, epsilon, prompt_epsilon,
             weights.contains("prompt_encoder.mask_embed.conv1.weight")};
        require(s.channels > 0 && s.channels % 128 == 0 && s.inner > 0 && s.inner % kTileDepth == 0,
                "channels must be a multiple of 128, inner of 32");
        require(heads > 0 && heads <= kMostHeads && heads % 2 == 0 && s.channels % heads == 0 && s.inner % heads == 0,
                "heads must be an even divisor of channels and inner");
        require((s.size() == kTile || s.size() == kTileDepth) && s.channels / heads % kTile == 0, "a head must be 16 or 32 deep");
        require(grid > 0 && grid <= kMostGrid && s.places() % kPair == 0, "places must be a multiple of 32");
        require(n_layers > 0 && n_layers <= kMostLayers && up.shape(0) == s.channels && s.mlp > 0, "lin1 does not fit the others");
        require(std::isfinite(image_size) && image_size > 0, "image_size must be positive");
        read_prompts();
        for (int64_t i = 0; i < n_layers; ++i) w_.layers.push_back(layer("mask_decoder.transformer.layers." + std::to_string(i) + "."));
        w_.last = from_tokens("mask_decoder.transformer.final_attn_token_to_image.");
        w_.last_norm = norm("mask_decoder.transformer.layer_norm_final_attn", s.channels);
        w_.first_doubling = linear("mask_decoder.upscale_conv1", s.channels, s.channels);
        w_.second_doubling = linear("mask_decoder.upscale_conv2", s.channels / 4, s.channels / 2);
        w_.doubling_norm = norm("mask_decoder.upscale_layer_norm", s.channels / 4);
        for (int64_t i = 0; i < n_masks; ++i) {
            const std::string name = "mask_decoder.output_hypernetworks_mlps." + std::to_string(first_mask + i) + ".";
            w_.hyper.push_back(small_network(name, 3));
            require(w_.hyper.back().back().out == s.channels / 8, "a mask's numbers must be as many as its places are deep");
        }
        require(iou_depth >= 2 && iou_depth <= kMostLayers, "iou_depth must be from 2 to 64");
        w_.scores = small_network("mask_decoder.iou_prediction_head.", iou_depth);
        require(first_mask >= 0 && n_masks > 0 && first_mask + n_masks <= w_.scores.back().out && first_mask + n_masks < w_.n_learned,
                "there are not so many masks");
        forget();
        decoder_ = std::make_unique<MaskDecoder>(w_);
    }

    std::pair<Array<float>, Array<float>> run(const Array<float>& embedding, const Array<float>& points, const Array<int64_t>& labels) {
        const MaskShape& s = w_.shape;
        require(points.ndim() == 3 && points.shape(2) == 2 && labels.ndim() == 2 && labels.shape(0) == points.shape(0) &&
                    labels.shape(1) == points.shape(1),
                "points must be (batch, n_points, 2) and labels (batch, n_points)");
        const int64_t batch = points.shape(0), n = points.shape(1);
        require(w_.n_learned + n <= kMostTokens, "there are too many points");
        require(embedding.ndim() == 4 && (embedding.shape(0) == 1 || embedding.shape(0) == batch) &&
                    embedding.shape(1) == s.channels && embedding.shape(2) == s.grid && embedding.shape(3) == s.grid,
                "image_embedding must be (1 or batch, channels, grid, grid)");
        const std::vector<int64_t> kinds(labels.data(), labels.data() + batch * n);  // checked, and then no one else's
        for (const int64_t kind : kinds) require(kind >= -1 && kind <= 3, "labels must be from -1 to 3");
        Array<float> logits({batch, s.n_masks, s.mask_size(), s.mask_size()}), scores({batch, s.n_masks});
        std::vector<MaskPrompt> prompts;
        const int64_t image = embedding.shape(0) == 1 ? 0 : s.channels * s.places();
        for (int64_t i = 0; i < batch; ++i) {
            prompts.push_back({embedding.data() + i * image, points.data() + 2 * i * n, kinds.data() + i * n, n,
                               logits.mutable_data() + i * s.n_masks * s.mask_size() * s.mask_size(),
                               scores.mutable_data() + i * s.n_masks});
        }
        py::gil_scoped_release release;
        decoder_->run(prompts.data(), batch);
        return {std::move(logits), std::move(scores)};
    }

   private:
    // (heads, rows, cols) or (rows, cols), as tiles, head by head; columns are filled up to pairs of panels.
    const uint16_t* matrices(const std::string& name, int64_t rows, int64_t cols, int64_t n = 1) {
        const py::array found = array(name);
        const bool fits = n == 1 ? found.ndim() == 2 : found.ndim() == 3 && found.shape(0) == n;
        require(fits && found.shape(found.ndim() - 2) == rows && found.shape(found.ndim() - 1) == cols &&
                    (found.flags() & py::array::c_style),
                (name + " does not fit the others").c_str());
        const Matrix view = view_matrix(py::array(found).reshape({n * rows, cols}), dtype_);
        const int64_t each = tiled_numbers(rows, up_to(cols, kPair));
        auto* const kept = reinterpret_cast<uint16_t*>(store_.taken(n * each * static_cast<int64_t>(sizeof(uint16_t))));
        std::fill(kept, kept + n * each, uint16_t{0});
        const py::gil_scoped_release release;
        for (int64_t i = 0; i < n; ++i) {
            const auto* first = static_cast<const uint8_t*>(view.data) + i * rows * cols * size_of(view.dtype);
            tile_matrix({first, view.dtype, rows, cols}, 1, kept + i * each);
        }
        return kept;
    }

    // A matrix that is read as floats.
    const float* numbers(const std::string& name, int64_t rows, int64_t cols) {
        const py::array given = array(name);
        const Matrix view = checked(given, name, rows, cols);
        float* const kept = room(rows * cols);
        std::vector<int64_t> ids(static_cast<size_t>(rows));
        for (int64_t i = 0; i < rows; ++i) ids[static_cast<size_t>(i)] = i;
        gather_rows(view, ids.data(), rows, kept);
        return kept;
    }

    Linear linear(const std::string& name, int64_t in, int64_t out, bool has_bias = true) {
        return {matrices(name + ".weight", in, out), has_bias ? vector(name + ".bias", out) : nullptr, in, out};
    }

    Norm norm(const std::string& name, int64_t size) { return {vector(name + ".weight", size), vector(name + ".bias", size)}; }

    FromTokens from_tokens(const std::string& name) {
        const MaskShape& s = w_.shape;
        return {linear(name + "q_proj", s.channels, s.inner), matrices(name + "k_proj.weight", s.size(), s.channels, s.heads),
                matrices(name + "v_proj.weight", s.channels, s.size(), s.heads), linear(name + "out_proj", s.inner, s.channels)};
    }

    FromPlaces from_places(const std::string& name) {
        const MaskShape& s = w_.shape;
        return {linear(name + "k_proj", s.channels, s.inner), matrices(name + "q_proj.weight", s.size(), s.channels, s.heads),
                vector(name + "q_proj.scores", s.inner), linear(name + "v_proj", s.channels, s.inner, false),
                matrices(name + "out_proj.weight", s.size(), s.channels, s.heads),
                vector(name + "out_proj.bias", s.heads * s.channels)};
    }

    MaskLayer layer(const std::string& name) {
        const MaskShape& s = w_.shape;
        const int64_t c = s.channels;
        MaskLayer found{};
        found.q = linear(name + "self_attn.q_proj", c, c, false);
        found.k = linear(name + "self_attn.k_proj", c, c, false);
        found.v = linear(name + "self_attn.v_proj", c, c, false);
        found.out = linear(name + "self_attn.out_proj", c, c);
        found.qkv_bias = vector(name + "self_attn.bias", 3 * c);
        found.from_tokens = from_tokens(name + "cross_attn_token_to_image.");
        found.up = linear(name + "mlp.lin1", c, s.mlp);
        found.down = linear(name + "mlp.lin2", s.mlp, c);
        found.from_places = from_places(name + "cross_attn_image_to_token.");
        for (int i = 0; i < 4; ++i) found.norms[i] = norm(name + "layer_norm" + std::to_string(i + 1), c);
        return found;
    }

    std::vector<Linear> small_network(const std::string& name, int64_t depth) {
        std::vector<std::string> names{name + "proj_in"};
        for (int64_t i = 0; i < depth - 2; ++i) names.push_back(name + "layers." + std::to_string(i));
        names.push_back(name + "proj_out");
        std::vector<Linear> found;
        int64_t in = w_.shape.channels;
        for (const std::string& each : names) {
            const py::array weight = array(each + ".weight");
            const bool is_last = &each == &names.back();
            require(weight.ndim() == 2 && weight.shape(1) > 0 && (is_last || weight.shape(1) % kPair == 0), (each + " does not fit the others").c_str());
            found.push_back(linear(each, in, weight.shape(1)));
            in = weight.shape(1);
        }
        return found;
    }

    void read_prompts() {
        const MaskShape& s = w_.shape;
        const int64_t c = s.channels;
        w_.frequencies = vector("frequencies", c);
        w_.kinds = numbers("point_kinds", 5, c);
        const py::array learned = array("output_tokens");
        require(learned.ndim() == 2 && learned.shape(0) >= 2, "output_tokens must be (n, channels)");
        w_.n_learned = learned.shape(0);
        w_.learned = numbers("output_tokens", w_.n_learned, c);
        w_.no_mask = vector("no_mask", c);
        const int64_t places = s.places(), half = c / 2;
        w_.image_places.resize(static_cast<size_t>(places * c));
        for (int64_t p = 0; p < places; ++p) {
            const double across = 2 * (static_cast<double>(p % s.grid) + 0.5) / static_cast<double>(s.grid) - 1;
            const double down = 2 * (static_cast<double>(p / s.grid) + 0.5) / static_cast<double>(s.grid) - 1;
            for (int64_t j = 0; j < half; ++j) {
                const double angle = 6.283185307179586 * (across * w_.frequencies[j] + down * w_.frequencies[half + j]);
                w_.image_places[static_cast<size_t>(p * c + j)] = static_cast<float>(std::sin(angle));
                w_.image_places[static_cast<size_t>(p * c + half + j)] = static_cast<float>(std::cos(angle));
            }
        }
        w_.box = {};
        if (!s.draws_box) return;
        const std::string name = "prompt_encoder.mask_embed.";
        const py::array first = array(name + "conv1.weight");
        require(first.ndim() == 2 && first.shape(1) > 0 && first.shape(1) % kTile == 0, "mask prompts must be a multiple of 16 deep");
        const int64_t d = first.shape(1);
        w_.box = {d, numbers(name + "conv1.weight", 16, d), vector(name + "conv1.bias", d), norm(name + "layer_norm1", d / 4),
                  numbers(name + "conv2.weight", d, d), vector(name + "conv2.bias", d), norm(name + "layer_norm2", d),
                  numbers(name + "conv3.weight", d, c), vector(name + "conv3.bias", c)};
    }

    MaskWeights w_;
    std::unique_ptr<MaskDecoder> decoder_;
};

}  // namespace

void bind_prompts(py::module_& m) {
    py::class_<PromptDecoder>(m, "PromptDecoder", "The weights of a mask decoder as tiles.")
        .def(py::init<const std::string&, const py::dict&, int64_t, int64_t, float, int64_t, int64_t, int64_t, int64_t, float, float>(),
             py::arg("dtype"), py::arg("weights"), py::arg("heads"), py::arg("grid"), py::arg("image_size"), py::arg("n_layers"),
             py::arg("iou_depth"), py::arg("first_mask"), py::arg("n_masks"), py::arg("epsilon"), py::arg("prompt_epsilon"))
        .def("run", &PromptDecoder::run, py::arg("embedding").noconvert(), py::arg("points").noconvert(), py::arg("labels").noconvert(),
             "Logits (batch, n_masks, 4 * grid, 4 * grid) and scores (batch, n_masks) of prompts in one image.");
}
