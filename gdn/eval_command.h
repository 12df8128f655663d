// ./train_gdn -load FOLDER -eval FILES: the loss of a checkpoint on files.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "evaluate.h"
#include "settings.h"

namespace gdn {

// Over all of their sequences, of the length the training had where -T does not say otherwise.
template <class Device>
void evaluate_and_print(Device& dev, Options& o, OptionTable& table) {
  const Checkpoint checkpoint = open_any_checkpoint(o.load);
  follow_training(table, checkpoint);
  if (o.seq_len == 0) o.seq_len = 1024;
  if (o.micro_batch == 0) o.micro_batch = Device::is_gpu ? 32 : 1;
  require_batch(o.micro_batch, o.micro_batch, o.seq_len);
  const DataLoader data(o.evaluate, o.seq_len, 1, 0, 0, 1, Split::validation, o.vocab_size);
  if (o.mask_docs) data.source().require_separator(separator(o));
  const ModelConfig config = config_of_checkpoint(o, table, checkpoint, data.source().vocab_size());
  o.micro_batch = int(std::min<int64_t>(o.micro_batch, data.sequences()));
  Parameters<Device> parameters(dev, config);
  load_parameters(parameters, checkpoint);
  Model<Device> model(parameters, o.micro_batch, o.seq_len, Use::inference, Recompute::nothing, separator(o));
  Communicator one_process;
  const Evaluation e = evaluate(
      model, data, data.sequences(), o.micro_batch, o.seq_len, [] { return false; }, one_process);
  std::printf("loss %.6f nats a token, perplexity %.4f, over %lld sequences of %d tokens of %s\n", e.loss,
              std::exp(e.loss), (long long)e.sequences, o.seq_len, o.evaluate.c_str());
}

}  // namespace gdn
