/* The floor of what a packet costs: the same socket and calls as a channel's, without Python.

   floor one-way|round-trip <producers> <consumers> <messages> <bytes>

   Prints the seconds from the first message sent to the last one received, and the processor time of all
   processes. Messages are as long as a channel's packet, and filled but not looked at. */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void check(int fine, const char *what)
{
    if (!fine) {
        perror(what);
        exit(1);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void put(int fd, const char *buffer, size_t size)
{
    check(send(fd, buffer, size, MSG_NOSIGNAL) == (ssize_t)size, "send");
}

static void get(int fd, char *buffer, size_t room)
{
    check(recv(fd, buffer, room, 0) > 0, "recv");
}

int main(int argc, char **argv)
{
    int ends[2], ready[2], go[2], moments[2], buffer_size = 65536;
    static char buffer[65536];
    char token = 0;
    check(argc == 6, "usage: floor one-way|round-trip producers consumers messages bytes");
    int round_trip = !strcmp(argv[1], "round-trip");
    int producers = atoi(argv[2]), consumers = atoi(argv[3]);
    long messages = atol(argv[4]);
    size_t size = atol(argv[5]);
    check(size <= sizeof buffer, "a packet that large");
    check(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), "socketpair");
    for (int end = 0; end < 2; end++)
        check(!setsockopt(ends[end], SOL_SOCKET, SO_SNDBUF, &buffer_size, sizeof buffer_size), "setsockopt");
    check(!pipe(ready) && !pipe(go) && !pipe(moments), "pipe");

    for (int child = 0; child < producers + consumers; child++) {
        pid_t pid = fork();
        check(pid >= 0, "fork");
        if (pid)
            continue;
        int produces = child >= consumers;
        long share = messages / (produces ? producers : consumers);
        close(go[1]);
        check(write(ready[1], &token, 1) == 1, "write");
        check(!read(go[0], &token, 1), "read");
        double moment = now();
        for (long i = 0; i < share; i++) {
            if (round_trip) {
                if (produces) {
                    put(ends[0], buffer, size);
                    get(ends[0], buffer, sizeof buffer);
                } else {
                    get(ends[1], buffer, sizeof buffer);
                    put(ends[1], buffer, size);
                }
            } else if (produces)
                put(ends[0], buffer, size);
            else
                get(ends[1], buffer, sizeof buffer);
        }
        if (!produces || round_trip) {
            double end = now();
            check(write(moments[1], &end, sizeof end) == sizeof end, "write");
        }
        if (produces)
            check(write(moments[1], &moment, sizeof moment) == sizeof moment, "write");
        _exit(0);
    }

    for (int child = 0; child < producers + consumers; child++)
        check(read(ready[0], &token, 1) == 1, "read");
    close(go[1]);
    close(moments[1]);
    double moment, first = 1e300, last = 0;
    while (read(moments[0], &moment, sizeof moment) == sizeof moment) {
        first = moment < first ? moment : first;
        last = moment > last ? moment : last;
    }
    int status, failed = 0;
    while (wait(&status) > 0)
        failed |= status;
    struct rusage usage;
    getrusage(RUSAGE_CHILDREN, &usage);
    double cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    printf("%.9f %.9f\n", last - first, cpu);
    return failed != 0;
}
