// Python's view of the decoder's step, and of the weight matrices that it shares with the language head.

#include "bindings.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "answer_run.h"
#include "decoder_step.h"
#include "packed_matrix.h"
#include "pages.h"

static Dtype checked_dtype(const py::array& weight, const std::string& dtype) {
    const bool is_float = weight.dtype().kind() == 'f', is_unsigned = weight.dtype().kind() == 'u';
    const auto size = weight.itemsize();
    require(weight.dtype().byteorder() != '>', "weight must be of this machine's byte order");
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

constexpr size_t kMatrices = 5, kArraysInBits = 3;  // of a layer; of a matrix in four bits

// The weights of a decoder, kept alive as long as they are pointed to, and the threads that run it.
class DecoderStep {
   public:
    DecoderStep(const std::string& dtype, int64_t heads, int64_t kv_heads, float epsilon, const py::iterable& matrices,
                const std::vector<std::vector<Array<float>>>& vectors, const Array<float>& final_norm, bool pack,
                int n_threads)
        : crew_(checked_threads(n_threads)) {
        const bool four = dtype == "int4";
        weights_.form = four ? MatrixForm::four_bits : pack ? MatrixForm::eight_bits : MatrixForm::plain;
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
        weights_.shape = {final_norm.size(), heads, kv_heads, 0, 0, epsilon};
        for (const py::handle layer : matrices) {  // one by one: whoever makes them need not hold them all
            const auto arrays = layer.cast<std::vector<py::array>>();
            require(arrays.size() == kMatrices * (four ? kArraysInBits : 1), "a layer has the matrices qkv, output, gate, up, down");
            require(weights_.layers.size() < vectors.size(), "matrices and vectors must be of one number of layers");
            if (weights_.layers.empty()) begin(arrays, vectors.size());
            add_layer(dtype, arrays, vectors[weights_.layers.size()]);
        }
        require(!vectors.empty() && weights_.layers.size() == vectors.size(), "matrices and vectors must be of one number of layers");
        weights_.final_norm = vector(final_norm, weights_.shape.hidden);
    }

    const DecoderWeights& weights() const { return weights_; }
    Crew& crew() { return crew_; }

   private:
    static int checked_threads(int n_threads) {
        require(n_threads > 0 && n_threads <= 1024, "n_threads must be from 1 to 1024");
        return n_threads;
    }

    // Sizes, from the first layer; and room for what will be packed of all.
    void begin(const std::vector<py::array>& m, size_t n_layers) {
        DecoderShape& s = weights_.shape;
        const bool four = weights_.form == MatrixForm::four_bits;
        if (four) {
            require(m[3].ndim() == 3 && m[6].ndim() == 3, "levels must be (out, in / 32, 16)");
            s.head_dim = m[3].shape(1) * kNibbleRows / s.heads;
            s.mlp = m[6].shape(0);
        } else {
            require(m[1].ndim() == 2 && m[1].shape(0) % s.heads == 0, "output must be (heads * head_dim, hidden)");
            require(m[2].ndim() == 2, "gate must be (hidden, mlp)");
            s.head_dim = m[1].shape(0) / s.heads;
            s.mlp = m[2].shape(1);
        }
        require(s.hidden > 0 && s.hidden % kStepAlign == 0 && s.mlp > 0 && s.mlp % kStepAlign == 0 && s.head_dim > 0 &&
                    s.head_dim % kStepAlign == 0,
                "sizes must be multiples of 16");
        if (weights_.form == MatrixForm::plain) return;
        const int64_t width = s.q_dim() + 2 * s.kv_dim();
        require(s.hidden % 64 == 0 && s.mlp % 64 == 0 && s.q_dim() % 64 == 0 && width % 64 == 0,
                "sizes must be multiples of 64 to be packed");
        const auto bytes = four ? nibble_bytes : packed_bytes;
        const int64_t layer = bytes(s.hidden, width) + bytes(s.q_dim(), s.hidden) + 2 * bytes(s.hidden, s.mlp) +
                              bytes(s.mlp, s.hidden);
        packed_ = allocate_pages(layer * static_cast<int64_t>(n_layers));
        free_ = packed_.get();
    }

    void add_layer(const std::string& dtype, const std::vector<py::array>& m, const std::vector<Array<float>>& v) {
        const DecoderShape& s = weights_.shape;
        const int64_t width = s.q_dim() + 2 * s.kv_dim();
        const std::pair<int64_t, int64_t> sizes[kMatrices] = {
            {s.hidden, width}, {s.q_dim(), s.hidden}, {s.hidden, s.mlp}, {s.hidden, s.mlp}, {s.mlp, s.hidden}};
        require(v.size() == 3, "a layer has five matrices and three vectors");
        const void* found[kMatrices];
        for (size_t i = 0; i < kMatrices; ++i) {
            const auto [rows, cols] = sizes[i];
            found[i] = dtype == "int4" ? in_bits(&m[kArraysInBits * i], rows, cols) : matrix(m[i], dtype, rows, cols);
        }
        weights_.layers.push_back({vector(v[0], s.hidden), found[0], vector(v[1], width), found[1], vector(v[2], s.hidden),
                                   found[2], found[3], found[4]});
    }

    const void* matrix(const py::array& array, const std::string& dtype, int64_t rows, int64_t cols) {
        const Matrix view = view_matrix(array, dtype);
        require(view.rows == rows && view.cols == cols, "a matrix does not fit the others");
        weights_.dtype = view.dtype;
        if (weights_.form == MatrixForm::plain) {
            kept_.push_back(array);
            return view.data;
        }
        uint8_t* const to = taken(packed_bytes(rows, cols));
        pack_matrix(view, to);
        return to;
    }

    // Of levels, scales and zero points as MatMulNBits has them.
    const void* in_bits(const py::array* m, int64_t rows, int64_t cols) {
        const int64_t blocks = rows / kNibbleRows;
        const auto is = [](const py::array& array, char kind, std::vector<int64_t> shape) {
            const bool typed = array.dtype().kind() == kind && array.itemsize() == (kind == 'f' ? 4 : 1);
            return typed && (array.flags() & py::array::c_style) &&
                   std::vector<int64_t>(array.shape(), array.shape() + array.ndim()) == shape;
        };
        require(is(m[0], 'u', {cols, blocks, kNibbleRows / 2}) && is(m[1], 'f', {cols, blocks}) &&
                    is(m[2], 'u', {cols, (blocks + 1) / 2}),
                "a matrix does not fit the others");
        const BlockMatrix view{static_cast<const uint8_t*>(m[0].data()), static_cast<const float*>(m[1].data()),
                               static_cast<const uint8_t*>(m[2].data()), rows, cols};
        uint8_t* const to = taken(nibble_bytes(rows, cols));
        std::atomic<bool> fits{true};
        {
            py::gil_scoped_release release;
            crew_.each(cols / kPanel, [&](int64_t panel, int) {
                if (!pack_nibbles(view, panel, to + panel * nibble_bytes(rows, kPanel))) fits = false;
            });
        }
        require(fits, "a scale is larger than float16 holds");
        return to;
    }

    uint8_t* taken(int64_t n_bytes) {
        uint8_t* const first = free_;
        free_ += n_bytes;
        return first;
    }

    const float* vector(const Array<float>& array, int64_t size) {
        require(array.ndim() == 1 && array.size() == size, "a vector does not fit the matrices");
        kept_.push_back(array);
        return array.data();
    }

    DecoderWeights weights_;
    std::vector<py::object> kept_;
    Pages packed_;
    uint8_t* free_ = nullptr;
    Crew crew_;
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

// Hidden states of the last new tokens of several sequences, those of one after those of the other.
Array<float> run_step(const std::vector<DecoderSequence*>& sequences, const std::vector<int64_t>& pasts,
                      const std::vector<int64_t>& counts, const Array<float>& embeds, const Array<float>& cos,
                      const Array<float>& sin, const std::optional<std::vector<int64_t>>& n_out) {
    require(!sequences.empty() && pasts.size() == sequences.size() && counts.size() == sequences.size(),
            "there must be a past and a count for each sequence");
    require(!n_out || n_out->size() == sequences.size(), "there must be an n_out for each sequence");
    const std::shared_ptr<DecoderStep> step = sequences[0]->step();
    const DecoderWeights& weights = step->weights();
    std::vector<StepPart> parts;
    int64_t n = 0, asked_for = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        const DecoderCache& cache = sequences[i]->cache();
        require(sequences[i]->step() == sequences[0]->step(), "sequences must be of one decoder");
        require(cache.dtype == sequences[0]->cache().dtype, "sequences must have caches of one type");
        for (size_t j = 0; j < i; ++j) require(sequences[j] != sequences[i], "a sequence may be there once");
        require(counts[i] > 0 && pasts[i] >= 0 && pasts[i] <= cache.capacity - counts[i], "past + n must fit the cache");
        parts.push_back({&cache, pasts[i], counts[i], n_out ? (*n_out)[i] : counts[i]});
        require(parts[i].n_out >= 0 && parts[i].n_out <= counts[i], "n_out must be from 0 to the count");
        n += counts[i];
        asked_for += parts[i].n_out;
    }
    const DecoderShape& s = weights.shape;
    require(embeds.ndim() == 2 && embeds.shape(0) == n && embeds.shape(1) == s.hidden, "embeds must be (n, hidden)");
    for (const auto* table : {&cos, &sin}) {
        require(table->ndim() == 2 && table->shape(0) == n && table->shape(1) == s.head_dim / 2,
                "cos and sin must be (n, head_dim / 2)");
    }
    Array<float> out({asked_for, s.hidden});
    const float *from = embeds.data(), *c = cos.data(), *i = sin.data();
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    decoder_step(weights, parts, from, c, i, to, step->crew());
    return out;
}

// Says to whoever runs that there is something else to do.
class Interrupt {
   public:
    void set() { is_set_ = true; }
    void clear() { is_set_ = false; }
    const std::atomic<bool>& flag() const { return is_set_; }

   private:
    std::atomic<bool> is_set_{false};
};

// One answer under way, and what it works on.
class AnswerWriting {
   public:
    AnswerWriting(AnswerState& state, const DecoderSequence& sequence, int64_t past, int64_t position,
                  const std::optional<Array<float>>& hidden, Tokens pending, double temperature, std::vector<double> shares,
                  bool decides_absent, std::optional<double> threshold, Tokens ahead)
        : step_(sequence.step()) {
        require(past >= 0 && past <= sequence.cache().capacity && position >= 0, "past must fit the cache");
        require(hidden.has_value() == pending.empty(), "there must be either a hidden state or tokens to feed");
        require(!hidden || (hidden->ndim() == 1 && hidden->size() == step_->weights().shape.hidden), "hidden must be (hidden,)");
        require(temperature >= 0 && std::isfinite(temperature), "temperature must be finite and not negative");
        require(ahead.size() <= pending.size() && std::equal(ahead.rbegin(), ahead.rend(), pending.rbegin()),
                "pending must end with ahead");
        row_.state = &state;
        row_.cache = &sequence.cache();
        row_.past = past;
        row_.position = position;
        row_.pending = std::move(pending);
        row_.temperature = temperature;
        row_.shares = std::move(shares);
        row_.decides_absent = decides_absent;
        row_.threshold = threshold;
        row_.ahead = std::move(ahead);
        if (hidden) row_.hidden.assign(hidden->data(), hidden->data() + hidden->size());
    }

    const std::shared_ptr<DecoderStep>& step() const { return step_; }
    AnswerRow& row() { return row_; }

    std::optional<Array<float>> hidden() const {
        if (row_.hidden.empty()) return std::nullopt;
        return Array<float>(static_cast<py::ssize_t>(row_.hidden.size()), row_.hidden.data());
    }

   private:
    std::shared_ptr<DecoderStep> step_;
    AnswerRow row_{};
};

void run_answers(const std::vector<AnswerWriting*>& answers, const py::array& embedding, const std::string& embedding_dtype,
                 const py::array& head, const std::string& head_dtype, const Array<float>& cos, const Array<float>& sin,
                 const Interrupt& interrupt, const std::optional<double>& seconds, int n_threads) {
    require(!answers.empty(), "there must be an answer");
    require(n_threads > 0 && n_threads <= 1024, "n_threads must be from 1 to 1024");
    const std::shared_ptr<DecoderStep> step = answers[0]->step();
    const DecoderShape& s = step->weights().shape;
    const AnswerModel model{&step->weights(), view_matrix(embedding, embedding_dtype), view_matrix(head, head_dtype),
                            cos.data(), sin.data(), cos.ndim() == 2 ? cos.shape(0) : 0};
    require(model.embedding.cols == s.hidden && model.head.cols == s.hidden, "embedding and head must be (V, hidden)");
    for (const auto* table : {&cos, &sin}) {
        require(table->ndim() == 2 && table->shape(0) == model.n_positions && table->shape(1) == s.head_dim / 2,
                "cos and sin must be (positions, head_dim / 2)");
    }
    std::vector<AnswerRow*> rows;
    for (AnswerWriting* each : answers) {
        require(each->step() == step, "answers must be of one decoder");
        require(each->row().cache->dtype == answers[0]->row().cache->dtype, "answers must have caches of one type");
        for (const AnswerRow* other : rows) {
            require(other->cache != each->row().cache && other->state != each->row().state, "an answer may be there once");
        }
        rows.push_back(&each->row());
    }
    std::optional<std::chrono::steady_clock::time_point> deadline;
    if (seconds) {
        require(std::isfinite(*seconds) && std::abs(*seconds) < 1e9, "seconds must be finite");
        deadline = std::chrono::steady_clock::now() +
                   std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(*seconds));
    }
    py::gil_scoped_release release;
    write_answers(model, rows, interrupt.flag(), deadline, step->crew(), n_threads);
}

