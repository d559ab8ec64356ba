// Python's view of the kernels: checks element type, dimensions and layout, takes the buffers, then releases the GIL.

#include <algorithm>
#include <cmath>
#include <string>

#include "answer_grammar.h"
#include "answer_parser.h"
#include "bindings.h"
#include "mask.h"
#include "preprocess.h"
#include "rows.h"
#include "simd.h"
#include "window.h"

namespace {

ImageView view_image(const Array<uint8_t>& pixels) {
    require(pixels.ndim() == 2 || (pixels.ndim() == 3 && pixels.shape(2) == 3), "pixels must be (H, W) or (H, W, 3)");
    require(pixels.size() > 0, "pixels must not be empty");
    return {pixels.data(), pixels.shape(0), pixels.shape(1), pixels.ndim() == 3 ? 3 : 1};
}

Array<uint8_t> resize_u8(const Array<uint8_t>& pixels, int64_t height, int64_t width) {
    const ImageView image = view_image(pixels);
    require(height > 0 && width > 0, "height and width must be positive");
    std::vector<py::ssize_t> shape{height, width};
    if (pixels.ndim() == 3) shape.push_back(3);
    Array<uint8_t> out(shape);
    uint8_t* to = out.mutable_data();
    py::gil_scoped_release release;
    const int64_t stride = width * image.channels;
    resize_rows(image, height, width, [&](int64_t y, const uint8_t* row) { std::copy(row, row + stride, to + y * stride); });
    return out;
}

using Size = std::pair<int64_t, int64_t>;
using Triple = std::array<float, 3>;

Canvas make_canvas(int64_t height, int64_t width, const std::optional<Size>& content) {
    const auto [h, w] = content.value_or(Size{height, width});
    require(h > 0 && w > 0 && h <= height && w <= width, "content must be positive and within height x width");
    return {height, width, h, w};
}

Normalisation make_normalisation(const Triple& mean, const Triple& std) {
    require(std[0] > 0 && std[1] > 0 && std[2] > 0, "std must be positive");
    return {{mean[0], mean[1], mean[2]}, {std[0], std[1], std[2]}};
}

Array<float> preprocess_patches_py(const Array<uint8_t>& pixels, int64_t height, int64_t width,
                                   const std::optional<Size>& content, const Triple& mean, const Triple& std,
                                   int64_t patch, int64_t merge) {
    const ImageView image = view_image(pixels);
    const Canvas canvas = make_canvas(height, width, content);
    const Normalisation norm = make_normalisation(mean, std);
    require(patch > 0 && merge > 0, "patch and merge must be positive");
    require(height % (patch * merge) == 0 && width % (patch * merge) == 0,
            "height and width must be multiples of patch * merge");
    Array<float> out({(height / patch) * (width / patch), 3 * patch * patch});
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    preprocess_patches(image, canvas, norm, patch, merge, to);
    return out;
}

Array<float> preprocess_planes_py(const Array<uint8_t>& pixels, int64_t height, int64_t width,
                                  const std::optional<Size>& content, const Triple& mean, const Triple& std) {
    const ImageView image = view_image(pixels);
    const Canvas canvas = make_canvas(height, width, content);
    const Normalisation norm = make_normalisation(mean, std);
    Array<float> out({int64_t{3}, height, width});
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    preprocess_planes(image, canvas, norm, to);
    return out;
}

VoiFunction voi_function(const std::string& name) {
    if (name == "LINEAR") return VoiFunction::linear;
    if (name == "LINEAR_EXACT") return VoiFunction::linear_exact;
    require(name == "SIGMOID", "function must be LINEAR, LINEAR_EXACT or SIGMOID");
    return VoiFunction::sigmoid;
}

template <class T>
Array<uint8_t> window_u8_py(const Array<T>& values, double slope, double intercept, double center, double width,
                            const std::string& function, bool invert) {
    require(values.ndim() == 2, "values must be (H, W)");
    const Window window{slope, intercept, center, width, voi_function(function), invert};
    require(std::isfinite(slope) && std::isfinite(intercept) && std::isfinite(center) && std::isfinite(width),
            "slope, intercept, center and width must be finite");
    require(window.function == VoiFunction::linear ? width >= 1 : width > 0,
            "width must be at least 1 (LINEAR) or positive");
    Array<uint8_t> out({values.shape(0), values.shape(1)});
    const T* from = values.data();
    uint8_t* to = out.mutable_data();
    py::gil_scoped_release release;
    window_u8(from, values.size(), window, to);
    return out;
}

Matrix view_head(const py::array& weight, const std::string& dtype, const Array<float>& hidden) {
    const Matrix matrix = view_matrix(weight, dtype);
    require(hidden.ndim() == 1 && hidden.shape(0) == matrix.cols, "hidden must be (D,) with the D of weight (V, D)");
    return matrix;
}

template <class Index>
void check_indices(const Index* indices, int64_t n, int64_t rows) {
    for (int64_t k = 0; k < n; ++k) {
        if (indices[k] < 0 || indices[k] >= rows) {
            refuse("row " + std::to_string(indices[k]) + " is not in a matrix of " + std::to_string(rows) + " rows");
        }
    }
}

std::pair<int32_t, float> select_token_py(const Array<float>& hidden, const py::array& weight, const std::string& dtype,
                                          const Array<int32_t>& rows) {
    const Matrix matrix = view_head(weight, dtype, hidden);
    require(rows.ndim() == 1 && rows.size() > 0, "rows must be (K,) with at least one row");
    const float* h = hidden.data();
    const int32_t* r = rows.data();
    py::gil_scoped_release release;
    check_indices(r, rows.size(), matrix.rows);
    const Selected selected = select_token(matrix, h, r, rows.size());
    return {selected.row, selected.logprob};
}

Array<float> project_rows_py(const Array<float>& hidden, const py::array& weight, const std::string& dtype,
                             const std::optional<Array<int32_t>>& rows, int n_threads) {
    const Matrix matrix = view_head(weight, dtype, hidden);
    require(n_threads > 0 && n_threads <= 1024, "n_threads must be from 1 to 1024");
    require(!rows || rows->ndim() == 1, "rows must be (K,)");
    const int64_t n = rows ? rows->size() : matrix.rows;
    Array<float> out(n);
    const float* h = hidden.data();
    const int32_t* r = rows ? rows->data() : nullptr;
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    if (r) check_indices(r, n, matrix.rows);
    project_rows(matrix, h, r, n, to, n_threads);
    return out;
}

Array<float> gather_rows_py(const py::array& weight, const std::string& dtype, const Array<int64_t>& ids) {
    const Matrix matrix = view_matrix(weight, dtype);
    std::vector<py::ssize_t> shape(ids.shape(), ids.shape() + ids.ndim());
    shape.push_back(matrix.cols);
    Array<float> out(shape);
    const int64_t* from = ids.data();
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    check_indices(from, ids.size(), matrix.rows);
    gather_rows(matrix, from, ids.size(), to);
    return out;
}

void check_enlarging(int64_t logits_height, int64_t logits_width, const std::pair<double, double>& crop, int64_t height,
                     int64_t width) {
    const auto [crop_h, crop_w] = crop;
    require(crop_h > 0 && crop_w > 0 && crop_h <= static_cast<double>(logits_height) &&
                crop_w <= static_cast<double>(logits_width),
            "crop must be positive and within the logits");
    require(height > 0 && width > 0, "height and width must be positive");
}

Array<bool> mask_from_logits_py(const Array<float>& logits, const std::pair<double, double>& crop, int64_t height,
                                int64_t width, float threshold) {
    require(logits.ndim() == 2 && logits.size() > 0, "logits must be (h, w) and not empty");
    check_enlarging(logits.shape(0), logits.shape(1), crop, height, width);
    Array<bool> out({height, width});
    const float* from = logits.data();
    auto* to = reinterpret_cast<uint8_t*>(out.mutable_data());
    py::gil_scoped_release release;
    mask_from_logits(from, logits.shape(1), crop.first, crop.second, threshold, height, width, to);
    return out;
}

Array<uint8_t> count_masks_py(const Array<float>& logits, const std::pair<double, double>& crop, int64_t height,
                              int64_t width, float threshold, int n_threads) {
    require(logits.ndim() == 3 && logits.size() > 0 && logits.shape(0) <= 255, "logits must be (n <= 255, h, w) and not empty");
    check_enlarging(logits.shape(1), logits.shape(2), crop, height, width);
    require(n_threads > 0 && n_threads <= 1024, "n_threads must be from 1 to 1024");
    Array<uint8_t> out({height, width});
    const float* from = logits.data();
    uint8_t* to = out.mutable_data();
    py::gil_scoped_release release;
    count_masks(from, logits.shape(0), logits.shape(1), logits.shape(2), crop.first, crop.second, threshold, height, width,
                to, n_threads);
    return out;
}

const uint8_t* view_mask(const Array<bool>& mask) {
    require(mask.ndim() == 2 && mask.size() > 0, "mask must be (H, W) and not empty");
    return reinterpret_cast<const uint8_t*>(mask.data());
}

std::optional<std::array<int64_t, 4>> mask_box_py(const Array<bool>& mask) {
    const uint8_t* from = view_mask(mask);
    py::gil_scoped_release release;
    Box box{};
    if (!mask_box(from, mask.shape(0), mask.shape(1), &box)) return std::nullopt;
    return std::array<int64_t, 4>{box.x1, box.y1, box.x2, box.y2};
}

std::string rle_encode_py(const Array<bool>& mask) {
    const uint8_t* from = view_mask(mask);
    py::gil_scoped_release release;
    return encode_counts(run_lengths(from, mask.shape(0), mask.shape(1)));
}

Array<bool> rle_decode_py(const std::string& counts, int64_t height, int64_t width) {
    require(height > 0 && width > 0, "height and width must be positive");
    require(width <= (int64_t{1} << 31) / height, "a mask has at most 2**31 pixels");
    std::vector<int64_t> runs;
    {
        // Checked before the mask is allocated, so that a few bytes of text cannot ask for gigabytes unnoticed.
        py::gil_scoped_release release;
        runs = decode_counts(counts, height * width);
    }
    Array<bool> out({height, width});
    auto* to = reinterpret_cast<uint8_t*>(out.mutable_data());
    py::gil_scoped_release release;
    std::fill(to, to + height * width, uint8_t{0});
    fill_runs(runs, height, width, to);
    return out;
}

// Text as UTF-8 in which even lone surrogates survive, since a tokenizer may hand over anything.
std::string encode_text(const py::str& text) {
    auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
    if (!bytes) throw py::error_already_set();
    return bytes;
}

py::object decode_text(const std::optional<std::string>& text) {
    if (!text) return py::none();
    auto decoded = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(text->data(), static_cast<py::ssize_t>(text->size()), "surrogatepass"));
    if (!decoded) throw py::error_already_set();
    return decoded;
}

