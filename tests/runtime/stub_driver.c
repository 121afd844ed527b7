/* A libcuda.so.1 that answers and does nothing, so that what Python and cuda-bindings take of a cold start can be measured on any machine. It has
 * one device of compute capability 9.0, and reads from a cubin what its kernel's parameters are; a launch is a return. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, MOST = 256 };
enum { MAJOR = 75, MINOR = 76 };
typedef struct { unsigned short offset, size; } Parameter;
typedef struct { int count; Parameter parameters[MOST]; } Library;
static unsigned long long next_address = 1 << 20;

static int succeed(void) { return SUCCESS; }
static int version(int *value) { return *value = 13000, SUCCESS; }
static int device(int *value) { return *value = 0, SUCCESS; }
static int one(int *value) { return *value = 1, SUCCESS; }
static int name(char *text, int length) { return snprintf(text, length, "Stub"), SUCCESS; }
static int attribute(int *value, int which) { return *value = which == MAJOR ? 9 : which == MINOR ? 0 : 132, SUCCESS; }
static int handle(void **value) { return *value = (void *)0x1000, SUCCESS; }
static int allocate(unsigned long long *value, size_t bytes) {
    *value = next_address;
    next_address += (bytes + 511) / 256 * 256;
    return SUCCESS;
}

/* ELF64: the section table's offset is at byte 40, its count at 60. Records of .nv.info: format 4, attribute 0x17, 12 bytes: index, ordinal, offset, size. */
static int load(Library **library, const unsigned char *image) {
    Library *made = *library = calloc(1, sizeof *made);
    unsigned long long table;
    unsigned short sections;
    memcpy(&table, image + 40, 8);
    memcpy(&sections, image + 60, 2);
    const unsigned char *end = image + table;
    for (const unsigned char *at = image + 64; at + 16 <= end; at += 4) {
        unsigned short ordinal, offset;
        unsigned size;
        if (memcmp(at, "\x04\x17\x0c\x00", 4) != 0) continue;
        memcpy(&ordinal, at + 8, 2);
        memcpy(&offset, at + 10, 2);
        memcpy(&size, at + 12, 4);
        if (ordinal >= MOST) continue;
        made->parameters[ordinal] = (Parameter){offset, size >> 18};
        if (ordinal >= made->count) made->count = ordinal + 1;
    }
    return SUCCESS;
}
static int kernel(Library **value, Library *library) { return *value = library, SUCCESS; }
static int parameter(Library *library, size_t index, size_t *offset, size_t *size) {
    if (index >= (size_t)library->count) return INVALID_VALUE;
    *offset = library->parameters[index].offset;
    *size = library->parameters[index].size;
    return SUCCESS;
}

static int address(const char *symbol, void **function, int since, unsigned long long flags, int *status);
static const struct { const char *name; void *function; } functions[] = {
    {"cuGetProcAddress", address},
    {"cuDriverGetVersion", version},
    {"cuDeviceGetCount", one},
    {"cuDeviceGet", device},
    {"cuDeviceGetName", name},
    {"cuDeviceGetAttribute", attribute},
    {"cuDevicePrimaryCtxRetain", handle},
    {"cuCtxGetCurrent", handle},
    {"cuCtxGetDevice", device},
    {"cuLibraryLoadData", load},
    {"cuLibraryGetKernel", kernel},
    {"cuKernelGetParamInfo", parameter},
    {"cuMemAlloc", allocate},
    {"cuStreamCreate", handle},
    {"cuPointerGetAttribute", device},
};

static int address(const char *symbol, void **function, int since, unsigned long long flags, int *status) {
    *function = succeed;
    if (status) *status = 0;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (strcmp(symbol, functions[i].name) == 0) *function = functions[i].function;
    return SUCCESS;
}
int cuGetProcAddress_v2(const char *symbol, void **function, int since, unsigned long long flags, int *status) {
    return address(symbol, function, since, flags, status);
}
