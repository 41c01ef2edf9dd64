"""Small TFLite delegates, compiled here: they take no operation, but the runtime loads, asks and frees them as any other."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>

/* TfLiteDelegate of tensorflow/lite/core/c/common.h */
typedef struct Delegate {
  void *data;
  int (*prepare)(void *context, struct Delegate *delegate);
  void *copy_from, *copy_to, *free_handle;
  int64_t flags;
  void *opaque_builder;
} Delegate;

int prepared = 0;

static int prepare(void *context, Delegate *delegate) { prepared++; return PREPARE_STATUS; }

Delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
  if (!HAS_DEVICE) {
    report("no device is connected");
    return NULL;
  }
  Delegate *delegate = calloc(1, sizeof(Delegate));
  delegate->prepare = prepare;
  return delegate;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) { free(delegate); }
"""


def compile_delegate(directory: Path, *, prepare_status: int = 0, has_device: bool = True) -> Path:
    """Build a delegate; status 0 takes part, 1 refuses the model. Skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a delegate with")
    path = directory / f"libdelegate-{prepare_status}-{int(has_device)}.so"
    defines = [f"-DPREPARE_STATUS={prepare_status}", f"-DHAS_DEVICE={int(has_device)}"]
    command = [compiler, "-shared", "-fPIC", *defines, "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=_SOURCE, text=True, check=True, timeout=60)
    return path


def times_prepared(library: Path) -> int:
    """How often the runtime has asked a delegate of this process which operations it takes."""
    return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "prepared").value
