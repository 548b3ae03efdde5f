// softmax(q k' / sqrt(d)) v of one head, for blocks of queries, in chunks of keys: the largest score and the
// sum of the weights are running ones (Milakov and Gimelshein 2018; Dao et al. 2022), so that scores take a
// chunk's memory only. A chunk that has them all, as most images do, is the plain softmax.
//
// Both products are m[row][kPanel] = sum over c of a[row][c] b[c][kPanel]: of queries and keys over a head's
// channels, a panel of keys at a time, and of weights and values over a chunk's keys, a panel of channels at
// a time. How a and b lie in memory, and what multiplies them, `Products` says. Keys and values are laid out
// once for all blocks.
#pragma once

#include <cmath>
#include <limits>

#include "../kernels.h"
#include "attention_products.h"
#include "silu.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int64_t kChunk = 512;  // keys, at most

template <typename Products>
struct Attention {
  using T = typename Products::Element;
  static constexpr int64_t kBlock = Products::kBlock;
  static constexpr int64_t kGroup = 4 * kLanes;                  // keys whose weights are computed together
  static constexpr int64_t kPanelStride = kBlock * kPanel + 16;  // powers of two would share a few sets

  static int64_t key_size(const AttentionPlan& plan) { return Products::columns_size(plan.width); }
  static int64_t value_size(const AttentionPlan& plan) { return Products::columns_size(plan.chunk); }
  static int64_t key_panels(const AttentionPlan& plan) { return ceil_div(plan.tokens, kPanel); }
  static int64_t panels(const AttentionPlan& plan) { return ceil_div(plan.width, kPanel); }

  static int64_t keys_in(const AttentionPlan& plan, int64_t chunk) {
    const int64_t rest = plan.tokens - chunk * plan.chunk;
    return rest < plan.chunk ? rest : plan.chunk;
  }

  static AttentionPlan plan(int64_t tokens, int64_t width, int64_t threads) {
    AttentionPlan plan = {};
    plan.tokens = tokens, plan.width = width;
    plan.blocks = ceil_div(tokens, kBlock);
    if (plan.blocks > threads) plan.blocks = ceil_div(plan.blocks, threads) * threads;
    plan.block = ceil_div(tokens, plan.blocks);  // all alike
    plan.chunk = tokens < kChunk ? tokens : kChunk;
    plan.chunks = ceil_div(tokens, plan.chunk);
    plan.pieces = key_panels(plan) + plan.chunks * panels(plan);
    plan.laid_out = key_panels(plan) * key_size(plan) + plan.chunks * panels(plan) * value_size(plan);
    plan.scratch = Scratch(plan, nullptr).size;
    return plan;
  }

  // What a block of queries is worked on in.
  struct Scratch {
    float *queries, *scores, *weights, *outputs, *columns;
    int64_t size = 0;

    Scratch(const AttentionPlan& plan, float* memory) {
      const auto take = [&](int64_t count) {
        float* const from = memory == nullptr ? nullptr : memory + size;
        size += ceil_div(count, 16) * 16;
        return from;
      };
      const int64_t groups = ceil_div(plan.chunk, kGroup);
      queries = take(Products::rows_size(plan.width));
      scores = take(groups * (kGroup / kPanel) * kPanelStride);
      weights = take(Products::rows_size(groups * kGroup));
      outputs = take(panels(plan) * kPanelStride);
      columns = take(Products::scratch_size(plan.width > plan.chunk ? plan.width : plan.chunk));
    }
  };

  // ---- keys and values ----

  static void lay_out(
      const AttentionPlan& plan, const AttentionHead& head, int64_t first, int64_t last, float* to,
      float* memory) {
    const Scratch scratch(plan, memory);
    const int64_t of_keys = key_panels(plan);
    float* const values = to + of_keys * key_size(plan);
    for (int64_t piece = first; piece < last; ++piece) {
      if (piece < of_keys) {
        const int64_t key = piece * kPanel, rest = plan.tokens - key;
        Products::lay_out_keys(
            static_cast<const T*>(head.k) + key * head.stride, head.stride, rest < kPanel ? rest : kPanel,
            plan.width, to + piece * key_size(plan), scratch.columns);
      } else {
        const int64_t chunk = (piece - of_keys) / panels(plan), c = (piece - of_keys) % panels(plan) * kPanel;
        const int64_t rest = plan.width - c;
        Products::lay_out_values(
            static_cast<const T*>(head.v) + chunk * plan.chunk * head.stride + c, head.stride,
            keys_in(plan, chunk), rest < kPanel ? rest : kPanel,
            values + (piece - of_keys) * value_size(plan), scratch.columns);
      }
    }
  }

  // ---- the softmax ----

  // Of a block's queries so far.
  struct Running {
    static constexpr int64_t kRows = ceil_div(kBlock, kLanes) * kLanes;
    float most[kRows], total[kRows], fade[kRows];

    Running() {
      for (int64_t row = 0; row < kRows; ++row) {
        most[row] = -std::numeric_limits<float>::infinity(), total[row] = 0;
      }
    }
  };

  template <int N>
  static inline void power_of_two(Float (&u)[N]) {
    Float p[N];
#if !defined(__AVX512F__)
    for (Float& v : u) v = at_least(v, -kSiluBound);
#endif
    if constexpr (sizeof(T) == 2) {
      power(u, 1, kRoughPower, p);
    } else {
      power(u, 1, kPower, p);
    }
    for (int k = 0; k < N; ++k) u[k] = p[k];
  }

