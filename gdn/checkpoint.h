// Checkpoints: folders OUT/step_00001000 that hold
//
//   model.safetensors            the weights
//   training_state.safetensors   what else training goes on from (moments)
//   config.json                  the model's configuration
//   checkpoint.json              written last: the step, the caller's counters, size and XXH64 of the other
//                                files, and at its end an XXH64 of its own text
//
// A checkpoint is complete or not there, whenever the program or the machine stops: it is written to
// step_00001000.tmp, every file and the folder are fsynced, and a rename makes it visible. One that replaces
// a checkpoint of the same step first renames that to step_00001000.old, which counts as the checkpoint of
// its step until the new one is in place. Folders named .tmp never count. One process at a time may save to
// a folder.
//
// A folder with config.json and model.safetensors alone, as Hugging Face writes them, or with the latter in
// several files and model.safetensors.index.json, opens as well: its weights can be read, training cannot go
// on from it.
//
// Errors are std::runtime_error with one line: the file, the value seen and what was expected.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"
#include "safetensors.h"

namespace gdn {

struct CheckpointContents {
  int64_t step = 0;
  std::vector<TensorSource> model, training_state;
  Json config, counters;                        // counters: whatever the caller wants back
  std::map<std::string, std::string> metadata;  // of both safetensors files
};

struct Checkpoint {
  std::string path;
  Json config, counters;
  SafetensorsFile model, training_state;
  bool has_training_state = false;  // false: a folder of weights; counters are null, training_state is empty
};

// Deletes the checkpoints up to this step but for the newest `keep` of them (keep <= 0: all stay), passing over
// damaged ones and those whose name is not their step.
void delete_older_checkpoints(const std::string& out_dir, int64_t step, int keep);

// Writes OUT/step_XXXXXXXX, makes OUT where it is missing, and returns the checkpoint's path. A checkpoint of
// the same step is replaced. Afterwards deletes checkpoints older than this one until `keep` are left, this
// one included (keep <= 0: all stay), passing over damaged ones, and what killed runs left behind; what
// cannot be deleted stays for the next save. Throws when the checkpoint could not be written: its .tmp is
// then removed, and earlier checkpoints are as they were.
std::string save_checkpoint(const std::string& out_dir, const CheckpointContents& contents, int keep);

// The path of the newest complete checkpoint in a folder, "" if there is none. Reads all of it. Newer ones
// that are damaged are passed over, each with one line to `warn` that says what is wrong.
std::string find_newest_checkpoint(const std::string& out_dir,
                                   const std::function<void(const std::string&)>& warn);

// Opens a checkpoint, verifying every byte, or a folder of weights. Throws when it is neither or is damaged.
Checkpoint open_checkpoint(const std::string& path);

// ---------------------------------------------------------------------------------------------------------

namespace checkpoints {

namespace fs = std::filesystem;

constexpr char kModel[] = "model.safetensors";
constexpr char kTrainingState[] = "training_state.safetensors";
constexpr char kConfig[] = "config.json";
constexpr const char* kFiles[] = {kModel, kTrainingState, kConfig};
constexpr char kManifest[] = "checkpoint.json";
constexpr char kFormat[] = "train_gdn checkpoint";
constexpr int64_t kVersion = 1;

// The manifest's text ends with kChecksumLabel, 16 hexadecimal digits and kManifestEnd. The digits are XXH64
// of the text with zeros in their place.
constexpr char kChecksumLabel[] = "\"xxh64\": \"";
constexpr char kManifestEnd[] = "\"\n}\n";
constexpr size_t kChecksumDigits = 16;

inline std::string checksum_text(uint64_t checksum) {
  char text[kChecksumDigits + 1];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(checksum));
  return text;
}

inline Json to_json(const FileDigest& digest) {
  return Json::Object{{"size", int64_t(digest.size)}, {"xxh64", checksum_text(digest.checksum)}};
}

// The text with its checksum filled in.
inline std::string sealed(std::string text) {
  const size_t position = text.size() - std::strlen(kManifestEnd) - kChecksumDigits;
  text.replace(position, kChecksumDigits, kChecksumDigits, '0');
  safetensors::Xxh64 hash;
  hash.update(text.data(), text.size());
  return text.replace(position, kChecksumDigits, checksum_text(hash.digest()));
}

inline std::string manifest_text(const CheckpointContents& contents, Json files) {
  const Json manifest =
      Json::Object{{"format", kFormat},         {"version", kVersion},
                   {"step", contents.step},     {"counters", contents.counters},
                   {"files", std::move(files)}, {"xxh64", std::string(kChecksumDigits, '0')}};
  return sealed(json_text(manifest, true) + "\n");
}

// The manifest in a folder. Throws when it is missing, changed in any byte, or of another format.
inline Json read_manifest(const std::string& folder) {
  const std::string path = folder + "/" + kManifest;
  const std::string text = read_text_file(path);
  const Json manifest = parse_json(text, path);
  const size_t tail = std::strlen(kChecksumLabel) + kChecksumDigits + std::strlen(kManifestEnd);
  if (text.size() < tail ||
      text.compare(text.size() - tail, std::strlen(kChecksumLabel), kChecksumLabel) != 0 ||
      text != sealed(text))
    safetensors::fail(path, "the checksum at its end does not match, expected that of its text");
  try {
    if (manifest.string("format") != kFormat || manifest.integer("version") != kVersion)
      throw std::runtime_error("format " + json_text(manifest.at("format")) + " version " +
                               json_text(manifest.at("version")) + ", expected \"" + kFormat + "\" version " +
                               std::to_string(kVersion));
    manifest.at("counters");
    for (const char* name : kFiles) manifest.at("files").at(name);
  } catch (const std::runtime_error& e) {
    safetensors::fail(path, e.what());
  }
  return manifest;
}

// Throws unless the file has the size and checksum of its entry in the manifest.
inline void verify_file(const std::string& folder, const char* name, const Json& manifest) {
  const std::string path = folder + "/" + name;
  const Json expected = manifest.at("files").at(name);
  const Json found = to_json(digest_file(path));
  if (found != expected)
    safetensors::fail(path, json_text(found) + ", expected " + json_text(expected) + " by " + kManifest);
}

// What a folder of OUT is by its name: step_X, step_X.old, or step_X.tmp and step_X.old.tmp.
enum class Kind { checkpoint, replaced, temporary };

struct Folder {
  int64_t step;
  Kind kind;
  std::string path;
};

inline std::string step_path(const std::string& out_dir, int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "/step_%08lld", static_cast<long long>(step));
  return out_dir + name;
}

