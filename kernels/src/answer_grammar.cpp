#include "answer_grammar.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace medreasoner {

bool AnswerGrammar::Node::reaches(int low, int high) const {
    if (children.empty()) return low <= value && value <= high;
    const auto first = std::lower_bound(values.begin(), values.end(), low);
    return first != values.end() && *first <= high;
}

AnswerGrammar::AnswerGrammar(std::vector<Tokens> literals, const std::vector<Tokens>& numbers,
                             std::optional<Tokens> absent)
    : literals_(std::move(literals)), absent_(std::move(absent)), nodes_(1), limit_(static_cast<int>(numbers.size()) - 1) {
    if (literals_.size() != kNumbers + 1) throw std::invalid_argument("a grammar has 9 literals");
    if (numbers.size() < 2) throw std::invalid_argument("a grammar has the numbers 0 and 1 at least");
    for (size_t v = 0; v < numbers.size(); ++v) add_number(numbers[v], static_cast<int>(v));
    check_literals();
    if (absent_) find_fork();
    lay_out();
}

void AnswerGrammar::lay_out() {
    for (Node& node : nodes_) {
        for (const auto& [token, child] : node.children) {
            const std::vector<int>& values = nodes_[static_cast<size_t>(child)].values;
            node.edges.push_back({token, child, values.front(), values.back()});
        }
    }
}

void AnswerGrammar::add_number(const Tokens& tokens, int value) {
    if (tokens.empty()) throw std::invalid_argument("the number " + std::to_string(value) + " has no tokens");
    size_t at = 0;
    nodes_[at].values.push_back(value);
    for (const int32_t token : tokens) {
        const auto [child, is_new] = nodes_[at].children.try_emplace(token, static_cast<int>(nodes_.size()));
        at = static_cast<size_t>(child->second);
        if (is_new) nodes_.emplace_back();  // `child` is not used after this
        nodes_[at].values.push_back(value);
    }
    if (nodes_[at].value >= 0) throw std::invalid_argument("two numbers have the same tokens");
    nodes_[at].value = value;
}

void AnswerGrammar::check_literals() const {
    for (size_t i = 1; i < literals_.size(); ++i) {
        if (literals_[i].empty()) throw std::invalid_argument("only the first literal may be empty");
        for (const Node& node : nodes_) {
            if (node.value >= 0 && node.children.count(literals_[i][0])) {
                throw std::invalid_argument("a literal starts with a token that could also continue a number");
            }
        }
    }
}

void AnswerGrammar::find_fork() {
    const Tokens &present = literals_[0], &absent = *absent_;
    while (fork_ < present.size() && fork_ < absent.size() && present[fork_] == absent[fork_]) ++fork_;
    if (fork_ == absent.size()) throw std::invalid_argument("the absent answer is the start of every answer");
    if (fork_ == present.size() && nodes_[0].children.count(absent[fork_])) {
        throw std::invalid_argument("the absent answer goes on like a number");
    }
}

AnswerState::AnswerState(std::shared_ptr<const AnswerGrammar> grammar, int width, int height)
    : grammar_(std::move(grammar)), width_(width), height_(height) {
    const int limit = grammar_->limit();
    if (width < 1 || height < 1 || width > limit || height > limit) {
        throw std::invalid_argument("width and height must be 1 to " + std::to_string(limit) + ", the largest number");
    }
    in_number_ = grammar_->literal(0).empty();
}

AnswerState::Range AnswerState::range() const {
    switch (values_.size()) {  // a box needs a pixel of extent, so its first corner stays clear of the far edges
        case 0: return {0, width_ - 1};
        case 1: return {0, height_ - 1};
        case 2: return {values_[0] + 1, width_};
        case 3: return {values_[1] + 1, height_};
        default: return {0, values_.size() % 2 ? height_ : width_};
    }
}

bool AnswerState::at_absent_choice() const {
    return grammar_->absent() && !absent_ && !done_ && values_.empty() && node_ == 0 && position_ == grammar_->fork();
}

std::optional<int32_t> AnswerState::number_end() const {
    const int value = grammar_->node(node_).value;
    const auto [low, high] = range();
    if (value < low || value > high) return std::nullopt;
    return grammar_->literal(static_cast<int>(values_.size()) + 1)[0];
}

template <class Visit>
void AnswerState::each_allowed(Visit visit) const {
    if (done_) return;
    if (absent_) {
        visit((*grammar_->absent())[position_]);
        return;
    }
    if (at_absent_choice() && !visit((*grammar_->absent())[position_])) return;
    if (!in_number_) {
        visit(grammar_->literal(static_cast<int>(values_.size()))[position_]);
        return;
    }
    const auto [low, high] = range();
    for (const AnswerGrammar::Edge& edge : grammar_->node(node_).edges) {
        if (edge.highest < low || edge.lowest > high) continue;
        const bool is_one = edge.lowest == edge.highest;  // number, which lies in the range then
        if ((is_one || grammar_->node(edge.child).reaches(low, high)) && !visit(edge.token)) return;
    }
    if (const auto end = number_end()) visit(*end);
}

Tokens AnswerState::allowed() const {
    Tokens tokens;
    if (in_number_) tokens.reserve(grammar_->node(node_).edges.size() + 2);
    each_allowed([&](int32_t token) {
        tokens.push_back(token);
        return true;
    });
    if (!std::is_sorted(tokens.begin(), tokens.end())) std::sort(tokens.begin(), tokens.end());
    return tokens;
}

void AnswerState::accept(int32_t token) {
    bool found = false;
    each_allowed([&](int32_t candidate) { return !(found = candidate == token); });
    if (!found) throw std::invalid_argument("the grammar does not allow token " + std::to_string(token) + " here");
    step(token);
}

Tokens AnswerState::forced() {
    Tokens tokens;
    while (!done_) {
        int32_t only = 0;
        int count = 0;
        each_allowed([&](int32_t token) {
            only = token;
            return ++count < 2;
        });
        if (count != 1) break;
        step(only);
        tokens.push_back(only);
    }
    return tokens;
}

void AnswerState::step(int32_t token) {
    if (at_absent_choice() && token == (*grammar_->absent())[position_]) absent_ = true;
    if (absent_) {
        done_ = ++position_ == grammar_->absent()->size();
        return;
    }
    if (in_number_) {
        const auto& edges = grammar_->node(node_).edges;
        const auto edge = std::lower_bound(edges.begin(), edges.end(), token,
                                           [](const AnswerGrammar::Edge& each, int32_t wanted) { return each.token < wanted; });
        if (edge != edges.end() && edge->token == token) {
            node_ = edge->child;
            return;
        }
        values_.push_back(grammar_->node(node_).value);
        node_ = 0;
        position_ = 0;
        in_number_ = false;
    }
    if (++position_ < grammar_->literal(static_cast<int>(values_.size())).size()) return;
    done_ = values_.size() == AnswerGrammar::kNumbers;
    in_number_ = !done_;
}

}  // namespace medreasoner
