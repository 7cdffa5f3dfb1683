/* A recorded call of the kernels, repeated by one call: allocate, patch pointers, launch.

   A plan is a list of launches. A parameter of a launch is eight bytes: a constant, or the address of a piece of memory
   plus an offset. The pieces are the call's tensors in order, then what the plan allocates. In the place of a launch
   may be another plan, whose pieces of memory are then the parameters:

       bases      = addresses of the given tensors, then of one new tensor for each allocation
       parameter  = constant,  or  bases[memory] + offset
       results    = new tensors, or parts of them

   Plans are found by a key: the bytes of everything that a call depends on but the values in its tensors (shapes,
   strides, dtypes, devices, alignments, plain arguments, the precision of float32 products). Addresses are read
   again on every call and a plan keeps nothing of a call, so threads may repeat one plan at the same time.

   Tensors are read through PyTorch's stable C interface (aoti_torch_*), allocated by the function that Inductor's code
   calls, on the current stream, and launched by cuLaunchKernel. The addresses of these functions come from Python
   (native_plan.py), so this file needs no header but Python's. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define MOST_WORDS 8192      /* of a key */
#define MOST_BASES 1024      /* tensors of a call and allocations of a plan */
#define MOST_PARAMETERS 128  /* of a kernel */
#define CONSTANT (-1)        /* in the place of a memory's number */
#define PART 0               /* in the place of the threads: a plan is repeated */

typedef int32_t (*ReadInt64)(void *tensor, int64_t *value);
typedef int32_t (*ReadInt32)(void *tensor, int32_t *value);
typedef int32_t (*ReadPointer)(void *tensor, void **value);
typedef int (*LaunchKernel)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                            void *stream, void **parameters, void **extra);
typedef int (*CurrentDevice)(int *device);

static struct {
    ReadInt64 dim;
    ReadPointer sizes, strides, address;
    ReadInt32 dtype, device_type, device_index;
} torch_; /* each returns 0, or an error */

static PyTypeObject *tensor_type, *parameter_type, *recorded_type, *dtype_type;
static Py_ssize_t tensor_offset; /* of the at::Tensor in a Python tensor */
static PyObject *as_strided, *key_of_recorded, *precision, *dispatch_modes, *runtime_knobs;
static PyObject *enter_hook_name, *exit_hook_name, *calls_name, *key_name;

/* ---- The key of a call ---- */

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

/* ---- Plans ---- */

typedef struct {
    int64_t function, grid[3], threads, shared, parameters; /* function: or a plan; the last: how many */
} Launch;

typedef struct {
    int64_t memory; /* number of a base, or CONSTANT */
    uint64_t value; /* offset in bytes, or the constant */
} Parameter;

typedef struct {
    PyObject_HEAD
    LaunchKernel launch;
    CurrentDevice current_device;
    int device, given, single; /* given: how many tensors a call has; single: the result is one tensor, no tuple */
    PyObject *stream_of, *allocate, *allocations, *launches, *parameters, *results, *owners; /* of kernels, or plans */
    PyObject *device_number, *arguments; /* the latter owns the seven above */
} Plan;

static void Plan_dealloc(Plan *plan) {
    Py_XDECREF(plan->device_number);
    Py_XDECREF(plan->arguments);
    Py_TYPE(plan)->tp_free((PyObject *)plan);
}

static PyTypeObject PlanType;

/* Whether a launch of ``plan`` is a kernel's, or a plan's that its parameters suit. */
static int is_whole(const Plan *plan, const Launch *launch, PyObject *owner) {
    if (launch->threads != PART) return Py_TYPE(owner) != &PlanType && launch->parameters <= MOST_PARAMETERS;
    if (Py_TYPE(owner) != &PlanType || (int64_t)(uintptr_t)owner != launch->function) return 0;
    const Plan *part = (const Plan *)owner;
    return part->device == plan->device && launch->parameters == part->given + PyTuple_GET_SIZE(part->allocations);
}

