// The schedules of the gated delta rule's kernels (gdn/kernels/delta_rule/schedule.h), host code alone.
#include <doctest/doctest.h>

#include "../kernels/delta_rule/schedule.h"
#include "inputs.h"

namespace {

using namespace gdn;
using namespace gdn::delta_rule;
using namespace gdn_tests;

// f(shape) for every pair of head sizes, with one and with two value heads a key head.
template <class F>
void for_each_head_size(const F& f) {
  for (int dk = 16; dk <= 256; dk += 16)
    for (int dv = 16; dv <= 512; dv += 16)
      for (int heads_v : {1, 2}) f(make_shape(1, 4096, 1, heads_v, dk, dv));
}

TEST_CASE("delta rule: every head size has plans that fit in 99 KiB, 163 KiB and 227 KiB of shared memory") {
  for (const int limit : {kSharedBytes99, kSharedBytes163, kSharedBytes227})
    for_each_head_size([&](const MixerShape& shape) {
      INFO("dk ", shape.head_dim_k, ", dv ", shape.head_dim_v, ", heads_v ", shape.heads_v, ", limit ",
           limit);
      for (const int sm_count : {1, 132})
        for (const int splits : {1, 5}) {
          const PassPlan pass = pass_plan(shape, splits, sm_count, limit);
          CHECK(pass.bytes <= limit);
          CHECK(pass.bytes ==
                pass.stages * pass_stage_bytes(compiled_head_dim(shape.head_dim_k), pass.warps));
          CHECK((pass.stages == 2 || has_one_stage_passes(compiled_head_dim(shape.head_dim_k))));
          CHECK(pass.warps >= 1);
          CHECK(pass.warps <= kMaxPassWarps);
          CHECK(16 * pass.warps * pass.slices(shape.head_dim_v) >= shape.head_dim_v);
          CHECK(16 * pass.warps * (pass.slices(shape.head_dim_v) - 1) < shape.head_dim_v);  // none is empty
          const int ctas = resident_passes(shape.head_dim_k, limit);
          CHECK((ctas == 1 || ctas == 2));
        }
      const GradientPlan gradients = gradient_plan(shape, limit);
      CHECK(gradients.ctas * (gradients.bytes + 1024) <= limit + 1024);
      CHECK(gradients.buffers.stages >= (gradients.compact ? 1 : 2));
      CHECK(gradients.buffers.stages <= 3);
      CHECK(prepare_shared_bytes<false>(shape.head_dim_k) <= limit);
    });
}

// With all of Hopper's shared memory nothing is given up: the plans' kernels are the widest, two stages deep.
TEST_CASE("delta rule: with 227 KiB of shared memory no plan is a reduced one") {
  for_each_head_size([&](const MixerShape& shape) {
    INFO("dk ", shape.head_dim_k, ", dv ", shape.head_dim_v, ", heads_v ", shape.heads_v);
    const PassPlan pass = pass_plan(shape, 1, 1, kSharedBytes227);
    CHECK(pass.stages == 2);
    CHECK(pass.slices(shape.head_dim_v) == (shape.head_dim_v + 127) / 128);
    CHECK(!gradient_plan(shape, kSharedBytes227).compact);
    CHECK(resident_passes(shape.head_dim_k, kSharedBytes227) ==
          pass_blocks(compiled_head_dim(shape.head_dim_k)));
  });
}

TEST_CASE("delta rule: a plan that fits nowhere says how much it needs") {
  const MixerShape shape = make_shape(1, 64, 1, 1, 256, 512);
  CHECK(pass_plan(shape, 1, 1, 48 * 1024).bytes > 48 * 1024);
  CHECK(gradient_plan(shape, 48 * 1024).bytes > 48 * 1024);
}

}  // namespace
