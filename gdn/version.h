// What this program was made from and with; gdn/version.cpp is compiled again for each commit.
#pragma once

#include <string>

namespace gdn {

std::string commit();      // of the repository, with "-dirty" where files were changed; "unknown" without one
std::string build_text();  // compiler, matrix products on the CPU, GPU code

}  // namespace gdn
