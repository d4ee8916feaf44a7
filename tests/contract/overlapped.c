/* Overlapped operation: what pends, how it is told of, and that it does not block. */
#include "suite.h"

static unsigned char record[MOST_RECORD];
static SOCKET accepted, onwards;
static DWORD length;

ROW(a_set_with_an_event, "S14 S17 S28 W3 W20 W39")
{
    WSAEVENT event = WSACreateEvent();
    DWORD returned, bytes = UNTOUCHED, flags = UNTOUCHED;

    accepted = redirected();
    onwards = overlapped_socket();
    length = record_of(accepted, record);
    for EACH_ENTRY(entry) {
        WSAOVERLAPPED overlapped = fresh(event);
        struct call call = set_call(onwards, record, length, &returned);
        call.overlapped = &overlapped;
        WSAResetEvent(event);
        EQUAL(error_of(entry, call), 0);
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(overlapped.Internal, STATUS_SUCCESS);
        EQUAL(overlapped.InternalHigh, 0);
        EQUAL(WSAGetOverlappedResult(onwards, &overlapped, &bytes, FALSE, &flags), TRUE);
        EQUAL(bytes, 0);
        EQUAL(flags, 0);
        EQUAL(WSAGetLastError(), 0);
    }
    WSACloseEvent(event);
}

ROW(a_set_with_a_routine, "S21 W3 W8 W11 W21")
{
    for EACH_ENTRY(entry) {
        WSAOVERLAPPED overlapped = fresh(NULL);
        DWORD returned;
        struct call call = set_call(onwards, record, length, &returned);
        call.overlapped = &overlapped;
        call.routine = note;
        forget();
        EQUAL(error_of(entry, call), 0);
        EQUAL(SleepEx(0, TRUE), WAIT_IO_COMPLETION);
        EQUAL(completions(1), 1);
        EQUAL(SleepEx(0, TRUE), 0, "exactly one");
        EQUAL(journal[0].error, 0);
        EQUAL(journal[0].bytes, 0);
        EQUAL(journal[0].flags, 0);
        CHECK(journal[0].overlapped == &overlapped);
        EQUAL(journal[0].thread, this_thread());
    }
}

ROW(a_set_that_pends, "S13 S14 S17 S19 S27 S28 W4 W39 W47")
{
    WSAEVENT event = WSACreateEvent();

    for EACH_ENTRY(entry) {
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned, bytes = UNTOUCHED, flags = UNTOUCHED;
        struct call call = set_call(onwards, record, length, &returned);
        int error;
        call.overlapped = &overlapped;
        carnet_winsock_test_delay(1500);
        EQUAL(make(entry, call, &error), SOCKET_ERROR);
        EQUAL(error, WSA_IO_PENDING);
        EQUAL(returned, UNTOUCHED);
        /* It has returned before the operation is at its end. */
        EQUAL(WSAGetOverlappedResult(onwards, &overlapped, &bytes, FALSE, &flags), FALSE);
        EQUAL(WSAGetLastError(), WSA_IO_INCOMPLETE);
        EQUAL(bytes, UNTOUCHED);
        EQUAL(overlapped.Internal, WSS_OPERATION_IN_PROGRESS);
        CHECK(!HasOverlappedIoCompleted(&overlapped));
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(WSAGetOverlappedResult(onwards, &overlapped, &bytes, FALSE, &flags), TRUE);
        EQUAL(bytes, 0);
        EQUAL(overlapped.Internal, STATUS_SUCCESS);
        EQUAL(returned, UNTOUCHED);
        carnet_winsock_test_delay(0);
    }
    WSACloseEvent(event);
}

ROW(a_query_with_an_event, "S14 S17 S28 Q10 W4 W29")
{
    WSAEVENT event = WSACreateEvent();

    for EACH_ENTRY(entry) {
        unsigned char out[MOST_RECORD];
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned, bytes = UNTOUCHED, flags = UNTOUCHED;
        struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
        call.overlapped = &overlapped;
        memset(out, 0xEE, sizeof out);
        EQUAL(error_of(entry, call), WSA_IO_PENDING);
        EQUAL(returned, UNTOUCHED);
        EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, TRUE, &flags), TRUE);
        EQUAL(bytes, length);
        EQUAL(overlapped.InternalHigh, length);
        CHECK(memcmp(out, record, length) == 0);
        EQUAL(out[length], 0xEE, "no more is written");
        CHECK(signalled(event, 0));
    }
    WSACloseEvent(event);
}

