// ./train_gdn -load FOLDER -gen N: text from a checkpoint on standard output.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "generate.h"
#include "settings.h"
#include "signals.h"
#include "terminal_text.h"

namespace gdn {

// A training's checkpoint says whether documents were masked, and where the vocabulary was. On a terminal
// what is not printable is escaped; elsewhere the bytes are the model's.
template <class Device>
void generate_and_print(Device& dev, const Options& o, OptionTable& table) {
  const Checkpoint checkpoint = open_any_checkpoint(o.load);
  follow_training(table, checkpoint);
  Parameters<Device> parameters(dev, config_of_checkpoint(o, table, checkpoint, 0));
  load_parameters(parameters, checkpoint);
  const TextCodec codec(parameters.config.vocab, o.vocabulary, document_start(o));
  const std::vector<int32_t> prompt = codec.tokens(o.prompt);
  const bool terminal = isatty(STDOUT_FILENO);
  TerminalText printable;
  bool failed = false;
  const auto print = [&](const std::string& bytes) {
    const std::string text = terminal ? printable(bytes) : bytes;
    std::fwrite(text.data(), 1, text.size(), stdout);  // may hold zero bytes
    failed = std::fflush(stdout) != 0 || failed;
  };
  print(codec.shown(o.prompt));
  generate<Device>(
      parameters, prompt, o.generate, sampling(o), separator(o), [&](int token) { print(codec.text(token)); },
      [&] { return failed; });
  std::printf("%s\n", printable.rest().c_str());
}

}  // namespace gdn
