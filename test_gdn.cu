// Tests of train_gdn (doctest): layer against layer, GPU against CPU, CPU against finite differences. Each
// file of gdn/tests holds the tests of one part. ./test_gdn -h shows doctest's options, e.g.
// --test-case='*delta rule*'.
//
// The last line is: N passed, N failed, N skipped.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "dataloader.h"
#include "mup.h"
#include "gdn/cpu_layers.h"
#ifdef __CUDACC__
#include "gdn_kernels.cuh"
#endif

#include "gdn/tests/skip.h"
#include "gdn/tests/test_checkpoint.h"
#include "gdn/tests/test_config.h"
#include "gdn/tests/test_coord_check.h"
#include "gdn/tests/test_cpu_layers.h"
#include "gdn/tests/test_cuda_delta_rule.h"
#include "gdn/tests/test_cuda_layers.h"
#include "gdn/tests/test_dataloader.h"
#include "gdn/tests/test_generate.h"
#include "gdn/tests/test_model.h"
#include "gdn/tests/test_golden.h"
#include "gdn/tests/test_mup.h"
#include "gdn/tests/test_program.h"

namespace {

// Counts what doctest ran, for the closing line.
struct Counter : doctest::IReporter {
  explicit Counter(const doctest::ContextOptions&) {}
  void test_run_end(const doctest::TestRunStats& stats) override {
    ran = int(stats.numTestCasesPassingFilters);
    failed = int(stats.numTestCasesFailed);
  }
  void report_query(const doctest::QueryData&) override {}
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
};

}  // namespace

REGISTER_LISTENER("counter", 1, Counter);

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int result = context.run();
  if (context.shouldExit()) return result;
  const int skipped = gdn_tests::skipped_tests;
  std::printf("%d passed, %d failed, %d skipped\n", Counter::ran - Counter::failed - skipped, Counter::failed,
              skipped);
  return result;
}