// Takes `end` off the end of the text; false where it ends otherwise.
inline bool take_end(std::string& text, const std::string& end) {
  if (text.size() < end.size() || text.compare(text.size() - end.size(), end.size(), end) != 0) return false;
  text.resize(text.size() - end.size());
  return true;
}

// The folder that a path names; nothing for names that are not ours.
inline std::optional<Folder> parse_path(const std::string& out_dir, const std::string& path) {
  std::string stem = path;
  const bool temporary = take_end(stem, ".tmp"), replaced = take_end(stem, ".old");
  const std::string prefix = out_dir + "/step_";
  if (stem.compare(0, prefix.size(), prefix) != 0) return {};
  const int64_t step = std::strtoll(stem.c_str() + prefix.size(), nullptr, 10);
  if (step < 0 || stem != step_path(out_dir, step)) return {};
  return Folder{step, temporary ? Kind::temporary : replaced ? Kind::replaced : Kind::checkpoint, path};
}

// Our folders in OUT, the newest first and a replaced checkpoint after what replaces it; none where OUT does
// not exist. Throws when OUT cannot be read.
inline std::vector<Folder> list_folders(const std::string& out_dir) {
  std::vector<Folder> folders;
  std::error_code error;
  fs::directory_iterator entry(out_dir, error);
  if (error == std::errc::no_such_file_or_directory) return folders;
  for (; !error && entry != fs::directory_iterator(); entry.increment(error))
    if (const auto folder = parse_path(out_dir, out_dir + "/" + entry->path().filename().string()))
      folders.push_back(*folder);
  if (error) safetensors::fail(out_dir, "cannot list: " + error.message());
  std::sort(folders.begin(), folders.end(), [](const Folder& a, const Folder& b) {
    return a.step != b.step ? a.step > b.step : a.kind < b.kind;
  });
  return folders;
}