int64_t draw_py(const Array<float>& logits, double temperature, double share) {
    require(logits.ndim() == 1 && logits.size() > 0, "logits must be (K,) with at least one");
    require(temperature > 0 && std::isfinite(temperature), "temperature must be positive");
    require(share >= 0 && share < 1, "share must be in [0, 1)");
    const float* from = logits.data();
    py::gil_scoped_release release;
    return draw(from, logits.size(), temperature, share);
}

float absent_share_py(const Array<float>& logits, const Array<bool>& leads_to_absent) {
    require(logits.ndim() == 1 && logits.size() > 0, "logits must be (K,) with at least one");
    require(leads_to_absent.ndim() == 1 && leads_to_absent.size() == logits.size(), "leads_to_absent must be (K,)");
    return absent_share(logits.data(), reinterpret_cast<const uint8_t*>(leads_to_absent.data()), logits.size());
}

void bind_writing(py::module_& m) {
    py::class_<Interrupt>(m, "Interrupt", "Says to whoever runs that there is something else to do.")
        .def(py::init<>())
        .def("set", &Interrupt::set, "Stop between two steps.")
        .def("clear", &Interrupt::clear, "Go on.");
    py::class_<AnswerWriting>(m, "AnswerWriting", "One answer under way.")
        .def(py::init<AnswerState&, const DecoderSequence&, int64_t, int64_t, const std::optional<Array<float>>&, Tokens,
                      double, std::vector<double>, bool, std::optional<double>, Tokens>(),
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::arg("state"), py::arg("sequence"), py::arg("past"),
             py::arg("position"), py::arg("hidden").noconvert().none(true), py::arg("pending"), py::arg("temperature"),
             py::arg("shares"), py::arg("decides_absent") = false, py::arg("threshold") = py::none(),
             py::arg("ahead") = Tokens{})
        .def_property_readonly("hidden", &AnswerWriting::hidden, "(hidden,) float32 of the last token, or None.")
        .def_property_readonly("absent_share", [](AnswerWriting& a) { return a.row().share; })
        .def_property_readonly("ahead", [](AnswerWriting& a) { return a.row().ahead; })
        .def_property_readonly("seconds_to_hidden", [](AnswerWriting& a) { return a.row().seconds_to_hidden; })
        .def_property_readonly("is_stuck", [](AnswerWriting& a) { return a.row().is_stuck; })
        .def_property_readonly("pending", [](AnswerWriting& a) { return a.row().pending; })
        .def_property_readonly("written", [](AnswerWriting& a) { return a.row().written; })
        .def_property_readonly("past", [](AnswerWriting& a) { return a.row().past; })
        .def_property_readonly("position", [](AnswerWriting& a) { return a.row().position; })
        .def_property_readonly("n_chosen", [](AnswerWriting& a) { return a.row().n_chosen; })
        .def_property_readonly("n_runs", [](AnswerWriting& a) { return a.row().n_runs; });
    m.def("write_answers", &run_answers, py::arg("answers"), py::arg("embedding"), py::arg("embedding_dtype"),
          py::arg("head"), py::arg("head_dtype"), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          py::arg("interrupt"), py::arg("seconds"), py::arg("n_threads"), "Write answers until one is done or cannot go on.");
    m.def("absent_share", &absent_share_py, py::arg("logits").noconvert(), py::arg("leads_to_absent").noconvert(),
          "Probability of the tokens that lead to absent, among those with these logits (K,) float32.");
    m.def("draw_token", &draw_py, py::arg("logits").noconvert(), py::arg("temperature"), py::arg("share"),
          "Index into logits (K,) float32, drawn from their softmax.");
}

}  // namespace

