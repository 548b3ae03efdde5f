// Our own ops as a recorded run calls them (ddpm_fast/replay/): past the dispatcher, one after another, into
// results that are there already.
#pragma once

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../common.h"

namespace ddpm_fast {

// Of a call; a pointer is to a tensor that each run of the program is given.
using Value = std::variant<std::monostate, Tensor, const OptionalTensor*, int64_t, double, bool>;
using BoundCall = std::function<void()>;

struct ProgramOp {
  std::string name;  // as the dispatcher knows it
  BoundCall (*bind)(std::vector<Value>);
};

inline std::vector<ProgramOp>& program_ops() {
  static std::vector<ProgramOp> ops;
  return ops;
}

namespace detail {

template <typename T>
T from_value(const Value& value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    const auto* const given = std::get_if<const OptionalTensor*>(&value);
    return given == nullptr ? std::get<Tensor>(value) : (**given).value();
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
    return from_value<Tensor>(value);
  } else {
    return std::get<T>(value);
  }
}

template <auto op, typename... Args, size_t... k>
BoundCall bind(void (*)(Args...), std::vector<Value> values, std::index_sequence<k...>) {
  check(values.size() == sizeof...(Args), "another count of arguments");
  return [values = std::move(values)] { op(from_value<std::decay_t<Args>>(values[k])...); };
}

template <typename... Args>
auto indices_of(void (*)(Args...)) {
  return std::index_sequence_for<Args...>();
}

}  // namespace detail

// Makes `op` known, which takes the arguments of the dispatcher's op `name` and then its results:
//   const bool in_programs = runs_in_programs<group_norm_silu_into>("group_norm_silu");
template <auto op>
bool runs_in_programs(const char* name) {
  program_ops().push_back({std::string("ddpm_fast::") + name, [](std::vector<Value> values) {
                             return detail::bind<op>(op, std::move(values), detail::indices_of(op));
                           }});
  return true;
}

}  // namespace ddpm_fast
