/* The key of a call, by which native_plan.c finds its plan; the first half of the module native_plan.

   It is the bytes of everything that a call depends on but the values in its tensors: shapes, strides, dtypes, devices,
   alignments, plain arguments, the precision of float32 products. Tensors are read through PyTorch's stable C interface
   (aoti_torch_*), whose addresses come from Python (native_plan.py), so no header but Python's is needed. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define MOST_WORDS 8192 /* of a key */
#define MOST_BASES 1024 /* tensors of a call and pieces of memory of a plan */

typedef int32_t (*ReadInt64)(void *tensor, int64_t *value);
typedef int32_t (*ReadInt32)(void *tensor, int32_t *value);
typedef int32_t (*ReadPointer)(void *tensor, void **value);

static struct {
    ReadInt64 dim;
    ReadPointer sizes, strides, address;
    ReadInt32 dtype, device_type, device_index;
} torch_; /* each returns 0, or an error */

static PyTypeObject *tensor_type, *parameter_type, *recorded_type, *dtype_type;
static Py_ssize_t tensor_offset; /* of the at::Tensor in a Python tensor */
static PyObject *key_of_recorded, *precision, *key_name;

/* Where a Python tensor holds its at::Tensor, one pointer, which tensor._cdata tells; -1 where it is not one place. */
static Py_ssize_t find_offset(PyObject *tensor) {
    PyObject *number = PyObject_GetAttrString(tensor, "_cdata");
    if (!number) return -1;
    void *wanted = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    if (PyErr_Occurred()) return -1;
    Py_ssize_t found = -1, end = Py_TYPE(tensor)->tp_basicsize - (Py_ssize_t)sizeof(void *);
    for (Py_ssize_t at = sizeof(PyObject); at <= end; at += sizeof(void *)) {
        if (*(void **)((char *)tensor + at) != wanted) continue;
        if (found >= 0) return -1;
        found = at;
    }
    return found;
}

typedef struct {
    int words, bases;
    uint64_t word[MOST_WORDS], base[MOST_BASES];
} Call;

enum { NONE = 1, TRUE_, FALSE_, INTEGER, FLOAT, TEXT, DTYPE, SEQUENCE, TENSOR };

static int is_tensor(PyObject *value) { return Py_TYPE(value) == tensor_type || Py_TYPE(value) == parameter_type; }

static void *handle_of(PyObject *tensor) { return (char *)tensor + tensor_offset; }

/* These return 0, or -1 for what no plan supports. */
static int add_bytes(Call *call, const void *bytes, Py_ssize_t size) {
    Py_ssize_t words = (size + 7) / 8;
    if (words > MOST_WORDS - call->words) return -1;
    if (words) call->word[call->words + words - 1] = 0;
    memcpy(call->word + call->words, bytes, size);
    call->words += (int)words;
    return 0;
}

static int add_word(Call *call, uint64_t word) {
    if (call->words == MOST_WORDS) return -1;
    call->word[call->words++] = word;
    return 0;
}

static int add_tensor(Call *call, PyObject *tensor) {
    void *handle = handle_of(tensor), *sizes, *strides, *address;
    int64_t dim;
    int32_t dtype, device_type, device_index;
    if (!*(void **)handle || call->bases == MOST_BASES) return -1;
    if (torch_.dim(handle, &dim) || torch_.sizes(handle, &sizes) || torch_.strides(handle, &strides) ||
        torch_.dtype(handle, &dtype) || torch_.device_type(handle, &device_type) ||
        torch_.device_index(handle, &device_index) || torch_.address(handle, &address))
        return -1;
    call->base[call->bases++] = (uint64_t)address;
    uint64_t facts = TENSOR | (uint64_t)dim << 8 | (uint64_t)(uint8_t)dtype << 16 |
                     (uint64_t)(uint8_t)device_type << 24 |
                     (uint64_t)(uint16_t)device_index << 32 | (uint64_t)((uintptr_t)address % 16) << 48;
    return add_word(call, facts) || add_bytes(call, sizes, 8 * dim) || add_bytes(call, strides, 8 * dim) ? -1 : 0;
}

