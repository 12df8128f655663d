// Times the full training step, as train_gdn runs it: queued, replayed as CUDA graphs, over random tokens
// whose frequencies fall with the rank as in text (V = 50257, padded to 50304; H = 6, T = 1024; L = 8, B =
// 32, and L = 21, B = 8 from d = 2048 on, the 1.3B shape).
//
//   dev/bench_step [-d 256,512,...] [-recompute 0|1|2] [-opt adamw|sgd] [-steps N] [-phases] [-csv FILE]
//                  [-trace FILE]
//
// A row a width:
//   ms, tokens/s     median over the steps after a warm-up, from CUDA events at the ends of the steps
//   sol              speed-of-light: the time the strictly needed matrix products take at the peak measured
//                    first (gdn/speed_of_light.h), over the step's time
//   plan, used       GiB: what the trainer asks for, and what the GPU says is taken (CUDA's own share too)
//   first            seconds from the first allocation to the end of the first step (initial values too)
// A width whose shape does not fit into the GPU's memory is named and skipped. With -phases, for each width
// the time of each NVTX range (outer / inner, without what runs inside inner ones) in a step without graphs.
// With -trace, for one width, where in time each range and kernel of a step without graphs lies
// (dev/trace.h).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "gdn_kernels.cuh"

#include "gdn/model.h"
#include "gdn/optimizer.h"
#include "gdn/speed_of_light.h"
#include "gdn/training_step.h"

#include "dev/range_times.h"
#include "dev/trace.h"

namespace {

using gdn::Cuda;

constexpr int kLength = 1024, kVocab = 50257, kHeads = 6;
constexpr int kWarmUp = 4;  // steps: one layer by layer, one that records the graphs, two that replay them
constexpr int kPhaseSteps = 3;  // the breakdown is their mean
constexpr double kLearningRate = 1e-4;

struct Options {
  std::vector<int> widths = {256, 512, 1024, 1536, 2048};
  int recompute = 0, steps = 20;
  std::string optimizer = "adamw", csv, trace;
  bool phases = false;
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
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
    if (name == "-phases") {
      o.phases = true;
      continue;
    }
    if (name != "-d" && name != "-recompute" && name != "-opt" && name != "-steps" && name != "-csv" &&
        name != "-trace")
      throw std::runtime_error(name + ": expected -d, -recompute, -opt, -steps, -phases, -csv or -trace");
    if (++i == argc) throw std::runtime_error(name + ": needs a value");
    const std::string value = argv[i];
    if (name == "-d") {
      o.widths.clear();
      std::istringstream list(value);
      for (std::string width; std::getline(list, width, ',');)
        o.widths.push_back(whole(name, width, 8, 1 << 14));
    }
    if (name == "-recompute") o.recompute = whole(name, value, 0, 2);
    if (name == "-steps") o.steps = whole(name, value, 1, 100000);
    if (name == "-opt") o.optimizer = value;
    if (name == "-csv") o.csv = value;
    if (name == "-trace") o.trace = value;
  }
  if (!o.trace.empty() && o.widths.size() != 1)
    throw std::runtime_error("-trace " + o.trace + ": expected one width in -d, not " +
                             std::to_string(o.widths.size()));
  gdn::parse_optimizer(o.optimizer);
  return o;
}

struct Row {
  int width = 0, layers = 0, batch = 0;
  size_t parameters = 0;
  double milliseconds = 0, tokens_per_second = 0, speed_of_light = 0;
  double planned = 0, used = 0;  // GiB
  double first = 0;              // seconds
};

std::vector<int32_t> random_tokens(int n, uint32_t seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<> uniform(0, 1);
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = std::min(kVocab - 1, int(std::pow(double(kVocab), uniform(engine))) - 1);
  return tokens;
}

double gibibytes(size_t bytes) { return double(bytes) / double(size_t(1) << 30); }

