/* How an operation ends before its time, and how a blocking call does. */
#include "suite.h"

static SOCKET accepted, other;
static unsigned char out[8][MOST_RECORD];

/* Starts an operation that does not end by itself. */
static void start(SOCKET s, int number, WSAOVERLAPPED *overlapped,
                  LPWSAOVERLAPPED_COMPLETION_ROUTINE routine)
{
    DWORD returned;
    struct call call = query_call(s, QUERY_RECORDS, out[number], MOST_RECORD, &returned);

    call.overlapped = overlapped;
    call.routine = routine;
    EQUAL(error_of(number % 2 ? BY_WSA : BY_WSP, call), WSA_IO_PENDING);
}

static void was_aborted(WSAOVERLAPPED *overlapped, SOCKET s)
{
    DWORD bytes = UNTOUCHED, flags = UNTOUCHED;

    EQUAL(overlapped->Internal, STATUS_CANCELLED);
    EQUAL(overlapped->InternalHigh, 0);
    EQUAL(WSAGetOverlappedResult(s, overlapped, &bytes, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSA_OPERATION_ABORTED);
    EQUAL(bytes, UNTOUCHED);
}

ROW(closing_the_socket, "S29a W33")
{
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED with_event = fresh(event), with_routine = fresh(NULL);

    accepted = redirected();
    other = redirected();
    SOCKET closed = redirected();
    carnet_winsock_test_delay(LONG_MS);
    forget();
    start(closed, 0, &with_event, NULL);
    start(closed, 1, &with_routine, note);
    EQUAL(closesocket(closed), 0);
    CHECK(signalled(event, PATIENCE_MS));
    EQUAL(with_event.Internal, STATUS_CANCELLED);
    EQUAL(with_event.InternalHigh, 0);
    EQUAL(completions(1), 1);
    EQUAL(journal[0].error, WSA_OPERATION_ABORTED);
    EQUAL(journal[0].bytes, 0);
    CHECK(journal[0].overlapped == &with_routine);
    CHECK(!is_open((int)closed));
    WSACloseEvent(event);
}

ROW(closing_the_descriptor_itself, "S29a")
{
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event);
    SOCKET closed = redirected();

    /* The library is not told; it notices when the operation is carried out. */
    carnet_winsock_test_delay(1000);
    start(closed, 0, &overlapped, NULL);
    raw_close((int)closed);
    CHECK(signalled(event, PATIENCE_MS));
    EQUAL(overlapped.Internal, STATUS_CANCELLED);
    carnet_winsock_test_delay(LONG_MS);
    WSACloseEvent(event);
}

ROW(flushing_the_socket, "S29b")
{
    WSAEVENT events[3] = {WSACreateEvent(), WSACreateEvent(), WSACreateEvent()};
    WSAOVERLAPPED overlapped[4] = {fresh(events[0]), fresh(events[1]), fresh(events[2]),
                                   fresh(NULL)};
    DWORD returned = UNTOUCHED;
    struct call flush = {accepted, SIO_FLUSH, NULL, 0, NULL, 0, &returned, NULL, NULL};

    forget();
    start(accepted, 0, &overlapped[0], NULL);
    start(accepted, 1, &overlapped[1], NULL);
    start(other, 2, &overlapped[2], NULL);
    start(accepted, 3, &overlapped[3], note);
    EQUAL(error_of(BY_WSA, flush), 0);
    EQUAL(returned, 0);
    CHECK(signalled(events[0], PATIENCE_MS));
    CHECK(signalled(events[1], PATIENCE_MS));
    was_aborted(&overlapped[0], accepted);
    was_aborted(&overlapped[1], accepted);
    EQUAL(completions(1), 1);
    EQUAL(journal[0].error, WSA_OPERATION_ABORTED);
    /* The other socket's goes on. */
    CHECK(!signalled(events[2], 20));
    CHECK(!HasOverlappedIoCompleted(&overlapped[2]));
    flush.s = other;
    EQUAL(error_of(BY_WSP, flush), 0);
    CHECK(signalled(events[2], PATIENCE_MS));
    was_aborted(&overlapped[2], other);
    for (int i = 0; i < 3; i++)
        WSACloseEvent(events[i]);
}

struct short_life {
    WSAOVERLAPPED *with_event, *with_routine;
};

static void live_shortly(void *argument)
{
    struct short_life *life = argument;

    start(accepted, 0, life->with_event, NULL);
    start(accepted, 1, life->with_routine, note);
}

ROW(the_end_of_the_thread, "S29c W10")
{
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED with_event = fresh(event), with_routine = fresh(NULL), mine = fresh(NULL);
    struct short_life life = {&with_event, &with_routine};

    forget();
    start(accepted, 2, &mine, note);
    wait_for_thread(start_thread(live_shortly, &life));
    CHECK(signalled(event, PATIENCE_MS));
    was_aborted(&with_event, accepted);
    for (int i = 0; i < 1000 && !HasOverlappedIoCompleted(&with_routine); i++)
        pause_ms(10);
    EQUAL(with_routine.Internal, STATUS_CANCELLED);
    /* Its routine has no thread to run in, and runs in no other. */
    EQUAL(SleepEx(20, TRUE), 0);
    /* What another thread began goes on. */
    CHECK(!HasOverlappedIoCompleted(&mine));
    EQUAL(CancelIoEx((HANDLE)accepted, &mine), TRUE);
    EQUAL(completions(1), 1);
    EQUAL(journal[0].error, WSA_OPERATION_ABORTED);
    WSACloseEvent(event);
}

