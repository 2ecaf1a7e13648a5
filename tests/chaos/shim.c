/* Faults of disk and clock for one process, preloaded into it by tests. The file named by RUVECTOR_TEST_SHIM is
 * mapped into memory; whoever started the process writes into it:
 *   bytes 0-7    microseconds that each fsync and each write at a position takes longer
 *   bytes 8-15   not 0: the disk is full, writes that make a file larger end with ENOSPC
 *   bytes 16-23  seconds, signed, by which the wall clock is wrong */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *control;

__attribute__((constructor)) static void start(void) {
  const char *path = getenv("RUVECTOR_TEST_SHIM");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
  if (page != MAP_FAILED) control = page;
  close(fd);
}

static void slow(void) {
  if (control && control[0] > 0) usleep((useconds_t)control[0]);
}

static int full(int fd, off_t end) {
  struct stat now;
  if (!control || !control[1] || fstat(fd, &now) != 0 || !S_ISREG(now.st_mode)) return 0;
  return end > now.st_size;
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
  slow();
  if (full(fd, at + (off_t)size)) { errno = ENOSPC; return -1; }
  return syscall(SYS_pwrite64, fd, bytes, size, at);
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) { return pwrite64(fd, bytes, size, at); }

int ftruncate64(int fd, off64_t size) {
  if (full(fd, size)) { errno = ENOSPC; return -1; }
  return (int)syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fsync(int fd) { slow(); return (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { slow(); return (int)syscall(SYS_fdatasync, fd); }

int clock_gettime(clockid_t clock, struct timespec *time) {
  int done = (int)syscall(SYS_clock_gettime, clock, time);
  if (done == 0 && control && clock == CLOCK_REALTIME) time->tv_sec += (time_t)control[2];
  return done;
}