// One shape's model, its optimizer, and steps over the same batch again and again.
class Bench {
 public:
  Bench(Cuda& dev, const Options& o, int width)
      : dev_(dev),
        begin_(std::chrono::steady_clock::now()),
        layers_(width < 2048 ? 8 : 21),
        batch_(width < 2048 ? 32 : 8),
        parameters_(dev,
                    gdn::make_config(width, 256, layers_, kHeads, 0, 2, kVocab, gdn::Parametrization::mup)),
        tokens_(random_tokens(batch_ * kLength + 1, 1)) {
    gdn::OptimizerConfig settings;
    settings.kind = gdn::parse_optimizer(o.optimizer);
    parameters_.allocate_gradients();
    optimizer_ = std::make_unique<gdn::Optimizer<Cuda>>(parameters_, settings);
    model_ = std::make_unique<gdn::Model<Cuda>>(parameters_, batch_, kLength, gdn::Use::training,
                                                gdn::Recompute(o.recompute));
    parameters_.initialize(1);
  }

  Row time(int steps, double peak_flops) {
    gdn::TrainingStep<Cuda> training_step(parameters_, *model_, *optimizer_, batch_, batch_, kLength);
    Row row = {parameters_.config.width, layers_, batch_, parameters_.table.count};
    std::vector<double> seconds;
    const auto wait = [&] {
      seconds.push_back(finish(training_step));
      if (seconds.size() == 1) row.first = elapsed();
    };
    for (int i = 0; i < kWarmUp + steps; i++) {
      queue(training_step);
      if (i == 0 || training_step.running() > 1) wait();
    }
    while (training_step.running()) wait();
    seconds.erase(seconds.begin(), seconds.begin() + kWarmUp);
    std::nth_element(seconds.begin(), seconds.begin() + steps / 2, seconds.end());
    const double median = seconds[steps / 2], tokens = double(batch_) * kLength;
    row.milliseconds = 1000 * median;
    row.tokens_per_second = tokens / median;
    row.speed_of_light = gdn::flops_per_token(parameters_.config) * tokens / (median * peak_flops);
    size_t free_bytes = 0, total_bytes = 0, planned = 0;
    cuda_check(cudaMemGetInfo(&free_bytes, &total_bytes));
    for (const auto& [what, bytes] : dev_.allocated) planned += bytes;
    row.planned = gibibytes(planned);
    row.used = gibibytes(total_bytes - free_bytes);
    return row;
  }

  // A step is always running ahead of the one being queued, so that no range waits for the host.
  void print_phases() {
    gdn::TrainingStep<Cuda> training_step(parameters_, *model_, *optimizer_, batch_, batch_, kLength,
                                          gdn::GradientSum::tree, false);
    queue(training_step);
    gdn::RangeTimes times(dev_);
    for (int i = 0; i < kPhaseSteps; i++) {
      queue(training_step);
      finish(training_step);
    }
    const auto phases = times.own_milliseconds();
    finish(training_step);
    double total = 0;
    for (const auto& [name, ms] : phases) total += ms / kPhaseSteps;
    std::printf("\nd = %d, one step without graphs: %.2f ms\n%8s %6s  phase\n", parameters_.config.width,
                total, "ms", "%");
    for (const auto& [name, ms] : phases)
      if (ms / kPhaseSteps >= 0.001)
        std::printf("%8.3f %6.1f  %s\n", ms / kPhaseSteps, 100 * ms / kPhaseSteps / total,
                    name.empty() ? "between steps" : name.c_str());
    std::printf("\n");
  }

  void write_trace(const std::string& file, const Row& row) {
    gdn::TrainingStep<Cuda> training_step(parameters_, *model_, *optimizer_, batch_, batch_, kLength,
                                          gdn::GradientSum::tree, false);
    const gdn::Trace trace = gdn::trace_step(
        dev_, [&] { queue(training_step); }, [&] { finish(training_step); });
    gdn::write_trace(file, trace,
                     {{"device", dev_.name},
                      {"width", row.width},
                      {"layers", row.layers},
                      {"batch", row.batch},
                      {"length", kLength},
                      {"graph_ms", row.milliseconds}});
    std::printf("wrote %s (%zu spans, by %s)\n", file.c_str(), trace.spans.size(), trace.source.c_str());
  }

