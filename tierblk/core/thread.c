/* How the core's threads run. */
#define _GNU_SOURCE
#include "core.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>

/* Signals are the event loop's: a thread of the core never runs a handler. */
int tb_thread_start(pthread_t *thread, void *(*main)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(thread, NULL, main, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

/* Where the kernel would like the thread, a bit a processor. Not being allowed there costs speed only. */
static void go_to_cpus(const uint8_t *mask, size_t bytes)
{
    cpu_set_t *set = bytes ? CPU_ALLOC(bytes * 8) : NULL;
    if (!set)
        return;
    size_t set_bytes = CPU_ALLOC_SIZE(bytes * 8);
    CPU_ZERO_S(set_bytes, set);
    for (size_t cpu = 0; cpu < bytes * 8; cpu++)
        if (mask[cpu / 8] >> (cpu % 8) & 1)
            CPU_SET_S(cpu, set_bytes, set);
    sched_setaffinity(0, set_bytes, set);
    CPU_FREE(set);
}

/* Of this thread alone. Not being allowed to costs speed, no more. */
void tb_thread_nice(int nice)
{
    setpriority(PRIO_PROCESS, 0, nice);
}

/* In the thread. cpus: a bit a processor; none for anywhere. */
void tb_thread_settle(const char *name, const uint8_t *cpus, size_t cpus_bytes)
{
    pthread_setname_np(pthread_self(), name);
    go_to_cpus(cpus, cpus_bytes);
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0); /* reclaim must never wait for it; needs CAP_SYS_RESOURCE */
}
