// Loaded before the C library (LD_PRELOAD): calls on files fail with EIO, and all others do what they
// always do. strace could not tell a file from a socket or from what wakes a thread, all of which are
// written to.
//
// The file that TEST_FAULT_PLAN names says which: `CALL N PART` for the Nth such call on a path that
// holds PART, `CALL N PART lasting` for all from the Nth on until that file is gone, `fsync N PART lies`
// for the same, which then do nothing and succeed. A path ends in `$`, so that PART can name its end.
// Calls are counted over all threads, from when the plan is there; what fails, or lies, is noted in it.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define LONGEST 4096

static char call_planned[16], part[64], lasting[16];
static atomic_int is_planned;
static atomic_long left;

// Not by the functions below.
static int open_plan(int flags) {
  const char *plan = getenv("TEST_FAULT_PLAN");
  return plan ? (int)syscall(SYS_openat, AT_FDCWD, plan, flags | O_CLOEXEC) : -1;
}

static void look_for_plan(void) {
  static atomic_flag is_looking = ATOMIC_FLAG_INIT;
  if (atomic_load(&is_planned) || atomic_flag_test_and_set(&is_looking)) return;
  int file = open_plan(O_RDONLY);
  if (file >= 0) {
    char text[128] = "";
    long nth = 0;
    syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    if (sscanf(text, "%15s %ld %63s %15s", call_planned, &nth, part, lasting) >= 3) {
      atomic_store(&left, nth);
      atomic_store(&is_planned, 1);
    }
  }
  atomic_flag_clear(&is_looking);
}

static int is_due(const char *call, const char *path) {
  char whole[LONGEST + 2];
  look_for_plan();
  if (!atomic_load(&is_planned) || strcmp(call, call_planned)) return 0;
  snprintf(whole, sizeof whole, "%s$", path);
  if (!strstr(whole, part)) return 0;
  long before = atomic_fetch_sub(&left, 1);
  return before == 1 || (before < 1 && *lasting);
}

// Whether this call is to fail; `errno` says so then, and is left alone otherwise.
static int fails(const char *call, const char *path) {
  int before = errno, file = -1;
  if (is_due(call, path) && (file = open_plan(O_WRONLY | O_APPEND)) >= 0) {
    char line[LONGEST + 16];
    int length = snprintf(line, sizeof line, "%s (INJECTED)\n", path);
    syscall(SYS_write, file, line, (size_t)length);
    syscall(SYS_close, file);
  }
  errno = file >= 0 ? EIO : before;
  return file >= 0;
}

static int fails_on(const char *call, int fd) {
  char link[64], path[LONGEST] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  int before = errno;
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  return length > 0 && fails(call, path);
}

static int is_file(int fd) {
  struct stat about;
  int before = errno;
  // The first three are whatever the server was started with.
  int is = fd > 2 && fstat(fd, &about) == 0 && S_ISREG(about.st_mode);
  errno = before;
  return is;
}

// Half of it is written, as when a disk breaks off.
ssize_t write(int fd, const void *bytes, size_t count) {
  if (!is_file(fd) || !fails_on("write", fd)) return REAL(write)(fd, bytes, count);
  syscall(SYS_write, fd, bytes, count / 2);
  errno = EIO;
  return -1;
}

int fsync(int fd) {
  if (!fails_on("fsync", fd)) return REAL(fsync)(fd);
  return strcmp(lasting, "lies") ? -1 : 0;
}

// A new name, whether the old one goes or stays.
int rename(const char *from, const char *to) {
  return fails("rename", to) ? -1 : REAL(rename)(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  return fails("rename", to) ? -1 : REAL(renameat)(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  return fails("rename", to) ? -1 : REAL(renameat2)(a, from, b, to, flags);
}

int link(const char *from, const char *to) {
  return fails("rename", to) ? -1 : REAL(link)(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
  return fails("rename", to) ? -1 : REAL(linkat)(a, from, b, to, flags);
}

int unlink(const char *path) {
  return fails("unlink", path) ? -1 : REAL(unlink)(path);
}

int unlinkat(int at, const char *path, int flags) {
  return fails("unlink", path) ? -1 : REAL(unlinkat)(at, path, flags);
}