ROW(a_query_with_a_routine, "S14 S21 W8 W29")
{
    static const DWORD codes[] = {QUERY_RECORDS, QUERY_CONTEXT};

    for (int i = 0; i < 2; i++) {
        for EACH_ENTRY(entry) {
            unsigned char out[MOST_RECORD];
            WSAOVERLAPPED overlapped = fresh(NULL);
            DWORD returned, expected = i == 0 ? length : 5;
            struct call call = query_call(accepted, codes[i], out, sizeof out, &returned);
            call.overlapped = &overlapped;
            call.routine = note;
            forget();
            EQUAL(error_of(entry, call), WSA_IO_PENDING);
            EQUAL(completions(1), 1);
            EQUAL(journal[0].error, 0);
            EQUAL(journal[0].bytes, expected);
            EQUAL(journal[0].flags, 0);
            CHECK(journal[0].overlapped == &overlapped);
            EQUAL(journal[0].thread, this_thread());
            CHECK(memcmp(out, i == 0 ? (const char *)record : "hello", expected) == 0);
            EQUAL(SleepEx(0, TRUE), 0, "exactly one");
        }
    }
}

ROW(a_query_without_enough_room, "S11 Q5 W12 W27 W39 W43")
{
    WSAEVENT event = WSACreateEvent();

    for EACH_ENTRY(entry) {
        unsigned char out[8] = "abcdefg";
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned, bytes = UNTOUCHED, flags = UNTOUCHED;
        struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
        call.overlapped = &overlapped;
        EQUAL(error_of(entry, call), WSA_IO_PENDING);
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(overlapped.Internal, STATUS_BUFFER_TOO_SMALL);
        EQUAL(overlapped.InternalHigh, 0);
        EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags), FALSE);
        EQUAL(WSAGetLastError(), WSAEFAULT);
        EQUAL(bytes, UNTOUCHED);
        CHECK(memcmp(out, "abcdefg", 8) == 0);

        overlapped = fresh(NULL);
        call.routine = note;
        forget();
        EQUAL(error_of(entry, call), WSA_IO_PENDING);
        EQUAL(completions(1), 1);
        EQUAL(journal[0].error, WSAEFAULT);
        EQUAL(journal[0].bytes, 0);
    }
    WSACloseEvent(event);
}

ROW(an_unknown_code, "S37a W17 W18")
{
    static const DWORD codes[] = {0xdeadbeefu, FIOASYNC, 0x667eu};
    WSAEVENT event = WSACreateEvent();

    for (int i = 0; i < 3; i++) {
        for EACH_ENTRY(entry) {
            char in[16] = "", out[16] = "";
            WSAOVERLAPPED overlapped = fresh(event);
            DWORD returned = UNTOUCHED, bytes = UNTOUCHED, flags = UNTOUCHED;
            struct call call = {onwards,    codes[i],  in,          sizeof in, out,
                                sizeof out, &returned, &overlapped, NULL};
            EQUAL(error_of(entry, call), WSA_IO_PENDING);
            EQUAL(returned, UNTOUCHED);
            CHECK(signalled(event, PATIENCE_MS));
            EQUAL(overlapped.Internal, STATUS_NOT_SUPPORTED);
            EQUAL(overlapped.InternalHigh, 0);
            EQUAL(WSAGetOverlappedResult(onwards, &overlapped, &bytes, FALSE, &flags), FALSE);
            EQUAL(WSAGetLastError(), WSAEOPNOTSUPP);

            overlapped = fresh(NULL);
            call.routine = note;
            forget();
            EQUAL(error_of(entry, call), WSA_IO_PENDING);
            EQUAL(completions(1), 1);
            EQUAL(journal[0].error, WSAEOPNOTSUPP);
            EQUAL(journal[0].bytes, 0);
            EQUAL(SleepEx(0, TRUE), 0, "exactly one");
        }
    }
    WSACloseEvent(event);
}

