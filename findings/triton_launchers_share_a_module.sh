#!/usr/bin/env bash
# Triton 3.6: loading a kernel's launcher may change the launcher that was loaded before it.
#
# Triton 3.6 compiles a launcher for each kind of arguments, a C extension, and names all of them __triton_launcher.
# Python keeps one module by that name. When a file is loaded again, as for a second kernel with the same kinds of
# arguments, Python does not make a new module: it writes that file's functions into the module that stands under the
# name, which is the one of another launcher if that was loaded last.
#
# Expected: the module that compile_module_from_src returns keeps the functions of its own source.
# What happens: after sources 1, 2 and 1 again, the module of source 2 has the function of source 1.
# Why it matters to a server of vision-language models: it loads dozens of kernels at start, from several threads, since
# that takes seconds (an encoder and a language model in one process do so anyway). Between a thread's load and its use of
# the module's function, another thread may load. Then a kernel gets another kernel's launcher: an error about the
# number of arguments if that differs, and wrong arguments if it doesn't. Load launchers under names of their own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.6.0
cat > "$work/launchers.py" <<'PY'
import sys

import triton
from triton.runtime.build import compile_module_from_src

NAME = "__triton_launcher"


def load(number: int):
    source = f"""
    #include <Python.h>
    static PyObject* launch(PyObject* module, PyObject* arguments) {{ return PyLong_FromLong({number}); }}
    static PyMethodDef functions[] = {{{{"launch", launch, METH_VARARGS, ""}}, {{NULL, NULL, 0, NULL}}}};
    static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{NAME}", NULL, -1, functions}};
    PyMODINIT_FUNC PyInit_{NAME}(void) {{ return PyModule_Create(&module); }}
    """
    return compile_module_from_src(source, NAME, library_dirs=[], include_dirs=[], libraries=[])


print("triton", triton.__version__, "Python", sys.version.split()[0])
first, second = load(1), load(2)
assert (first.launch(), second.launch()) == (1, 2)
again = load(1)
print(f"the second launcher is now number {second.launch()}; same module as the one just loaded: {again is second}")
assert second.launch() == 1 and again is second, "launchers keep their functions now"
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/launchers.py"
