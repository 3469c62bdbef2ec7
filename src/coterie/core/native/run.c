/* Takes clients' steps: the kernels of a step one after the other, again and again, with nobody between. */
#include "threads.h"
#include "vec.h"

#define MOST 26 /* arguments of a kernel */

typedef struct {
    void *kernel;
    int64_t checked; /* stop when it returns something else than 0 */
    int64_t slots[MOST]; /* an argument is values[i], or, where slots[i] >= 0, that many bytes into that slot */
    int64_t values[MOST];
} Call;

typedef int64_t (*Kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

/* Pointers and whole numbers travel alike in a call, and arguments that a kernel does not have are passed for
   nothing. Returns 0, or what a kernel returned that stopped it. */
static int64_t run(const Call *calls, int64_t count, char *const *slots) {
    for (const Call *call = calls; call < calls + count; call++) {
        int64_t a[MOST];
        for (int i = 0; i < MOST; i++)
            a[i] = call->values[i] + (call->slots[i] >= 0 ? (int64_t)slots[call->slots[i]] : 0);
        int64_t said = ((Kernel)call->kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
                                              a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20],
                                              a[21], a[22], a[23], a[24], a[25]);
        if (call->checked && said) return said;
    }
    return 0;
}

typedef struct {
    const Call *first, *step, *last, *end; /* what a client begins with, its step, what it ends with */
    char *const *slots; /* addresses, of the first client at its first step */
    const int64_t *by_client, *moves; /* bytes by which each slot grows with a client, and with a step */
    int64_t many; /* slots; one more is the room of whoever works */
    char *const *rooms;
    const int64_t *steps; /* of each client */
    int64_t clients, most, loss; /* most: of all steps; loss: where in a room the loss stands after a step */
    float *losses; /* [clients, most] */
    int64_t *said; /* of each client, 0 or what stopped it */
    int64_t room, client; /* the next ones */
} Training;

static void *train(void *given) {
    Training *all = given;
    int64_t many = all->many, c;
    char *slots[many + 1], *room = all->rooms[next_of(&all->room)];
    slots[many] = room;
    while ((c = next_of(&all->client)) < all->clients) {
        for (int64_t i = 0; i < many; i++) slots[i] = all->slots[i] + c * all->by_client[i];
        int64_t said = run(all->first, all->step - all->first, slots);
        for (int64_t step = 0; !said && step < all->steps[c]; step++) {
            said = run(all->step, all->last - all->step, slots);
            all->losses[c * all->most + step] = *(const float *)(room + all->loss);
            for (int64_t i = 0; i < many; i++) slots[i] += all->moves[i];
        }
        all->said[c] = said ? said : run(all->last, all->end - all->last, slots);
    }
    return 0;
}

/* All steps of all clients, by as many threads as there are rooms; counts: of the calls at a client's beginning,
   in a step, and at its end. */
void run_clients(const Call *calls, const int64_t *counts, char *const *slots, const int64_t *by_client,
                 const int64_t *moves, int64_t many, char *const *rooms, int64_t threads, const int64_t *steps,
                 int64_t clients, int64_t most, int64_t loss, float *losses, int64_t *said) {
    const Call *step = calls + counts[0], *last = step + counts[1];
    Training all = {calls, step,    last, last + counts[2], slots, by_client, moves, many, rooms,
                    steps, clients, most, loss,             losses, said,     0,     0};
    together(train, &all, threads);
}

/* out [rows] = from[index], each so many bytes */
void gather(const char *from, const int64_t *index, char *out, int64_t rows, int64_t bytes) {
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * bytes, from + index[r] * bytes, (size_t)bytes);
}
