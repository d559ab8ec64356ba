// Every kernel on inputs made here; prints what came out, so that two builds can be compared line by line.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <vector>

#include "answer_grammar.h"
#include "answer_parser.h"
#include "decoder_step.h"
#include "packed_matrix.h"
#include "mask.h"
#include "preprocess.h"
#include "resize.h"
#include "rows.h"
#include "simd.h"
#include "window.h"

using namespace medreasoner;

namespace {

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u; }
float draw_float() { return static_cast<float>(draw() >> 8) / 8388608.0f - 1.0f; }

// FNV-1a: integer results must agree in every bit.
template <class T>
uint64_t digest(const std::vector<T>& values) {
    uint64_t hash = 1469598103934665603ull;
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
    return hash;
}

// Sums of products come in another order for each vector width: four digits are compared.
void print_floats(const char* name, const std::vector<float>& values) {
    std::printf("%s", name);
    for (size_t i = 0; i < values.size(); i += 1 + values.size() / 16) std::printf(" %.4g", std::round(values[i] * 1e4) / 1e4);
    std::printf("\n");
}

void images() {
    std::vector<uint8_t> pixels(37 * 53 * 3);
    for (auto& p : pixels) p = static_cast<uint8_t>(draw() >> 24);
    const ImageView image{pixels.data(), 37, 53, 3};
    std::vector<uint8_t> resized;
    for (const int64_t size : {19, 37, 91}) {
        resize_rows(image, size, size + 5, [&](int64_t, const uint8_t* row) { resized.insert(resized.end(), row, row + (size + 5) * 3); });
    }
    std::printf("resize %llu\n", static_cast<unsigned long long>(digest(resized)));
    const Normalisation norm{{0.48f, 0.45f, 0.40f}, {0.26f, 0.25f, 0.27f}};
    std::vector<float> patches(3 * 56 * 56), planes(3 * 64 * 64);
    preprocess_patches(image, {56, 56, 56, 56}, norm, 14, 2, patches.data());
    preprocess_planes(image, {64, 64, 45, 64}, norm, planes.data());
    print_floats("patches", patches);
    print_floats("planes", planes);
    std::vector<float> values(1001);
    for (auto& v : values) v = 2000 * draw_float();
    values[7] = std::numeric_limits<float>::quiet_NaN();
    for (const auto function : {VoiFunction::linear, VoiFunction::linear_exact, VoiFunction::sigmoid}) {
        std::vector<uint8_t> grey(values.size());
        window_u8(values.data(), 1001, {1.5, -20, 40, 400, function, function == VoiFunction::linear}, grey.data());
        std::printf("window %llu\n", static_cast<unsigned long long>(digest(grey)));
    }
}

void masks() {
    std::vector<float> logits(64 * 64);
    for (int y = 0; y < 64; ++y)
        for (int x = 0; x < 64; ++x) logits[y * 64 + x] = 300.f - (x - 30) * (x - 30) - (y - 25) * (y - 25) + 0.37f * draw_float();
    std::vector<uint8_t> mask(301 * 207), again(301 * 207, 0);
    mask_from_logits(logits.data(), 64, 44.0, 64.0, 0.f, 207, 301, mask.data());
    Box box{};
    const bool found = mask_box(mask.data(), 207, 301, &box);
    std::printf("box %d %lld %lld %lld %lld\n", found, (long long)box.x1, (long long)box.y1, (long long)box.x2, (long long)box.y2);
    const std::string text = encode_counts(run_lengths(mask.data(), 207, 301));
    fill_runs(decode_counts(text, 301 * 207), 207, 301, again.data());
    std::printf("mask %llu rle %s same %d\n", static_cast<unsigned long long>(digest(mask)), text.substr(0, 60).c_str(), mask == again);
}

void rows() {
    const int64_t n = 40, cols = 67;
    std::vector<float> hidden(cols), weights(n * cols), out(n);
    for (auto& h : hidden) h = draw_float();
    for (auto& w : weights) w = draw_float();
    std::vector<uint16_t> halves(n * cols);  // finite float16 and bfloat16 patterns alike
    for (auto& h : halves) h = static_cast<uint16_t>(((draw() >> 16) & 0x83ff) | 0x3800);
    for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
        const Matrix matrix{dtype == Dtype::float32 ? static_cast<const void*>(weights.data()) : halves.data(), dtype, n, cols};
        project_rows(matrix, hidden.data(), nullptr, n, out.data());
        print_floats("project", out);
        const std::vector<int32_t> some{3, 17, 21, 39};
        const Selected best = select_token(matrix, hidden.data(), some.data(), 4);
        std::printf("select %d %.3f\n", best.row, best.logprob);
        std::vector<float> gathered(2 * cols);
        const std::vector<int64_t> ids{5, 0};
        gather_rows(matrix, ids.data(), 2, gathered.data());
        std::printf("gather %llu\n", static_cast<unsigned long long>(digest(gathered)));
    }
}

