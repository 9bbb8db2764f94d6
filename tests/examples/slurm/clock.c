// A library to preload: the second rank of a job, or the second task of an array, has a clock of its own. It is as many
// nanoseconds ahead as the file CLOCK_FILE says, which may change at any moment. Files keep the time of their server.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void find(void) {
    const char *path = getenv("CLOCK_FILE"), *number = getenv("SLURM_ARRAY_TASK_ID");
    if (!number) number = getenv("SLURM_PROCID");
    if (!path || !number || strcmp(number, "1")) return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) ahead = page;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t moment = (int64_t)now->tv_sec * 1000000000 + now->tv_nsec + *ahead;
        now->tv_sec = moment / 1000000000;
        now->tv_nsec = moment % 1000000000;
    }
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec moment;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &moment);
    now->tv_sec = moment.tv_sec;
    now->tv_usec = moment.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec moment;
    clock_gettime(CLOCK_REALTIME, &moment);
    if (where) *where = moment.tv_sec;
    return moment.tv_sec;
}