ROW(a_bad_record, "S34b W5 W30 W43")
{
    WSAEVENT event = WSACreateEvent();

    record[length - 1] ^= 1;
    for EACH_ENTRY(entry) {
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned, bytes = UNTOUCHED, flags = UNTOUCHED;
        struct call call = set_call(onwards, record, length, &returned);
        call.overlapped = &overlapped;
        EQUAL(error_of(entry, call), WSAEINVAL, "at once");
        CHECK(is_fresh(&overlapped));
        CHECK(!signalled(event, 0));
        call.routine = note;
        EQUAL(error_of(entry, call), WSAEINVAL, "at once, with a routine");
        CHECK(is_fresh(&overlapped));
        EQUAL(SleepEx(0, TRUE), 0);

        call.routine = NULL;
        carnet_winsock_test_delay(20);
        EQUAL(error_of(entry, call), WSA_IO_PENDING);
        CHECK(signalled(event, PATIENCE_MS));
        carnet_winsock_test_delay(0);
        EQUAL(WSAGetOverlappedResult(onwards, &overlapped, &bytes, FALSE, &flags), FALSE);
        EQUAL(WSAGetLastError(), WSAEINVAL);
        WSAResetEvent(event);
    }
    record[length - 1] ^= 1;
    WSACloseEvent(event);
}

ROW(a_socket_without_the_attribute, "S16 S20 S22 W1 W2")
{
    SOCKET plain = plain_socket();
    WSAEVENT event = WSACreateEvent();

    forget();
    for EACH_ENTRY(entry) {
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned;
        struct call call = set_call(plain, record, length, &returned);
        call.overlapped = &overlapped;
        EQUAL(error_of(entry, call), 0);
        EQUAL(returned, 0);
        CHECK(is_fresh(&overlapped));
        call.routine = note;
        carnet_winsock_test_delay(50);
        unsigned long long begun = now_ms();
        EQUAL(error_of(entry, call), 0, "with a routine");
        CHECK(now_ms() - begun >= 50, "it waits");
        carnet_winsock_test_delay(0);
        CHECK(is_fresh(&overlapped));
        EQUAL(SleepEx(0, TRUE), 0);
        EQUAL(completions(0), 0);
    }
    CHECK(!signalled(event, 0));
    WSACloseEvent(event);
    closesocket(plain);
}

ROW(who_has_the_attribute, "W1 S16 S17")
{
    char out[16];
    DWORD returned;
    WSAOVERLAPPED overlapped;
    SOCKET by_socket = socket(AF_INET, SOCK_STREAM, IPPROTO_TCP);
    const struct {
        SOCKET s;
        int overlapped;
    } sockets[] = {{by_socket, 1},
                   {overlapped_socket(), 1},
                   {accepted, 1},
                   {plain_socket(), 0},
                   {(SOCKET)raw_socket(AF_INET, 1, 0), 1}};

    for (int i = 0; i < 5; i++) {
        /* An unknown code pends on those alone (W16, W17). */
        struct call call = {sockets[i].s, 0xdeadbeefu, NULL,       0,   out,
                            sizeof out,   &returned,   &overlapped, NULL};
        overlapped = fresh(NULL);
        EQUAL(error_of(BY_WSA, call), sockets[i].overlapped ? WSA_IO_PENDING : WSAEOPNOTSUPP,
              "socket %d", i);
        while (sockets[i].overlapped && !HasOverlappedIoCompleted(&overlapped))
            pause_ms(1);
        /* Without an OVERLAPPED the call is synchronous on all of them. */
        call.overlapped = NULL;
        EQUAL(error_of(BY_WSA, call), WSAEOPNOTSUPP, "socket %d", i);
    }
    closesocket(by_socket);
    closesocket(sockets[1].s);
    closesocket(sockets[3].s);
    raw_close((int)sockets[4].s);
}

