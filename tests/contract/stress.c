/* Ten thousand overlapped operations of eight threads on a hundred redirected sockets, which are
 * closed, flushed and cancelled meanwhile: each completes exactly once, with a status that is true. */
#include "suite.h"

enum { THREADS = 8, OPERATIONS = 1250, SOCKETS = 100, AT_ONCE = 16, RECORD = 1024 };

static SOCKET sockets[SOCKETS];
/* Numbers of operations: begun, refused at once, and how they ended. */
static unsigned begun, refused, succeeded, aborted, unconnected;

struct operation {
    WSAOVERLAPPED overlapped;
    WSAEVENT event;
    int in_use, with_routine, calls;
    DWORD error, bytes;
    unsigned char out[RECORD];
};

static void CALLBACK count(DWORD error, DWORD bytes, LPWSAOVERLAPPED overlapped, DWORD flags)
{
    struct operation *operation = (struct operation *)overlapped;

    CHECK(flags == 0);
    operation->calls++;
    operation->error = error;
    operation->bytes = bytes;
}

static unsigned next(unsigned long long *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(*seed >> 33);
}

static void add(unsigned *counter)
{
    __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* Waits for an operation's end and checks what it says of itself. */
static void finish(struct operation *operation)
{
    WSAOVERLAPPED *overlapped = &operation->overlapped;
    unsigned long long until = now_ms() + PATIENCE_MS;
    DWORD expected = 0;

    if (!operation->in_use)
        return;
    operation->in_use = 0;
    if (operation->with_routine) {
        while (operation->calls == 0 && now_ms() < until)
            SleepEx(100, TRUE);
    } else {
        CHECK(signalled(operation->event, PATIENCE_MS));
        WSAResetEvent(operation->event);
    }
    switch (overlapped->Internal) {
    case STATUS_SUCCESS:
        CHECK(overlapped->InternalHigh > 100 && overlapped->InternalHigh <= RECORD);
        CHECK(memcmp(operation->out, "CRNT", 4) == 0);
        add(&succeeded);
        break;
    case STATUS_CANCELLED:
        expected = WSA_OPERATION_ABORTED;
        add(&aborted);
        break;
    case STATUS_INVALID_CONNECTION:
        expected = WSAENOTCONN;
        add(&unconnected);
        break;
    default:
        CHECK(0, "status %llx", (unsigned long long)overlapped->Internal);
    }
    if (operation->with_routine) {
        EQUAL(operation->calls, 1);
        EQUAL(operation->error, expected);
        EQUAL(operation->bytes, overlapped->InternalHigh);
    }
}

static void start(struct operation *operation, SOCKET s, enum entry entry, int with_routine)
{
    DWORD returned;
    struct call call = query_call(s, QUERY_RECORDS, operation->out, RECORD, &returned);
    int error;

    /* Since it was waited for, nobody has completed it again. */
    CHECK(!signalled(operation->event, 0));
    operation->overlapped = fresh(with_routine ? NULL : operation->event);
    operation->with_routine = with_routine;
    operation->calls = 0;
    memset(operation->out, 0, RECORD);
    call.overlapped = &operation->overlapped;
    call.routine = with_routine ? count : NULL;
    error = error_of(entry, call);
    if (error == WSA_IO_PENDING) {
        operation->in_use = 1;
        add(&begun);
    } else {
        EQUAL(error, WSAENOTSOCK);
        CHECK(is_fresh(&operation->overlapped));
        add(&refused);
    }
}

/* Disturbs the operations of a socket. */
static void disturb(unsigned choice, SOCKET *place, struct operation *own)
{
    SOCKET s = __atomic_load_n(place, __ATOMIC_ACQUIRE);
    DWORD returned = 0;
    struct call flush = {s, SIO_FLUSH, NULL, 0, NULL, 0, &returned, NULL, NULL};
    int error;

    if (choice < 2) {
        s = __atomic_exchange_n(place, INVALID_SOCKET, __ATOMIC_ACQ_REL);
        if (s != INVALID_SOCKET) {
            EQUAL(closesocket(s), 0);
            __atomic_store_n(place, overlapped_socket(), __ATOMIC_RELEASE);
        }
    } else if (choice < 6) {
        error = error_of(BY_WSA, flush);
        CHECK(error == 0 || error == WSAENOTSOCK, "error %d", error);
    } else if (choice < 10) {
        if (!CancelIoEx((HANDLE)s, &own->overlapped))
            CHECK(GetLastError() == ERROR_NOT_FOUND || GetLastError() == ERROR_INVALID_HANDLE ||
                      GetLastError() == WSAENOTSOCK,
                  "error %u", GetLastError());
    }
}

static void work(void *argument)
{
    unsigned long long seed = (unsigned long long)(size_t)argument;
    struct operation *operations = calloc(AT_ONCE, sizeof *operations);

    MUST(operations);
    for (int i = 0; i < AT_ONCE; i++)
        operations[i].event = WSACreateEvent();
    for (int i = 0; i < OPERATIONS; i++) {
        struct operation *operation = &operations[next(&seed) % AT_ONCE];
        SOCKET s = __atomic_load_n(&sockets[next(&seed) % SOCKETS], __ATOMIC_ACQUIRE);
        finish(operation);
        start(operation, s, next(&seed) % 2 ? BY_WSA : BY_WSP, next(&seed) % 2);
        disturb(next(&seed) % 64, &sockets[next(&seed) % SOCKETS],
                &operations[next(&seed) % AT_ONCE]);
    }
    for (int i = 0; i < AT_ONCE; i++) {
        finish(&operations[i]);
        WSACloseEvent(operations[i].event);
    }
    EQUAL(SleepEx(0, TRUE), 0, "nothing is left");
    free(operations);
}

ROW(each_of_ten_thousand_operations_completes_once, "S14 S28 S29a S29b S29c W5 W33 W47")
{
    struct thread *threads[THREADS];

    for (int i = 0; i < SOCKETS; i++)
        sockets[i] = redirected();
    carnet_winsock_test_delay(1);
    for (size_t i = 0; i < THREADS; i++)
        threads[i] = start_thread(work, (void *)(i + 1));
    for (int i = 0; i < THREADS; i++)
        wait_for_thread(threads[i]);
    carnet_winsock_test_delay(0);
    EQUAL(begun + refused, THREADS * OPERATIONS);
    EQUAL(succeeded + aborted + unconnected, begun);
    CHECK(succeeded > 1000 && aborted > 50 && unconnected > 50, "%u, %u, %u", succeeded, aborted,
          unconnected);
    for (int i = 0; i < SOCKETS; i++)
        closesocket(sockets[i]);
    lab("close");
}
