/* A failing file system: a library that is loaded before the system's. Of the calls that change files under FAULT_UNDER,
 * the one numbered FAULT_AT (from 1) kills the process (FAULT_HOW=kill) or fails with the error number FAULT_HOW.
 * At the end of the process their number is written to FAULT_COUNT. FAULT_NO_LOCKS refuses every lock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int calls;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Whether this call is to fail. */
static int fails(const char *path) {
    const char *under = getenv("FAULT_UNDER"), *at = getenv("FAULT_AT"), *how = getenv("FAULT_HOW");
    if (!under || !path || strncmp(path, under, strlen(under)) != 0) return 0;
    int call = atomic_fetch_add(&calls, 1) + 1;
    if (!at || !how || call != atoi(at)) return 0;
    if (strcmp(how, "kill") == 0) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = atoi(how);
    return 1;
}

static int fails_on(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%d\n", atomic_load(&calls));
    fclose(file);
}

ssize_t write(int fd, const void *data, size_t size) { return fails_on(fd) ? -1 : NEXT(write)(fd, data, size); }
int fsync(int fd) { return fails_on(fd) ? -1 : NEXT(fsync)(fd); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : NEXT(rename)(from, to); }
int unlink(const char *path) { return fails(path) ? -1 : NEXT(unlink)(path); }
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : NEXT(mkdir)(path, mode); }

int open64(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = va_arg(list, mode_t);
    va_end(list);
    return (flags & O_CREAT) && fails(path) ? -1 : NEXT(open64)(path, flags, mode);
}

int flock(int fd, int operation) {
    int (*next)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    if (!getenv("FAULT_NO_LOCKS")) return next(fd, operation);
    errno = ENOSYS;
    return -1;
}