ROW(a_synchronous_call_waits, "S20")
{
    for EACH_ENTRY(entry) {
        unsigned char out[MOST_RECORD];
        DWORD returned;
        unsigned long long begun = now_ms();
        carnet_winsock_test_delay(200);
        EQUAL(error_of(entry, query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned)), 0);
        carnet_winsock_test_delay(0);
        CHECK(now_ms() - begun >= 200);
        EQUAL(returned, length);
    }
}

ROW(the_event_is_reset_and_set_again, "W7")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh(event);
    DWORD returned;
    struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);

    call.overlapped = &overlapped;
    WSASetEvent(event);
    carnet_winsock_test_delay(1000);
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    CHECK(!signalled(event, 0), "while it pends");
    CHECK(signalled(event, PATIENCE_MS));
    CHECK(HasOverlappedIoCompleted(&overlapped));
    carnet_winsock_test_delay(0);
    WSACloseEvent(event);
}

ROW(with_a_routine_the_event_is_the_applications, "W7 W37")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    HANDLE handles[] = {event, (HANDLE)(ULONG_PTR)0x12345, (HANDLE)(ULONG_PTR)-1};

    for (int i = 0; i < 3; i++) {
        for EACH_ENTRY(entry) {
            WSAOVERLAPPED overlapped = fresh(handles[i]);
            DWORD returned;
            struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
            call.overlapped = &overlapped;
            call.routine = note;
            forget();
            EQUAL(error_of(entry, call), WSA_IO_PENDING, "handle %d", i);
            EQUAL(completions(1), 1, "handle %d", i);
            CHECK(overlapped.hEvent == handles[i]);
        }
    }
    CHECK(!signalled(event, 0));
    WSACloseEvent(event);
}

ROW(the_low_bit_of_the_event_does_not_matter_here, "W37")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    WSAOVERLAPPED overlapped = fresh((WSAEVENT)((ULONG_PTR)event | 1));
    DWORD returned, bytes = 0, flags = 0;
    struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);

    call.overlapped = &overlapped;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    CHECK(signalled(event, PATIENCE_MS));
    EQUAL(WSAGetOverlappedResult(accepted, &overlapped, &bytes, FALSE, &flags), TRUE);
    EQUAL(bytes, length);
    WSACloseEvent(event);
}

ROW(a_routine_waits_for_an_alertable_wait, "S21 W9")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent(), never = WSACreateEvent();
    WSAOVERLAPPED with_routine = fresh(NULL), with_event = fresh(event);
    DWORD returned;
    struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);

    forget();
    call.overlapped = &with_routine;
    call.routine = note;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    while (!HasOverlappedIoCompleted(&with_routine))
        pause_ms(1);
    call.overlapped = &with_event;
    call.routine = NULL;
    EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    CHECK(signalled(event, PATIENCE_MS));
    EQUAL(SleepEx(10, FALSE), 0);
    EQUAL(WSAWaitForMultipleEvents(1, &never, FALSE, 10, FALSE), WSA_WAIT_TIMEOUT);
    EQUAL(completions(0), 0, "nothing has run in waits that are not alertable");
    EQUAL(WSAWaitForMultipleEvents(1, &never, FALSE, 10, TRUE), WSA_WAIT_IO_COMPLETION);
    EQUAL(completions(0), 1);
    EQUAL(WSAWaitForMultipleEvents(1, &never, FALSE, 10, TRUE), WSA_WAIT_TIMEOUT);
    WSACloseEvent(event);
    WSACloseEvent(never);
}

static int depth, deepest, runs;

static void CALLBACK nests(DWORD error, DWORD bytes, LPWSAOVERLAPPED overlapped, DWORD flags)
{
    (void)error, (void)bytes, (void)overlapped, (void)flags;
    runs++;
    if (++depth > deepest)
        deepest = depth;
    SleepEx(20, TRUE);
    depth--;
}

