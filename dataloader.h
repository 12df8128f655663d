// Batches of token sequences from three sources: token shards, raw text files (gdn/token_file.h) and a
// built-in corpus of stories generated from a seed (gdn/stories.h).
//
// A source is cut into sequences of T inputs and T targets shifted by one: sequence i of a file covers its
// tokens [iT, iT + T], so a file of n tokens holds (n - 1) / T sequences and drops the tail. The loader
// numbers the sequences it hands out p = 0, 1, 2, ...; with N sequences in all, epoch e = p / N visits them
// in the order of a pseudo-random permutation of [0, N) keyed by (seed, e). The permutation is computed
// element by element, so p is the whole state. Row j of global batch s is p = s B + j, whatever the number of
// ranks; rank r of R reads rows [r B / R, (r + 1) B / R).
//
// Errors are std::runtime_error with one line: the file, the value seen, what was expected. A file that
// shrinks, changes or is deleted fails the next read of it (gdn/regular_file.h says what a change is).
#pragma once

#include <glob.h>
#include <sys/stat.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "gdn/random.h"
#include "gdn/stories.h"
#include "gdn/token_file.h"

namespace gdn {

namespace data {

// Whether the name is a file's, or something else's that opening it will refuse.
inline bool exists(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0;
}

// Files that match one glob pattern, sorted by name; none where nothing does.
inline std::vector<std::string> glob_paths(const std::string& pattern) {
  glob_t matches;
  int status = glob(pattern.c_str(), 0, nullptr, &matches);
  std::vector<std::string> paths;
  if (status == 0) paths.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
  globfree(&matches);
  return paths;
}

inline std::string without_blanks_around(const std::string& text) {
  const size_t first = text.find_first_not_of(' ');
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(' ') + 1 - first);
}

// The files that a name or glob pattern means: the file of that name, else what matches; either without the
// blanks around it where there is none with them.
inline std::vector<std::string> matching_files(const std::string& pattern) {
  for (const std::string& text : {pattern, without_blanks_around(pattern)}) {
    if (exists(text)) return {text};
    if (const std::vector<std::string> paths = glob_paths(text); !paths.empty()) return paths;
  }
  return {};
}

// The files of a list of names and glob patterns with commas. A name that is a file's is that file, whatever
// brackets, commas or blanks it has: of the ways to read the next name the longest that is a file counts;
// else the next pattern ends at the first comma at which something matches. Throws where nothing does.
inline std::vector<std::string> list_files(const std::string& list) {
  std::vector<std::string> files;
  for (size_t begin = 0, taken = 0; begin <= list.size(); begin = taken + 1) {
    std::vector<size_t> ends;  // the commas at which the next name may end
    for (size_t end = begin; end <= list.size() && end - begin < PATH_MAX; ++end) {
      if (end == list.size() || list[end] == ',') ends.push_back(end);
    }
    const auto text_to = [&](size_t end) { return list.substr(begin, end - begin); };
    std::vector<std::string> found;
    for (auto end = ends.rbegin(); end != ends.rend() && found.empty(); ++end) {
      const std::string name = text_to(taken = *end);
      if (exists(name) || exists(without_blanks_around(name))) found = matching_files(name);
    }
    for (auto end = ends.begin(); end != ends.end() && found.empty(); ++end) {
      found = matching_files(text_to(taken = *end));
    }
    if (found.empty()) fail("data: no file matches '" + text_to(ends.empty() ? list.size() : ends[0]) + "'");
    files.insert(files.end(), found.begin(), found.end());
  }
  return files;
}

}  // namespace data

// Where tokens come from: the built-in corpus, or a set of files of one kind.
class TokenSource {
 public:
  // spec: "" for the built-in corpus, otherwise names and glob patterns separated by commas (list_files).
  // seed and split choose the built-in stories and do not touch files. vocabulary: that of the shards where
  // it is not their format's, else 0. Fails if a pattern matches nothing, the files are of several kinds, or
  // a file is unreadable, empty or malformed.
  explicit TokenSource(const std::string& spec, uint64_t seed = 0, Split split = Split::train,
                       int vocabulary = 0)
      : spec_(spec), seed_(seed), split_(split) {
    if (is_builtin()) {
      if (vocabulary)
        data::fail("-vocab_size " + std::to_string(vocabulary) + ": the built-in stories are bytes");
      return;
    }
    for (const std::string& path : data::list_files(spec)) {
      files_.push_back(data::open_tokens(path, vocabulary, files_.size() < kKeptOpen));
      const data::TokenFile &first = files_[0], &last = files_.back();
      if (first.is_bytes() != last.is_bytes())
        data::fail("data: '" + first.path() + "' and '" + path +
                   "' mix token shards and raw text, expected one kind");
      if (first.vocabulary != last.vocabulary)
        data::fail("data: '" + first.path() + "' has a vocabulary of " + std::to_string(first.vocabulary) +
                   ", '" + path + "' one of " + std::to_string(last.vocabulary) + ", expected the same");
    }
  }