/* Whether every number lies where it may: a wrong one would be an address that nobody gave. */
static int is_sound(Plan *plan) {
    Py_ssize_t allocations = PyTuple_GET_SIZE(plan->allocations), total = 0;
    Py_ssize_t launches = PyBytes_GET_SIZE(plan->launches) / (Py_ssize_t)sizeof(Launch);
    Py_ssize_t parameters = PyBytes_GET_SIZE(plan->parameters) / (Py_ssize_t)sizeof(Parameter);
    const Launch *launch = (const Launch *)PyBytes_AS_STRING(plan->launches);
    const Parameter *parameter = (const Parameter *)PyBytes_AS_STRING(plan->parameters);
    int sound = plan->given >= 0 && plan->given + allocations <= MOST_BASES;
    if (PyList_GET_SIZE(plan->owners) != launches) return 0;
    for (Py_ssize_t i = 0; i < launches; total += launch[i++].parameters)
        sound &= launch[i].parameters >= 0 && is_whole(plan, launch + i, PyList_GET_ITEM(plan->owners, i));
    for (Py_ssize_t i = 0; i < parameters; i++)
        sound &= parameter[i].memory >= CONSTANT && parameter[i].memory < plan->given + allocations;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plan->results); i++) {
        long number = 0;
        PyObject *part = Py_None, *result = PyTuple_GET_ITEM(plan->results, i);
        if (result != Py_None && !PyArg_ParseTuple(result, "lO", &number, &part)) return 0;
        sound &= result == Py_None || (number >= 0 && number < allocations);
        sound &= part == Py_None || (PyTuple_Check(part) && PyTuple_GET_SIZE(part) == 3);
    }
    return sound && total == parameters && (!plan->single || PyTuple_GET_SIZE(plan->results) == 1);
}

/* Plan(launch, current_device, device, given, single, stream_of, allocate, allocations, launches, parameters, results,
   owners): see native_plan.py, which makes them. */
static PyObject *Plan_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    unsigned long long launch, current_device;
    Plan *plan = (Plan *)type->tp_alloc(type, 0);
    if (!plan) return NULL;
    if (PyArg_ParseTuple(arguments, "KKiipOOO!SSO!O!", &launch, &current_device, &plan->device, &plan->given,
                         &plan->single, &plan->stream_of, &plan->allocate, &PyTuple_Type, &plan->allocations,
                         &plan->launches, &plan->parameters, &PyTuple_Type, &plan->results, &PyList_Type,
                         &plan->owners)) {
        plan->launch = (LaunchKernel)(uintptr_t)launch;
        plan->current_device = (CurrentDevice)(uintptr_t)current_device;
        plan->arguments = Py_NewRef(arguments);
        plan->device_number = PyLong_FromLong(plan->device);
        if (plan->device_number && is_sound(plan)) return (PyObject *)plan;
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the numbers of a plan do not fit each other");
    }
    Py_DECREF(plan);
    return NULL;
}

static PyTypeObject PlanType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "native_plan.Plan",
    .tp_basicsize = sizeof(Plan),
    .tp_dealloc = (destructor)Plan_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = Plan_new,
};

/* ---- Repeating a call ---- */

/* The new tensors, their addresses added to the bases; NULL with an exception set. */
static PyObject *allocate(Plan *plan, Call *call) {
    Py_ssize_t count = PyTuple_GET_SIZE(plan->allocations);
    PyObject *made = PyTuple_New(count);
    for (Py_ssize_t i = 0; made && i < count; i++) {
        PyObject *tensor = PyObject_CallObject(plan->allocate, PyTuple_GET_ITEM(plan->allocations, i));
        void *address;
        if (!tensor) {
            Py_CLEAR(made);
        } else if (!is_tensor(tensor) || torch_.address(handle_of(tensor), &address)) {
            PyErr_SetString(PyExc_RuntimeError, "an allocation returned no tensor that has memory");
            Py_DECREF(tensor);
            Py_CLEAR(made);
        } else {
            call->base[plan->given + i] = (uint64_t)address;
            PyTuple_SET_ITEM(made, i, tensor);
        }
    }
    return made;
}

