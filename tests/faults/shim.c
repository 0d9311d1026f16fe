// Fails system calls on purpose: loaded with LD_PRELOAD, told what to do through fault_arm(). Only calls on files under
// the folder in FAULT_FOLDER count.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static long left = -1;        // calls before the failing one; below 0: none fails
static int error_number;      // 0: a short write
static int persistent;        // from the failing one on, all fail
static long seen;
static char failed[32];

void fault_arm(long after, int error, int stay) {
    left = after, error_number = error, persistent = stay, seen = 0, failed[0] = 0;
}
void fault_disarm(void) { left = -1; }
const char* fault_failed(void) { return failed; }

static int ours_path(const char* path) {
    const char* folder = getenv("FAULT_FOLDER");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int ours(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return ours_path(path);
}

// True if this call is to fail.
static int fails(const char* name) {
    if (left < 0) return 0;
    ++seen;
    if (seen - 1 < left) return 0;
    if (seen - 1 > left && !persistent) return 0;
    if (!failed[0]) snprintf(failed, sizeof failed, "%s", name);
    return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(result)                              \
    do {                                          \
        errno = error_number ? error_number : EIO; \
        return result;                            \
    } while (0)

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
    REAL(pwrite64);
    if (ours(fd) && fails("pwrite")) {
        if (error_number) FAIL(-1);
        return real(fd, data, size > 1 ? size / 2 : size, offset);
    }
    return real(fd, data, size, offset);
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t pread64(int fd, void* data, size_t size, off64_t offset) {
    REAL(pread64);
    if (ours(fd) && fails("pread")) {
        if (error_number) FAIL(-1);
        return real(fd, data, size > 1 ? size / 2 : size, offset);
    }
    return real(fd, data, size, offset);
}
ssize_t pread(int fd, void* data, size_t size, off_t offset) { return pread64(fd, data, size, offset); }

int fdatasync(int fd) {
    REAL(fdatasync);
    if (ours(fd) && error_number && fails("fdatasync")) FAIL(-1);
    return real(fd);
}
int fsync(int fd) {
    REAL(fsync);
    if (ours(fd) && error_number && fails("fsync")) FAIL(-1);
    return real(fd);
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    if (ours(fd) && error_number && fails("ftruncate")) FAIL(-1);
    return real(fd, size);
}
int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    if (ours(fd) && error_number && fails("fallocate")) return error_number;
    return real(fd, offset, size);
}
void* mmap64(void* at, size_t size, int protection, int flags, int fd, off64_t offset) {
    REAL(mmap64);
    if (fd >= 0 && ours(fd) && error_number && fails("mmap")) FAIL(MAP_FAILED);
    return real(at, size, protection, flags, fd, offset);
}
void* mmap(void* at, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap64(at, size, protection, flags, fd, offset);
}
int rename(const char* from, const char* to) {
    REAL(rename);
    if (ours_path(from) && error_number && fails("rename")) FAIL(-1);
    return real(from, to);
}
int link(const char* from, const char* to) {
    REAL(link);
    if (ours_path(from) && error_number && fails("link")) FAIL(-1);
    return real(from, to);
}
int unlink(const char* path) {
    REAL(unlink);
    if (ours_path(path) && error_number && fails("unlink")) FAIL(-1);
    return real(path);
}
int open64(const char* path, int flags, ...) {
    REAL(open64);
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0;
    va_end(list);
    if (ours_path(path) && error_number && fails("open")) FAIL(-1);
    return real(path, flags, mode);
}