// Throws when what the folder lists did not reach the disk; file systems that cannot sync folders say EINVAL.
inline void sync_folder(const std::string& path) {
  const safetensors::OpenFile folder(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fsync(folder.descriptor) != 0 && errno != EINVAL) safetensors::fail_errno(path, "sync");
}

inline void rename_folder(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0)
    safetensors::fail(from, "cannot rename to " + to + ": " + std::strerror(errno));
}

// Deletes a checkpoint's files and its folder, as far as that is possible; the folder stays where it holds
// anything else.
inline void remove_folder(const std::string& path) {
  for (const char* name : {kManifest, kModel, kTrainingState, kConfig}) unlink((path + "/" + name).c_str());
  rmdir(path.c_str());
}

// Throws where the folder holds anything but a checkpoint's files: this program did not write it.
inline void require_ours(const std::string& path) {
  std::error_code error;
  fs::directory_iterator entry(path, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name != kManifest && name != kModel && name != kTrainingState && name != kConfig)
      safetensors::fail(path,
                        "holds '" + name + "', which is not of a checkpoint; expected a name that is free");
  }
  if (error) safetensors::fail(path, "cannot list: " + error.message());
}

// Deletes a checkpoint, as far as that is possible, so that a kill on the way leaves a .tmp.
inline void discard(const std::string& path) {
  const std::string temporary = path + ".tmp";
  if (std::rename(path.c_str(), temporary.c_str()) == 0) remove_folder(temporary);
}

inline void write_files(const std::string& folder, const CheckpointContents& contents) {
  if (mkdir(folder.c_str(), 0777) != 0) safetensors::fail_errno(folder, "create");
  const std::string base = folder + "/";
  const FileDigest model = write_safetensors(base + kModel, contents.model, contents.metadata);
  const FileDigest state =
      write_safetensors(base + kTrainingState, contents.training_state, contents.metadata);
  const FileDigest config = write_text_file(base + kConfig, json_text(contents.config, true) + "\n");
  const Json files =
      Json::Object{{kModel, to_json(model)}, {kTrainingState, to_json(state)}, {kConfig, to_json(config)}};
  write_text_file(base + kManifest, manifest_text(contents, files));
  sync_folder(folder);
}

// Renames the .tmp of a checkpoint to its path, a checkpoint of that path to .old.
inline void publish(const std::string& path) {
  const std::string old = path + ".old";
  const bool replaces = path_exists(path);
  if (replaces) {
    require_ours(path);
    discard(old);
    rename_folder(path, old);
  }
  try {
    rename_folder(path + ".tmp", path);
  } catch (...) {
    if (replaces) rename_folder(old, path);
    throw;
  }
}

// Throws where a folder is not named for the step that its checkpoint holds.
inline void require_step(const Folder& folder, const Json& manifest) {
  if (manifest.integer("step") != folder.step)
    safetensors::fail(folder.path, "holds step " + std::to_string(manifest.integer("step")) +
                                       ", expected the step that its name says");
}

// Whether the manifest is right, of the step that the name says, and the files have the sizes that it says.
inline bool looks_complete(const Folder& found) try {
  const std::string& folder = found.path;
  const Json manifest = read_manifest(folder);
  require_step(found, manifest);
  for (const char* name : kFiles)
    if (int64_t(fs::file_size(folder + "/" + name)) != manifest.at("files").at(name).integer("size"))
      return false;
  return true;
} catch (const std::runtime_error&) {
  return false;
}

