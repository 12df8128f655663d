// Sampling from a model in its recurrent form: constant memory and time per token, whatever came before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "random.h"
#include "vocabulary.h"

namespace gdn {

constexpr int kEndOfText = 50256;  // GPT-2's; starts every document of a shard
constexpr int kByteTokens = 256;   // the vocabulary of a model of bytes

// How a token is drawn from logits z: from softmax(z / temperature), of which the top_k most probable tokens
// stay, and of these the most probable ones up to the first that brings their share to top_p. Of equal logits
// the lower token comes first.
struct Sampling {
  double temperature = 0.8;  // 0: the most probable token
  int64_t top_k = 0;         // 0: all
  double top_p = 1;          // 1: all
  uint64_t seed = 42;
};

// A token among the first `vocab` entries; `uniform` in (0,1) decides. Throws where a logit is not a number.
template <class Real>
int sample_token(const Real* logits, int vocab, const Sampling& sampling, double uniform) {
  const Real top = *std::max_element(logits, logits + vocab);
  if (!std::isfinite(top) || std::any_of(logits, logits + vocab, [](Real z) { return std::isnan(z); }))
    throw std::runtime_error("the model's logits are not finite: no token can be drawn");
  if (sampling.temperature == 0) return int(std::find(logits, logits + vocab, top) - logits);
  std::vector<int> tokens(vocab);
  std::iota(tokens.begin(), tokens.end(), 0);
  if (sampling.top_k > 0 && sampling.top_k < vocab) tokens.resize(size_t(sampling.top_k));
  if (sampling.top_p < 1 || int(tokens.size()) < vocab) {
    std::vector<int> all(vocab);
    std::iota(all.begin(), all.end(), 0);
    std::partial_sort_copy(all.begin(), all.end(), tokens.begin(), tokens.end(), [&](int a, int b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
  }
  std::vector<double> sums(tokens.size());
  double sum = 0;
  for (size_t i = 0; i < tokens.size(); i++)
    sums[i] = sum += std::exp((double(logits[tokens[i]]) - double(top)) / sampling.temperature);
  if (sampling.top_p < 1) {
    const auto last = std::lower_bound(sums.begin(), sums.end(), sampling.top_p * sum);
    sum = *last;
    sums.resize(size_t(last - sums.begin()) + 1);
  }
  const auto drawn = std::upper_bound(sums.begin(), sums.end(), uniform * sum);
  return tokens[std::min(size_t(drawn - sums.begin()), sums.size() - 1)];
}

// Text in and out of a model: bytes, GPT-2's tokens by a vocabulary's file, or without one their numbers.
class TextCodec {
 public:
  // vocab: the model's; path: a vocabulary's file (vocabulary.h), or ""; start: the token that begins a
  // document, where no vocabulary's file says it. Throws one line where vocab and file do not agree.
  TextCodec(int vocab, const std::string& path, int start = kEndOfText) : vocab_(vocab), start_(start) {
    if (path.empty()) return;
    if (is_bytes()) throw std::runtime_error("-vocab " + path + ": this model reads bytes and needs none");
    vocabulary_ = std::make_unique<Vocabulary>(path);
    if (vocabulary_->size() != vocab)
      throw std::runtime_error("-vocab " + path + ": has " + std::to_string(vocabulary_->size()) +
                               " tokens with the end of text, the model " + std::to_string(vocab));
  }

  // Tokens of a prompt. A text is the start of a document: with a vocabulary's file the end-of-text token
  // comes before it. An empty prompt is a new line of bytes, or the token that begins a document. Throws one
  // line naming a word that is not a token's number where numbers are expected, and where an empty prompt has
  // no token to begin with.
  std::vector<int32_t> tokens(const std::string& prompt) const {
    std::vector<int32_t> tokens;
    if (is_bytes()) {
      for (unsigned char c : prompt.empty() ? std::string("\n") : prompt) tokens.push_back(c);
    } else if (vocabulary_) {
      tokens = vocabulary_->encode(prompt);
      tokens.insert(tokens.begin(), vocabulary_->end_of_text());
    } else {
      tokens = numbers(prompt);
    }
    return tokens;
  }

  // A token as text: its bytes, or its number and a space.
  std::string text(int token) const {
    if (is_bytes()) return std::string(1, char(token));
    return vocabulary_ ? vocabulary_->text(token) : std::to_string(token) + " ";
  }

  // A prompt as it stands before the tokens that continue it.
  std::string shown(const std::string& prompt) const {
    return prompt + (prompt.empty() || is_bytes() || vocabulary_ ? "" : " ");
  }
  bool is_bytes() const { return vocab_ == kByteTokens; }

 private:
  std::vector<int32_t> numbers(const std::string& prompt) const {
    std::vector<int32_t> tokens;
    for (size_t at = 0; at < prompt.size();) {
      const size_t end = std::min(prompt.find_first_of(" ,\n", at), prompt.size());
      const std::string word = prompt.substr(at, end - at);
      at = end + 1;
      if (word.empty()) continue;
      char* rest = nullptr;
      const long id = std::strtol(word.c_str(), &rest, 10);
      if (*rest || id < 0 || id >= vocab_)
        throw std::runtime_error("-prompt '" + word +
                                 "': without -vocab this model reads token ids from 0 to " +
                                 std::to_string(vocab_ - 1) + ", separated by spaces");
      tokens.push_back(int32_t(id));
    }
    if (tokens.empty() && (start_ < 0 || start_ >= vocab_))
      throw std::runtime_error("-prompt '': this model's vocabulary of " + std::to_string(vocab_) +
                               " has no token " + std::to_string(start_) +
                               " to begin with; give token ids, or -separator");
    if (tokens.empty()) tokens.push_back(start_);
    return tokens;
  }

  int vocab_, start_;
  std::unique_ptr<Vocabulary> vocabulary_;
};

constexpr int kPromptPiece = 64;  // tokens of a prompt at a time

// Feeds tokens in pieces, each as one batch of matrix products; `logits` are those after the last token. The
// model must be made for kPromptPiece tokens. Where it masks documents, each begins with a state of zeros.
template <class Device>
void feed(Model<Device>& model, const std::vector<int32_t>& tokens, RecurrentState<Device>& state,
          std::vector<typename Device::real>& logits) {
  for (size_t at = 0, end; at < tokens.size(); at = end) {
    if (tokens[at] == model.separator()) state.reset();
    for (end = at + 1; end < tokens.size() && end < at + kPromptPiece && tokens[end] != model.separator();)
      end++;
    model.decode(&tokens[at], 1, int(end - at), state, logits);
  }
}

// Feeds `prompt`, then draws `count` tokens and hands each to `emit`, until `stop` says so. The tokens depend
// on the weights, the prompt and `sampling` alone. separator: as the model was trained with
// (Model::separator). Throws one line where a token of the prompt is not in the vocabulary.
template <class Device>
void generate(Parameters<Device>& parameters, const std::vector<int32_t>& prompt, int64_t count,
              const Sampling& sampling, int separator, const std::function<void(int)>& emit,
              const std::function<bool()>& stop) {
  for (const int32_t token : prompt)
    if (token < 0 || token >= parameters.config.vocab)
      throw std::runtime_error("-prompt: token " + std::to_string(token) + ", expected 0 to " +
                               std::to_string(parameters.config.vocab - 1));
  Model<Device> model(parameters, 1, kPromptPiece, Use::inference, Recompute::nothing, separator);
  RecurrentState<Device> state(parameters.dev, parameters.config, 1);
  std::vector<typename Device::real> logits;
  feed(model, prompt, state, logits);
  const uint64_t key = stream_key(sampling.seed, "samples");
  for (int64_t i = 0; i < count && !stop(); i++) {
    const int32_t token =
        sample_token(logits.data(), parameters.config.vocab, sampling, random_uniform(key, uint64_t(i)));
    emit(token);
    if (i + 1 < count) feed(model, {token}, state, logits);
  }
}

}  // namespace gdn
