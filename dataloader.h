// Batches of token sequences from three sources: token shards, raw text files and a built-in corpus.
//
// - shards: files ending in .bin, the format of llm.c and modded-nanogpt: 256 little-endian int32 (magic
//   20240520, version 1, token count, zeros), then uint16 GPT-2 tokens; vocabulary 50257.
// - raw text: all other files, one token per byte; vocabulary 256.
// - built-in: stories generated from a seed, one token per byte, each byte's probability known exactly
//   (gdn/stories.h).
//
// A source is cut into sequences of T inputs and T targets shifted by one: sequence i of a file covers its
// tokens [iT, iT + T], so a file of n tokens holds (n - 1) / T sequences and drops the tail. The loader
// numbers the sequences it hands out p = 0, 1, 2, ...; with N sequences in all, epoch e = p / N visits them
// in the order of a pseudo-random permutation of [0, N) keyed by (seed, e). The permutation is computed
// element by element, so p is the whole state. Row j of global batch s is p = s B + j, whatever the number of
// ranks; rank r of R reads rows [r B / R, (r + 1) B / R).
//
// Errors are std::runtime_error with one line: the file, the value seen, what was expected.
// Files are memory-mapped and read in the host's byte order, which is taken to be little-endian.
#pragma once

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "gdn/random.h"
#include "gdn/stories.h"