void decoder() {
    const DecoderShape shape{32, 4, 2, 16, 48, 1e-6f};
    const int64_t capacity = 8, past = 3, n = 2;
    std::vector<std::vector<float>> kept;
    const auto drawn = [&](int64_t size, float scale) {
        kept.emplace_back(size);
        for (auto& v : kept.back()) v = scale * draw_float();
        return kept.back().data();
    };
    DecoderWeights weights{shape, MatrixForm::plain, Dtype::float32, {}, nullptr};
    DecoderCache cache{Dtype::float16, capacity, {}};
    std::vector<std::vector<uint16_t>> buffers(4, std::vector<uint16_t>(2 * capacity * 16));
    for (int layer = 0; layer < 2; ++layer) {
        weights.layers.push_back({drawn(32, 1), drawn(32 * 128, 0.2f), drawn(128, 1), drawn(64 * 32, 0.2f), drawn(32, 1),
                                  drawn(32 * 48, 0.2f), drawn(32 * 48, 0.2f), drawn(48 * 32, 0.2f)});
        for (int part = 0; part < 2; ++part)
            for (auto& v : buffers[2 * layer + part]) v = static_cast<uint16_t>(((draw() >> 16) & 0x83ff) | 0x3800);
        cache.layers.push_back({buffers[2 * layer].data(), buffers[2 * layer + 1].data()});
    }
    weights.final_norm = drawn(32, 1);
    std::vector<float> out(n * 32);
    const float* embeds = drawn(n * 32, 1);  // one by one: the order of arguments is the compiler's
    const float* cos = drawn(n * 8, 1);
    const float* sin = drawn(n * 8, 1);
    Crew crew(1);
    decoder_step(weights, {{&cache, past, n, n}}, embeds, cos, sin, out.data(), crew);
    print_floats("decoder", out);
}

void packed_decoder() {
    const DecoderShape shape{64, 2, 1, 64, 64, 1e-6f};
    std::vector<std::vector<float>> kept;
    std::vector<std::vector<uint8_t>> packed;
    const auto drawn = [&](int64_t size, float scale) {
        kept.emplace_back(size);
        for (auto& v : kept.back()) v = scale * draw_float();
        return kept.back().data();
    };
    const auto pack = [&](int64_t rows, int64_t cols) {
        packed.emplace_back(packed_bytes(rows, cols));
        pack_matrix({drawn(rows * cols, 0.2f), Dtype::float32, rows, cols}, packed.back().data());
        return packed.back().data();
    };
    DecoderWeights weights{shape, MatrixForm::eight_bits, Dtype::float32, {}, nullptr};
    DecoderLayer layer{};
    layer.input_norm = drawn(64, 1);
    layer.qkv = pack(64, 256);
    layer.qkv_bias = drawn(256, 1);
    layer.output = pack(128, 64);
    layer.attention_norm = drawn(64, 1);
    layer.gate = pack(64, 64);
    layer.up = pack(64, 64);
    layer.down = pack(64, 64);
    weights.layers.push_back(layer);
    weights.final_norm = drawn(64, 1);
    std::vector<float> one(2 * 4 * 64), other(2 * 4 * 64), out(3 * 64);
    const DecoderCache caches[2] = {{Dtype::float32, 4, {{one.data(), one.data() + 256}}},
                                    {Dtype::float32, 4, {{other.data(), other.data() + 256}}}};
    const float* embeds = drawn(3 * 64, 1);
    const float* cos = drawn(3 * 32, 1);
    const float* sin = drawn(3 * 32, 1);
    Crew crew(2);
    decoder_step(weights, {{&caches[0], 0, 1, 1}, {&caches[1], 0, 2, 2}}, embeds, cos, sin, out.data(), crew);
    print_floats("packed", out);
}