// Deletes what the checkpoint of this step makes superfluous.
inline void delete_older(const std::string& out_dir, int64_t step, int keep) {
  int kept = 0;
  for (const Folder& folder : list_folders(out_dir)) {
    if (folder.kind == Kind::temporary || folder.step > step) continue;
    const bool superseded = folder.kind == Kind::replaced && path_exists(step_path(out_dir, folder.step));
    if (superseded || (keep > 0 && looks_complete(folder) && ++kept > keep)) discard(folder.path);
  }
}

// Throws unless the folder holds a complete checkpoint.
inline Checkpoint open_complete(const std::string& path) {
  const Json manifest = read_manifest(path);
  for (const char* name : kFiles) verify_file(path, name, manifest);
  const std::string base = path + "/";
  return {path,
          read_json_file(base + kConfig),
          manifest.at("counters"),
          SafetensorsFile(base + kModel),
          SafetensorsFile(base + kTrainingState),
          true};
}

// The weights of a folder as Hugging Face writes them, in one file or, with an index, in several.
inline Checkpoint open_weights(const std::string& path) {
  const std::string base = path + "/", index = base + kModel + ".index.json";
  const bool sharded = !path_exists(base + kModel) && path_exists(index);
  if (!sharded && !path_exists(base + kModel) && path_exists(base + "pytorch_model.bin"))
    safetensors::fail(base + "pytorch_model.bin", std::string("PyTorch's format is not read, expected ") +
                                                      kModel +
                                                      " (save_pretrained with safe_serialization=True)");
  return {path, read_json_file(base + kConfig),
          {},   sharded ? SafetensorsFile::sharded(index) : SafetensorsFile(base + kModel),
          {},   false};
}

}  // namespace checkpoints

inline void delete_older_checkpoints(const std::string& out_dir, int64_t step, int keep) {
  checkpoints::delete_older(out_dir, step, keep);
}

inline std::string save_checkpoint(const std::string& out_dir, const CheckpointContents& contents, int keep) {
  const std::string path = checkpoints::step_path(out_dir, contents.step);
  if (contents.step < 0) safetensors::fail(path, "expected a step of at least 0");
  std::error_code error;
  std::filesystem::create_directories(out_dir, error);
  if (error) safetensors::fail(out_dir, "cannot create: " + error.message());
  for (const checkpoints::Folder& folder : checkpoints::list_folders(out_dir))
    if (folder.kind == checkpoints::Kind::temporary) checkpoints::remove_folder(folder.path);
  try {
    checkpoints::write_files(path + ".tmp", contents);
    checkpoints::publish(path);
  } catch (...) {
    checkpoints::remove_folder(path + ".tmp");
    throw;
  }
  checkpoints::sync_folder(out_dir);
  checkpoints::delete_older(out_dir, contents.step, keep);
  return path;
}

inline std::string find_newest_checkpoint(const std::string& out_dir,
                                          const std::function<void(const std::string&)>& warn) {
  for (const checkpoints::Folder& folder : checkpoints::list_folders(out_dir)) {
    if (folder.kind == checkpoints::Kind::temporary) continue;
    try {
      checkpoints::require_step(folder, checkpoints::read_manifest(folder.path));
      return checkpoints::open_complete(folder.path).path;
    } catch (const std::runtime_error& e) {
      warn("passing over a checkpoint: " + std::string(e.what()));
    }
  }
  return "";
}

inline Checkpoint open_checkpoint(const std::string& path) {
  if (!is_folder(path))
    safetensors::fail(path,
                      "no such folder, expected a checkpoint or one with config.json and model.safetensors");
  const bool weights_only = !path_exists(path + "/" + checkpoints::kManifest) &&
                            !path_exists(path + "/" + checkpoints::kTrainingState);
  return weights_only ? checkpoints::open_weights(path) : checkpoints::open_complete(path);
}

}  // namespace gdn
