// Prints the schedules that the portable kernels of the gated delta rule (mma.sync) take, by head size and by
// the shared memory a block may have: the table of dev/doc/delta_rule_plans.md. Needs no GPU.
//
//   make dev/delta_rule_plans && dev/delta_rule_plans
#include <cstdio>

#include "../gdn/kernels/delta_rule/schedule.h"
#include "../gdn/tests/inputs.h"

int main() {
  using namespace gdn;
  using namespace gdn::delta_rule;
  std::printf(
      "| dk, dv | limit KiB | prepare KiB | passes: warps | slices | stages | KiB | gradients, own heads: "
      "columns | "
      "slices | stages | q, k | CTAs an SM | KiB | shared heads: columns | slices | stages | q, k | CTAs an "
      "SM | KiB "
      "|\n"
      "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
  for (const int dk : {32, 64, 96, 128, 192, 256})
    for (const int limit : {kSharedBytes99, kSharedBytes163, kSharedBytes227}) {
      const int dv = 2 * dk;
      const auto kib = [](int bytes) { return bytes / 1024.0; };
      const MixerShape own = gdn_tests::make_shape(32, 1024, 6, 6, dk, dv);
      const PassPlan pass = pass_plan(own, 1, 132, limit);
      std::printf("| %d, %d | %d | %.1f | %d | %d | %d | %.1f", dk, dv, limit / 1024,
                  kib(prepare_shared_bytes<false>(dk)), pass.warps, pass.slices(dv), pass.stages,
                  kib(pass.bytes));
      for (const int heads_v : {6, 12}) {
        const GradientPlan plan = gradient_plan(gdn_tests::make_shape(32, 1024, 6, heads_v, dk, dv), limit);
        std::printf(" | %d%s | %d | %d | %d | %d | %.1f", plan.columns, plan.compact ? " compact" : "",
                    (dk + plan.columns - 1) / plan.columns, plan.buffers.stages, plan.buffers.keys, plan.ctas,
                    kib(plan.bytes));
      }
      std::printf(" |\n");
    }
}