ROW(asking_for_cancellation, "S29c")
{
    WSAEVENT events[3] = {WSACreateEvent(), WSACreateEvent(), WSACreateEvent()};
    WSAOVERLAPPED overlapped[3] = {fresh(events[0]), fresh(events[1]), fresh(events[2])};

    for (int i = 0; i < 3; i++)
        start(accepted, i, &overlapped[i], NULL);
    EQUAL(CancelIoEx((HANDLE)accepted, &overlapped[1]), TRUE);
    CHECK(signalled(events[1], PATIENCE_MS));
    was_aborted(&overlapped[1], accepted);
    CHECK(!signalled(events[0], 20));
    CHECK(!signalled(events[2], 0));
    EQUAL(CancelIoEx((HANDLE)accepted, NULL), TRUE);
    CHECK(signalled(events[0], PATIENCE_MS));
    CHECK(signalled(events[2], PATIENCE_MS));
    was_aborted(&overlapped[0], accepted);
    was_aborted(&overlapped[2], accepted);
    EQUAL(CancelIoEx((HANDLE)accepted, NULL), FALSE);
    EQUAL(GetLastError(), ERROR_NOT_FOUND);
    EQUAL(CancelIoEx((HANDLE)accepted, &overlapped[0]), FALSE);
    EQUAL(GetLastError(), ERROR_NOT_FOUND);
    for (int i = 0; i < 3; i++)
        WSACloseEvent(events[i]);
}

static void cancel_own(void *argument)
{
    WSAOVERLAPPED *overlapped = argument;

    start(accepted, 1, overlapped, NULL);
    EQUAL(CancelIo((HANDLE)accepted), TRUE);
    CHECK(signalled(overlapped->hEvent, PATIENCE_MS));
}

ROW(cancelling_what_the_thread_began, "S29c")
{
    WSAEVENT mine = WSACreateEvent(), others = WSACreateEvent();
    WSAOVERLAPPED here = fresh(mine), there = fresh(others);

    start(accepted, 0, &here, NULL);
    wait_for_thread(start_thread(cancel_own, &there));
    was_aborted(&there, accepted);
    CHECK(!signalled(mine, 20));
    EQUAL(CancelIo((HANDLE)accepted), TRUE);
    CHECK(signalled(mine, PATIENCE_MS));
    was_aborted(&here, accepted);
    WSACloseEvent(mine);
    WSACloseEvent(others);
}

static int from_within[3];

static void CALLBACK calls_again(DWORD error, DWORD bytes, LPWSAOVERLAPPED overlapped, DWORD flags)
{
    DWORD returned;

    (void)error, (void)bytes, (void)overlapped, (void)flags;
    carnet_winsock_test_delay(LONG_MS);
    for EACH_ENTRY(entry)
        from_within[entry] = error_of(
            entry, query_call(accepted, QUERY_RECORDS, out[1], MOST_RECORD, &returned));
    carnet_winsock_test_delay(0);
    from_within[2] = 1;
}

ROW(a_blocking_call_from_a_routine, "S32")
{
    WSAOVERLAPPED overlapped = fresh(NULL);
    DWORD returned;

    carnet_winsock_test_delay(0);
    start(accepted, 0, &overlapped, calls_again);
    for (int i = 0; i < 1000 && !from_within[2]; i++)
        SleepEx(30, TRUE);
    EQUAL(from_within[2], 1);
    EQUAL(from_within[BY_WSA], WSAEINPROGRESS);
    EQUAL(from_within[BY_WSP], WSAEINPROGRESS);
    /* Outside of it, it works again. */
    EQUAL(error_of(BY_WSA, query_call(accepted, QUERY_RECORDS, out[1], MOST_RECORD, &returned)), 0);
}

struct blocked {
    enum entry entry;
    int error; /* -1 until the call has returned */
};

static void block(void *argument)
{
    struct blocked *blocked = argument;
    DWORD returned;

    int error = error_of(
        blocked->entry, query_call(accepted, QUERY_RECORDS, out[2], MOST_RECORD, &returned));
    EQUAL(returned, 0);
    __atomic_store_n(&blocked->error, error, __ATOMIC_RELEASE);
}

ROW(a_blocking_call_that_is_cancelled, "S33")
{
    carnet_winsock_test_delay(LONG_MS);
    for EACH_ENTRY(entry) {
        struct blocked blocked = {entry, -1};
        struct thread *thread = start_thread(block, &blocked);
        for (int i = 0; i < 3000 && !WSAIsBlocking(); i++)
            pause_ms(10);
        CHECK(WSAIsBlocking());
        EQUAL(WSACancelBlockingCall(), 0);
        wait_for_thread(thread);
        EQUAL(blocked.error, WSAEINTR);
        CHECK(!WSAIsBlocking());
    }
}

ROW(a_blocking_call_and_a_signal, "S33")
{
    for EACH_ENTRY(entry) {
        struct blocked blocked = {entry, -1};
        struct thread *thread = start_thread(block, &blocked);
        for (int i = 0; i < 3000 && !WSAIsBlocking(); i++)
            pause_ms(10);
        /* It may come before the wait begins; then it has to come again. */
        for (int i = 0; i < 3000 && __atomic_load_n(&blocked.error, __ATOMIC_ACQUIRE) == -1; i++) {
            interrupt(thread);
            pause_ms(10);
        }
        wait_for_thread(thread);
        EQUAL(blocked.error, WSAEINTR);
    }
    carnet_winsock_test_delay(0);
    closesocket(accepted);
    closesocket(other);
    lab("close");
}
