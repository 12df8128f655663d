// Where a run goes on, and what it must not write over.
#pragma once

#include <cstdio>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>

#include "checkpoint.h"
#include "model_checkpoint.h"
#include "options.h"
#include "run_folder.h"
#include "terminal_text.h"

namespace gdn {

// Renames the checkpoints in a folder, none of which could be read, to step_X.damaged, with a line for each: a
// run that starts anew there would replace them as its own. What this program did not write stays as it is.
// Throws where one cannot be renamed.
inline void set_damaged_aside(const std::string& folder) {
  for (const checkpoints::Folder& found : checkpoints::list_folders(folder)) {
    if (found.kind == checkpoints::Kind::temporary) continue;
    if (!path_exists(found.path + "/" + checkpoints::kManifest) &&
        !path_exists(found.path + "/" + checkpoints::kModel))
      continue;
    std::string aside = found.path + ".damaged";
    for (int n = 2; path_exists(aside); n++) aside = found.path + ".damaged" + std::to_string(n);
    std::error_code error;
    std::filesystem::rename(found.path, aside, error);
    if (error)
      throw std::runtime_error("-resume auto: cannot rename " + found.path + ", which is damaged, to " +
                               aside + ": " + error.message());
    warn(found.path + " is kept as " + aside);
  }
}

// Where -resume goes on, its checkpoint open; nothing where -resume auto has nothing to go on from. Never
// starts anew by itself: throws one line where there is nothing whole.
inline std::unique_ptr<Checkpoint> open_resumed(Options& o, FolderLock& lock) {
  const bool automatic = o.resume == Resume::automatic;
  if (o.output.empty()) o.output = last_run_folder();
  if (o.output.empty() && !automatic)
    throw std::runtime_error("-resume: there is no run_001 here; name the run's folder with -o");
  if (o.output.empty() || !path_exists(o.output)) {
    if (automatic) return nullptr;
    throw std::runtime_error("-resume -o " + o.output + ": no such folder, expected a run to go on from");
  }
  lock = FolderLock(o.output);
  std::string wrong;
  const std::string newest = find_newest_checkpoint(o.output, [&](const std::string& line) {
    if (!wrong.empty()) warn(wrong);
    wrong = line;
  });
  if (!newest.empty() || automatic) {
    if (!wrong.empty()) warn(wrong);
    if (newest.empty()) {
      set_damaged_aside(o.output);
      return nullptr;
    }
    std::printf("resuming %s\n", newest.c_str());
    return std::make_unique<Checkpoint>(open_checkpoint(newest));
  }
  throw std::runtime_error("-resume -o " + o.output + ": no whole checkpoint there" +
                           (wrong.empty() ? "" : " (" + wrong + ")") +
                           ", expected one to go on from; -resume auto starts where there is none");
}

// Throws one line where a new run would write over what is there.
inline void require_free(const std::string& folder, bool automatic) {
  if (automatic) return;
  for (const checkpoints::Folder& found : checkpoints::list_folders(folder))
    if (found.kind != checkpoints::Kind::temporary)
      throw std::runtime_error("-o " + folder + ": already holds " + found.path +
                               "; add -resume to go on from it, or choose another folder");
  if (path_exists(folder + "/log.csv"))
    throw std::runtime_error("-o " + folder +
                             ": already holds log.csv; choose another folder, or move it away");
}

}  // namespace gdn
