/* Xen's own ring macros behind plain functions, for the comparison with this crate. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Barriers as in Xen's tools (xenctrl.h) for x86-64, the compiler's own elsewhere. */
#if defined(__x86_64__)
#define xen_mb() __asm__ volatile("lock addl $0, -32(%%rsp)" : : : "memory")
#define xen_rmb() __asm__ volatile("" : : : "memory")
#define xen_wmb() __asm__ volatile("" : : : "memory")
#else
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#endif

/* As the tools do: the newest interface, so that the barriers above are not replaced. */
#define __XEN_TOOLS__ 1
#include <xen/xen-compat.h>
#include <xen/io/ring.h>

/* As large as a block request and response. */
struct toy_request { uint64_t word[14]; };
struct toy_response { uint64_t word[2]; };
DEFINE_RING_TYPES(toy, struct toy_request, struct toy_response);

struct front { toy_front_ring_t ring; };
struct back { toy_back_ring_t ring; };

unsigned c_slots(size_t bytes) { return __CONST_RING_SIZE(toy, bytes); }

struct front *c_front_init(void *page, size_t bytes)
{
    struct front *f = calloc(1, sizeof(*f));
    toy_sring_t *s = page;
    SHARED_RING_INIT(s);
    FRONT_RING_INIT(&f->ring, s, bytes);
    return f;
}
struct front *c_front_attach(void *page, size_t bytes, unsigned at)
{
    struct front *f = calloc(1, sizeof(*f));
    FRONT_RING_ATTACH(&f->ring, (toy_sring_t *)page, at, bytes);
    return f;
}
struct back *c_back_attach(void *page, size_t bytes)
{
    struct back *b = calloc(1, sizeof(*b));
    toy_sring_t *s = page;
    BACK_RING_ATTACH(&b->ring, s, s->rsp_prod, bytes);
    return b;
}
void c_free(void *end) { free(end); }

int c_front_push(struct front *f, const struct toy_request *req)
{
    if (RING_FULL(&f->ring))
        return 0;
    *RING_GET_REQUEST(&f->ring, f->ring.req_prod_pvt) = *req;
    f->ring.req_prod_pvt++;
    return 1;
}
int c_front_publish(struct front *f)
{
    int notify;
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&f->ring, notify);
    return notify;
}
int c_front_take(struct front *f, struct toy_response *rsp)
{
    if (!RING_HAS_UNCONSUMED_RESPONSES(&f->ring))
        return 0;
    xen_rmb();
    RING_COPY_RESPONSE(&f->ring, f->ring.rsp_cons, rsp);
    f->ring.rsp_cons++;
    return 1;
}
int c_front_arm(struct front *f)
{
    int work;
    RING_FINAL_CHECK_FOR_RESPONSES(&f->ring, work);
    return work != 0;
}
int c_back_take(struct back *b, struct toy_request *req)
{
    RING_IDX prod = b->ring.sring->req_prod;
    xen_rmb();
    if (RING_REQUEST_PROD_OVERFLOW(&b->ring, prod))
        return -1;
    if (prod == b->ring.req_cons || RING_REQUEST_CONS_OVERFLOW(&b->ring, b->ring.req_cons))
        return 0;
    RING_COPY_REQUEST(&b->ring, b->ring.req_cons, req);
    b->ring.req_cons++;
    return 1;
}
void c_back_respond(struct back *b, const struct toy_response *rsp)
{
    *RING_GET_RESPONSE(&b->ring, b->ring.rsp_prod_pvt) = *rsp;
    b->ring.rsp_prod_pvt++;
}
int c_back_publish(struct back *b)
{
    int notify;
    RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&b->ring, notify);
    return notify;
}
int c_back_arm(struct back *b)
{
    int work;
    RING_FINAL_CHECK_FOR_REQUESTS(&b->ring, work);
    return work != 0;
}

/*
 * `rounds` round trips of `batch` requests each, both ends in this thread. As any backend does
 * whose requests outlive the loop that takes them, it copies each into a private entry, and as
 * in any driver the ends lie in memory: as locals of this one function their indices would be in
 * registers. The sum of what came back is returned, so that nothing is optimised away.
 */
uint64_t c_roundtrips(void *page, size_t bytes, uint64_t rounds, unsigned batch)
{
    toy_sring_t *s = page;
    struct front *front = c_front_init(page, bytes);
    struct back *back = c_back_attach(page, bytes);
    unsigned n, i, slots, nr_free, nr_held = 0;
    uint64_t sum = 0, id = 0, events = 0;
    struct toy_request *held;
    uint32_t *spare, *order;

    slots = RING_SIZE(&front->ring);
    held = calloc(slots, sizeof(*held));
    spare = calloc(slots, sizeof(*spare));
    order = calloc(slots, sizeof(*order));
    for (nr_free = 0; nr_free < slots; nr_free++)
        spare[nr_free] = nr_free;

    while (rounds--) {
        RING_IDX rc, rp;
        int flag;

        for (n = 0; n < batch && !RING_FULL(&front->ring); n++) {
            struct toy_request *req = RING_GET_REQUEST(&front->ring, front->ring.req_prod_pvt);
            for (i = 0; i < 14; i++)
                req->word[i] = id + i;
            id++;
            front->ring.req_prod_pvt++;
        }
        RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&front->ring, flag);
        events += flag;

        do {
            rc = back->ring.req_cons;
            rp = s->req_prod;
            xen_rmb();
            if (RING_REQUEST_PROD_OVERFLOW(&back->ring, rp))
                return 0;
            while (rc != rp && !RING_REQUEST_CONS_OVERFLOW(&back->ring, rc)) {
                unsigned slot = spare[--nr_free];
                RING_COPY_REQUEST(&back->ring, rc, &held[slot]);
                back->ring.req_cons = ++rc;
                order[nr_held++] = slot;
            }
            while (nr_held) {
                unsigned slot = order[--nr_held];
                struct toy_response rsp = { { held[slot].word[0], held[slot].word[13] } };
                *RING_GET_RESPONSE(&back->ring, back->ring.rsp_prod_pvt) = rsp;
                back->ring.rsp_prod_pvt++;
                spare[nr_free++] = slot;
            }
            RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&back->ring, flag);
            events += flag;
            RING_FINAL_CHECK_FOR_REQUESTS(&back->ring, flag);
        } while (flag);

        do {
            RING_IDX p = s->rsp_prod;
            xen_rmb();
            if (RING_RESPONSE_PROD_OVERFLOW(&front->ring, p))
                return 0;
            while (front->ring.rsp_cons != p) {
                struct toy_response rsp;
                RING_COPY_RESPONSE(&front->ring, front->ring.rsp_cons, &rsp);
                front->ring.rsp_cons++;
                sum += rsp.word[0] ^ rsp.word[1];
            }
            RING_FINAL_CHECK_FOR_RESPONSES(&front->ring, flag);
        } while (flag);
    }
    c_free(front);
    c_free(back);
    free(held);
    free(spare);
    free(order);
    return sum + events;
}
