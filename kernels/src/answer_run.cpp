#include "answer_run.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <future>
#include <stdexcept>

namespace medreasoner {

int64_t draw(const float* logits, int64_t n, double temperature, double share) {
    const double largest = static_cast<double>(*std::max_element(logits, logits + n)) / temperature;
    std::vector<double> sums(static_cast<size_t>(n));
    double total = 0;
    for (int64_t k = 0; k < n; ++k) {
        total += std::exp(static_cast<double>(logits[k]) / temperature - largest);
        sums[static_cast<size_t>(k)] = total;
    }
    const auto found = std::upper_bound(sums.begin(), sums.end(), share * total);
    return std::min<int64_t>(found - sums.begin(), n - 1);
}

float absent_share(const float* logits, const uint8_t* leads_to_absent, int64_t n) {
    const float largest = *std::max_element(logits, logits + n);
    float absent = 0, total = 0;
    for (int64_t k = 0; k < n; ++k) {
        const float weight = std::exp(logits[k] - largest);
        total += weight;
        if (leads_to_absent[k]) absent += weight;
    }
    return absent / total;
}

namespace {

// The token that a row goes on with; none if it cannot be told here.
std::optional<int32_t> chosen(const AnswerModel& model, const AnswerRow& row, const Tokens& allowed) {
    const auto n = static_cast<int64_t>(allowed.size());
    if (row.temperature == 0) {
        try {
            return likeliest_row(model.head, row.hidden.data(), allowed.data(), n);
        } catch (const std::invalid_argument&) {
            return std::nullopt;
        }
    }
    if (static_cast<size_t>(row.n_chosen) >= row.shares.size()) return std::nullopt;
    std::vector<float> logits(allowed.size());
    project_rows(model.head, row.hidden.data(), allowed.data(), n, logits.data());
    for (const float logit : logits) {
        if (!std::isfinite(logit)) return std::nullopt;
    }
    return allowed[static_cast<size_t>(draw(logits.data(), n, row.temperature, row.shares[static_cast<size_t>(row.n_chosen)]))];
}

// The token at the choice of absent; none if it cannot be told here.
std::optional<int32_t> there_or_absent(const AnswerModel& model, AnswerRow& row, const Tokens& allowed) {
    if (!row.decides_absent) return std::nullopt;
    const auto n = static_cast<int64_t>(allowed.size());
    std::vector<float> logits(allowed.size());
    project_rows(model.head, row.hidden.data(), allowed.data(), n, logits.data());
    if (!std::all_of(logits.begin(), logits.end(), [](float logit) { return std::isfinite(logit); })) return std::nullopt;
    std::vector<uint8_t> leads_to_absent;
    for (const int32_t token : allowed) {
        AnswerState ahead = *row.state;
        ahead.accept(token);
        leads_to_absent.push_back(ahead.absent());
    }
    row.share = absent_share(logits.data(), leads_to_absent.data(), n);
    std::optional<size_t> best;
    for (size_t k = 0; k < logits.size(); ++k) {
        if (row.threshold && (static_cast<double>(*row.share) > *row.threshold) != static_cast<bool>(leads_to_absent[k])) continue;
        if (!best || logits[k] > logits[*best]) best = k;
    }
    return best ? std::optional(allowed[*best]) : std::nullopt;
}

// Goes on to what is to be fed next, or to the next choice; false if the row cannot.
bool choose(const AnswerModel& model, AnswerRow& row) {
    const bool is_first = row.state->at_absent_choice();
    const Tokens allowed = row.state->allowed();
    if (allowed.empty()) return false;
    if (allowed.back() >= model.head.rows || allowed.front() < 0) return false;
    const auto token = is_first ? there_or_absent(model, row, allowed) : chosen(model, row, allowed);
    if (!token) return false;
    row.state->accept(*token);
    if (!is_first) ++row.n_chosen;
    row.pending = {*token};
    const Tokens forced = row.state->forced();
    row.pending.insert(row.pending.end(), forced.begin(), forced.end());
    row.written.insert(row.written.end(), row.pending.begin(), row.pending.end());
    row.hidden.clear();
    if (row.pending == row.ahead && !row.beyond.empty()) {
        row.pending.clear();
        row.hidden.swap(row.beyond);
    }
    row.ahead.clear();
    row.beyond.clear();
    return true;
}

bool fits(const AnswerModel& model, const AnswerRow& row) {
    const auto n = static_cast<int64_t>(row.pending.size());
    const auto known = [&](int32_t token) { return token >= 0 && token < model.embedding.rows; };
    return n > 0 && row.past + n <= row.cache->capacity && row.position + n <= model.n_positions &&
           std::all_of(row.pending.begin(), row.pending.end(), known);
}

// Feeds what is pending of all rows.
void feed(const AnswerModel& model, const std::vector<AnswerRow*>& rows, Crew& crew) {
    const auto n_out = [](const AnswerRow* row) { return static_cast<int64_t>(row->ahead.size()) + 1; };
    const DecoderShape& s = model.weights->shape;
    const int64_t half = s.head_dim / 2;
    std::vector<StepPart> parts;
    std::vector<int64_t> ids;
    std::vector<float> cos, sin;
    int64_t n_states = 0;
    for (const AnswerRow* row : rows) {
        const auto n = static_cast<int64_t>(row->pending.size());
        parts.push_back({row->cache, row->past, n, n_out(row)});
        n_states += n_out(row);
        ids.insert(ids.end(), row->pending.begin(), row->pending.end());
        cos.insert(cos.end(), model.cos + row->position * half, model.cos + (row->position + n) * half);
        sin.insert(sin.end(), model.sin + row->position * half, model.sin + (row->position + n) * half);
    }
    std::vector<float> embeds(ids.size() * static_cast<size_t>(s.hidden)), states(static_cast<size_t>(n_states * s.hidden));
    gather_rows(model.embedding, ids.data(), static_cast<int64_t>(ids.size()), embeds.data());
    decoder_step(*model.weights, parts, embeds.data(), cos.data(), sin.data(), states.data(), crew);
    const float* from = states.data();
    for (AnswerRow* row : rows) {
        const auto n = static_cast<int64_t>(row->pending.size());
        row->hidden.assign(from, from + s.hidden);
        from += n_out(row) * s.hidden;
        if (!row->ahead.empty()) row->beyond.assign(from - s.hidden, from);
        row->pending.clear();
        row->past += n;
        row->position += n;
        ++row->n_runs;
    }
}

constexpr size_t kRowsOfAThread = 3;  // at least: fewer are not worth waking it

// When to stop between two steps.
struct Limits {
    const std::atomic<bool>& stop;
    std::optional<std::chrono::steady_clock::time_point> deadline;
    std::atomic<bool> has_ended{false};  // by one of those who share the rows