template <size_t N>
py::object to_tuple(const std::optional<std::array<double, N>>& numbers) {
    if (!numbers) return py::none();
    py::tuple out(N);
    for (size_t i = 0; i < N; ++i) out[i] = (*numbers)[i];
    return out;
}

Array<int32_t> to_array(const Tokens& tokens) {
    return Array<int32_t>(static_cast<py::ssize_t>(tokens.size()), tokens.data());
}

void bind_images(py::module_& m) {
    m.def("resize_u8", &resize_u8, py::arg("pixels").noconvert(), py::arg("height"), py::arg("width"),
          "(H, W) or (H, W, 3) uint8 -> (height, width[, 3]) uint8, bicubic as Pillow.");
    m.def("preprocess_patches", &preprocess_patches_py, py::arg("pixels").noconvert(), py::arg("height"),
          py::arg("width"), py::kw_only(), py::arg("content"), py::arg("mean"), py::arg("std"), py::arg("patch"),
          py::arg("merge"), "(H, W) or (H, W, 3) uint8 -> (n_patches, 3 * patch**2) float32 in merge order.");
    m.def("preprocess_planes", &preprocess_planes_py, py::arg("pixels").noconvert(), py::arg("height"),
          py::arg("width"), py::kw_only(), py::arg("content"), py::arg("mean"), py::arg("std"),
          "(H, W) or (H, W, 3) uint8 -> (3, height, width) float32.");
    const auto window = [&m](auto function) {
        m.def("window_u8", function, py::arg("values").noconvert(), py::arg("slope"), py::arg("intercept"),
              py::arg("center"), py::arg("width"), py::kw_only(), py::arg("function"), py::arg("invert"),
              "(H, W) int16, uint16, int32 or float32 -> (H, W) uint8, DICOM PS3.3 C.11.2.1.");
    };
    window(&window_u8_py<int16_t>);
    window(&window_u8_py<uint16_t>);
    window(&window_u8_py<int32_t>);
    window(&window_u8_py<float>);
}

