// The size of an error, for the tests and dev/emulate.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace gdn {

// ||x - reference|| / ||reference||, infinite if x has anything but numbers; ||x|| where the reference is
// zero.
inline double relative_error(const std::vector<double>& x, const std::vector<double>& reference) {
  double error = 0, size = 0;
  for (size_t i = 0; i < x.size(); i++) {
    if (!std::isfinite(x[i])) return std::numeric_limits<double>::infinity();
    error += (x[i] - reference[i]) * (x[i] - reference[i]);
    size += reference[i] * reference[i];
  }
  return std::sqrt(size > 0 ? error / size : error);
}

}  // namespace gdn
