// A library to preload: system calls on files whose path holds REFUSED_PATH fail with REFUSED_ERRNO, where
// REFUSED_CALL is open, read, write or sync. With REFUSED_TRACE, a file, nothing fails: the calls are written there.
// The environment is read at each call, so that it can change.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static void trace(const char *call, const char *path) {
    const char *where = getenv("REFUSED_TRACE"), *part = getenv("REFUSED_PATH");
    if (!where || !path || !part || !strstr(path, part)) return;
    char line[4200];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    int file = syscall(SYS_openat, AT_FDCWD, where, O_WRONLY | O_CREAT | O_APPEND, 0666);
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

static int refused(const char *call, const char *path) {
    const char *asked = getenv("REFUSED_CALL"), *part = getenv("REFUSED_PATH"), *number = getenv("REFUSED_ERRNO");
    trace(call, path);
    if (!asked || !part || !number || strcmp(asked, call) || !path || !strstr(path, part)) return 0;
    errno = atoi(number);
    return 1;
}

static int refused_file(const char *call, int file) {
    if (!getenv("REFUSED_CALL") && !getenv("REFUSED_TRACE")) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return refused(call, path);
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define OPEN(name)                                        \
    int name(const char *path, int flags, ...) {          \
        NEXT(name);                                       \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        int mode = va_arg(rest, int);                     \
        va_end(rest);                                     \
        return refused("open", path) ? -1 : next(path, flags, mode); \
    }

OPEN(open)
OPEN(open64)

int openat(int folder, const char *path, int flags, ...) {
    NEXT(openat);
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return refused("open", path) ? -1 : next(folder, path, flags, mode);
}

ssize_t read(int file, void *data, size_t size) {
    NEXT(read);
    return refused_file("read", file) ? -1 : next(file, data, size);
}

ssize_t write(int file, const void *data, size_t size) {
    NEXT(write);
    return refused_file("write", file) ? -1 : next(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    NEXT(pwrite64);
    return refused_file("write", file) ? -1 : next(file, data, size, place);
}

int fsync(int file) {
    NEXT(fsync);
    return refused_file("sync", file) ? -1 : next(file);
}
