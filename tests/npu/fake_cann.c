/* A CANN without a device: its memory is the host's, everything is done when a call returns, and operators are left to the emulator.
   Names and argument types are those of the public headers acl_rt.h, acl_base.h and hccl.h; only what must answer with more than
   "success" stands here, fake_cann.py adds the rest. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 207001, NOT_EMULATED = 561103 };

/* Devices and contexts: a context is the address of its device's byte. */
static __thread int32_t current;
static char contexts[64];
static uint32_t devices(void) { const char *count = getenv("NPU_EMULATOR_DEVICES"); return count ? atoi(count) : 2; }
int aclrtGetDeviceCount(uint32_t *count) { *count = devices(); return SUCCESS; }
int aclrtSetDevice(int32_t device) { current = device; return SUCCESS; }
int aclrtGetDevice(int32_t *device) { *device = current; return SUCCESS; }
int aclrtGetCurrentContext(void **context) { *context = &contexts[current]; return SUCCESS; }
int aclrtSetCurrentContext(void *context) { current = (char *)context - contexts; return SUCCESS; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) { if (flags) *flags = 0; if (active) *active = 1; return SUCCESS; }
int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) { *logic = user; return SUCCESS; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 1; return SUCCESS; }
int aclrtDeviceGetBareTgid(int32_t *process) { *process = 1; return SUCCESS; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {}

/* Without "disable" the wheel takes the older operator interface, which refuses for example interleaved rotary positions. */
size_t aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char *value, size_t size) { if (size) strncpy(value, "disable", size); return SUCCESS; }

/* Memory. */
int aclrtMalloc(void **memory, size_t size, int policy) { return posix_memalign(memory, 512, size ? size : 512) ? OUT_OF_MEMORY : SUCCESS; }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }
int aclrtMallocHost(void **memory, size_t size) { return aclrtMalloc(memory, size, 0); }
int aclrtMallocHostWithCfg(void **memory, size_t size, void *config) { return aclrtMalloc(memory, size, 0); }
int aclrtFree(void *memory) { free(memory); return SUCCESS; }
int aclrtFreeHost(void *memory) { free(memory); return SUCCESS; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memmove(to, from, size); return SUCCESS; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) { memmove(to, from, size); return SUCCESS; }
int aclrtMemset(void *to, size_t room, int32_t value, size_t size) { memset(to, value, size); return SUCCESS; }
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, void *stream) { memset(to, value, size); return SUCCESS; }
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)64 << 30; return SUCCESS; }
int aclrtReserveMemAddress(void **start, size_t size, size_t alignment, void *wanted, uint64_t flags) {
    *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *start == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}
int aclrtMallocPhysical(void **handle, size_t size, const void *property, uint64_t flags) { *handle = malloc(8); return SUCCESS; }
int aclrtFreePhysical(void *handle) { free(handle); return SUCCESS; }

/* Streams and events: each call has ended when it returns, so a stream is a token and an event is a time. */
int aclrtCreateStream(void **stream) { *stream = calloc(1, 64); return SUCCESS; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return aclrtCreateStream(stream); }
int aclrtDestroyStream(void *stream) { free(stream); return SUCCESS; }
int aclrtDestroyStreamForce(void *stream) { free(stream); return SUCCESS; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return SUCCESS; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 0; return SUCCESS; }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { *flag = 0; return SUCCESS; }
int aclrtCreateEvent(void **event) { *event = calloc(1, sizeof(struct timespec)); return SUCCESS; }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return aclrtCreateEvent(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return aclrtCreateEvent(event); }
int aclrtDestroyEvent(void *event) { free(event); return SUCCESS; }
int aclrtRecordEvent(void *event, void *stream) { clock_gettime(CLOCK_MONOTONIC, event); return SUCCESS; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return SUCCESS; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return SUCCESS; }
int aclQueryEventRecordedStatus(void *event, int *status) { *status = 1; return SUCCESS; }
int aclQueryEventWaitStatus(void *event, int *status) { *status = 0; return SUCCESS; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    struct timespec *a = start, *b = end;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f;
    return SUCCESS;
}

/* Operators. The emulator lets the wheel's host code run up to here, then writes the outputs itself; a call it did not expect fails by name. */
int emulated_call;
const char *last_operator = "";
static char complaint[200] = "";
int run_operator(const char *name) {
    last_operator = name;
    if (emulated_call) return SUCCESS;
    snprintf(complaint, sizeof complaint, "the emulated NPU has no formula for %s", name);
    return NOT_EMULATED;
}
int aclopCompileAndExecute(const char *name) { return run_operator(name); }
int aclopCompileAndExecuteV2(const char *name) { return run_operator(name); }
const char *aclGetRecentErrMsg(void) { return complaint; }
