// When the exchanges of a training step ran beside its layers, by NCCL, one GPU a rank:
//
//   [mpirun -n R] dev/bench_overlap [-d 1024] [-micro N] [-csv FILE]
//
// The model is bench_step's (V = 50257, H = 6, L = 8, T = 1024), a rank's micro-batches (-micro, by default 1) have
// 32 sequences. The steps are without graphs, so that CUDA events can be recorded on both streams where NVTX
// ranges begin and end (dev/range_times.h); one is running while the next is queued. Of the last one each rank
// prints a row:
//
//   step              milliseconds
//   gather, exchange  of new weights and of gradients: the sum of the groups' times on their stream
//   waited            of the layers' stream for them
//   hidden            1 - waited / (gather + exchange); "-" with one rank, whose calls send nothing
//
// and rank 0 writes its ranges to FILE: name, number of the layer or of the arena's group, begin and end in
// microseconds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "gdn_kernels.cuh"

#include "gdn/communicator_cuda.h"
#include "gdn/model.h"
#include "gdn/optimizer.h"
#include "gdn/random.h"
#include "gdn/training_step.h"

#include "dev/range_times.h"

namespace {

using namespace gdn;

constexpr int kLength = 1024, kVocab = 50257, kHeads = 6, kLayers = 8, kBatch = 32;
constexpr int kWarmUp = 4;  // steps
constexpr double kTimeout = 30;

struct Options {
  int width = 1024, micro_batches = 1;
  std::string csv;
};

int whole(const std::string& name, const std::string& value, int low, int high) {
  char* end = nullptr;
  const long n = std::strtol(value.c_str(), &end, 10);
  if (value.empty() || *end || n < low || n > high)
    throw std::runtime_error(name + " '" + value + "': expected a whole number from " + std::to_string(low) +
                             " to " + std::to_string(high));
  return int(n);
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (name != "-d" && name != "-micro" && name != "-csv")
      throw std::runtime_error(name + ": expected -d, -micro or -csv");
    if (i + 1 == argc) throw std::runtime_error(name + ": needs a value");
    const std::string value = argv[i + 1];
    if (name == "-d") o.width = whole(name, value, 8, 1 << 14);
    if (name == "-micro") o.micro_batches = whole(name, value, 1, 1024);
    if (name == "-csv") o.csv = value;
  }
  return o;
}

// Milliseconds in all ranges of a name.
double total(const std::vector<Span>& spans, const std::string& name) {
  double sum = 0;
  for (const Span& s : spans)
    if (s.name == name) sum += (s.end - s.begin) / 1000;
  return sum;
}

void write_csv(const std::string& path, const std::vector<Span>& spans) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (!file) throw std::runtime_error("-csv " + path + ": cannot be written");
  bool failed = std::fprintf(file, "range,number,begin_us,end_us\n") < 0;
  for (const Span& s : spans)
    failed |= std::fprintf(file, "%s,%s,%.1f,%.1f\n", s.name.c_str(),
                           s.layer < 0 ? "" : std::to_string(s.layer).c_str(), s.begin, s.end) < 0;
  failed |= std::fclose(file) != 0;
  if (failed) throw std::runtime_error("-csv " + path + ": cannot be written; is the disk full?");
}

void measure(const Options& o, Communicator& ranks) {
  Cuda dev(ranks.local_rank());
  const ModelConfig config = make_config(o.width, 256, kLayers, kHeads, 0, 2, kVocab, Parametrization::mup);
  Parameters<Cuda> parameters(dev, config, ranks.rank(), ranks.ranks());
  parameters.allocate_gradients();
  Exchange<Cuda> exchange(dev, ranks, ExchangeBy::nccl);
  Optimizer<Cuda> optimizer(parameters, {}, &exchange);
  Model<Cuda> model(parameters, kBatch, kLength, Use::training);
  parameters.initialize(1);
  TrainingStep<Cuda> training_step(parameters, model, optimizer,
                                   int64_t(kBatch) * o.micro_batches * ranks.ranks(), kBatch, kLength,
                                   GradientSum::tree, false);
  std::vector<int32_t> tokens(size_t(kBatch) * size_t(o.micro_batches) * kLength + 1);
  for (size_t i = 0; i < tokens.size(); i++)
    tokens[i] = int32_t(random_bits(uint64_t(ranks.rank() + 1), i) % kVocab);
  int64_t step = 0;
  const auto queue = [&] {
    training_step.load(tokens.data(), tokens.data() + 1);
    training_step.queue(++step, 1e-4);
  };
  const auto wait = [&] {
    const auto result = training_step.wait();
    if (!std::isfinite(result.loss) || !std::isfinite(result.norm))
      throw std::runtime_error("the loss or the gradient is not finite: these times would mean nothing");
    return result;
  };
  queue();
  for (int i = 0; i < kWarmUp; i++) {
    queue();
    wait();
  }
  RangeTimes times(dev);
  queue();
  const std::vector<Span> spans = times.spans();
  wait();
  const double seconds = wait().seconds;
  const double gather = total(spans, "gather weights"), sum = total(spans, "exchange gradients"),
               waited = total(spans, "wait for weights") + total(spans, "wait for gradients");
  char row[160], hidden[16] = "-";
  if (ranks.ranks() > 1) std::snprintf(hidden, sizeof hidden, "%.1f%%", 100 * (1 - waited / (gather + sum)));
  std::snprintf(row, sizeof row, "%5d %9.2f %9.3f %9.3f %9.3f %8s\n", ranks.rank(), 1000 * seconds, gather,
                sum, waited, hidden);
  if (ranks.first())
    std::printf(
        "d = %d, %d micro-batches of %d x %d tokens a rank, %d ranks, %s; milliseconds\n%5s %9s %9s %9s "
        "%9s %8s\n",
        o.width, o.micro_batches, kBatch, kLength, ranks.ranks(), exchange.description().c_str(), "rank",
        "step", "gather", "exchange", "waited", "hidden");
  for (int r = 0; r < ranks.ranks(); r++) {
    if (r == ranks.rank()) std::fputs(row, stdout);
    std::fflush(stdout);
    ranks.barrier();
  }
  if (ranks.first() && !o.csv.empty()) write_csv(o.csv, spans);
}

}  // namespace

int main(int argc, char** argv) {
  Communicator ranks;
  try {
    const Options o = parse(argc, argv);
    Communicator::require_mpi_if_launched();
    ranks.join(kTimeout);
    measure(o, ranks);
    ranks.leave();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_overlap: %s\n", error.what());
    if (ranks.ranks() > 1) ranks.abort_after_another();
    return 1;
  }
}
