/* The provider's side: WSPIoctl's own two parameters, and the functions that queue and complete. */
#include "suite.h"

static SOCKET accepted;
static unsigned char out[MOST_RECORD];

struct host {
    WSATHREADID id;
    volatile int ready, done, seen;
    unsigned long thread;
    struct completion first;
};

/* Tells its name and runs what is queued for it. */
static void host(void *argument)
{
    struct host *host = argument;

    host->thread = this_thread();
    host->id = own_thread();
    forget();
    __atomic_store_n(&host->ready, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&host->done, __ATOMIC_ACQUIRE)) {
        if (SleepEx(10, TRUE) == WAIT_IO_COMPLETION) {
            host->first = journal[0];
            __atomic_store_n(&host->seen, completions(0), __ATOMIC_RELEASE);
        }
    }
}

static struct thread *start_host(struct host *place)
{
    struct thread *thread;

    memset(place, 0, sizeof *place);
    thread = start_thread(host, place);
    while (!__atomic_load_n(&place->ready, __ATOMIC_ACQUIRE))
        pause_ms(1);
    return thread;
}

static void end_host(struct thread *thread, struct host *place)
{
    __atomic_store_n(&place->done, 1, __ATOMIC_RELEASE);
    wait_for_thread(thread);
}

static int saw(struct host *place, int count)
{
    unsigned long long until = now_ms() + PATIENCE_MS;

    while (__atomic_load_n(&place->seen, __ATOMIC_ACQUIRE) < count && now_ms() < until)
        pause_ms(1);
    return __atomic_load_n(&place->seen, __ATOMIC_ACQUIRE);
}

ROW(the_routine_runs_in_the_thread_that_was_named, "S23 S24 W44 W45")
{
    struct host place;
    struct thread *thread;
    WSAOVERLAPPED overlapped = fresh(NULL);
    WSATHREADID *id = malloc(sizeof *id);
    DWORD returned = UNTOUCHED;
    int error = 0;

    accepted = redirected();
    thread = start_host(&place);
    MUST(id);
    *id = place.id;
    carnet_winsock_test_delay(50);
    EQUAL(WSPIoctl(accepted, QUERY_RECORDS, NULL, 0, out, sizeof out, &returned, &overlapped, note,
                   id, &error),
          SOCKET_ERROR);
    EQUAL(error, WSA_IO_PENDING);
    /* Long before the routine is due the structure is gone. */
    memset(id, 0xA5, sizeof *id);
    free(id);
    carnet_winsock_test_delay(0);
    EQUAL(saw(&place, 1), 1);
    EQUAL(SleepEx(0, TRUE), 0, "not here");
    end_host(thread, &place);
    EQUAL(place.first.thread, place.thread);
    EQUAL(place.first.error, 0);
    CHECK(place.first.bytes > 100);
    CHECK(place.first.overlapped == &overlapped);
}

ROW(the_error_goes_to_its_place_alone, "S25 W48")
{
    WSATHREADID thread = own_thread();
    DWORD returned = UNTOUCHED;
    int error = 0;

    WSASetLastError(4711);
    EQUAL(WSPIoctl(INVALID_SOCKET, SET_RECORDS, out, 1, NULL, 0, &returned, NULL, NULL, &thread,
                   &error),
          SOCKET_ERROR);
    EQUAL(error, WSAENOTSOCK);
    EQUAL(WSAGetLastError(), 4711);
    EQUAL(WSPIoctl(accepted, QUERY_RECORDS, NULL, 0, out, sizeof out, &returned, NULL, NULL,
                   &thread, &error),
          0);
    EQUAL(WSAGetLastError(), 4711);
    /* The other entry point tells it as the last error. */
    EQUAL(WSAIoctl(INVALID_SOCKET, SET_RECORDS, out, 1, NULL, 0, &returned, NULL, NULL),
          SOCKET_ERROR);
    EQUAL(WSAGetLastError(), WSAENOTSOCK);
}

static _Thread_local unsigned long long sum;

static void CALLBACK add(DWORD_PTR context)
{
    sum = sum * 10 + context;
    note(0, (DWORD)context, NULL, 0);
}

static void queue_for(void *argument)
{
    WSATHREADID *id = argument;
    int error = 0;

    EQUAL(WPUQueueApc(id, add, 7, &error), 0);
}

