/* WSAGetOverlappedResult. */
#include "suite.h"

static SOCKET accepted;
static unsigned char out[MOST_RECORD];

static void start(WSAOVERLAPPED *overlapped, LPWSAOVERLAPPED_COMPLETION_ROUTINE routine)
{
    DWORD returned;
    struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);

    call.overlapped = overlapped;
    call.routine = routine;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
}

ROW(success_failure_and_pending, "W39 S14")
{
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event);
    DWORD bytes = UNTOUCHED, flags = UNTOUCHED;

    accepted = redirected();
    carnet_winsock_test_delay(1000);
    start(&overlapped, NULL);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSA_IO_INCOMPLETE);
    EQUAL(bytes, UNTOUCHED);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, TRUE, &flags), TRUE);
    CHECK(bytes > 100);
    EQUAL(flags, 0);
    carnet_winsock_test_delay(LONG_MS);
    bytes = UNTOUCHED;
    start(&overlapped, NULL);
    EQUAL(CancelIoEx((HANDLE)accepted, &overlapped), TRUE);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, TRUE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSA_OPERATION_ABORTED);
    EQUAL(bytes, UNTOUCHED);
    carnet_winsock_test_delay(0);
    WSACloseEvent(event);
}

ROW(its_wait_runs_no_routine, "W40 W9")
{
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED with_event = fresh(event), with_routine = fresh(NULL);
    DWORD bytes, flags;

    forget();
    start(&with_routine, note);
    while (!HasOverlappedIoCompleted(&with_routine))
        pause_ms(1);
    carnet_winsock_test_delay(50);
    start(&with_event, NULL);
    EQUAL(WSAGetOverlappedResult(accepted, &with_event, &bytes, TRUE, &flags), TRUE);
    carnet_winsock_test_delay(0);
    EQUAL(completions(0), 0);
    EQUAL(completions(1), 1);
    WSACloseEvent(event);
}

ROW(the_event_ends_its_wait, "W41")
{
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event);
    DWORD bytes = UNTOUCHED, flags = UNTOUCHED;

    overlapped.Internal = STATUS_PENDING;
    overlapped.InternalHigh = 7;
    WSASetEvent(event);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, TRUE, &flags), TRUE);
    EQUAL(bytes, 7);
    WSACloseEvent(event);
}

ROW(its_other_errors, "W42 S31 S36")
{
    WSAOVERLAPPED overlapped = fresh(NULL);
    DWORD bytes = UNTOUCHED, flags = UNTOUCHED;
    WSAEVENT closed = WSACreateEvent();

    overlapped.Internal = STATUS_SUCCESS;
    overlapped.InternalHigh = 3;
    EQUAL(WSAGetOverlappedResult(INVALID_SOCKET, &overlapped, &bytes, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSAENOTSOCK);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, NULL, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSAEFAULT);
    EQUAL(WSAGetOverlappedResult(accepted, unmapped(), &bytes, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSAEFAULT);
    EQUAL(WSAGetOverlappedResult(accepted, NULL, &bytes, FALSE, &flags), FALSE);
    CHECK(WSAGetLastError() == WSAEFAULT || WSAGetLastError() == WSA_INVALID_PARAMETER);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, unmapped(), FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSAEFAULT);
    EQUAL(bytes, UNTOUCHED);

    WSACloseEvent(closed);
    overlapped.Internal = STATUS_PENDING;
    overlapped.hEvent = closed;
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, TRUE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSA_INVALID_HANDLE);
}

ROW(without_wsastartup, "W42")
{
    WSAOVERLAPPED overlapped = fresh(NULL);
    DWORD bytes = UNTOUCHED, flags = UNTOUCHED, returned;
    WSADATA data;

    overlapped.Internal = STATUS_SUCCESS;
    EQUAL(WSACleanup(), 0);
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags), FALSE);
    EQUAL(WSAGetLastError(), WSANOTINITIALISED);
    EQUAL(error_of(BY_WSA, query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned)),
          WSANOTINITIALISED);
    EQUAL(WSACleanup(), SOCKET_ERROR);
    EQUAL(WSAGetLastError(), WSANOTINITIALISED);
    EQUAL(WSAStartup(MAKEWORD(2, 2), &data), 0);
    EQUAL(data.wVersion, MAKEWORD(2, 2));
    EQUAL(error_of(BY_WSA, query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned)), 0);
}