  bool is_builtin() const { return spec_.empty(); }
  bool is_bytes() const { return is_builtin() || files_[0].is_bytes(); }
  int vocab_size() const { return is_builtin() ? data::kByteVocabulary : files_[0].vocabulary; }
  // The token that begins a document, -1 where it is not known.
  int separator() const { return is_builtin() ? -1 : files_[0].separator; }

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

  // None when built-in.
  const std::vector<data::TokenFile>& files() const { return files_; }

  // Tokens over all files; 0 when built-in.
  int64_t tokens() const {
    int64_t sum = 0;
    for (const data::TokenFile& file : files_) sum += file.tokens;
    return sum;
  }

  // One line where more than a tenth of the tokens is in no sequence, "" otherwise.
  std::string dropped(int seq_len) const {
    if (is_builtin()) return "";
    const int64_t all = tokens(), left = all - sequences(seq_len) * seq_len - int64_t(files_.size());
    if (left * 10 <= all) return "";
    return "data: '" + spec_ + "': " + std::to_string(left) + " of " + std::to_string(all) + " tokens in " +
           std::to_string(files_.size()) +
           " file(s) are never read: a file's last ones that do not fill a sequence of " +
           std::to_string(seq_len) + "; join the files into one, or lower -T";
  }

  // Throws unless some document begins with the token `separator`: with none, masking documents does nothing.
  // Reads up to the first one.
  void require_separator(int separator) const {
    constexpr int64_t kPiece = int64_t{1} << 20;
    for (const data::TokenFile& file : files_) {
      for (int64_t first = 0; first < file.tokens; first += kPiece) {
        const int64_t count = std::min(kPiece, file.tokens - first);
        const std::vector<int32_t> tokens = data::read_tokens(file, first, count);
        if (std::count(tokens.begin(), tokens.end(), separator)) return;
      }
    }
    data::fail("-mask_docs: none of the " + std::to_string(tokens()) + " tokens of '" + spec_ + "' is " +
               std::to_string(separator) + ", expected it at the start of every document (-separator)");
  }

  // Sequence `index` of file `file`, both in range: writes inputs and targets, [seq_len] int32 each. Returns
  // the entropy floor of the targets, the mean of -log p in nats per token, or NaN for files, whose p is not
  // known. Fails if a token is not in the vocabulary, or the file is not as it was when it was opened.
  double read(size_t file, int64_t index, int seq_len, int32_t* inputs, int32_t* targets) const {
    if (is_builtin()) return read_stories(index, seq_len, inputs, targets);
    const std::vector<int32_t> tokens =
        data::read_tokens(files_[file], index * seq_len, int64_t{seq_len} + 1);
    std::copy_n(tokens.begin(), seq_len, inputs);
    std::copy_n(tokens.begin() + 1, seq_len, targets);
    return std::numeric_limits<double>::quiet_NaN();
  }

 private:
  static constexpr size_t kKeptOpen = 400;  // a process may have 1024 files open by default

  double read_stories(int64_t index, int seq_len, int32_t* inputs, int32_t* targets) const {
    stories::Writer writer = stories::sequence(seed_, split_, index);
    const size_t length = static_cast<size_t>(seq_len) + 1;
    writer.text.reserve(length + 256);
    writer.nats.reserve(length + 256);
    while (writer.text.size() < length) writer.sentence();
    double sum = 0.0;
    for (size_t t = 0; t + 1 < length; ++t) {
      inputs[t] = static_cast<unsigned char>(writer.text[t]);
      targets[t] = static_cast<unsigned char>(writer.text[t + 1]);
      sum += writer.nats[t + 1];
    }
    return sum / seq_len;
  }

  std::string spec_;
  uint64_t seed_;
  Split split_;
  std::vector<data::TokenFile> files_;
};

// Draws batches from a source in shuffled order, for one rank of several.
class DataLoader {
 public:
  // spec, split, vocabulary: see TokenSource; seed keys the order and the built-in stories. seq_len: tokens
  // in a sequence, T; global_batch: sequences in a batch over all ranks, B. Fails as TokenSource does, if T,
  // B or the ranks are out of range, if ranks does not divide B, or if no file holds one sequence.
  DataLoader(const std::string& spec, int seq_len, int64_t global_batch, uint64_t seed, int rank = 0,
             int ranks = 1, Split split = Split::train, int vocabulary = 0)
      : source_(spec, seed, split, vocabulary),
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