void decoder_in_four_bits() {
    const DecoderShape shape{128, 2, 1, 64, 192, 1e-6f};
    std::vector<std::vector<float>> kept;
    std::vector<std::vector<uint8_t>> packed;
    const auto drawn = [&](int64_t size, float base, float scale) {
        kept.emplace_back(size);
        for (auto& v : kept.back()) v = base + scale * draw_float();
        return kept.back().data();
    };
    const auto pack = [&](int64_t rows, int64_t cols) {
        std::vector<uint8_t> levels(rows * cols / 2), zeros(cols * ((rows / 32 + 1) / 2));
        for (auto& v : levels) v = static_cast<uint8_t>(draw() >> 24);
        for (auto& v : zeros) v = static_cast<uint8_t>(0x77 + (draw() >> 31) + (draw() >> 31 << 4));
        const BlockMatrix matrix{levels.data(), drawn(cols * rows / 32, 0.02f, 0.01f), zeros.data(), rows, cols};
        packed.emplace_back(nibble_bytes(rows, cols));
        for (int64_t panel = 0; panel < cols / kPanel; ++panel) {
            pack_nibbles(matrix, panel, packed.back().data() + panel * nibble_bytes(rows, kPanel));
        }
        std::printf("nibbles %llu\n", static_cast<unsigned long long>(digest(packed.back())));
        return packed.back().data();
    };
    DecoderWeights weights{shape, MatrixForm::four_bits, Dtype::float32, {}, nullptr};
    DecoderLayer layer{};
    layer.input_norm = drawn(128, 0, 1);
    layer.qkv = pack(128, 256);
    layer.qkv_bias = drawn(256, 0, 1);
    layer.output = pack(128, 128);
    layer.attention_norm = drawn(128, 0, 1);
    layer.gate = pack(128, 192);
    layer.up = pack(128, 192);
    layer.down = pack(192, 128);
    weights.layers.push_back(layer);
    weights.final_norm = drawn(128, 0, 1);
    std::vector<float> own(2 * 4 * 64), out(3 * 128);
    const DecoderCache cache{Dtype::float32, 4, {{own.data(), own.data() + 256}}};
    const float* embeds = drawn(3 * 128, 0, 1);
    const float* cos = drawn(3 * 32, 0, 1);
    const float* sin = drawn(3 * 32, 0, 1);
    for (const int n_threads : {1, 3}) {
        Crew crew(n_threads);
        decoder_step(weights, {{&cache, 0, 3, 3}}, embeds, cos, sin, out.data(), crew);
        std::printf("%d ", n_threads);
        print_floats("threads, four bits", out);
    }
}

void answers() {
    for (const char* text : {"<think>left</think><answer>{'bbox': [1.5, 2e1, 30, -4.25], \"points_1\": [1,2], 'points_2':[3 ,4.0]}</answer>",
                             "<answer>{'bbox': [1, 2, 3]}</answer>", "<answer>{\"bbox\": [1,2,3,4]", "none",
                             "<answer>{'bbox': [0.1, 1e308, -0.0, 123456789012345678], 'points_1': [1e999, 2], 'points_2': [1e-5, 7E-2]}</answer>"}) {
        AnswerParser parser;
        for (const char* c = text; *c; ++c) parser.feed(std::string_view(c, 1));
        const ParsedAnswer answer = parser.result();
        std::printf("answer %s", answer.status.c_str());
        if (answer.bbox)
            for (const double v : *answer.bbox) std::printf(" %g", v);
        for (const auto& name : answer.missing) std::printf(" -%s", name.c_str());
        std::printf("\n");
    }
    std::vector<Tokens> literals, numbers;
    for (int i = 0; i < 9; ++i) literals.push_back({100 + i, 120});
    for (int i = 0; i < 100; ++i) numbers.push_back(i < 10 ? Tokens{i} : Tokens{i / 10, i % 10});
    AnswerState answer(std::make_shared<AnswerGrammar>(literals, numbers, Tokens{99}), 90, 70);
    std::printf("grammar");
    while (!answer.done()) {
        const Tokens forced = answer.forced();
        const Tokens allowed = answer.allowed();
        std::printf(" %zu/%zu", forced.size(), allowed.size());
        if (!allowed.empty()) answer.accept(allowed[allowed.size() > 1 ? 1 + draw() % (allowed.size() - 1) : 0]);
    }
    for (const int v : answer.values()) std::printf(" %d", v);
    std::printf("\n");
}

}  // namespace

int main() {
    set_simd_level(simd_level_names().front());
    images();
    masks();
    rows();
    decoder();
    packed_decoder();
    decoder_in_four_bits();
    answers();
}
