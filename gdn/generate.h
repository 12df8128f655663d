// Sampling from a model in its recurrent form: constant memory and time per token, whatever came before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "random.h"

namespace gdn {

constexpr int kEndOfText = 50256;           // GPT-2's; starts every document of a shard
constexpr double kSampleTemperature = 0.8;  // logits are divided by it

// A token drawn from softmax(logits / temperature) over the first `vocab` entries; `uniform` in (0,1)
// decides.
template <class Real>
int sample_token(const std::vector<Real>& logits, int vocab, double temperature, double uniform) {
  const double top = *std::max_element(logits.begin(), logits.begin() + vocab);
  std::vector<double> sums(vocab);
  double sum = 0;
  for (int v = 0; v < vocab; v++) sums[v] = sum += std::exp((double(logits[v]) - top) / temperature);
  const auto it = std::upper_bound(sums.begin(), sums.end(), uniform * sum);
  return std::min(int(it - sums.begin()), vocab - 1);
}

// The tokens of a prompt: its bytes, or for a GPT-2 vocabulary the ids written in it. An empty prompt is a
// new line, or the end-of-text token. Throws one line naming a word that is not a token id.
inline std::vector<int32_t> prompt_tokens(const std::string& prompt, int vocab) {
  std::vector<int32_t> tokens;
  if (vocab == 256) {
    for (unsigned char c : prompt.empty() ? std::string("\n") : prompt) tokens.push_back(c);
    return tokens;
  }
  for (size_t at = 0; at < prompt.size();) {
    const size_t end = std::min(prompt.find_first_of(" ,\n", at), prompt.size());
    const std::string word = prompt.substr(at, end - at);
    at = end + 1;
    if (word.empty()) continue;
    char* rest = nullptr;
    const long id = std::strtol(word.c_str(), &rest, 10);
    if (*rest || id < 0 || id >= vocab)
      throw std::runtime_error("-prompt '" + word + "': this model reads token ids from 0 to " +
                               std::to_string(vocab - 1) + ", separated by spaces");
    tokens.push_back(int32_t(id));
  }
  if (tokens.empty()) tokens.push_back(kEndOfText);
  return tokens;
}

// A token as text: the byte itself, or the id and a space.
inline std::string token_text(int token, int vocab) {
  return vocab == 256 ? std::string(1, char(token)) : std::to_string(token) + " ";
}

// Feeds `prompt`, then draws `count` tokens and hands each to `emit`, until `stop` says so. The tokens depend
// on the weights, the prompt and `seed` alone.
template <class Device>
void generate(Parameters<Device>& parameters, const std::vector<int32_t>& prompt, int64_t count,
              uint64_t seed, const std::function<void(int)>& emit, const std::function<bool()>& stop) {
  constexpr int kPiece = 64;  // tokens of the prompt at a time
  Model<Device> model(parameters, 1, kPiece, Use::inference);
  RecurrentState<Device> state(parameters.dev, parameters.config, 1);
  std::vector<typename Device::real> logits;
  for (size_t at = 0; at < prompt.size(); at += kPiece)
    model.decode(&prompt[at], 1, int(std::min<size_t>(kPiece, prompt.size() - at)), state, logits);
  const uint64_t key = stream_key(seed, "samples");
  for (int64_t i = 0; i < count && !stop(); i++) {
    const int32_t token =
        sample_token(logits, parameters.config.vocab, kSampleTemperature, random_uniform(key, uint64_t(i)));
    emit(token);
    if (i + 1 < count) model.decode(&token, 1, 1, state, logits);
  }
}

}  // namespace gdn
