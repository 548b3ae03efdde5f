// Threads that stay together from one parallel loop to the next. A region of OpenMP's takes 2 us to begin and
// end, of which a step of a U-Net has 240; and where other processes are busy, each may wait for a thread
// that the system has put aside. A team's loop goes on without it.
#pragma once

#include <cstdint>
#include <functional>

#include "../common.h"

namespace ddpm_fast {

using Loop = void (*)(const void* body, int64_t first, int64_t last);

// Runs `work`, whose parallel loops are run by one team of torch's threads.
void as_a_team(const std::function<void()>& work);

// False where the calling thread leads no team.
bool run_by_team(int64_t begin, int64_t end, int64_t grain, Loop loop, const void* body);

// torch::stable::parallel_for; in a team the same parts, each run by whoever comes to it first.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const auto loop = [](const void* given, int64_t first, int64_t last) {
    (*static_cast<const Body*>(given))(first, last);
  };
  if (!run_by_team(begin, end, grain, loop, &body)) torch::stable::parallel_for(begin, end, grain, body);
}

}  // namespace ddpm_fast