  static inline Float score(const float* of_row, int64_t k) {
    return load(of_row + k / 2 * kPanelStride + k % 2 * kLanes);
  }

  // A row whose scores have a NaN need not find its largest: its sum is NaN.
  static inline float largest_score(const float* of_row, int64_t keys) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const auto larger = [](Float a, Float b) { return a > b ? a : b; };
    Float most[4] = {broadcast(kNone), broadcast(kNone), broadcast(kNone), broadcast(kNone)};
    const int64_t whole = keys / kLanes;
    int64_t k = 0;
    for (; k + 4 <= whole; k += 4) {
      for (int i = 0; i < 4; ++i) most[i] = larger(most[i], score(of_row, k + i));
    }
    for (; k < whole; ++k) most[0] = larger(most[0], score(of_row, k));
    if (keys % kLanes) most[1] = larger(most[1], keep(score(of_row, k), keys % kLanes, kNone));
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  }

  // A chunk's scores become weights, 2^(scale (score - largest)); `fade` is what the weights before them, and
  // all that was summed with those, are to be multiplied by.
  static inline void weigh(
      Products& products, float scale, int64_t keys, int64_t count, const Scratch& scratch,
      Running& running) {
    float before[Running::kRows];
    std::memcpy(before, running.most, sizeof(before));
    for (int64_t row = 0; row < count; ++row) {
      const float most = largest_score(scratch.scores + row * kPanel, keys);
      running.most[row] = most > before[row] ? most : before[row];
    }
    for (int64_t row = 0; row < count; row += kLanes) {
      Float fade[1] = {(load(before + row) - load(running.most + row)) * scale};
      power_of_two(fade);
      store(running.fade + row, fade[0]);
      store(running.total + row, load(running.total + row) * fade[0]);
    }
    for (int64_t row = 0; row < count; ++row) {
      const float* const of_row = scratch.scores + row * kPanel;
      const Float most = broadcast(running.most[row]);
      Float sum[4] = {};
      const auto weights_of = [&](int64_t group, Float(&u)[4]) {
        for (int i = 0; i < 4; ++i) u[i] = (score(of_row, 4 * group + i) - most) * scale;
        power_of_two(u);
      };
      const auto put = [&](int64_t group, const Float(&p)[4]) {
        for (int i = 0; i < 4; ++i) sum[i] += p[i];
        products.put(scratch.weights, keys, row, group, p);
      };
      int64_t group = 0;
      Float p[4];
      for (; group < keys / kGroup; ++group) {
        weights_of(group, p);
        put(group, p);
      }
      if (group * kGroup < keys) {
        weights_of(group, p);
        for (int i = 0; i < 4; ++i) p[i] = keep(p[i], keys - (4 * group + i) * kLanes);
        put(group, p);
      }
      running.total[row] += cpu::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }

  static inline void fade(const AttentionPlan& plan, const Running& running, int64_t count, float* outputs) {
    for (int64_t row = 0; row < count; ++row) {
      const float fade = running.fade[row];
      if (fade == 1) continue;
      for (int64_t panel = 0; panel < panels(plan); ++panel) {
        float* const m = outputs + panel * kPanelStride + row * kPanel;
        store(m, load(m) * fade);
        store(m + kLanes, load(m + kLanes) * fade);
      }
    }
  }

  // ---- blocks of queries ----

  static inline void write(
      const AttentionPlan& plan, const Running& running, int64_t count, const float* outputs, T* y,
      int64_t stride) {
    for (int64_t row = 0; row < count; ++row, y += stride) {
      const float factor = 1 / running.total[row];
      for (int64_t c = 0, k = 0; c < plan.width; c += kLanes, ++k) {
        const Float value = score(outputs + row * kPanel, k) * factor;
        if (c + kLanes <= plan.width) {
          store(y + c, value);
        } else {
          store(y + c, value, plan.width - c);
        }
      }
    }
  }

  static void attend(
      const AttentionPlan& plan, const AttentionHead& head, const float* laid_out, int64_t first,
      int64_t last, float* memory) {
    Products products;
    const Scratch scratch(plan, memory);
    const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(plan.width)));
    const float* const values = laid_out + key_panels(plan) * key_size(plan);
    for (int64_t block = first; block < last; ++block) {
      const int64_t query = block * plan.block, rest = plan.tokens - query;
      if (rest <= 0) break;
      const int64_t count = rest < plan.block ? rest : plan.block;
      products.take_queries(
          static_cast<const T*>(head.q) + query * head.stride, head.stride, count, plan.width,
          scratch.queries);
      Running running;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t keys = keys_in(plan, chunk), before = chunk * (plan.chunk / kPanel);
        for (int64_t panel = 0; panel < ceil_div(keys, kPanel); ++panel) {
          products.score(
              scratch.queries, laid_out + (before + panel) * key_size(plan), plan.width,
              scratch.scores + panel * kPanelStride, count);
        }
        products.finish();
        weigh(products, scale, keys, count, scratch, running);
        if (chunk > 0) fade(plan, running, count, scratch.outputs);
        for (int64_t panel = 0; panel < panels(plan); ++panel) {
          products.sum(
              scratch.weights, values + (chunk * panels(plan) + panel) * value_size(plan), keys,
              scratch.outputs + panel * kPanelStride, count, chunk > 0);
        }
        products.finish();
      }
      write(
          plan, running, count, scratch.outputs, static_cast<T*>(head.y) + query * head.y_stride,
          head.y_stride);
    }
  }

  static constexpr AttentionKernels kKernels = {plan, lay_out, attend};
};

}  // namespace
}  // namespace ddpm_fast::cpu
