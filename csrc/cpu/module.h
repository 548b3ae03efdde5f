// The library as a Python module, of Python's limited API: what its files share.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <memory>

#include "../common.h"

namespace ddpm_fast {

using Owned = std::unique_ptr<PyObject, void (*)(PyObject*)>;

// torch 2.14 and later hand tensors over; null before `set_up`.
extern AOTITorchError (*tensor_from_python)(void*, AtenTensorHandle*);

// program_ops() -> the names of the ops that a program may have
PyObject* program_op_names(PyObject*, PyObject*);
// program(((name, (argument, ..., result, ...)), ...), count) -> a function of `count` tensors that makes
// these calls; an argument (k,) is the k-th of those
PyObject* program(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace ddpm_fast
