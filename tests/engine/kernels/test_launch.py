"""Launchers that Triton compiles: kernels that are loaded by several threads get their own."""

from __future__ import annotations

import shutil

import pytest
from triton.runtime import build

import engine.kernels.launch  # noqa: F401

_SOURCE = """
#include <Python.h>
static PyObject* launch(PyObject* self, PyObject* args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&definition); }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_launcher_is_not_overwritten_by_another_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def load(number: int):
        return build.compile_module_from_src(
            _SOURCE % number, "__triton_launcher", library_dirs=[], include_dirs=[], libraries=[]
        )

    load(1)
    second = load(2)
    # As another thread may, before the first one has taken the function of what it loaded.
    first = load(1)
    assert (first.launch(), second.launch()) == (1, 2)
