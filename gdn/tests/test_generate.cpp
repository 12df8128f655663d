// Generation: tiktoken's tokens from text, sampling against a plain reference, the recurrent form's logits
// against the training forward's, and ./train_gdn -gen.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../generate.h"
#include "models.h"
#include "needs_gpu.h"
#include "program.h"
#include "relative_error.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

// ---- vocabulary

inline std::string from_hexadecimal(const std::string& text) {
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) bytes += char(std::stoi(text.substr(i, 2), nullptr, 16));
  return bytes;
}

inline std::string to_hexadecimal(const std::string& bytes) {
  std::string text;
  for (unsigned char c : bytes)
    for (int digit : {c / 16, c % 16}) text += "0123456789abcdef"[digit];
  return text;
}

inline std::string decoded(const Vocabulary& vocabulary, const std::vector<int32_t>& tokens) {
  std::string text;
  for (int32_t token : tokens) text += vocabulary.text(token);
  return text;
}

TEST_CASE("vocabulary: tiktoken's tokens (dev/bpe_golden.py)") {
  const Vocabulary vocabulary("gdn/tests/golden/bpe_vocabulary.txt");
  std::ifstream file("gdn/tests/golden/bpe_texts.txt");
  int texts = 0;
  for (std::string line; std::getline(file, line); texts++) {
    const size_t end = std::min(line.find(' '), line.size());
    std::istringstream numbers(line.substr(end));
    std::vector<int32_t> expected;
    for (int32_t token; numbers >> token;) expected.push_back(token);
    const std::string text = from_hexadecimal(line.substr(0, end));
    CAPTURE(text);
    CHECK(vocabulary.encode(text) == expected);
    CHECK(decoded(vocabulary, expected) == text);
  }
  CHECK(texts >= 50);
}

TEST_CASE("vocabulary: any bytes come back, UTF-8 or not") {
  const Vocabulary vocabulary("gdn/tests/golden/bpe_vocabulary.txt");
  for (uint64_t seed = 0; seed < 200; seed++) {
    std::string text;
    for (uint64_t i = 0; i < 300; i++)  // the lead and continuation bytes of UTF-8 more often than not
      text += char(random_bits(seed, 2 * i) % 2 ? 0x80 + random_bits(seed, 2 * i + 1) % 0x80
                                                : random_bits(seed, 2 * i + 1) % 256);
    CHECK(decoded(vocabulary, vocabulary.encode(text)) == text);
  }
  // a surrogate, an overlong slash, a number past the last character, a cut character: none of them is a
  // letter
  for (const std::string bytes : {"\xed\xa0\x80", "\xc0\xaf", "\xf4\x90\x80\x80", "\xe4\xb8"}) {
    const auto tokens = vocabulary.encode("a" + bytes + "a");
    CHECK(decoded(vocabulary, tokens) == "a" + bytes + "a");
    CHECK(vocabulary.text(tokens.front()) == "a");
    CHECK(vocabulary.text(tokens.back()) == "a");
  }
}

// A vocabulary's file: 256 bytes, then `pairs`, with letters a-z, digits and ASCII's spaces.
inline std::string vocabulary_file(const std::vector<std::string>& pairs) {
  std::string text = "train_gdn vocabulary 1\nletters 41-5a,61-7a\nnumbers 30-39\nspaces 9-d,20-20\n";
  for (int b = 0; b < 256; b++) text += to_hexadecimal(std::string(1, char(b))) + "\n";
  for (const std::string& pair : pairs) text += to_hexadecimal(pair) + "\n";
  return text;
}

TEST_CASE("vocabulary: merges by rank, the leftmost first, a whole piece at once") {
  Folder folder;
  const std::string path = (folder.path / "v.txt").string();
  write_file(path, vocabulary_file({"bc", "ab", "aa", "abcd", "xyz"}));  // 256, 257, ...
  const Vocabulary vocabulary(path);
  using Tokens = std::vector<int32_t>;
  CHECK(vocabulary.encode("abc") == Tokens{'a', 256});
  CHECK(vocabulary.encode("abb") == Tokens{257, 'b'});
  CHECK(vocabulary.encode("aaaaa") == Tokens{258, 258, 'a'});
  CHECK(vocabulary.encode("abcd") == Tokens{259});  // merges alone would not reach it
  CHECK(vocabulary.encode("wxyz") == Tokens{'w', 'x', 'y', 'z'});
  CHECK(vocabulary.encode("xyz") == Tokens{260});
  CHECK(vocabulary.encode("").empty());
  CHECK(vocabulary.text(vocabulary.end_of_text()) == "<|endoftext|>");
  CHECK(vocabulary.size() == 262);
}

