// Programs as Python sees them: a tuple of calls becomes a function of the tensors that differ at each run.
#include "program.h"

#include <exception>
#include <stdexcept>

#include "module.h"
#include "team.h"

namespace ddpm_fast {
namespace {

struct Program {
  std::vector<BoundCall> calls;
  std::vector<OptionalTensor> given;  // while it runs
};

constexpr const char* kProgram = "ddpm_fast.program";

Tensor to_tensor(PyObject* from) {
  AtenTensorHandle handle;
  check(tensor_from_python(from, &handle) == AOTI_TORCH_SUCCESS, "an argument is no tensor");
  return Tensor(handle);
}

// (k,) stands for the program's own argument k.
Value to_value(PyObject* from, const Program& program) {
  if (from == Py_None) return {};
  if (PyTuple_Check(from)) {
    const Py_ssize_t k = PyLong_AsSsize_t(PyTuple_GetItem(from, 0));
    return &program.given.at(k);
  }
  if (PyBool_Check(from)) return from == Py_True;
  if (PyLong_CheckExact(from)) {
    const int64_t number = PyLong_AsLongLong(from);
    check(number != -1 || PyErr_Occurred() == nullptr, "a number is too large");
    return number;
  }
  if (PyFloat_Check(from)) return PyFloat_AsDouble(from);
  return to_tensor(from);
}

// (name, (argument, ...))
BoundCall to_call(PyObject* from, const Program& program) {
  PyObject *const name = PyTuple_GetItem(from, 0), *const arguments = PyTuple_GetItem(from, 1);
  check(name != nullptr && arguments != nullptr, "a call must be a name and its arguments");
  for (const ProgramOp& op : program_ops()) {
    if (PyUnicode_CompareWithASCIIString(name, op.name.c_str()) != 0) continue;
    std::vector<Value> values;
    for (Py_ssize_t k = 0, count = PyTuple_Size(arguments); k < count; ++k) {
      values.push_back(to_value(PyTuple_GetItem(arguments, k), program));
    }
    return op.bind(std::move(values));
  }
  fail<std::invalid_argument>("there is no such op");
}

void destroy(PyObject* capsule) { delete static_cast<Program*>(PyCapsule_GetPointer(capsule, kProgram)); }

PyObject* run(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  auto& program = *static_cast<Program*>(PyCapsule_GetPointer(capsule, kProgram));
  std::string error;
  try {
    check(static_cast<size_t>(count) == program.given.size(), "another count of tensors");
    for (Py_ssize_t k = 0; k < count; ++k) program.given[k] = to_tensor(args[k]);
  } catch (const std::exception& raised) {
    PyErr_SetString(PyExc_ValueError, raised.what());
    return nullptr;
  }
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    as_a_team([&] {
      for (const BoundCall& call : program.calls) call();
    });
  } catch (const std::exception& raised) {
    error = raised.what();
  }
  PyEval_RestoreThread(thread);
  for (OptionalTensor& tensor : program.given) tensor.reset();
  if (error.empty()) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return nullptr;
}

PyMethodDef run_method = {
    "run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL, nullptr};

}  // namespace

PyObject* program_op_names(PyObject*, PyObject*) {
  Owned names(PyList_New(0), Py_DecRef);
  for (const ProgramOp& op : program_ops()) {
    const Owned name(PyUnicode_FromString(op.name.c_str()), Py_DecRef);
    if (PyList_Append(names.get(), name.get()) != 0) return nullptr;
  }
  return names.release();
}

PyObject* program(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    check(count == 2, "a program is made of calls, and a count of tensors");
    auto made = std::make_unique<Program>();
    made->given.resize(PyLong_AsSize_t(args[1]));
    for (Py_ssize_t k = 0, calls = PyTuple_Size(args[0]); k < calls; ++k) {
      made->calls.push_back(to_call(PyTuple_GetItem(args[0], k), *made));
    }
    const Owned capsule(PyCapsule_New(made.get(), kProgram, destroy), Py_DecRef);
    made.release();
    return PyCFunction_NewEx(&run_method, capsule.get(), nullptr);
  } catch (const std::exception& raised) {
    PyErr_SetString(PyExc_ValueError, raised.what());
    return nullptr;
  }
}

}  // namespace ddpm_fast