void bind_rows(py::module_& m) {
    m.def("select_token", &select_token_py, py::arg("hidden").noconvert(), py::arg("weight"), py::arg("dtype"),
          py::arg("rows").noconvert(), "The best of `rows` (K,) int32 and its log-probability among them.");
    m.def("project_rows", &project_rows_py, py::arg("hidden").noconvert(), py::arg("weight"), py::arg("dtype"),
          py::arg("rows").noconvert().none(true), py::arg("n_threads") = 1,
          "Logits (K,) float32 of `rows`, or of all rows.");
    m.def("gather_rows", &gather_rows_py, py::arg("weight"), py::arg("dtype"), py::arg("ids").noconvert(),
          "Rows `ids` (...) int64 of weight (V, D) -> (..., D) float32.");
}

void bind_masks(py::module_& m) {
    m.def("mask_from_logits", &mask_from_logits_py, py::arg("logits").noconvert(), py::kw_only(), py::arg("crop"),
          py::arg("height"), py::arg("width"), py::arg("threshold"), "(h, w) float32 -> (height, width) bool.");
    m.def("count_masks", &count_masks_py, py::arg("logits").noconvert(), py::kw_only(), py::arg("crop"),
          py::arg("height"), py::arg("width"), py::arg("threshold"), py::arg("n_threads") = 1,
          "(n, h, w) float32 -> (height, width) uint8.");
    m.def("mask_box", &mask_box_py, py::arg("mask").noconvert(), "Half-open [x1, y1, x2, y2] of the set pixels, or None.");
    m.def("rle_encode", &rle_encode_py, py::arg("mask").noconvert(), "COCO compressed counts of (H, W) bool.");
    m.def("rle_decode", &rle_decode_py, py::arg("counts"), py::arg("height"), py::arg("width"),
          "COCO compressed counts -> (height, width) bool.");
}