ROW(a_routine_is_not_entered_while_one_runs, "W9")
{
    unsigned char out[2][MOST_RECORD];
    WSAOVERLAPPED overlapped[2] = {fresh(NULL), fresh(NULL)};
    DWORD returned;

    for (int i = 0; i < 2; i++) {
        struct call call = query_call(accepted, QUERY_RECORDS, out[i], MOST_RECORD, &returned);
        call.overlapped = &overlapped[i];
        call.routine = nests;
        EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
    }
    while (!HasOverlappedIoCompleted(&overlapped[0]) || !HasOverlappedIoCompleted(&overlapped[1]))
        pause_ms(1);
    for (int i = 0; i < 100 && runs < 2; i++)
        SleepEx(50, TRUE);
    EQUAL(runs, 2);
    EQUAL(deepest, 1);
}

static void CALLBACK frees(DWORD error, DWORD bytes, LPWSAOVERLAPPED overlapped, DWORD flags)
{
    note(error, bytes, NULL, flags);
    free(overlapped);
}

ROW(a_routine_may_release_its_structure, "W6")
{
    unsigned char out[MOST_RECORD];
    DWORD returned;

    forget();
    for (int i = 0; i < 8; i++) {
        WSAOVERLAPPED *overlapped = malloc(sizeof *overlapped);
        struct call call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
        MUST(overlapped);
        *overlapped = fresh(NULL);
        call.overlapped = overlapped;
        call.routine = frees;
        EQUAL(error_of(i % 2 ? BY_WSA : BY_WSP, call), WSA_IO_PENDING);
        EQUAL(completions(i + 1), i + 1);
    }
}

ROW(a_socket_that_does_not_block, "W2 W32")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    SOCKET other = redirected();
    u_long on = 1;

    MUST(ioctlsocket(other, FIONBIO, &on) == 0);
    carnet_winsock_test_delay(100);
    for EACH_ENTRY(entry) {
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned;
        struct call call = query_call(other, QUERY_RECORDS, out, sizeof out, &returned);
        EQUAL(error_of(entry, call), WSAEWOULDBLOCK);
        call.overlapped = &overlapped;
        EQUAL(error_of(entry, call), WSA_IO_PENDING);
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(overlapped.Internal, STATUS_SUCCESS);
    }
    carnet_winsock_test_delay(0);
    closesocket(other);
    WSACloseEvent(event);
}

ROW(other_codes_that_set_something, "W3 W20 W21 W23 W24 W25")
{
    struct tcp_keepalive keepalive = {1, 60000, 1000};
    WSAEVENT event = WSACreateEvent();

    for EACH_ENTRY(entry) {
        u_long on = 0;
        WSAOVERLAPPED overlapped = fresh(event);
        DWORD returned = UNTOUCHED;
        struct call call = {onwards, FIONBIO, &on, sizeof on, NULL, 0, &returned, &overlapped,
                            NULL};
        WSAResetEvent(event);
        EQUAL(error_of(entry, call), 0);
        EQUAL(returned, 0, "FIONBIO writes it");
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(overlapped.Internal, STATUS_SUCCESS);
        EQUAL(overlapped.InternalHigh, 0);

        struct call alive = {onwards, SIO_KEEPALIVE_VALS, &keepalive, sizeof keepalive, NULL, 0,
                             &returned, &overlapped, note};
        returned = UNTOUCHED;
        forget();
        EQUAL(error_of(entry, alive), 0);
        EQUAL(returned, UNTOUCHED, "SIO_KEEPALIVE_VALS does not");
        EQUAL(SleepEx(0, TRUE), WAIT_IO_COMPLETION);
        EQUAL(completions(0), 1);
        EQUAL(journal[0].error, 0);
        EQUAL(journal[0].bytes, 0);

        overlapped = fresh(NULL);
        alive.in_size--;
        EQUAL(error_of(entry, alive), WSAEFAULT, "a byte too few");
        EQUAL(returned, UNTOUCHED);
        CHECK(is_fresh(&overlapped));
        EQUAL(SleepEx(0, TRUE), 0);
    }
    WSACloseEvent(event);
    closesocket(onwards);
    closesocket(accepted);
    lab("close");
}