 private:
  void queue(gdn::TrainingStep<Cuda>& training_step) {
    training_step.load(tokens_.data(), tokens_.data() + 1);
    training_step.queue(++step_, kLearningRate);
  }

  double finish(gdn::TrainingStep<Cuda>& training_step) {
    const auto result = training_step.wait();
    if (!std::isfinite(result.loss) || !std::isfinite(result.norm))
      throw std::runtime_error("the loss or the gradient is not finite at d = " +
                               std::to_string(parameters_.config.width) + ": these times would mean nothing");
    return result.seconds;
  }

  double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

  Cuda& dev_;
  const std::chrono::steady_clock::time_point begin_;
  const int layers_, batch_;
  gdn::Parameters<Cuda> parameters_;
  const std::vector<int32_t> tokens_;  // [B*T+1]
  std::unique_ptr<gdn::Optimizer<Cuda>> optimizer_;
  std::unique_ptr<gdn::Model<Cuda>> model_;
  int64_t step_ = 0;
};

void write_csv(const std::string& path, const std::vector<Row>& rows, const Options& o,
               const std::string& device) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (!file) throw std::runtime_error("-csv " + path + ": cannot be written");
  bool failed =
      std::fprintf(file,
                   "device,d,layers,batch,tokens,recompute,optimizer,parameters,ms,tokens_per_s,sol,plan_gib,"
                   "used_gib,first_s\n") < 0;
  for (const Row& r : rows)
    failed |=
        std::fprintf(file, "%s,%d,%d,%d,%d,%d,%s,%zu,%.4f,%.0f,%.4f,%.3f,%.3f,%.3f\n", device.c_str(),
                     r.width, r.layers, r.batch, kLength, o.recompute, o.optimizer.c_str(), r.parameters,
                     r.milliseconds, r.tokens_per_second, r.speed_of_light, r.planned, r.used, r.first) < 0;
  failed |= std::fclose(file) != 0;
  if (failed) throw std::runtime_error("-csv " + path + ": cannot be written; is the disk full?");
}

void bench(const Options& o) {
  std::string device;
  double peak_flops = 0;
  {
    Cuda dev;
    device = dev.name;
    peak_flops = gdn::measure_peak_flops(dev);
  }
  std::printf("%s, peak matrix product %.0f TFLOP/s, -opt %s, -recompute %d\n", device.c_str(),
              peak_flops / 1e12, o.optimizer.c_str(), o.recompute);
  const auto header = [] {
    std::printf("%5s %3s %3s %11s %9s %10s %6s %9s %9s %8s\n", "d", "L", "B", "parameters", "ms", "tokens/s",
                "sol", "plan GiB", "used GiB", "first s");
  };
  header();
  std::vector<Row> rows;
  for (const int width : o.widths) {
    try {
      Cuda dev;
      Bench shape(dev, o, width);
      const Row r = shape.time(o.steps, peak_flops);
      std::printf("%5d %3d %3d %11zu %9.3f %10.0f %5.1f%% %9.2f %9.2f %8.2f\n", r.width, r.layers, r.batch,
                  r.parameters, r.milliseconds, r.tokens_per_second, 100 * r.speed_of_light, r.planned,
                  r.used, r.first);
      rows.push_back(r);
      if (!o.trace.empty()) shape.write_trace(o.trace, r);
      if (o.phases) {
        shape.print_phases();
        if (width != o.widths.back()) header();
      }
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).rfind("out of GPU memory", 0) != 0) throw;
      std::printf("%5d skipped: %s\n", width, error.what());
    }
    std::fflush(stdout);
  }
  if (!o.csv.empty()) write_csv(o.csv, rows, o, device);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bench(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_step: %s\n", error.what());
    return 1;
  }
}