/* The driver's error code, 0 for none. Runs without the interpreter's lock. */
static int launch_all(const Plan *plan, const uint64_t *base, void *stream) {
    const Launch *launch = (const Launch *)PyBytes_AS_STRING(plan->launches);
    const Launch *end = (const Launch *)(PyBytes_AS_STRING(plan->launches) + PyBytes_GET_SIZE(plan->launches));
    const Parameter *parameter = (const Parameter *)PyBytes_AS_STRING(plan->parameters);
    uint64_t value[MOST_BASES]; /* of a part all of its memory */
    void *pointer[MOST_PARAMETERS];
    for (int i = 0; i < MOST_PARAMETERS; i++) pointer[i] = &value[i];
    for (; launch < end; launch++) {
        for (int64_t i = 0; i < launch->parameters; i++, parameter++)
            value[i] = parameter->value + (parameter->memory == CONSTANT ? 0 : base[parameter->memory]);
        int error = launch->threads == PART
                        ? launch_all((const Plan *)launch->function, value, stream)
                        : plan->launch((void *)launch->function, (unsigned)launch->grid[0], (unsigned)launch->grid[1],
                                       (unsigned)launch->grid[2], (unsigned)launch->threads, 1, 1,
                                       (unsigned)launch->shared, stream, pointer, NULL);
        if (error) return error;
    }
    return 0;
}

/* What the call returns, of what was allocated. */
static PyObject *results_of(Plan *plan, PyObject *made) {
    Py_ssize_t count = PyTuple_GET_SIZE(plan->results);
    PyObject *results = PyTuple_New(count);
    for (Py_ssize_t i = 0; results && i < count; i++) {
        PyObject *result = PyTuple_GET_ITEM(plan->results, i), *value;
        if (result == Py_None) {
            value = Py_NewRef(Py_None);
        } else {
            PyObject *tensor = PyTuple_GET_ITEM(made, PyLong_AsLong(PyTuple_GET_ITEM(result, 0)));
            PyObject *part = PyTuple_GET_ITEM(result, 1); /* None: the whole, or (shape, strides, offset) */
            if (part == Py_None)
                value = Py_NewRef(tensor);
            else
                value = PyObject_CallFunctionObjArgs(as_strided, tensor, PyTuple_GET_ITEM(part, 0),
                                                     PyTuple_GET_ITEM(part, 1), PyTuple_GET_ITEM(part, 2), NULL);
        }
        if (!value)
            Py_CLEAR(results);
        else
            PyTuple_SET_ITEM(results, i, value);
    }
    if (!results || !plan->single) return results;
    PyObject *only = Py_NewRef(PyTuple_GET_ITEM(results, 0));
    Py_DECREF(results);
    return only;
}

/* 1 where Triton's launch hooks, a profiler's, want to hear of each launch, 0 where none does. */
static int is_hooked(PyObject *name) {
    PyObject *hook = PyObject_GetAttr(runtime_knobs, name), *calls;
    int hooked = hook != Py_None;
    if (hook && hooked && (calls = PyObject_GetAttr(hook, calls_name))) {
        hooked = !PyList_Check(calls) || PyList_GET_SIZE(calls) > 0;
        Py_DECREF(calls);
    }
    PyErr_Clear();
    Py_XDECREF(hook);
    return hooked;
}

/* Whether no mode of PyTorch's that dispatches in Python would hear of an allocation. */
static int is_unseen(void) {
    PyObject *modes = PyObject_CallNoArgs(dispatch_modes);
    int unseen = modes && PyLong_Check(modes) && PyLong_AsLong(modes) == 0;
    Py_XDECREF(modes);
    PyErr_Clear();
    return unseen;
}

static PyObject *run(Plan *plan, Call *call) {
    int device, error;
    if (call->bases != plan->given || plan->current_device(&device) || device != plan->device) Py_RETURN_NOTIMPLEMENTED;
    if (is_hooked(enter_hook_name) || is_hooked(exit_hook_name)) Py_RETURN_NOTIMPLEMENTED;
    PyObject *stream = PyObject_CallOneArg(plan->stream_of, plan->device_number);
    if (!stream) return NULL;
    void *raw_stream = (void *)PyLong_AsUnsignedLongLong(stream);
    Py_DECREF(stream);
    PyObject *made = PyErr_Occurred() ? NULL : allocate(plan, call);
    if (!made) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    error = launch_all(plan, call->base, raw_stream);
    Py_END_ALLOW_THREADS;
    PyObject *results =
        error ? PyErr_Format(PyExc_RuntimeError, "CUDA error %d at a launch", error) : results_of(plan, made);
    Py_DECREF(made);
    return results;
}

