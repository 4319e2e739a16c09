/* Loaded before the C library: clocks that are ahead. The file AHEAD_FILE says by how many seconds: the time of day, and the
   clock that is never set. */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int answer = syscall(SYS_clock_gettime, clock, now);
    const char *path = getenv("AHEAD_FILE");
    if (answer == 0 && path != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_MONOTONIC)) {
        char text[64] = "", *behind;
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            if (read(file, text, sizeof text - 1) > 0) {
                long of_day = strtol(text, &behind, 10);
                now->tv_sec += clock == CLOCK_REALTIME ? of_day : strtol(behind, NULL, 10);
            }
            close(file);
        }
    }
    return answer;
}
