// Python's view of the decoder's step, and of the weight matrices that it shares with the language head.

#include "bindings.h"

#include <memory>
#include <vector>

#include "decoder_step.h"
#include "packed_matrix.h"

static Dtype checked_dtype(const py::array& weight, const std::string& dtype) {
    const bool is_float = weight.dtype().kind() == 'f', is_unsigned = weight.dtype().kind() == 'u';
    const auto size = weight.itemsize();
    if (dtype == "float32") {
        require(is_float && size == 4, "weight must be a float32 array");
        return Dtype::float32;
    }
    if (dtype == "float16") {
        require(is_float && size == 2, "weight must be a float16 array");
        return Dtype::float16;
    }
    require(dtype == "bfloat16", "dtype must be float32, float16 or bfloat16");
    require(is_unsigned && size == 2, "weight must be a uint16 array that holds bfloat16 patterns");
    return Dtype::bfloat16;
}

Matrix view_matrix(const py::array& weight, const std::string& dtype) {
    const Dtype type = checked_dtype(weight, dtype);
    require(weight.ndim() == 2 && (weight.flags() & py::array::c_style), "weight must be (V, D) and C-contiguous");
    return {weight.data(), type, weight.shape(0), weight.shape(1)};
}

namespace {

// The weights of a small decoder, kept alive as long as they are pointed to.
class DecoderStep {
   public:
    DecoderStep(const std::string& dtype, int64_t heads, int64_t kv_heads, float epsilon,
                const std::vector<std::vector<py::array>>& matrices, const std::vector<std::vector<Array<float>>>& vectors,
                const Array<float>& final_norm, bool pack) {
        weights_.packed = pack;
        require(!matrices.empty() && matrices.size() == vectors.size(), "matrices and vectors must be of one number of layers");
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
        require(matrices[0].size() == 5 && matrices[0][2].ndim() == 2, "a layer has the matrices qkv, output, gate, up, down");
        const int64_t hidden = final_norm.size(), mlp = matrices[0][2].shape(1);
        require(matrices[0][1].ndim() == 2 && matrices[0][1].shape(0) % heads == 0, "output must be (heads * head_dim, hidden)");
        weights_.shape = {hidden, heads, kv_heads, matrices[0][1].shape(0) / heads, mlp, epsilon};
        const DecoderShape& s = weights_.shape;
        require(hidden > 0 && hidden % kStepAlign == 0 && mlp > 0 && mlp % kStepAlign == 0 && s.head_dim > 0 &&
                    s.head_dim % kStepAlign == 0,
                "sizes must be multiples of 16");
        for (size_t i = 0; i < matrices.size(); ++i) add_layer(dtype, matrices[i], vectors[i]);
        weights_.final_norm = vector(final_norm, hidden);
    }

    const DecoderWeights& weights() const { return weights_; }

   private:
    void add_layer(const std::string& dtype, const std::vector<py::array>& m, const std::vector<Array<float>>& v) {
        const DecoderShape& s = weights_.shape;
        const int64_t width = s.q_dim() + 2 * s.kv_dim();
        require(m.size() == 5 && v.size() == 3, "a layer has five matrices and three vectors");
        weights_.layers.push_back({vector(v[0], s.hidden), matrix(m[0], dtype, s.hidden, width), vector(v[1], width),
                                   matrix(m[1], dtype, s.q_dim(), s.hidden), vector(v[2], s.hidden),
                                   matrix(m[2], dtype, s.hidden, s.mlp), matrix(m[3], dtype, s.hidden, s.mlp),
                                   matrix(m[4], dtype, s.mlp, s.hidden)});
    }

    const void* matrix(const py::array& array, const std::string& dtype, int64_t rows, int64_t cols) {
        const Matrix view = view_matrix(array, dtype);
        require(view.rows == rows && view.cols == cols, "a matrix does not fit the others");
        weights_.dtype = view.dtype;
        if (weights_.packed) {
            require(rows % kBlockRows == 0 && cols % kPanel == 0, "sizes must be multiples of 64 to be packed");
            packed_.emplace_back(static_cast<size_t>(packed_bytes(rows, cols)));
            pack_matrix(view, packed_.back().data());
            return packed_.back().data();
        }
        kept_.push_back(array);
        return view.data;
    }

    const float* vector(const Array<float>& array, int64_t size) {
        require(array.ndim() == 1 && array.size() == size, "a vector does not fit the matrices");
        kept_.push_back(array);
        return array.data();
    }