/* What stands for a tensor in a recording has its part of the key, and no address. */
static int add_recorded(Call *call, PyObject *value) {
    PyObject *bytes = PyObject_GetAttr(value, key_name); /* None until it was asked for */
    if (bytes == Py_None) {
        Py_DECREF(bytes);
        bytes = PyObject_CallOneArg(key_of_recorded, value);
    }
    int unknown = !bytes || !PyBytes_Check(bytes) || add_bytes(call, PyBytes_AS_STRING(bytes), PyBytes_GET_SIZE(bytes));
    Py_XDECREF(bytes);
    PyErr_Clear();
    return unknown ? -1 : 0;
}

static int add_value(Call *call, PyObject *value) {
    if (is_tensor(value)) return add_tensor(call, value);
    if (Py_TYPE(value) == recorded_type) return add_recorded(call, value);
    if (value == Py_None) return add_word(call, NONE);
    if (value == Py_True) return add_word(call, TRUE_);
    if (value == Py_False) return add_word(call, FALSE_);
    if (Py_TYPE(value) == dtype_type) return add_word(call, DTYPE) || add_word(call, (uintptr_t)value) ? -1 : 0;
    if (PyLong_CheckExact(value)) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        return overflow || add_word(call, INTEGER) || add_word(call, (uint64_t)number) ? -1 : 0;
    }
    if (PyFloat_CheckExact(value)) {
        double number = PyFloat_AS_DOUBLE(value);
        return add_word(call, FLOAT) || add_bytes(call, &number, 8) ? -1 : 0;
    }
    if (PyUnicode_CheckExact(value)) {
        Py_ssize_t size;
        const char *text = PyUnicode_AsUTF8AndSize(value, &size);
        if (!text) PyErr_Clear();
        return !text || add_word(call, TEXT | (uint64_t)size << 8) || add_bytes(call, text, size) ? -1 : 0;
    }
    if (!PyTuple_Check(value)) return -1;
    Py_ssize_t size = PyTuple_GET_SIZE(value);
    if (add_word(call, SEQUENCE | (uint64_t)size << 8) || add_word(call, (uintptr_t)Py_TYPE(value))) return -1;
    for (Py_ssize_t i = 0; i < size; i++)
        if (add_value(call, PyTuple_GET_ITEM(value, i))) return -1;
    return 0;
}

static int describe(Call *call, PyObject *arguments) {
    call->words = call->bases = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); i++)
        if (add_value(call, PyTuple_GET_ITEM(arguments, i))) return -1;
    PyObject *state = PyObject_CallNoArgs(precision);
    if (!state) {
        PyErr_Clear();
        return -1;
    }
    int unknown = add_value(call, state);
    Py_DECREF(state);
    return unknown;
}

static PyObject *key_of(Call *call) {
    return PyBytes_FromStringAndSize((char *)call->word, 8 * (Py_ssize_t)call->words);
}

static PyObject *key(PyObject *module, PyObject *arguments) {
    Call call;
    if (!PyTuple_Check(arguments)) return PyErr_Format(PyExc_TypeError, "key takes the tuple of a call's arguments");
    if (describe(&call, arguments)) Py_RETURN_NONE;
    return key_of(&call);
}

/* Appends to ``found`` the part of the key that each tensor among the values makes; 0, or -1. */
static int add_keys(PyObject *found, Call *call, PyObject *values) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); i++) {
        PyObject *value = PyTuple_GET_ITEM(values, i);
        if (is_tensor(value) || Py_TYPE(value) == recorded_type) {
            call->words = call->bases = 0;
            PyObject *bytes = add_value(call, value) ? NULL : key_of(call);
            int failed = !bytes || PyList_Append(found, bytes);
            Py_XDECREF(bytes);
            if (failed) return -1;
        } else if (PyTuple_Check(value) && add_keys(found, call, value)) {
            return -1;
        }
    }
    return 0;
}

/* keys(arguments): those of a call's tensors, in order; None where one has none. */
static PyObject *keys(PyObject *module, PyObject *arguments) {
    Call call;
    if (!PyTuple_Check(arguments)) return PyErr_Format(PyExc_TypeError, "keys takes the tuple of a call's arguments");
    PyObject *found = PyList_New(0);
    if (!found || !add_keys(found, &call, arguments)) return found;
    Py_DECREF(found);
    PyErr_Clear();
    Py_RETURN_NONE;
}
