/* No engine serves the socket: it was taken down, and comes back. */
#include "suite.h"

static unsigned char record[MOST_RECORD];
static DWORD length;
static SOCKET accepted, prepared;

static void all_fail(int expected)
{
    unsigned char out[MOST_RECORD];
    DWORD returned;

    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, set_call(prepared, record, length, &returned)), expected, "SET");
        EQUAL(returned, 0);
        EQUAL(error_of(entry, query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned)),
              expected, "QUERY_RECORDS");
        EQUAL(error_of(entry, query_call(accepted, QUERY_CONTEXT, out, sizeof out, &returned)),
              expected, "QUERY_CONTEXT");
    }
}

ROW(with_an_engine_it_works, "S35")
{
    DWORD returned;

    accepted = redirected();
    prepared = overlapped_socket();
    length = record_of(accepted, record);
    EQUAL(error_of(BY_WSA, set_call(prepared, record, length, &returned)), 0);
}

ROW(without_one_the_network_is_down, "S35 Q6")
{
    lab("close");
    lab("detach");
    all_fail(WSAENETDOWN);
}

ROW(an_overlapped_operation_says_the_same, "S35 S14 W43")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event);
    DWORD returned, flags = UNTOUCHED;
    struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);

    call.overlapped = &overlapped;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    CHECK(signalled(event, PATIENCE_MS));
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &returned, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSAENETDOWN);
    EQUAL(overlapped.InternalHigh, 0);
    WSACloseEvent(event);
}

ROW(a_socket_without_a_record_may_connect, "S35")
{
    struct sockaddr_in to = destination();
    SOCKET s = overlapped_socket();

    MUST(connect(s, (struct sockaddr *)&to, sizeof to) == 0);
    CHECK(echoes(s));
    closesocket(s);
}

ROW(with_an_engine_again_it_works_again, "S35 S34b")
{
    unsigned char anew[MOST_RECORD];
    DWORD returned, anew_length;
    SOCKET again;

    lab("attach");
    /* The record of before is another instance's now. */
    EQUAL(error_of(BY_WSA, set_call(prepared, record, length, &returned)), WSAEINVAL);
    lab("register");
    again = redirected();
    anew_length = record_of(again, anew);
    EQUAL(error_of(BY_WSA, set_call(prepared, anew, anew_length, &returned)), 0);
    closesocket(again);
    closesocket(prepared);
    closesocket(accepted);
}
