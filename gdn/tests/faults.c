// A library to be preloaded: calls on files fail as a disk, a quota or a limit makes them fail. Settings:
//   FAULT_CALLS    the calls that may fail, as ",open,rename,"
//   FAULT_IN       part of the path of the files meant
//   FAULT_FROM, FAULT_TO    of those calls on those files, counted together from 1, the ones that fail: [FROM, TO)
//   FAULT_ERRNO    how
//   FAULT_MARK     a file that is made when one fails
// A call that fails does nothing, but close, which closes.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static long number(const char* name) {
  const char* value = getenv(name);
  return value ? atol(value) : 0;
}

static int fails(const char* call, const char* path) {
  static long calls;
  const char *listed = getenv("FAULT_CALLS"), *part = getenv("FAULT_IN"), *mark = getenv("FAULT_MARK");
  char item[32];
  snprintf(item, sizeof item, ",%s,", call);
  if (!listed || !part || !path || !strstr(listed, item) || !strstr(path, part)) return 0;
  ++calls;
  if (calls < number("FAULT_FROM") || calls >= number("FAULT_TO")) return 0;
  if (mark) syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, mark, O_CREAT | O_WRONLY, 0666));
  errno = (int)number("FAULT_ERRNO");
  return 1;
}

static int fails_of(const char* call, int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t n = syscall(SYS_readlink, link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return descriptor > 2 && fails(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static mode_t mode_of(int flags, va_list list) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; }

#define OPEN(name)                                 \
  int name(const char* path, int flags, ...) {     \
    va_list list;                                  \
    va_start(list, flags);                         \
    const mode_t mode = mode_of(flags, list);      \
    va_end(list);                                  \
    return fails("open", path) ? -1 : REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                        \
  int name(int folder, const char* path, int flags, ...) {  \
    va_list list;                                           \
    va_start(list, flags);                                  \
    const mode_t mode = mode_of(flags, list);               \
    va_end(list);                                           \
    return fails("open", path) ? -1 : REAL(name)(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

FILE* fopen(const char* path, const char* mode) { return fails("open", path) ? NULL : REAL(fopen)(path, mode); }
FILE* fopen64(const char* path, const char* mode) { return fails("open", path) ? NULL : REAL(fopen64)(path, mode); }
DIR* opendir(const char* path) { return fails("opendir", path) ? NULL : REAL(opendir)(path); }

ssize_t write(int d, const void* p, size_t n) { return fails_of("write", d) ? -1 : REAL(write)(d, p, n); }
ssize_t read(int d, void* p, size_t n) { return fails_of("read", d) ? -1 : REAL(read)(d, p, n); }
ssize_t pread(int d, void* p, size_t n, off_t at) { return fails_of("pread", d) ? -1 : REAL(pread)(d, p, n, at); }
ssize_t pread64(int d, void* p, size_t n, off64_t at) {
  return fails_of("pread", d) ? -1 : REAL(pread64)(d, p, n, at);
}
int fsync(int d) { return fails_of("fsync", d) ? -1 : REAL(fsync)(d); }
int ftruncate(int d, off_t n) { return fails_of("ftruncate", d) ? -1 : REAL(ftruncate)(d, n); }
int flock(int d, int how) { return fails_of("flock", d) ? -1 : REAL(flock)(d, how); }
int fstat(int d, struct stat* s) { return fails_of("stat", d) ? -1 : REAL(fstat)(d, s); }
int close(int d) {
  const int failed = fails_of("close", d), error = errno, closed = REAL(close)(d);
  if (failed) errno = error;
  return failed ? -1 : closed;
}

int rename(const char* from, const char* to) { return fails("rename", from) ? -1 : REAL(rename)(from, to); }
int mkdir(const char* path, mode_t mode) { return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }
int rmdir(const char* path) { return fails("rmdir", path) ? -1 : REAL(rmdir)(path); }
int unlink(const char* path) { return fails("unlink", path) ? -1 : REAL(unlink)(path); }
int stat(const char* path, struct stat* s) { return fails("stat", path) ? -1 : REAL(stat)(path, s); }
int lstat(const char* path, struct stat* s) { return fails("stat", path) ? -1 : REAL(lstat)(path, s); }
int access(const char* path, int how) { return fails("access", path) ? -1 : REAL(access)(path, how); }
