/* A recorded call of the kernels, repeated by one call: allocate, patch pointers, launch.

   A plan is a list of launches. A parameter of a launch is eight bytes: a constant, or the address of a piece of memory
   plus an offset. In the place of a launch may be another plan, whose bases are then the parameters:

       bases      = addresses of the given tensors, then of one new tensor for each allocation
       memory     = addresses of the given tensors, then of the pieces:  base of an allocation + offset
       parameter  = constant,  or  memory[number] + offset
       results    = new tensors, or parts of them

   Addresses are read again on every call and a plan keeps nothing of a call, so threads may repeat one plan at the same
   time. Memory is allocated by the function that Inductor's code calls; kernels are launched by cuLaunchKernel on the
   current stream. Both functions come from Python (native_plan.py), which compiles native_key.c and this file as one. */

#define MOST_PARAMETERS 128 /* of a kernel */
#define CONSTANT (-1)       /* in the place of a memory's number */
#define PART 0              /* in the place of the threads: a plan is repeated */

typedef int (*LaunchKernel)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                            void *stream, void **parameters, void **extra);
typedef int (*CurrentDevice)(int *device);

static PyObject *as_strided, *dispatch_modes, *runtime_knobs, *enter_hook_name, *exit_hook_name, *calls_name;

/* ---- Plans ---- */

typedef struct {
    int64_t function, grid[3], threads, shared, parameters; /* function: or a plan; the last: how many */
} Launch;

typedef struct {
    int64_t memory; /* its number, or CONSTANT; of a piece the number of an allocation */
    uint64_t value; /* offset in bytes, or the constant */
} Parameter;

typedef struct {
    PyObject_HEAD
    LaunchKernel launch;
    CurrentDevice current_device;
    int device, given, single; /* given: how many tensors a call has; single: the result is one tensor, no tuple */
    PyObject *stream_of, *allocate, *allocations, *pieces, *launches, *parameters, *results;
    PyObject *owners; /* of kernels, or plans */
    PyObject *device_number, *arguments; /* the latter owns the eight above */
} Plan;

static void Plan_dealloc(Plan *plan) {
    Py_XDECREF(plan->device_number);
    Py_XDECREF(plan->arguments);
    Py_TYPE(plan)->tp_free((PyObject *)plan);
}

static PyTypeObject PlanType;

static Py_ssize_t count_of(PyObject *parameters) {
    return PyBytes_GET_SIZE(parameters) / (Py_ssize_t)sizeof(Parameter);
}

/* Whether every parameter has a number from ``least`` to below ``end``. */
static int is_within(PyObject *parameters, int64_t least, int64_t end) {
    const Parameter *parameter = (const Parameter *)PyBytes_AS_STRING(parameters);
    int within = 1;
    for (Py_ssize_t i = 0; i < count_of(parameters); i++)
        within &= parameter[i].memory >= least && parameter[i].memory < end;
    return within;
}

/* Whether a launch of ``plan`` is a kernel's, or a plan's that its parameters suit. */
static int is_whole(const Plan *plan, const Launch *launch, PyObject *owner) {
    if (launch->threads != PART) return Py_TYPE(owner) != &PlanType && launch->parameters <= MOST_PARAMETERS;
    if (Py_TYPE(owner) != &PlanType || (int64_t)(uintptr_t)owner != launch->function) return 0;
    const Plan *part = (const Plan *)owner;
    return part->device == plan->device && launch->parameters == part->given + PyTuple_GET_SIZE(part->allocations);
}

/* Whether every number of memory exists: a wrong one would be an address that nobody gave. */
static int is_sound(Plan *plan) {
    Py_ssize_t allocations = PyTuple_GET_SIZE(plan->allocations), total = 0;
    Py_ssize_t launches = PyBytes_GET_SIZE(plan->launches) / (Py_ssize_t)sizeof(Launch);
    Py_ssize_t memory = plan->given + count_of(plan->pieces);
    const Launch *launch = (const Launch *)PyBytes_AS_STRING(plan->launches);
    int sound = plan->given >= 0 && memory <= MOST_BASES && plan->given + allocations <= MOST_BASES;
    sound &= is_within(plan->pieces, 0, allocations) && is_within(plan->parameters, CONSTANT, memory);
    if (PyList_GET_SIZE(plan->owners) != launches) return 0;
    for (Py_ssize_t i = 0; i < launches; total += launch[i++].parameters)
        sound &= launch[i].parameters >= 0 && is_whole(plan, launch + i, PyList_GET_ITEM(plan->owners, i));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plan->results); i++) {
        long number = 0;
        PyObject *part = Py_None, *result = PyTuple_GET_ITEM(plan->results, i);
        if (result != Py_None && !PyArg_ParseTuple(result, "lO", &number, &part)) return 0;
        sound &= result == Py_None || (number >= 0 && number < allocations);
        sound &= part == Py_None || (PyTuple_Check(part) && PyTuple_GET_SIZE(part) == 3);
    }
    return sound && total == count_of(plan->parameters) && (!plan->single || PyTuple_GET_SIZE(plan->results) == 1);
}

/* Plan(launch, current_device, device, given, single, stream_of, allocate, allocations, pieces, launches, parameters,
   results, owners): see native_plan.py, which makes them. */
static PyObject *Plan_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    unsigned long long launch, current_device;
    Plan *plan = (Plan *)type->tp_alloc(type, 0);
    if (!plan) return NULL;
    if (PyArg_ParseTuple(arguments, "KKiipOOO!SSSO!O!", &launch, &current_device, &plan->device, &plan->given,
                         &plan->single, &plan->stream_of, &plan->allocate, &PyTuple_Type, &plan->allocations,
                         &plan->pieces, &plan->launches, &plan->parameters, &PyTuple_Type, &plan->results,
                         &PyList_Type, &plan->owners)) {
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
    const Parameter *piece = (const Parameter *)PyBytes_AS_STRING(plan->pieces);
    uint64_t memory[MOST_BASES], value[MOST_BASES]; /* of a part all of its bases */
    void *pointer[MOST_PARAMETERS];
    for (int i = 0; i < MOST_PARAMETERS; i++) pointer[i] = &value[i];
    memcpy(memory, base, 8 * (size_t)plan->given);
    for (Py_ssize_t i = 0; i < count_of(plan->pieces); i++)
        memory[plan->given + i] = base[plan->given + piece[i].memory] + piece[i].value;
    for (; launch < end; launch++) {
        for (int64_t i = 0; i < launch->parameters; i++, parameter++)
            value[i] = parameter->value + (parameter->memory == CONSTANT ? 0 : memory[parameter->memory]);
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