/* repeat(plans, arguments): the results, or NotImplemented where Python has to look at the call. */
static PyObject *repeat(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    Call call;
    if (count != 2 || !PyDict_Check(given[0]) || !PyTuple_Check(given[1]))
        return PyErr_Format(PyExc_TypeError, "repeat takes a dictionary of plans and the tuple of a call's arguments");
    if (!is_unseen() || describe(&call, given[1])) Py_RETURN_NOTIMPLEMENTED;
    PyObject *bytes = key_of(&call);
    if (!bytes) return NULL;
    PyObject *plan;
#ifdef Py_GIL_DISABLED
    PyDict_GetItemRef(given[0], bytes, &plan);
#else
    plan = Py_XNewRef(PyDict_GetItemWithError(given[0], bytes));
#endif
    Py_DECREF(bytes);
    if (!plan) return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *results = Py_TYPE(plan) == &PlanType
                            ? run((Plan *)plan, &call)
                            : PyErr_Format(PyExc_TypeError, "%R is no native plan", plan);
    Py_DECREF(plan);
    return results;
}

/* ---- The module ---- */

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

/* Takes a tensor and a parameter, the types dtype and RecordedTensor, and functions of Python and PyTorch. */
static PyObject *configure(PyObject *module, PyObject *arguments) {
    PyObject *tensor, *parameter, *dtype, *recorded, *functions;
    unsigned long long f[7];
    if (!PyArg_ParseTuple(arguments, "OOOOOO!OOOO", &tensor, &parameter, &dtype, &recorded, &key_of_recorded,
                          &PyTuple_Type, &functions, &as_strided, &precision, &dispatch_modes, &runtime_knobs) ||
        !PyArg_ParseTuple(functions, "KKKKKKK", f, f + 1, f + 2, f + 3, f + 4, f + 5, f + 6))
        return NULL;
    tensor_offset = find_offset(tensor);
    if (tensor_offset < 0 || tensor_offset != find_offset(parameter))
        return PyErr_Occurred() ? NULL
                                : PyErr_Format(PyExc_RuntimeError, "this PyTorch lays its tensors out otherwise");
    torch_.dim = (ReadInt64)(uintptr_t)f[0];
    torch_.sizes = (ReadPointer)(uintptr_t)f[1];
    torch_.strides = (ReadPointer)(uintptr_t)f[2];
    torch_.dtype = (ReadInt32)(uintptr_t)f[3];
    torch_.device_type = (ReadInt32)(uintptr_t)f[4];
    torch_.device_index = (ReadInt32)(uintptr_t)f[5];
    torch_.address = (ReadPointer)(uintptr_t)f[6];
    tensor_type = (PyTypeObject *)Py_NewRef(Py_TYPE(tensor));
    parameter_type = (PyTypeObject *)Py_NewRef(Py_TYPE(parameter));
    dtype_type = (PyTypeObject *)Py_NewRef(dtype);
    recorded_type = (PyTypeObject *)Py_NewRef(recorded);
    PyObject *kept[] = {key_of_recorded, as_strided, precision, dispatch_modes, runtime_knobs};
    for (int i = 0; i < 5; i++) Py_INCREF(kept[i]);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, NULL},
    {"key", key, METH_O, NULL},
    {"keys", keys, METH_O, NULL},
    {"repeat", (PyCFunction)(void (*)(void))repeat, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "native_plan", NULL, -1, methods};

PyMODINIT_FUNC PyInit_native_plan(void) {
    enter_hook_name = PyUnicode_InternFromString("launch_enter_hook");
    exit_hook_name = PyUnicode_InternFromString("launch_exit_hook");
    calls_name = PyUnicode_InternFromString("calls");
    key_name = PyUnicode_InternFromString("key");
    PyObject *module = PyModule_Create(&definition);
    if (!module || PyType_Ready(&PlanType) || PyModule_AddObject(module, "Plan", Py_NewRef(&PlanType)) ||
        PyModule_AddIntConstant(module, "MOST_BASES", MOST_BASES))
        return NULL;
#ifdef Py_GIL_DISABLED
    PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}