ROW(queueing_a_function, "W45 W9")
{
    struct host place;
    struct thread *thread = start_host(&place);
    WSATHREADID mine = own_thread();
    int error = 0;

    EQUAL(WPUQueueApc(&place.id, add, 5, &error), 0);
    EQUAL(saw(&place, 1), 1);
    wait_for_thread(start_thread(queue_for, &place.id));
    EQUAL(saw(&place, 2), 2);
    EQUAL(place.first.bytes, 5);
    EQUAL(place.first.thread, place.thread);
    end_host(thread, &place);

    /* To itself: not before an alertable wait. */
    forget();
    sum = 0;
    EQUAL(WPUQueueApc(&mine, add, 1, &error), 0);
    EQUAL(WPUQueueApc(&mine, add, 2, &error), 0);
    EQUAL(SleepEx(1, FALSE), 0);
    EQUAL(sum, 0);
    EQUAL(SleepEx(0, TRUE), WAIT_IO_COMPLETION);
    EQUAL(completions(2), 2);
    CHECK(sum == 12 || sum == 21, "%llu", sum);
}

ROW(threads_that_are_none, "W45")
{
    struct host place;
    struct thread *thread = start_host(&place);
    WSATHREADID nobody, own;
    int error = 0;

    end_host(thread, &place);
    EQUAL(WPUQueueApc(&place.id, add, 1, &error), SOCKET_ERROR, "a thread that has ended");
    EQUAL(error, WSAEFAULT);
    memset(&nobody, 0x5A, sizeof nobody);
    error = 0;
    EQUAL(WPUQueueApc(&nobody, add, 1, &error), SOCKET_ERROR, "no thread's name");
    EQUAL(error, WSAEFAULT);
    error = 0;
    EQUAL(WPUQueueApc(unmapped(), add, 1, &error), SOCKET_ERROR, "no memory");
    EQUAL(error, WSAEFAULT);
    own = own_thread();
    CHECK(own.ThreadHandle != NULL);
}

ROW(completing_a_request, "W46 W47")
{
    static const struct {
        DWORD error;
        int result;
    } rows[] = {{0, 0},
                {WSA_OPERATION_ABORTED, WSA_OPERATION_ABORTED},
                {WSAEINVAL, WSAEINVAL},
                {WSAEACCES, WSAEACCES}};
    WSAEVENT event = WSACreateEvent();

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD bytes = UNTOUCHED, flags = UNTOUCHED;
        int error = 0;
        overlapped.Internal = WSS_OPERATION_IN_PROGRESS;
        WSAResetEvent(event);
        EQUAL(WPUCompleteOverlappedRequest(accepted, &overlapped, rows[i].error, 12, &error), 0);
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(overlapped.InternalHigh, 12);
        CHECK(HasOverlappedIoCompleted(&overlapped));
        EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags),
              rows[i].result == 0);
        EQUAL(WSAGetLastError(), rows[i].result);
        EQUAL(bytes, rows[i].result == 0 ? 12 : UNTOUCHED);
    }
    WSACloseEvent(event);
}

struct watcher {
    WSAOVERLAPPED *overlapped;
    ULONG_PTR high;
};

/* Sees the status change, and looks at the length at once. */
static void watch(void *argument)
{
    struct watcher *watcher = argument;

    while (__atomic_load_n(&watcher->overlapped->Internal, __ATOMIC_ACQUIRE) ==
           WSS_OPERATION_IN_PROGRESS)
        ;
    watcher->high = watcher->overlapped->InternalHigh;
}

ROW(the_length_is_there_before_the_status, "W47")
{
    DWORD returned, length = record_of(accepted, out);

    for (int i = 0; i < 200; i++) {
        WSAOVERLAPPED overlapped = fresh(NULL);
        struct watcher watcher = {&overlapped, UNTOUCHED};
        struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
        struct thread *thread;
        overlapped.Internal = WSS_OPERATION_IN_PROGRESS;
        call.overlapped = &overlapped;
        thread = start_thread(watch, &watcher);
        EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
        wait_for_thread(thread);
        EQUAL(watcher.high, length, "round %d", i);
    }
    closesocket(accepted);
    lab("close");
}
