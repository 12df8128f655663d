// The tests of train_gdn (doctest), in gdn/tests: layer against layer, GPU against CPU, CPU against finite
// differences. ./test_gdn -h shows doctest's options, e.g. --test-case='*delta rule*', or --test-suite=gpu
// for those that need a GPU. Where there is none they are skipped by name.
//
// The last line is: N passed, N failed, N skipped.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <ostream>
#include <string>
#include <vector>

#ifdef GDN_CUDA
#include "gdn/cuda_device.cuh"
#endif

#include "gdn/cpu_threads.h"
#include "gdn/tests/needs_gpu.h"

namespace {

// Takes from doctest what the closing lines need: what ran, and which tests a listing named.
struct Tally : doctest::IReporter {
  explicit Tally(const doctest::ContextOptions&) {}
  void test_run_end(const doctest::TestRunStats& run) override {
    ran = int(run.numTestCasesPassingFilters);
    failed = int(run.numTestCasesFailed);
  }
  void report_query(const doctest::QueryData& listing) override {
    for (unsigned i = 0; i < listing.num_data; i++)
      if (std::strcmp(listing.data[i]->m_test_suite, gdn_tests::kGpuSuite) == 0)
        need_gpu.push_back(listing.data[i]->m_name);
  }
  void test_run_start() override {}
  void test_case_start(const doctest::TestCaseData&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_end(const doctest::CurrentTestCaseStats&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}

  static inline int ran = 0, failed = 0;
  static inline std::vector<std::string> need_gpu;
};

// Why tests that need a GPU cannot run; empty where they can.
std::string no_gpu() {
#ifdef GDN_CUDA
  return gdn::Cuda::unavailable();
#else
  return "built without nvcc";
#endif
}

}  // namespace

REGISTER_LISTENER("tally", 1, Tally);

int main(int argc, char** argv) {
  // nohup and shells' background jobs ignore some of these, and so would the programs that tests send them to
  for (const int signal : {SIGHUP, SIGINT, SIGTERM, SIGUSR1}) std::signal(signal, SIG_DFL);
  gdn::sleep_while_waiting(argv);
  doctest::Context context(argc, argv);
  const std::string reason = no_gpu();
  if (!reason.empty()) {
    std::vector<const char*> arguments(argv, argv + argc);
    arguments.push_back("--list-test-cases");
    doctest::Context listing(int(arguments.size()), arguments.data());
    std::ostream nowhere(nullptr);
    listing.setCout(&nowhere);
    listing.run();
    context.addFilter("test-suite-exclude", gdn_tests::kGpuSuite);
  }
  const int result = context.run();
  if (context.shouldExit()) return result;
  for (const std::string& name : Tally::need_gpu)
    std::printf("skipped (%s): %s\n", reason.c_str(), name.c_str());
  std::printf("%d passed, %d failed, %d skipped\n", Tally::ran - Tally::failed, Tally::failed,
              int(Tally::need_gpu.size()));
  return result;
}
