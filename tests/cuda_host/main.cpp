// Runs a file of cases through the kernels and writes down what they leave.
//
//   cuda_host CASES RESULTS ORDER
//
// CASES is lines of words, a tensor's bytes behind its line:
//
//   case ID OP
//   number NAME VALUE
//   in NAME OFFSET BYTES     a tensor that lies OFFSET bytes past 16-byte alignment
//   out NAME OFFSET BYTES    one that the kernel fills; no bytes follow
//   inout NAME OFFSET BYTES  one that it reads and fills
//   same NAME OTHER          another name of a tensor
//   last NAME OTHER          a tensor of the case before this one
//   end
//
// RESULTS is `case ID`, then `NAME BYTES` and the bytes of each tensor that was filled, then `end`. Every
// tensor has an allocation of its own and no byte more; what is to be filled holds NaN before.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>

#include "kernels.h"

namespace {

using namespace ddpm_fast;
using namespace ddpm_fast::cuda;

class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t offset = 0)
      : memory_(new char[offset + bytes]), offset_(offset), bytes_(bytes) {
    std::memset(memory_.get(), 0xff, offset + bytes);
  }
  char* data() const { return memory_.get() + offset_; }
  size_t bytes() const { return bytes_; }
  bool whole() const {  // ASan sees what is past the end, and before the beginning only where OFFSET is 0
    return std::all_of(memory_.get(), memory_.get() + offset_, [](char byte) { return byte == '\xff'; });
  }

 private:
  std::unique_ptr<char[]> memory_;  // of char: exactly what is asked for
  size_t offset_, bytes_;
};

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

class Case {
 public:
  std::string id, op;

  Case() = default;

  Case(std::istream& from, const Case& last) {
    std::string word, name;
    from >> id >> op;
    while (from >> word && word != "end") {
      from >> name;
      if (word == "number") {
        from >> word;
        numbers_[name] = std::strtod(word.c_str(), nullptr);
      } else if (word == "same") {
        from >> word;
        tensors_[name] = tensors_.at(word);
      } else if (word == "last") {
        from >> word;
        tensors_[name] = last.tensors_.at(word);
      } else {
        size_t offset, bytes;
        from >> offset >> bytes;
        from.get();  // the line's end
        tensors_[name] = std::make_shared<Buffer>(bytes, offset);
        if (word != "out") from.read(tensors_[name]->data(), static_cast<std::streamsize>(bytes));
        if (word != "in") outputs_.push_back(name);
      }
    }
  }

  void write(std::ostream& to) const {
    to << "case " << id << "\n";
    for (const std::string& name : outputs_) {
      const Buffer& buffer = *tensors_.at(name);
      to << name << " " << buffer.bytes() << "\n";
      to.write(buffer.data(), static_cast<std::streamsize>(buffer.bytes()));
    }
    to << "end\n";
  }

  void check() const {
    for (const auto& [name, buffer] : tensors_) {
      if (!buffer->whole()) refuse("a write before the first element of " + name);
    }
  }

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }

  template <typename T = double>
  T number(const std::string& name) const {
    if (numbers_.count(name) == 0) refuse(op + " has no number " + name);
    return static_cast<T>(numbers_.at(name));
  }
  int64_t integer(const std::string& name) const { return number<int64_t>(name); }
  Dtype dtype(const std::string& name = "dtype") const { return static_cast<Dtype>(integer(name)); }

  template <typename T = void>
  T* tensor(const std::string& name) const {  // null if it is not given
    return has(name) ? reinterpret_cast<T*>(tensors_.at(name)->data()) : nullptr;
  }

  PerSample per_sample(const std::string& name) const {
    if (!has(name)) return {};
    return {tensor<int64_t>(name), tensors_.at(name)->bytes() == 8 ? 0 : 1};
  }

  Operand operand(const std::string& name) const {
    if (!has(name)) return {};
    return {tensor(name), dtype(name + "_dtype"), integer(name + "_stride")};
  }

  GroupNorm group_norm() const {
    return {
        dtype(),
        integer("channels_last") != 0,
        integer("batch"),
        integer("channels"),
        integer("pixels"),
        integer("groups"),
        tensor("x"),
        tensor("skip"),
        integer("x_channels"),
        operand("weight"),
        operand("bias"),
        operand("add"),
        operand("scale"),
        operand("shift"),
        number<float>("eps"),
        integer("silu") != 0};
  }

 private:
  std::map<std::string, double> numbers_;
  std::map<std::string, std::shared_ptr<Buffer>> tensors_;
  std::vector<std::string> outputs_;
};

