/* Redirects without a context. */
#include "suite.h"

ROW(there_is_none, "S52 Q8")
{
    SOCKET accepted = redirected();
    unsigned char out[64];
    DWORD returned;

    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, query_call(accepted, QUERY_CONTEXT, out, sizeof out, &returned)),
              (int)FWP_E_NOT_FOUND);
        EQUAL(returned, 0);
        /* Whatever room there is for it. */
        EQUAL(error_of(entry, query_call(accepted, QUERY_CONTEXT, NULL, 0, &returned)),
              (int)FWP_E_NOT_FOUND);
        EQUAL(error_of(entry, query_call(accepted, QUERY_RECORDS, NULL, 0, &returned)),
              ERROR_INSUFFICIENT_BUFFER, "there is a record");
    }
    closesocket(accepted);
    lab("close");
}

ROW(overlapped_it_is_an_invalid_argument, "Q8 W43")
{
    SOCKET accepted = redirected();
    unsigned char out[64];
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event);
    DWORD returned, bytes = UNTOUCHED, flags;
    struct call call = query_call(accepted, QUERY_CONTEXT, out, sizeof out, &returned);

    call.overlapped = &overlapped;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    CHECK(signalled(event, PATIENCE_MS));
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSAEINVAL);
    EQUAL(bytes, UNTOUCHED);
    overlapped = fresh(NULL);
    call.routine = note;
    forget();
    EQUAL(error_of(BY_WSP, call), WSA_IO_PENDING);
    EQUAL(completions(1), 1);
    EQUAL(journal[0].error, WSAEINVAL);
    WSACloseEvent(event);
    closesocket(accepted);
    lab("close");
}
