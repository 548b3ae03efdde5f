// 64 bits that tell whether memory holds what it held: a word is xored into a lane, which is multiplied by an
// odd number and rotated, so that no single change of any word can go unseen, and several do so by chance
// only. Reads each byte once. Each instruction set has its own number for the same bytes.
#pragma once

#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

inline UInt absorb(UInt state, UInt word) {
  const UInt mixed = (state ^ word) * 0x9E3779B1u;
  return mixed << 15 | mixed >> 17;
}

uint64_t fingerprint(const void* data, int64_t bytes) {
  constexpr int kStates = 8;
  constexpr int64_t kStep = kStates * sizeof(UInt);
  UInt states[kStates];
  for (int k = 0; k < kStates; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) states[k][lane] = 0x85EBCA6Bu * (k * kLanes + lane + 1);
  }
  const char* from = static_cast<const char*>(data);
  const auto step = [&](const char* words) {
    for (int k = 0; k < kStates; ++k) {
      UInt word;
      std::memcpy(&word, words + k * sizeof(UInt), sizeof(UInt));
      states[k] = absorb(states[k], word);
    }
  };
  int64_t done = 0;
  for (; done + kStep <= bytes; done += kStep) step(from + done);
  char rest[kStep] = {};
  std::memcpy(rest, from + done, bytes - done);
  step(rest);

  uint64_t folded = static_cast<uint64_t>(bytes);
  for (const UInt& state : states) {
    for (int lane = 0; lane < kLanes; ++lane) {
      folded = (folded ^ state[lane]) * 0x9E3779B97F4A7C15u;
      folded ^= folded >> 29;
    }
  }
  return folded;
}

}  // namespace
}  // namespace ddpm_fast::cpu