void run(const Case& given) {
  const auto integer = [&](const char* name) { return given.integer(name); };
  const auto tensor = [&](const char* name) { return given.tensor(name); };
  const auto floats = [&](const char* name) { return given.tensor<float>(name); };
  const auto words = [&](const char* name) { return given.tensor<int64_t>(name); };
  const auto per_sample = [&](const char* name) { return given.per_sample(name); };

  if (given.op == "q_sample") {
    q_sample(
        {given.dtype(), integer("batch"), integer("elements"), tensor("x0"), tensor("noise"), tensor("x_t"),
         floats("table"), integer("rows"), per_sample("t")},
        nullptr);
  } else if (given.op == "q_sample_counter") {
    q_sample_counter(
        {given.dtype(),
         integer("batch"),
         integer("elements"),
         {integer("layout_pixels"), integer("layout_channels")},
         tensor("x0"),
         tensor("x_t"),
         tensor("noise"),
         floats("table"),
         integer("rows"),
         per_sample("t"),
         per_sample("seed"),
         per_sample("image_index")},
        nullptr);
  } else if (given.op == "posterior_step") {
    posterior_step(
        {given.dtype(),
         given.dtype("out_dtype"),
         integer("batch"),
         integer("elements"),
         integer("out_elements"),
         {integer("layout_pixels"), integer("layout_channels")},
         tensor("x"),
         tensor("out"),
         tensor("noise"),
         tensor("x0_prev"),
         tensor("x_next"),
         tensor("x0"),
         floats("table"),
         integer("rows"),
         integer("columns"),
         per_sample("i"),
         per_sample("seed"),
         per_sample("image_index"),
         floats("clip_each"),
         given.number<float>("clip")},
        nullptr);
  } else if (given.op == "counter_normal") {
    counter_normal(
        {integer("batch"), integer("elements"), floats("out"), per_sample("seed"), per_sample("image_index"),
         per_sample("step"), integer("stream")},
        nullptr);
  } else if (given.op == "philox4x32_10") {
    philox4x32_10({words("counter"), words("key"), words("out"), integer("n")}, nullptr);
  } else if (given.op == "group_norm_silu") {
    const GroupNorm norm = given.group_norm();
    const Buffer scratch(sizeof(float) * group_norm_scratch(norm));
    group_norm_silu(norm, tensor("y"), tensor("concat"), reinterpret_cast<float*>(scratch.data()), nullptr);
  } else if (given.op == "group_norm_silu_backward") {
    const GroupNorm norm = given.group_norm();
    const Buffer scratch(sizeof(float) * group_norm_backward_scratch(norm));
    group_norm_silu_backward(
        norm, tensor("grad"),
        {tensor("grad_x"), tensor("grad_skip"), floats("grad_weight"), floats("grad_bias"),
         floats("grad_add"), floats("grad_scale"), floats("grad_shift")},
        reinterpret_cast<float*>(scratch.data()), nullptr);
  } else {
    refuse("no op " + given.op);
  }
}

}  // namespace

int main(int, char** words) {
  std::ifstream cases(words[1], std::ios::binary);
  std::ofstream results(words[2], std::ios::binary);
  cuda_host::descending = words[3] == std::string("descending");
  std::string word;
  Case last;
  while (cases >> word) {
    Case given(cases, last);
    std::cerr << given.id << std::endl;  // the last one is where it ended
    run(given);
    given.check();
    given.write(results);
    results.flush();
    last = std::move(given);
  }
}
