// Where a run comes from: its data, and which program ran when and where. Kept in checkpoint.json and at the
// head of log.csv.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <ctime>
#include <string>
#include <vector>

#include "../dataloader.h"
#include "json.h"
#include "options.h"
#include "version.h"

namespace gdn {

inline Json files_record(const TokenSource& source) {
  Json::Array files;
  for (const data::TokenFile& file : source.files())
    files.push_back(Json::Object{{"file", file.path()}, {"bytes", int64_t(file.file->size())}});
  return files;
}

// What a run trains on: a resumed one compares it.
inline Json data_record(const Options& o, const TokenSource& train, const TokenSource* validation) {
  return Json::Object{
      {"-i", files_record(train)}, {"-j", validation ? files_record(*validation) : Json(Json::Array{})},
      {"-T", int64_t(o.seq_len)},  {"-B", int64_t(o.global_batch)},
      {"-seed", int64_t(o.seed)},  {"vocabulary", int64_t(train.vocab_size())}};
}

inline Json program_record() {
  char host[256] = "unknown", date[32] = "";
  gethostname(host, sizeof host - 1);
  const time_t now = std::time(nullptr);
  tm utc = {};
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
  return Json::Object{{"commit", commit()}, {"build", build_text()}, {"date", date}, {"host", host}};
}

// The names of a list of files, "the built-in stories" where there are none.
inline std::string files_text(const Json& files) {
  const auto& list = std::get<Json::Array>(files.value);
  if (list.empty()) return "the built-in stories";
  const auto text = [](const Json& file) {
    return file.string("file") + " (" + std::to_string(file.integer("bytes")) + " bytes)";
  };
  return text(list[0]) + (list.size() > 1 ? " and " + std::to_string(list.size() - 1) + " more" : "");
}

// One line: commit, date, host and data. record: "data" and "program".
inline std::string provenance_line(const Json::Object& record) {
  const Json &data = record[0].second, &program = record[1].second;
  std::string line = "train_gdn " + program.string("commit") + ", " + program.string("date") + ", on " +
                     program.string("host") + ", data " + files_text(data.at("-i"));
  for (char& c : line)
    if (c == '\n' || c == '\r') c = ' ';  // a file's name may hold them
  return line;
}

// A line for each thing in which the data are not those that the checkpoint's run had, with old and new.
inline std::vector<std::string> changes_of_data(const Json& before, const Json& now) {
  std::vector<std::string> lines;
  const auto different = [&](const std::string& what, const std::string& old, const std::string& is) {
    lines.push_back("-resume: " + what + " was " + old + ", is " + is);
  };
  for (const char* key : {"-T", "-B", "-seed", "vocabulary"})
    if (before.find(key) && before.at(key) != now.at(key))
      different(key, json_text(before.at(key)), json_text(now.at(key)));
  for (const char* key : {"-i", "-j"}) {
    if (!before.find(key) || before.at(key) == now.at(key)) continue;
    const auto& old = before.array(key);
    const auto& is = now.array(key);
    size_t first = 0;
    while (first < old.size() && first < is.size() && old[first] == is[first]) first++;
    const auto text = [&](const Json::Array& files) {
      return first < files.size()
                 ? files_text(Json::Array{files[first]}) + " of " + std::to_string(files.size()) + " file(s)"
             : files.empty() ? "the built-in stories"
                             : "nothing after " + std::to_string(files.size()) + " file(s)";
    };
    different(std::string(key) + ", file " + std::to_string(first + 1) + ",", text(old), text(is));
  }
  return lines;
}

// A word as a shell reads it.
inline std::string shell_word(const std::string& text) {
  if (text.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-") ==
      std::string::npos)
    return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

}  // namespace gdn