void bind_decoder(py::module_& m) {
    py::class_<DecoderStep, std::shared_ptr<DecoderStep>>(m, "DecoderStep", "The weights of a decoder, and the threads that run it.")
        .def(py::init<const std::string&, int64_t, int64_t, float, const py::iterable&,
                      const std::vector<std::vector<Array<float>>>&, const Array<float>&, bool, int>(),
             py::arg("dtype"), py::arg("heads"), py::arg("kv_heads"), py::arg("epsilon"), py::arg("matrices"),
             py::arg("vectors"), py::arg("final_norm"), py::arg("pack") = false, py::arg("n_threads") = 1)
        .def("open",
             [](const std::shared_ptr<DecoderStep>& step, std::vector<py::array> keys, std::vector<py::array> values) {
                 return DecoderSequence(step, std::move(keys), std::move(values));
             },
             py::arg("keys"), py::arg("values"), "A sequence over these buffers, one a layer.");
    py::class_<DecoderSequence>(m, "DecoderSequence", "A decoder and one sequence's keys and values.");
    m.def("decoder_step", &run_step, py::arg("sequences"), py::arg("pasts"), py::arg("counts"),
          py::arg("embeds").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          py::arg("n_out") = py::none(),
          "Hidden states (n, hidden) of n more tokens, or of the last n_out of each sequence; those of one together.");
    bind_writing(m);
}
