/* Work that several threads take from each other until there is none left. */
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    void *(*work)(void *);
    void *job;
    pthread_mutex_t lock;
    pthread_cond_t left;
    int64_t known, inside; /* threads that know of this, and those that work */
    int open;
} Shift;

static void forget(Shift *shift) { /* the lock is held */
    int64_t known = --shift->known;
    pthread_mutex_unlock(&shift->lock);
    if (known) return;
    pthread_mutex_destroy(&shift->lock);
    pthread_cond_destroy(&shift->left);
    free(shift);
}

static void *join_in(void *given) {
    Shift *shift = given;
    pthread_mutex_lock(&shift->lock);
    if (shift->open) {
        shift->inside++;
        pthread_mutex_unlock(&shift->lock);
        shift->work(shift->job);
        pthread_mutex_lock(&shift->lock);
        shift->inside--;
        pthread_cond_signal(&shift->left);
    }
    forget(shift);
    return 0;
}

/* Call work(job) in so many threads at once, this one among them; in fewer where the system gives no more.
   Where cores are busy with something else, a thread may start when all is done: nobody waits for that one. */
static inline void together(void *(*work)(void *), void *job, int64_t threads) {
    Shift *shift = threads > 1 ? malloc(sizeof *shift) : 0;
    if (!shift) {
        work(job);
        return;
    }
    *shift = (Shift){work, job, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, threads, 0, 1};
    int64_t started = 1;
    for (pthread_t other; started < threads && !pthread_create(&other, 0, join_in, shift); started++)
        pthread_detach(other);
    work(job);
    pthread_mutex_lock(&shift->lock);
    shift->known -= threads - started;
    shift->open = 0;
    while (shift->inside) pthread_cond_wait(&shift->left, &shift->lock);
    forget(shift);
}

/* What comes next: every number from 0 once, whoever asks. */
static inline int64_t next_of(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