namespace gdn {

namespace data {

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

constexpr int32_t kShardMagic = 20240520, kShardVersion = 1;
constexpr int64_t kShardHeaderBytes = 256 * sizeof(int32_t);
constexpr int kShardVocabulary = 50257, kByteVocabulary = 256;

// A memory-mapped file of tokens; the mapping lives as long as the last copy.
struct TokenFile {
  std::string path;
  std::shared_ptr<const uint8_t> bytes;
  int64_t size = 0;    // bytes
  int64_t tokens = 0;  // tokens
};

inline bool is_shard(const std::string& path) {
  return path.size() >= 4 && path.compare(path.size() - 4, 4, ".bin") == 0;
}

// Maps a file for reading (tokens is left 0). Fails if it cannot be opened, is empty, or is not a regular
// file.
inline TokenFile map_file(const std::string& path) {
  struct Descriptor {
    int number;
    ~Descriptor() { close(number); }
  } descriptor{open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (descriptor.number < 0) fail(path + ": cannot open: " + std::strerror(errno));
  struct stat status;
  if (fstat(descriptor.number, &status) != 0) fail(path + ": cannot stat: " + std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail(path + ": not a regular file, expected a token shard or a text file");
  if (status.st_size == 0) fail(path + ": empty file, expected at least one token");
  size_t size = static_cast<size_t>(status.st_size);
  void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor.number, 0);
  if (address == MAP_FAILED) fail(path + ": cannot map: " + std::strerror(errno));
  TokenFile file;
  file.path = path;
  file.size = status.st_size;
  file.bytes.reset(static_cast<const uint8_t*>(address),
                   [address, size](const uint8_t*) { munmap(address, size); });
  return file;
}

// Checks a shard's header against the format and the file's size; returns the number of tokens.
inline int64_t shard_tokens(const TokenFile& file) {
  if (file.size < kShardHeaderBytes) {
    fail(file.path + ": " + std::to_string(file.size) + " bytes, shorter than the shard header of " +
         std::to_string(kShardHeaderBytes));
  }
  int32_t header[3];
  std::memcpy(header, file.bytes.get(), sizeof(header));
  const auto [magic, version, tokens] = header;
  if (magic != kShardMagic) {
    fail(file.path + ": magic number " + std::to_string(magic) + ", expected " + std::to_string(kShardMagic));
  }
  if (version != kShardVersion) {
    fail(file.path + ": shard version " + std::to_string(version) + ", expected " +
         std::to_string(kShardVersion));
  }
  int64_t expected_size = kShardHeaderBytes + int64_t{tokens} * static_cast<int64_t>(sizeof(uint16_t));
  if (file.size != expected_size) {
    fail(file.path + ": " + std::to_string(file.size) + " bytes, expected " + std::to_string(expected_size) +
         " for the " + std::to_string(tokens) + " tokens of its header");
  }
  if (tokens == 0) fail(file.path + ": empty shard (0 tokens), expected at least one token");
  return tokens;
}

inline TokenFile open_tokens(const std::string& path) {
  TokenFile file = map_file(path);
  file.tokens = is_shard(path) ? shard_tokens(file) : file.size;
  return file;
}

// Files that match one glob pattern, sorted by name. Fails if there are none.
inline std::vector<std::string> glob_paths(const std::string& pattern) {
  glob_t matches;
  int status = glob(pattern.c_str(), 0, nullptr, &matches);
  std::vector<std::string> paths;
  if (status == 0) paths.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
  globfree(&matches);
  if (paths.empty()) fail("data: no file matches '" + pattern + "'");
  return paths;
}

// The parts of a list separated by commas.
inline std::vector<std::string> split_commas(const std::string& list) {
  std::vector<std::string> parts(1);
  for (char c : list) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// Writes inputs[t] = tokens[t], targets[t] = tokens[t + 1] for t < length; returns the largest token seen.
template <typename Token>
int32_t copy_shifted(const Token* tokens, int length, int32_t* inputs, int32_t* targets) {
  Token largest = tokens[0];
  for (int t = 0; t < length; ++t) {
    inputs[t] = tokens[t];
    targets[t] = tokens[t + 1];
    largest = std::max(largest, tokens[t + 1]);
  }
  return largest;
}

}  // namespace data

// Where tokens come from: the built-in corpus, or a set of files of one kind.
class TokenSource {
 public:
  // spec: "" for the built-in corpus, otherwise glob patterns separated by commas (so no commas in file
  // names); files ending in .bin are shards, all others raw text. seed and split choose the built-in stories
  // and do not touch files. Fails if a pattern matches nothing, the files are of both kinds, or a file is
  // unreadable, empty or malformed.
  explicit TokenSource(const std::string& spec, uint64_t seed = 0, Split split = Split::train)
      : spec_(spec), seed_(seed), split_(split) {
    if (is_builtin()) return;
    for (const std::string& pattern : data::split_commas(spec)) {
      for (const std::string& path : data::glob_paths(pattern)) {
        if (!files_.empty() && data::is_shard(path) != data::is_shard(files_[0].path)) {
          data::fail("data: '" + files_[0].path + "' and '" + path +
                     "' mix token shards (.bin) and raw text, expected one kind");
        }
        files_.push_back(data::open_tokens(path));
      }
    }
  }

  bool is_builtin() const { return spec_.empty(); }
  bool is_bytes() const { return is_builtin() || !data::is_shard(files_[0].path); }
  int vocab_size() const { return is_bytes() ? data::kByteVocabulary : data::kShardVocabulary; }

  // Number of sequences of seq_len inputs: (tokens - 1) / seq_len summed over the files; 2^20 when built-in.
  int64_t sequences(int seq_len) const { return sequence_ends(seq_len).back(); }

  // ends[f] = sequences in files 0..f (the built-in corpus counts as one file).
  std::vector<int64_t> sequence_ends(int seq_len) const {
    if (is_builtin()) return {stories::kSequences};
    std::vector<int64_t> ends;
    for (const data::TokenFile& file : files_) {
      ends.push_back((ends.empty() ? 0 : ends.back()) + (file.tokens - 1) / seq_len);
    }
    return ends;
  }

  // Tokens over all files; 0 when built-in.
  int64_t tokens() const {
    int64_t sum = 0;
    for (const data::TokenFile& file : files_) sum += file.tokens;
    return sum;
  }

  // Sequence `index` of file `file`, both in range: writes inputs and targets, [seq_len] int32 each. Returns
  // the entropy floor of the targets, the mean of -log p in nats per token, or NaN for files, whose p is not
  // known. Fails if a token is not in the vocabulary.
  double read(size_t file, int64_t index, int seq_len, int32_t* inputs, int32_t* targets) const {
    if (is_builtin()) return read_stories(index, seq_len, inputs, targets);
    int64_t start = index * seq_len;
    const uint8_t* bytes = files_[file].bytes.get();
    if (is_bytes()) {
      data::copy_shifted(bytes + start, seq_len, inputs, targets);
    } else {
      auto* tokens = reinterpret_cast<const uint16_t*>(bytes + data::kShardHeaderBytes) + start;
      int32_t largest = data::copy_shifted(tokens, seq_len, inputs, targets);
      if (largest >= vocab_size()) fail_vocabulary(files_[file].path, start, tokens, seq_len);
    }
    return std::numeric_limits<double>::quiet_NaN();
  }

 private:
  double read_stories(int64_t index, int seq_len, int32_t* inputs, int32_t* targets) const {
    stories::Writer writer = stories::sequence(seed_, split_, index);
    const size_t length = static_cast<size_t>(seq_len) + 1;
    writer.text.reserve(length + 256);
    writer.nats.reserve(length + 256);
    while (writer.text.size() < length) writer.sentence();
    data::copy_shifted(reinterpret_cast<const uint8_t*>(writer.text.data()), seq_len, inputs, targets);
    double sum = 0.0;
    for (size_t t = 1; t < length; ++t) sum += writer.nats[t];
    return sum / seq_len;
  }

  [[noreturn]] void fail_vocabulary(const std::string& path, int64_t start, const uint16_t* tokens,
                                    int seq_len) const {
    auto outside = [this](uint16_t token) { return token >= vocab_size(); };
    const uint16_t* token = std::find_if(tokens, tokens + seq_len + 1, outside);
    data::fail(path + ": token " + std::to_string(start + (token - tokens)) + " is " +
               std::to_string(*token) + ", expected less than the vocabulary of " +
               std::to_string(vocab_size()));
  }

  std::string spec_;
  uint64_t seed_;
  Split split_;
  std::vector<data::TokenFile> files_;
};

// Draws batches from a source in shuffled order, for one rank of several.
class DataLoader {
 public:
  // spec, split: see TokenSource; seed keys the order and the built-in stories. seq_len: tokens in a
  // sequence, T; global_batch: sequences in a batch over all ranks, B. Fails as TokenSource does, if T, B or
  // the ranks are out of range, if ranks does not divide B, or if no file holds one sequence.
  DataLoader(const std::string& spec, int seq_len, int64_t global_batch, uint64_t seed, int rank = 0,
             int ranks = 1, Split split = Split::train)
      : source_(spec, seed, split),
        seq_len_(seq_len),
        global_batch_(global_batch),
        seed_(seed),
        rank_(rank),
        ranks_(ranks) {
    if (seq_len < 1) data::fail("data: sequence length " + std::to_string(seq_len) + ", expected at least 1");
    if (global_batch < 1) {
      data::fail("data: global batch " + std::to_string(global_batch) + ", expected at least 1");
    }
    if (ranks < 1 || rank < 0 || rank >= ranks) {
      data::fail("data: rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
                 ", expected 0 <= rank < ranks");
    }
    if (global_batch % ranks != 0) {
      data::fail("data: global batch " + std::to_string(global_batch) + " does not split over " +
                 std::to_string(ranks) + " ranks, expected a multiple");
    }
    sequence_ends_ = source_.sequence_ends(seq_len);
    if (sequences() == 0) {
      data::fail("data: '" + spec + "' has " + std::to_string(source_.tokens()) + " tokens in " +
                 std::to_string(sequence_ends_.size()) + " file(s), expected one of at least " +
                 std::to_string(int64_t{seq_len} + 1) + " tokens, one sequence");
    }
  }

  const TokenSource& source() const { return source_; }
  int64_t sequences() const { return sequence_ends_.back(); }
  int64_t local_batch() const { return global_batch_ / ranks_; }

  // Sequences handed out so far over all ranks: the whole state of the loader. seek() accepts any position.
  uint64_t position() const { return position_; }
  void seek(uint64_t position) { position_ = position; }
  int64_t epoch() const { return static_cast<int64_t>(position_ / static_cast<uint64_t>(sequences())); }

  // This rank's rows of the next global batch: writes inputs and targets, [local_batch, seq_len] int32 each,
  // and advances the position by the global batch. Returns the entropy floor, the mean of -log p over those
  // targets in nats per token (a global batch's is the mean over its ranks), NaN when the source is not
  // built-in. Fails if a token is not in the vocabulary; the position then stays.
  double next(int32_t* inputs, int32_t* targets) {
    double floor_sum = 0.0;
    for (int64_t row = 0; row < local_batch(); ++row) {
      uint64_t p = position_ + static_cast<uint64_t>(rank_ * local_batch() + row);
      floor_sum += read(shuffled(p), inputs + row * seq_len_, targets + row * seq_len_);
    }
    position_ += static_cast<uint64_t>(global_batch_);
    return floor_sum / static_cast<double>(local_batch());
  }

  // Sequence `index`, 0 <= index < sequences(), in file order: writes inputs and targets, [seq_len] int32
  // each, and returns their entropy floor as next() does. Fails if the index or a token is out of range.
  double read(int64_t index, int32_t* inputs, int32_t* targets) const {
    if (index < 0 || index >= sequences()) {
      data::fail("data: sequence " + std::to_string(index) + ", expected 0 <= sequence < " +
                 std::to_string(sequences()));
    }
    auto end = std::upper_bound(sequence_ends_.begin(), sequence_ends_.end(), index);
    int64_t first = end == sequence_ends_.begin() ? 0 : end[-1];
    size_t file = static_cast<size_t>(end - sequence_ends_.begin());
    return source_.read(file, index - first, seq_len_, inputs, targets);
  }

 private:
  // The sequence that position p visits.
  int64_t shuffled(uint64_t p) const {
    uint64_t n = static_cast<uint64_t>(sequences());
    uint64_t key = mix64(mix64(seed_) ^ (p / n));
    return static_cast<int64_t>(permuted(p % n, n, key));
  }

  TokenSource source_;
  int seq_len_;
  int64_t global_batch_;
  uint64_t seed_;
  int rank_;
  int ranks_;
  uint64_t position_ = 0;
  std::vector<int64_t> sequence_ends_;  // sequences in files 0..f
};

}  // namespace gdn