    DecoderWeights weights_;
    std::vector<py::object> kept_;
    std::vector<std::vector<uint8_t>> packed_;
};

// One sequence: a decoder and the buffers of its keys and values, which are written in place.
class DecoderSequence {
   public:
    DecoderSequence(std::shared_ptr<DecoderStep> step, std::vector<py::array> keys, std::vector<py::array> values)
        : step_(std::move(step)), keys_(std::move(keys)), values_(std::move(values)) {
        const size_t n = step_->weights().layers.size();
        require(keys_.size() == n && values_.size() == n, "there must be keys and values for every layer");
        cache_.dtype = keys_[0].itemsize() == 2 ? Dtype::float16 : Dtype::float32;
        cache_.capacity = keys_[0].ndim() == 4 ? keys_[0].shape(2) : 0;
        for (size_t i = 0; i < n; ++i) cache_.layers.push_back({buffer(keys_[i]), buffer(values_[i])});
    }

    const std::shared_ptr<DecoderStep>& step() const { return step_; }
    const DecoderCache& cache() const { return cache_; }

   private:
    void* buffer(py::array& array) {
        const DecoderShape& s = step_->weights().shape;
        require(array.ndim() == 4 && array.shape(0) == 1 && array.shape(1) == s.kv_heads &&
                    array.shape(2) == cache_.capacity && array.shape(3) == s.head_dim && (array.flags() & py::array::c_style),
                "keys and values must be (1, kv_heads, capacity, head_dim) and C-contiguous");
        require(array.dtype().kind() == 'f' && (array.itemsize() == 2 || array.itemsize() == 4),
                "keys and values must be float16 or float32");
        require(array.itemsize() == keys_[0].itemsize(), "keys and values must be of one type");
        return array.mutable_data();
    }

    std::shared_ptr<DecoderStep> step_;
    std::vector<py::array> keys_, values_;
    DecoderCache cache_{};
};

// Hidden states of new tokens of several sequences, those of one after those of the other.
Array<float> run_step(const std::vector<DecoderSequence*>& sequences, const std::vector<int64_t>& pasts,
                      const std::vector<int64_t>& counts, const Array<float>& embeds, const Array<float>& cos,
                      const Array<float>& sin) {
    require(!sequences.empty() && pasts.size() == sequences.size() && counts.size() == sequences.size(),
            "there must be a past and a count for each sequence");
    const DecoderWeights& weights = sequences[0]->step()->weights();
    std::vector<StepPart> parts;
    int64_t n = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        const DecoderCache& cache = sequences[i]->cache();
        require(sequences[i]->step() == sequences[0]->step(), "sequences must be of one decoder");
        require(cache.dtype == sequences[0]->cache().dtype, "sequences must have caches of one type");
        for (size_t j = 0; j < i; ++j) require(sequences[j] != sequences[i], "a sequence may be there once");
        require(counts[i] > 0 && pasts[i] >= 0 && pasts[i] <= cache.capacity - counts[i], "past + n must fit the cache");
        parts.push_back({&cache, pasts[i], counts[i]});
        n += counts[i];
    }
    const DecoderShape& s = weights.shape;
    require(embeds.ndim() == 2 && embeds.shape(0) == n && embeds.shape(1) == s.hidden, "embeds must be (n, hidden)");
    for (const auto* table : {&cos, &sin}) {
        require(table->ndim() == 2 && table->shape(0) == n && table->shape(1) == s.head_dim / 2,
                "cos and sin must be (n, head_dim / 2)");
    }
    Array<float> out({n, s.hidden});
    const float *from = embeds.data(), *c = cos.data(), *i = sin.data();
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    decoder_step(weights, parts, from, c, i, to);
    return out;
}

}  // namespace

void bind_decoder(py::module_& m) {
    py::class_<DecoderStep, std::shared_ptr<DecoderStep>>(m, "DecoderStep", "The weights of a small decoder.")
        .def(py::init<const std::string&, int64_t, int64_t, float, const std::vector<std::vector<py::array>>&,
                      const std::vector<std::vector<Array<float>>>&, const Array<float>&, bool>(),
             py::arg("dtype"), py::arg("heads"), py::arg("kv_heads"), py::arg("epsilon"), py::arg("matrices"),
             py::arg("vectors"), py::arg("final_norm"), py::arg("pack") = false)
        .def("open",
             [](const std::shared_ptr<DecoderStep>& step, std::vector<py::array> keys, std::vector<py::array> values) {
                 return DecoderSequence(step, std::move(keys), std::move(values));
             },
             py::arg("keys"), py::arg("values"), "A sequence over these buffers, one a layer.");
    py::class_<DecoderSequence>(m, "DecoderSequence", "A decoder and one sequence's keys and values.");
    m.def("decoder_step", &run_step, py::arg("sequences"), py::arg("pasts"), py::arg("counts"),
          py::arg("embeds").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          "Hidden states (n, hidden) of n more tokens, those of each sequence together.");
}
