/* Work that several threads take from each other until there is none left. */
#pragma once
#include <pthread.h>
#include <stdint.h>

/* Call work(job) in so many threads at once, this one among them; in fewer where the system gives no more. */
static inline void together(void *(*work)(void *), void *job, int64_t threads) {
    pthread_t others[threads > 1 ? threads - 1 : 1];
    int64_t started = 0;
    while (started + 1 < threads && !pthread_create(others + started, 0, work, job)) started++;
    work(job);
    while (started) pthread_join(others[--started], 0);
}

/* What comes next: every number from 0 once, whoever asks. */
static inline int64_t next_of(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
