// A libcuda.so.1 that runs nothing. It hands out handles, shows every launch to a callback, and refuses to load a module
// while it is told that a stream is being captured, as the real one does.
//
// Built by tests/support/stub_device.py with any C compiler; Triton finds it through TRITON_LIBCUDA_PATH. Types are those of the
// driver's ABI: results and attributes are ints, handles are pointers.
#include <stddef.h>
#include <stdint.h>

typedef int Result;
typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void *stream;
    void *attributes;
    unsigned attribute_count;
} LaunchConfig;
typedef void (*OnLaunch)(void *function, unsigned grid, unsigned block, void *stream, void **parameters);

enum { CAPTURING = 900 };

static OnLaunch on_launch;
static int is_capturing;
static long module_loads;
static uintptr_t last_handle = 0x1000;

void stub_on_launch(OnLaunch callback) { on_launch = callback; }
void stub_set_capturing(int value) { is_capturing = value; }
long stub_module_loads(void) { return module_loads; }

static Result load(void **module) {
    if (is_capturing) return CAPTURING;
    module_loads++;
    *module = (void *)(last_handle += 16);
    return 0;
}

// What Triton's launcher and its utilities ask for.
Result cuModuleLoadData(void **module, const void *image) { return load(module); }
Result cuLibraryLoadData(void **library, const void *image, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
    return load(library);
}
Result cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)((uintptr_t)module | 1);
    return 0;
}
Result cuLibraryGetKernel(void **function, void *library, const char *name) {
    *function = (void *)((uintptr_t)library | 1);
    return 0;
}
Result cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    if (on_launch) on_launch(function, config->grid_x, config->block_x, config->stream, parameters);
    return 0;
}
Result cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
    *(uint64_t *)out = pointer;
    return 0;
}
Result cuGetErrorString(Result error, const char **text) {
    *text = error == CAPTURING ? "operation not permitted when stream is capturing" : "no error";
    return 0;
}
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 10: *value = 32; break;      // warp size
    case 16: *value = 132; break;     // multiprocessors
    case 81: *value = 233472; break;  // shared memory of one
    case 97: *value = 232448; break;  // shared memory of a block, opted into
    default: *value = 65536;
    }
    return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 32;  // threads of a block at most; registers, bytes
    return 0;
}

// What only has to succeed.
static char context;
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 2; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuCtxGetCurrent(void **current) { *current = &context; return 0; }
Result cuCtxSetCurrent(void *current) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuDevicePrimaryCtxRetain(void **retained, int device) { *retained = &context; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuFuncLoad(void *function) { return 0; }
Result cuKernelGetFunction(void **function, void *kernel) { *function = kernel; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuLibraryUnload(void *library) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = is_capturing; return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *function, int block, size_t bytes) {
    *count = 1;
    return 0;
}
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuTensorMapEncodeIm2colWide(void) { return 0; }
Result cuMemAlloc(void) { return 0; }
