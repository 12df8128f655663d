// The size of an error, for the tests and dev/emulate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace gdn {

// ||x - reference|| / max(||reference||, floor) of n numbers, infinite if x has anything but numbers; ||x||
// where the divisor is zero.
template <class A, class B>
double relative_error(const A* x, const B* reference, size_t n, double floor = 0) {
  double error = 0, size = 0;
  for (size_t i = 0; i < n; i++) {
    const double at = double(x[i]), expected = double(reference[i]);
    if (!std::isfinite(at)) return std::numeric_limits<double>::infinity();
    error += (at - expected) * (at - expected);
    size += expected * expected;
  }
  const double divisor = std::max(std::sqrt(size), floor);
  return divisor > 0 ? std::sqrt(error) / divisor : std::sqrt(error);
}

template <class A, class B>
double relative_error(const std::vector<A>& x, const std::vector<B>& reference, double floor = 0) {
  if (x.size() != reference.size()) return std::numeric_limits<double>::infinity();
  return relative_error(x.data(), reference.data(), x.size(), floor);
}

}  // namespace gdn
