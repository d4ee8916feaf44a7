/* SIO_FLUSH as Microsoft's own provider for TCP answers it, where the environment asks for that. */
#include "suite.h"

/* Before the library begins. */
__attribute__((constructor(101))) static void ask_for_it(void)
{
    set_environment("CARNET_WINSOCK_STRICT_MSAFD", "1");
}

ROW(a_flush_is_not_supported, "S29b W16")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event), flushing = fresh(NULL);
    SOCKET accepted = redirected();
    DWORD returned;
    struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
    struct call flush = {accepted, SIO_FLUSH, NULL, 0, NULL, 0, &returned, NULL, NULL};

    carnet_winsock_test_delay(LONG_MS);
    call.overlapped = &overlapped;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    for EACH_ENTRY(entry) {
        returned = UNTOUCHED;
        EQUAL(error_of(entry, flush), WSAEOPNOTSUPP);
        EQUAL(returned, 0);
    }
    CHECK(!signalled(event, 20));
    EQUAL(CancelIoEx((HANDLE)accepted, NULL), TRUE);
    CHECK(signalled(event, PATIENCE_MS));

    /* Overlapped it pends first, as every unknown code (W17). */
    carnet_winsock_test_delay(0);
    flush.overlapped = &flushing;
    flush.routine = note;
    forget();
    EQUAL(error_of(BY_WSA, flush), WSA_IO_PENDING);
    EQUAL(completions(1), 1);
    EQUAL(journal[0].error, WSAEOPNOTSUPP);
    WSACloseEvent(event);
    closesocket(accepted);
    lab("close");
}
