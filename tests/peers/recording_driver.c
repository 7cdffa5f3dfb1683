/* The CUDA driver of hollow_gpu, which also notes every launch: what it is given, and the parameters' bytes.

   How many parameters a kernel takes and of what sizes a driver reads from its machine code; here a test tells it. */
#define cuLaunchKernel hollow_launch
#define cuLaunchKernelEx hollow_launch_ex
#include "hollow_cuda.c"
#undef cuLaunchKernel
#undef cuLaunchKernelEx

#define MOST 4096
typedef struct {
    uint64_t function, grid[3], block[3], shared, stream, attributes, parameters, value[64];
} Noted;
typedef struct {
    uint64_t function;
    int count, size[64];
} Kernel;
static Noted noted[MOST];
static Kernel kernel[MOST];
static int launches, kernels;

void take_sizes(uint64_t function, int count, const int *size) {
    kernel[kernels].function = function;
    kernel[kernels].count = count;
    memcpy(kernel[kernels++].size, size, count * sizeof(int));
}
void forget_launches(void) { launches = 0; }
int noted_launches(void) { return launches; }
const Noted *noted_launch(int i) { return &noted[i]; }

static CUresult note(CUfunction f, const unsigned *grid, const unsigned *block, unsigned shared, CUstream s, int attributes, void **p) {
    Noted *n = &noted[launches++ % MOST];
    memset(n, 0, sizeof *n);
    n->function = (uint64_t)f, n->shared = shared, n->stream = (uint64_t)s, n->attributes = attributes;
    for (int i = 0; i < 3; i++) n->grid[i] = grid[i], n->block[i] = block[i];
    for (int k = 0; k < kernels; k++) {
        if (kernel[k].function != (uint64_t)f) continue;
        n->parameters = kernel[k].count;
        for (int i = 0; i < kernel[k].count; i++) memcpy(&n->value[i], p[i], kernel[k].size[i]);
    }
    launched();
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream s, void **p, void **x) {
    return note(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, s, x != 0, p);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) {
    return note(f, &c->gridDimX, &c->blockDimX, c->sharedMemBytes, c->hStream, c->numAttrs + (x != 0), p);
}