ROW(what_a_status_becomes, "W43 W39")
{
    static const struct {
        DWORD status;
        int error;
    } rows[] = {
        {0x00000000, 0},                   /* STATUS_SUCCESS */
        {0x00000103, WSA_IO_INCOMPLETE},   /* STATUS_PENDING */
        {0x80000005, WSAEMSGSIZE},         /* STATUS_BUFFER_OVERFLOW */
        {0xC0000206, WSAEMSGSIZE},         /* STATUS_INVALID_BUFFER_SIZE */
        {0xC0000002, WSAEOPNOTSUPP},       /* STATUS_NOT_IMPLEMENTED */
        {0xC00000BB, WSAEOPNOTSUPP},       /* STATUS_NOT_SUPPORTED */
        {0xC0000005, WSAEFAULT},           /* STATUS_ACCESS_VIOLATION */
        {0xC0000023, WSAEFAULT},           /* STATUS_BUFFER_TOO_SMALL */
        {0xC00002C5, WSAEFAULT},           /* STATUS_DATATYPE_MISALIGNMENT_ERROR */
        {0xC0000008, WSAENOTSOCK},         /* STATUS_INVALID_HANDLE */
        {0xC0000024, WSAENOTSOCK},         /* STATUS_OBJECT_TYPE_MISMATCH */
        {0xC0000022, WSAEACCES},           /* STATUS_ACCESS_DENIED */
        {0xC0000120, WSA_OPERATION_ABORTED}, /* STATUS_CANCELLED */
        {0xC000000E, WSAENETDOWN},         /* STATUS_NO_SUCH_DEVICE */
        {0xC000000F, WSAENETDOWN},         /* STATUS_NO_SUCH_FILE */
        {0xC0000034, WSAENETDOWN},         /* STATUS_OBJECT_NAME_NOT_FOUND */
        {0xC000003A, WSAENETDOWN},         /* STATUS_OBJECT_PATH_NOT_FOUND */
        {0xC00000BF, WSAENETDOWN},         /* STATUS_NETWORK_BUSY */
        {0xC0000017, WSAENOBUFS},          /* STATUS_NO_MEMORY */
        {0xC000009A, WSAENOBUFS},          /* STATUS_INSUFFICIENT_RESOURCES */
        {0xC0000044, WSAENOBUFS},          /* STATUS_QUOTA_EXCEEDED */
        {0xC00000A3, WSAEWOULDBLOCK},      /* STATUS_DEVICE_NOT_READY */
        {0xC00000D0, WSAEWOULDBLOCK},      /* STATUS_REQUEST_NOT_ACCEPTED */
        {0xC0000140, WSAENOTCONN},         /* STATUS_INVALID_CONNECTION */
        {0xC000023B, WSAEISCONN},          /* STATUS_CONNECTION_ACTIVE */
        {0xC0000240, WSAEINTR},            /* STATUS_REQUEST_ABORTED */
        {0xC00000B5, WSAETIMEDOUT},        /* STATUS_IO_TIMEOUT */
        /* Every other failure. */
        {0xC0000001, WSAEINVAL},           /* STATUS_UNSUCCESSFUL */
        {0xC000000D, WSAEINVAL},           /* STATUS_INVALID_PARAMETER */
        {0xC0000225, WSAEINVAL},           /* STATUS_NOT_FOUND */
        {0xC0000095, WSAEINVAL},           /* STATUS_INTEGER_OVERFLOW */
        {0xC0220008, WSAEINVAL},           /* STATUS_FWP_NOT_FOUND */
        {0xFFFFFFFF, WSAEINVAL},
    };
    WSAOVERLAPPED overlapped = fresh(NULL);

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        DWORD bytes = UNTOUCHED, flags = UNTOUCHED;
        overlapped.Internal = rows[i].status;
        overlapped.InternalHigh = 5;
        EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags),
              rows[i].error == 0, "status %x", rows[i].status);
        EQUAL(WSAGetLastError(), rows[i].error, "status %x", rows[i].status);
        EQUAL(bytes, rows[i].error == 0 ? 5 : UNTOUCHED, "status %x", rows[i].status);
    }
    closesocket(accepted);
    lab("close");
}
