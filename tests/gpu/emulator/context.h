// The devices, alike and apart from each other, and each thread's current context.
#pragma once

namespace emulator {

constexpr int DEVICES = 2;

// That of this thread's current context; -1 where there is none.
int current_device();

} // namespace emulator