    bool are_reached() const {
        return stop || has_ended || (deadline && std::chrono::steady_clock::now() > *deadline);
    }
};

void write_rows(const AnswerModel& model, const std::vector<AnswerRow*>& rows, Limits& limits, Crew& crew) {
    const auto start = std::chrono::steady_clock::now();
    bool goes_on = true;
    while (true) {
        for (AnswerRow* row : rows) {
            row->is_stuck = false;
            while (!row->done() && row->pending.empty() && !row->is_stuck) row->is_stuck = !choose(model, *row);
            row->is_stuck = row->is_stuck || (!row->done() && !fits(model, *row));
            goes_on = goes_on && !row->done() && !row->is_stuck;
        }
        if (!goes_on || limits.are_reached()) break;
        feed(model, rows, crew);
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        for (AnswerRow* row : rows) {
            if (row->n_runs == 1) row->seconds_to_hidden = spent.count();
        }
    }
    limits.has_ended = true;
}

}  // namespace

void write_answers(const AnswerModel& model, const std::vector<AnswerRow*>& rows, const std::atomic<bool>& stop,
                   std::optional<std::chrono::steady_clock::time_point> deadline, Crew& crew, int n_threads) {
    Limits limits{stop, deadline};
    const auto n = std::min(static_cast<size_t>(std::max(n_threads, 1)), rows.size() / kRowsOfAThread);
    if (n < 2) return write_rows(model, rows, limits, crew);
    std::vector<std::vector<AnswerRow*>> shares(n);
    for (size_t i = 0; i < rows.size(); ++i) shares[i * n / rows.size()].push_back(rows[i]);
    Crew alone(1);
    if (n <= static_cast<size_t>(crew.n_threads())) {
        const std::lock_guard<std::mutex> turn(crew.turn());
        std::vector<std::exception_ptr> faults(n);
        crew.each(static_cast<int64_t>(n), [&](int64_t item, int) {
            const auto i = static_cast<size_t>(item);
            try {
                write_rows(model, shares[i], limits, alone);
            } catch (...) {
                faults[i] = std::current_exception();
            }
        });
        for (const std::exception_ptr& fault : faults) {
            if (fault) std::rethrow_exception(fault);
        }
        return;
    }
    std::vector<std::future<void>> others;
    for (size_t i = 1; i < n; ++i) {
        others.push_back(std::async(std::launch::async, [&, i] { write_rows(model, shares[i], limits, alone); }));
    }
    write_rows(model, shares[0], limits, alone);
    for (auto& other : others) other.get();
}

}  // namespace medreasoner