// The message of what is thrown, or "".
template <class Function>
std::string error_of(const Function& function) {
  try {
    function();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("vocabulary: a damaged file is named with its line") {
  Folder folder;
  const std::string path = (folder.path / "v.txt").string(), good = vocabulary_file({"ab"});
  const auto error = [&](const std::string& text) {
    write_file(path, text);
    const std::string message = error_of([&] { Vocabulary vocabulary(path); });
    CHECK(message.rfind(path + ": ", 0) == 0);
    return message;
  };
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    return error(text.replace(text.find(from), from.size(), to));
  };
  CHECK(error_of([] { Vocabulary vocabulary("nowhere.txt"); }).find("nowhere.txt: cannot open") == 0);
  CHECK(error("").find("line 1: expected 'train_gdn vocabulary 1'") != std::string::npos);
  CHECK(error("{\"!\": 0}\n").find("line 1") != std::string::npos);
  CHECK(changed("letters", "lettres").find("line 2: expected 'letters '") != std::string::npos);
  CHECK(changed("30-39", "30:39").find("line 3: expected ranges") != std::string::npos);
  CHECK(changed("9-d,20-20", "20-20,9-d").find("line 4: expected ranges of characters that ascend") !=
        std::string::npos);
  CHECK(error(good + "abc\n").find("line 262: expected a token's bytes") != std::string::npos);
  CHECK(error(good + "zz\n").find("line 262: expected a token's bytes") != std::string::npos);
  CHECK(error(good + "6162\n").find("line 262: token 6162 is there a second time") != std::string::npos);
  CHECK(changed("\n41\n", "\n4141\n").find("byte 65 is no token") != std::string::npos);
  REQUIRE(mkfifo((folder.path / "pipe").c_str(), 0600) == 0);
  CHECK(error_of([&] { Vocabulary vocabulary((folder.path / "pipe").string()); }).find("pipe: is a pipe") !=
        std::string::npos);
}

TEST_CASE("text codec: prompts of bytes, numbers and text; what does not fit the model is refused") {
  using Tokens = std::vector<int32_t>;
  const TextCodec bytes(256, ""), numbers(50257, "");
  CHECK(bytes.tokens("\xff a") == Tokens{255, ' ', 'a'});
  CHECK(bytes.tokens("") == Tokens{'\n'});
  CHECK(bytes.text(0) == std::string(1, '\0'));
  CHECK(numbers.tokens("5, 50256\n7") == Tokens{5, 50256, 7});
  CHECK(numbers.tokens("") == Tokens{kEndOfText});
  CHECK(numbers.text(17) == "17 ");
  for (const std::string word : {"50257", "-1", "Once", "3x"}) {
    CAPTURE(word);
    CHECK(error_of([&] { numbers.tokens("5 " + word); }).find("-prompt '" + word + "'") == 0);
  }
  CHECK(TextCodec(320, "", 7).tokens("") == Tokens{7});
  for (int start : {-1, 320, kEndOfText})
    CHECK(error_of([&] { TextCodec(320, "", start).tokens(""); }) ==
          "-prompt '': this model's vocabulary of 320 has no token " + std::to_string(start) +
              " to begin with; give token ids, or -separator");
  const std::string path = "gdn/tests/golden/bpe_vocabulary.txt";
  const Vocabulary vocabulary(path);
  const TextCodec text(vocabulary.size(), path);
  Tokens expected = vocabulary.encode("Hello, world!");
  expected.insert(expected.begin(), vocabulary.end_of_text());
  CHECK(text.tokens("Hello, world!") == expected);
  CHECK(text.tokens("") == Tokens{vocabulary.end_of_text()});
  CHECK(error_of([&] { TextCodec(256, path); }).find("-vocab " + path + ": this model reads bytes") == 0);
  CHECK(error_of([&] { TextCodec(50257, path); })
            .find("-vocab " + path + ": has " + std::to_string(vocabulary.size()) +
                  " tokens with the end of text, the model 50257") == 0);
}

// ---- sampling

// The probabilities that sampling means, by its definition: tokens are taken one at a time, the most probable
// first.
inline std::map<int, double> expected_probabilities(const std::vector<float>& logits, int vocab,
                                                    const Sampling& sampling) {
  std::vector<double> p(vocab);
  double total = 0;
  for (int v = 0; v < vocab; v++) total += p[v] = std::exp(double(logits[v]) / sampling.temperature);
  const auto best = [&](const std::set<int>& from) {
    int best = *from.begin();
    for (int v : from)
      if (p[v] > p[best]) best = v;
    return best;
  };
  std::set<int> rest, candidates;
  for (int v = 0; v < vocab; v++) rest.insert(v);
  for (int k = 0; k < (sampling.top_k ? int(sampling.top_k) : vocab) && !rest.empty(); k++) {
    candidates.insert(best(rest));
    rest.erase(best(rest));
  }
  double candidate_sum = 0, sum = 0;
  for (int v : candidates) candidate_sum += p[v];
  std::map<int, double> kept;
  while (!candidates.empty() && (kept.empty() || sum < sampling.top_p * candidate_sum * (1 - 1e-12))) {
    const int v = best(candidates);
    candidates.erase(v);
    sum += kept[v] = p[v];
  }
  for (auto& [v, probability] : kept) probability /= sum;
  return kept;
}

TEST_CASE("sampling: temperature, top-k and top-p give the probabilities of their definition") {
  constexpr int kVocab = 23, kGrid = 40000;
  std::vector<float> logits(kVocab + 3, 1e6f);  // what is past the vocabulary is never drawn
  for (int v = 0; v < kVocab; v++) logits[v] = float(2 * random_normal(71, uint64_t(v)));
  logits[5] = logits[11] = logits[2];  // ties
  for (double temperature : {0.3, 1.0, 2.5})
    for (int64_t top_k : {0, 1, 3, 8, 23, 100})
      for (double top_p : {1.0, 0.9, 0.5, 1e-9, 0.0}) {
        const Sampling sampling{temperature, top_k, top_p, 1};
        CAPTURE(temperature);
        CAPTURE(top_k);
        CAPTURE(top_p);
        const auto expected = expected_probabilities(logits, kVocab, sampling);
        std::map<int, int> counts;
        for (int i = 0; i < kGrid; i++)
          counts[sample_token(logits.data(), kVocab, sampling, (i + 0.5) / kGrid)]++;
        for (const auto& drawn : counts) {
          CAPTURE(drawn.first);
          CHECK(expected.count(drawn.first) == 1);
        }
        for (const auto& token : expected) {  // each has one interval of the grid
          CAPTURE(token.first);
          CHECK(std::abs(counts[token.first] - token.second * kGrid) <= 1.01);
        }
      }
}

TEST_CASE("sampling: temperature 0 is greedy, the lower token on ties; a small one tends to it") {
  const std::vector<float> logits = {0, 3, 7, 7, -2, 100};
  for (double uniform : {1e-9, 0.5, 1 - 1e-9}) {
    CHECK(sample_token(logits.data(), 5, {0, 0, 1, 1}, uniform) == 2);
    CHECK(sample_token(logits.data(), 5, {0, 4, 0.5, 1}, uniform) == 2);
    CHECK(sample_token(logits.data(), 2, {1e-300, 0, 1, 1}, uniform) == 1);
    CHECK(sample_token(logits.data(), 5, {1, 1, 1, 1}, uniform) == 2);
  }
}

TEST_CASE("sampling: logits that are not numbers draw nothing") {
  for (float bad : {NAN, INFINITY})
    for (size_t place : {0, 1, 3}) {
      std::vector<float> logits = {0, 3, 7, 1};
      logits[place] = bad;
      for (double temperature : {0.0, 1.0})
        CHECK(error_of([&] {
                sample_token(logits.data(), 4, {temperature, 0, 1, 1}, 0.5);
              }) == "the model's logits are not finite: no token can be drawn");
    }
}

TEST_CASE("generate: a prompt's tokens are among the rows of the table") {
  Cpu<float> dev;
  Parameters<Cpu<float>> parameters(dev, make_config(32, 32, 1, 2, 0, 2, 320, Parametrization::mup));
  parameters.initialize(1);
  for (int32_t token : {-1, 320, kEndOfText})
    CHECK(error_of([&] {
            generate<Cpu<float>>(
                parameters, {1, token}, 2, {}, kNoSeparator, [](int) {}, [] { return false; });
          }) == "-prompt: token " + std::to_string(token) + ", expected 0 to 319");
}

TEST_CASE("generate: tokens depend on the seed alone; memory not on how many there are") {
  Cpu<float> dev;
  Parameters<Cpu<float>> p(dev, small_config(2, 0));
  scatter(p, 31);
  const auto tokens = [&](const Sampling& sampling, int count, int prompt) {
    std::vector<int> tokens;
    const auto prompts = random_batch(1, prompt, p.config.vocab, 32).tokens;
    generate<Cpu<float>>(
        p, prompts, count, sampling, kNoSeparator, [&](int token) { tokens.push_back(token); },
        [] { return false; });
    return tokens;
  };
  const Sampling one{1, 20, 0.95, 1}, two{1, 20, 0.95, 2};
  CHECK(tokens(one, 60, 5) == tokens(one, 60, 5));
  CHECK(tokens(one, 60, 5) != tokens(two, 60, 5));
  CHECK(tokens({0, 0, 1, 1}, 60, 5) == tokens({0, 0, 1, 2}, 60, 5));
  std::vector<std::map<std::string, size_t>> allocated;
  for (const auto& [count, prompt] : std::vector<std::pair<int, int>>{{1, 1}, {500, 300}}) {
    dev.allocated.clear();
    REQUIRE(int(tokens(one, count, prompt).size()) == count);
    allocated.push_back(dev.allocated);
  }
  CHECK(allocated[0] == allocated[1]);
}

// ---- logits

// Numbers less their mean: logits and losses of all targets say the same up to one number.
inline std::vector<double> centred(std::vector<double> x) {
  double mean = 0;
  for (double v : x) mean += v / double(x.size());
  for (double& v : x) v -= mean;
  return x;
}

// Logits after `length` tokens in the training forward, centred: minus the losses of all targets of the last
// row.
template <class Device>
std::vector<double> training_logits(Model<Device>& model, const std::vector<int32_t>& tokens, int length,
                                    int vocab) {
  std::vector<int32_t> targets(length, -1);
  std::vector<double> logits;
  for (int v = 0; v < vocab; v++) {
    targets.back() = v;
    model.forward_loss(tokens.data(), targets.data(), 1, length);
    logits.push_back(-model.loss_sum());
  }
  return centred(logits);
}

// The relative error of the logits that generate() draws from against the training forward's: after prompts
// of each length, and after five more tokens one at a time.
template <class Device>
void check_logits(Parameters<Device>& p, double tolerance, int separator = kNoSeparator) {
  constexpr int kAfter = 5;
  const int vocab = p.config.vocab;
  const std::vector<int> prompts = {1, 3, 4, 63, 64, 65, 200};
  const auto tokens = random_batch(1, prompts.back() + kAfter, vocab, 41).tokens;
  Model<Device> training(p, 1, int(tokens.size()), Use::training, Recompute::nothing, separator);
  Model<Device> model(p, 1, kPromptPiece, Use::inference, Recompute::nothing, separator);
  std::vector<typename Device::real> logits;
  for (int prompt : prompts) {
    RecurrentState<Device> state(p.dev, p.config, 1);
    feed(model, {tokens.begin(), tokens.begin() + prompt}, state, logits);
    for (int length = prompt;; length++) {
      CAPTURE(prompt);
      CAPTURE(length);
      if (length == prompt || length == prompt + kAfter) {
        const auto expected = training_logits(training, tokens, length, vocab);
        const auto generated = centred({logits.begin(), logits.begin() + vocab});
        CHECK(relative_error(generated.data(), expected.data(), size_t(vocab)) <= tolerance);
      }
      if (length == prompt + kAfter) break;
      feed(model, {tokens[size_t(length)]}, state, logits);
    }
  }
}

TEST_CASE("generate: the training forward's logits, at any prompt length (CPU)") {
  for (const ModelConfig& config : {small_config(2, 0), small_config(0, 8)}) {
    Cpu<float> dev;
    Parameters<Cpu<float>> p(dev, config);
    scatter(p, 42);
    check_logits(p, 2e-5);
    check_logits(p, 2e-5, random_batch(1, 4, config.vocab, 41).tokens[2]);  // documents begin inside
  }
}

TEST_CASE("generate: the training forward's logits, at any prompt length (CUDA)" * needs_gpu()) {
#ifdef GDN_CUDA
  Cuda dev;
  Parameters<Cuda> p(dev, make_config(256, 128, 2, 4, 0, 2, 256, Parametrization::mup));
  scatter(p, 43);
  check_logits(p, 4 * 0x1p-8);  // four roundings to bf16
#endif
}

// ---- the program

TEST_CASE(
    "program: text in and out of a model of GPT-2's tokens; a vocabulary that does not fit is refused") {
  Folder folder;
  std::vector<std::string> pairs;
  for (int i = 0; i < 50000; i++) pairs.push_back({char(i / 250), char(i % 250)});
  const std::string file = vocabulary_file(pairs);
  write_file(folder.path / "vocab.txt", file);
  write_file(folder.path / "short.txt", file.substr(0, file.size() - 5));
  std::vector<uint16_t> tokens(200);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = uint16_t(i * 250);
  write_file(folder.path / "s.bin", shard(tokens));
  const std::string tiny = "-d cpu -w 32 -heads 3 -L 1 -T 32 -B 2 -v 0 -i s.bin ";
  const auto trained = run(folder, tiny + "-n 1 -s 1 -vocab vocab.txt -prompt 'the cat' -o out");
  REQUIRE(trained.code == 0);
  CHECK(trained.out.find("sample after step 1:\nthe cat") != std::string::npos);
  const auto text = [&](const std::string& options) {
    const auto outcome = run(folder, "-d cpu -load out -gen 20 " + options);
    CHECK(outcome.code == 0);
    return outcome.out;
  };
  const std::string once = text("-vocab vocab.txt -prompt 'Once there'");
  CHECK(once.rfind("Once there", 0) == 0);
  CHECK(once == text("-vocab vocab.txt -prompt 'Once there'"));
  CHECK(once != text("-vocab vocab.txt -prompt 'Once there' -seed 9"));
  const std::string greedy = text("-vocab vocab.txt -temperature 0");
  CHECK(greedy == text("-vocab vocab.txt -temperature 0 -seed 9"));
  CHECK(greedy == text("-vocab vocab.txt -top_k 1 -seed 3"));
  CHECK(greedy == text("-vocab vocab.txt -top_p 0 -temperature 2"));
  // The same tokens by their numbers: what -vocab shows is the text of these.
  const Vocabulary vocabulary((folder.path / "vocab.txt").string());
  CHECK(greedy == text("-temperature 0"));  // the training's vocabulary
  std::istringstream numbers(text("-temperature 0 -vocab ''"));
  std::vector<int32_t> ids;
  for (int32_t id; numbers >> id;) ids.push_back(id);
  CHECK(greedy == decoded(vocabulary, ids) + "\n");
  std::filesystem::rename(folder.path / "vocab.txt", folder.path / "moved.txt");
  CHECK(text("-temperature 0") == text("-temperature 0 -vocab ''"));  // which is no longer there
  for (const auto& bad :
       std::vector<std::pair<std::string, std::string>>{{"-vocab nowhere.txt", "nowhere.txt"},
                                                        {"-vocab s.bin", "s.bin: line 1"},
                                                        {"-vocab short.txt", "-vocab short.txt: has 50256"},
                                                        {"-temperature -1", "-temperature '-1'"},
                                                        {"-top_p 1.5", "-top_p '1.5'"},
                                                        {"-top_k -1", "-top_k '-1'"},
                                                        {"-vocab '' -prompt '50257'", "-prompt '50257'"}}) {
    CAPTURE(bad.first);
    const auto outcome = run(folder, "-d cpu -load out -gen 5 " + bad.first);
    CHECK(outcome.code == 1);
    CHECK(std::count(outcome.err.begin(), outcome.err.end(), '\n') == 1);
    CHECK(outcome.err.find(bad.second) != std::string::npos);
  }
}

}  // namespace