void bind_answers(py::module_& m) {
    py::class_<AnswerState>(m, "AnswerState", "A place in one answer.")
        .def("forced", &AnswerState::forced, "Consume and return the tokens that have no alternative.")
        .def("allowed", [](const AnswerState& s) { return to_array(s.allowed()); }, "Allowed tokens (K,) int32, sorted.")
        .def("accept", &AnswerState::accept, py::arg("token"), "Move over one allowed token.")
        .def("copy", [](const AnswerState& s) { return s; }, "An independent state at the same place.")
        .def_property_readonly("done", &AnswerState::done)
        .def_property_readonly("absent", &AnswerState::absent)
        .def_property_readonly("at_absent_choice", &AnswerState::at_absent_choice)
        .def_property_readonly("values", &AnswerState::values);

    py::class_<AnswerGrammar, std::shared_ptr<AnswerGrammar>>(m, "AnswerGrammar", "Answers as an automaton over token ids.")
        .def(py::init<std::vector<Tokens>, const std::vector<Tokens>&, std::optional<Tokens>>(), py::arg("literals"),
             py::arg("numbers"), py::arg("absent"))
        .def("start",
             [](const std::shared_ptr<AnswerGrammar>& g, int width, int height) { return AnswerState(g, width, height); },
             py::arg("width"), py::arg("height"), "State before the first token of an answer.");

    py::class_<ParsedAnswer>(m, "ParsedAnswer", "What a text says.")
        .def_property_readonly("thought", [](const ParsedAnswer& p) { return decode_text(p.thought); })
        .def_property_readonly("bbox", [](const ParsedAnswer& p) { return to_tuple(p.bbox); })
        .def_property_readonly("points_1", [](const ParsedAnswer& p) { return to_tuple(p.points_1); })
        .def_property_readonly("points_2", [](const ParsedAnswer& p) { return to_tuple(p.points_2); })
        .def_readonly("absent", &ParsedAnswer::absent)
        .def_readonly("missing", &ParsedAnswer::missing)
        .def_readonly("status", &ParsedAnswer::status);

    py::class_<AnswerParser>(m, "AnswerParser", "Incremental parser of a model's text.")
        .def(py::init<>())
        .def("feed", [](AnswerParser& p, const py::str& text) { p.feed(encode_text(text)); }, py::arg("text"),
             "Read the next piece of text.")
        .def("result", &AnswerParser::result, "What the text so far says.");
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "Compiled kernels; use them through medreasoner.ops.";
    bind_images(m);
    bind_rows(m);
    bind_masks(m);
    bind_answers(m);
    bind_decoder(m);
    bind_tower(m);
    bind_prompts(m);
    bind_encoder(m);
    m.def("cpu_features", &cpu_features, "Instruction sets that this processor offers, of those that matter here.");
    m.def("simd_level", &simd_level_name, "Name of the instruction set in use.");
    m.def("simd_levels", &simd_level_names, "Names that set_simd_level accepts on this machine, slowest first.");
    m.def("set_simd_level", &set_simd_level, py::arg("name"), "Choose the instruction set: for tests.");
}
