// The norms as functions of a Python module, past PyTorch's dispatcher, which takes longer to call an op than
// a small norm takes. Each returns None where a call is anything but plain: the op then runs, or says what is
// wrong. torch 2.14 and later hand tensors over; without that `set_up` returns False.
#include <dlfcn.h>

#include <cstring>
#include <exception>

#include "../layout.h"
#include "group_norm.h"
#include "module.h"

namespace ddpm_fast {

AOTITorchError (*tensor_from_python)(void*, AtenTensorHandle*);

namespace {

AOTITorchError (*tensor_to_python)(AtenTensorHandle, void*, void**);
PyObject *tensor_type, *parameter_type, *watchers, *requires_grad;

struct NotPlain {};

void must(bool plain) {
  if (!plain) throw NotPlain();
}

// No mode, transform, tracer or profiler looks on: each of `watchers` is called and says something false.
void must_be_unwatched() {
  for (Py_ssize_t k = 0, count = PyTuple_Size(watchers); k < count; ++k) {
    PyObject* const answer = PyObject_CallNoArgs(PyTuple_GetItem(watchers, k));
    const bool watches = answer == nullptr || PyObject_IsTrue(answer) != 0;
    Py_XDECREF(answer);
    must(!watches);
  }
}

// A tensor of PyTorch's own class, dense on the CPU, that asks for no gradient. More than one element: with
// strides as in memory it is then no view of a complex number's imaginary part, which may be stored negated.
OptionalTensor plain_tensor(PyObject* from, bool grad_mode) {
  if (from == Py_None) return std::nullopt;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(from));
  must(type == tensor_type || type == parameter_type);
  AtenTensorHandle handle;
  must(tensor_from_python(from, &handle) == AOTI_TORCH_SUCCESS);
  const Tensor x(handle);
  int32_t layout = 0;
  must(aoti_torch_get_layout(handle, &layout) == AOTI_TORCH_SUCCESS && layout == aoti_torch_layout_strided());
  must(x.is_cpu() && x.numel() > 1 && (x.is_contiguous() || is_channels_last(x)));
  must(x.const_data_ptr() != nullptr);
  if (grad_mode) {
    PyObject* const asked = PyObject_GetAttr(from, requires_grad);
    const bool asks = asked != Py_False;
    Py_XDECREF(asked);
    must(!asks);
  }
  return x;
}

int64_t natural_number(PyObject* from) {
  must(PyLong_CheckExact(from));
  const int64_t number = PyLong_AsLongLong(from);
  must(number > 0);  // -1 says that it is too large
  return number;
}

PyObject* to_python(const Tensor& x) {
  void* object = nullptr;
  must(tensor_to_python(x.get(), nullptr, &object) == AOTI_TORCH_SUCCESS);
  return static_cast<PyObject*>(object);
}

// (x, skip, num_groups, weight, bias, eps, add, scale, shift, act, concat) -> y, or with concat (y, cat)
PyObject* norm(PyObject* const* args) {
  must_be_unwatched();  // first: a transform's tensors have no memory to look at
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  const auto tensor = [&](int k) { return plain_tensor(args[k], grad_mode); };
  const OptionalTensor x = tensor(0), skip = tensor(1);
  must(x && x->dim() >= 2 && (!skip || skip->dim() == x->dim()));
  must(PyFloat_Check(args[5]) && PyUnicode_Check(args[9]) && PyBool_Check(args[10]));
  const int64_t batch = x->size(0), channels = x->size(1) + (skip ? skip->size(1) : 0);
  const auto operand = [&](int k, bool by_sample) {
    OptionalTensor values = tensor(k);
    if (values) {
      must(values->dim() == 1 + by_sample && values->size(by_sample) == channels);
      must(!by_sample || values->size(0) == batch);
    }
    return values;
  };
  const double eps = PyFloat_AsDouble(args[5]);
  must(eps >= 0);
  const bool silu = PyUnicode_CompareWithASCIIString(args[9], "silu") == 0;
  must(silu || PyUnicode_CompareWithASCIIString(args[9], "none") == 0);
  const GroupNormCall call{
      *x,
      skip,
      natural_number(args[2]),
      operand(3, false),
      operand(4, false),
      eps,
      operand(6, true),
      operand(7, true),
      operand(8, true),
      silu,
      args[10] == Py_True};

  GroupNormResult result;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    result = group_norm(call);
  } catch (...) {
    PyEval_RestoreThread(thread);
    throw;
  }
  PyEval_RestoreThread(thread);
  Owned y(to_python(*result.y), Py_DecRef);
  if (!call.builds) return y.release();
  const Owned both(to_python(*result.concat), Py_DecRef);
  return PyTuple_Pack(2, y.get(), both.get());
}

PyObject* group_norm_silu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    must(count == 11);
    return norm(args);
  } catch (const NotPlain&) {
  } catch (const std::exception&) {  // the op will say so too
  }
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* set_up(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto find = [](auto& function, const char* name) {
    void* const symbol = dlsym(RTLD_DEFAULT, name);
    std::memcpy(&function, &symbol, sizeof(symbol));
    return symbol != nullptr;
  };
  if (count != 3 || !find(tensor_from_python, "torch_tensor_from_pyobject") ||
      !find(tensor_to_python, "torch_tensor_to_pyobject")) {
    Py_RETURN_FALSE;
  }
  for (Py_ssize_t k = 0; k < count; ++k) Py_INCREF(args[k]);
  tensor_type = args[0], parameter_type = args[1], watchers = args[2];
  requires_grad = PyUnicode_InternFromString("requires_grad");
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"set_up", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(set_up)), METH_FASTCALL, nullptr},
    {"group_norm_silu", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(group_norm_silu)),
     METH_FASTCALL, nullptr},
    {"program_ops", program_op_names, METH_NOARGS, nullptr},
    {"program", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(program)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace ddpm_fast

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&ddpm_fast::module); }
