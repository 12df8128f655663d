// ./train_gdn -coord_check: the coordinate check (gdn/coord_check.h) of the model that the options describe.
#pragma once

#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <vector>

#include "../dataloader.h"
#include "coord_check.h"
#include "settings.h"

namespace gdn {

template <class Device>
void check_coordinates(Device& dev, Options& o, const OptionTable& table) {
  if (o.global_batch == 0) o.global_batch = 4;
  if (o.layers == 0) o.layers = 8;
  if (o.seq_len == 0 && !Device::is_gpu) o.seq_len = 128;
  o.micro_batch = o.global_batch;  // one micro-batch a step
  resolve_defaults(o, Device::is_gpu);
  DataLoader loader(o.train, o.seq_len, o.global_batch, o.seed, 0, 1, Split::train, o.vocab_size);
  std::vector<int32_t> tokens(size_t(o.global_batch) * o.seq_len), targets(tokens.size());
  loader.next(tokens.data(), targets.data());
  std::unique_ptr<Checkpoint> loaded;
  if (!o.load.empty()) loaded = std::make_unique<Checkpoint>(open_any_checkpoint(o.load));
  const int vocab = loader.source().vocab_size();
  const ModelConfig config =
      loaded ? config_of_checkpoint(o, table, *loaded, vocab) : config_of_options(o, vocab);
  std::function<void(Parameters<Device>&)> start;
  if (loaded)
    start = [&](Parameters<Device>& parameters) { load_parameters(parameters, *loaded); };
  else
    start = [&](Parameters<Device>& parameters) {
      parameters.initialize(o.seed, parse_class_factors(o.init_factors));
    };
  const std::vector<CoordRow> rows =
      coordinate_check(dev, config, optimizer_config(o), o.learning_rate, o.seed, tokens, targets,
                       o.global_batch, o.seq_len, kCoordSteps[std::size(kCoordSteps) - 1], start);
  write_coord_rows(o.output, rows, config, o.optimizer, o.seed);
}

}  // namespace gdn
