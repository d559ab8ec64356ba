// The numbers of answers in one go: choose a token, take those that the grammar forces, run the decoder, choose again.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "answer_grammar.h"
#include "crew.h"
#include "decoder_step.h"
#include "rows.h"

namespace medreasoner {

// Index into logits (n >= 1), drawn by `share` in [0, 1) from their softmax at a temperature.
int64_t draw(const float* logits, int64_t n, double temperature, double share);

// How likely absent is (a share of all) among the tokens with these finite logits (n >= 1), some of which lead to it.
float absent_share(const float* logits, const uint8_t* leads_to_absent, int64_t n);

// One answer under way: either `hidden` of the last token is known and a choice comes next, or `pending` are to be fed.
struct AnswerRow {
    AnswerState* state;
    const DecoderCache* cache;
    int64_t past;      // tokens in the cache
    int64_t position;  // of the next token
    std::vector<float> hidden;
    Tokens pending;
    double temperature = 0;      // 0: the likeliest token
    std::vector<double> shares;  // what to draw by, one for each choice
    Tokens written;              // what was chosen and forced
    int64_t n_chosen = 0, n_runs = 0;
    bool is_stuck = false;  // cannot go on here
    // Whether the choice of absent is made here too, and above which share; none: where it is the likeliest.
    bool decides_absent = false;
    std::optional<double> threshold;
    Tokens ahead;               // what `pending` ends with, which holds only if the target is there
    std::vector<float> beyond;  // the hidden state of its last token, where `hidden` is that before its first
    std::optional<float> share;     // what absent was given
    double seconds_to_hidden = 0;   // from the beginning of the run to its first hidden state

    bool done() const { return state->done(); }
};

// What a row needs of a model. Tables (n_positions, head_dim / 2) are those of text.
struct AnswerModel {
    const DecoderWeights* weights;
    Matrix embedding, head;
    const float *cos, *sin;
    int64_t n_positions;
};

// Writes rows, all of them step by step together, until one is done or cannot go on: where absent is a choice that is not
// made here, logits are not finite, shares are used up, or neither cache nor tables have room. Such a row is as it was before that. Stops between
// two steps when `stop` becomes true or the time is over. Each row gets what it would get alone, to the last bit. Where
// the crew is but one thread, up to n_threads share the rows out among themselves.
void write_answers(const AnswerModel& model, const std::vector<AnswerRow*>& rows, const std::atomic<bool>& stop,
                   std::optional<std::chrono::steady_clock::time_point> deadline, Crew& crew, int n_threads);

}  // namespace medreasoner
