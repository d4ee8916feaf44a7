/* QUERY: what it gives, to whom, into how much room. The redirects carry the context "hello". */
#include "suite.h"

static SOCKET accepted;

ROW(the_input_is_not_used, "Q2")
{
    static const DWORD codes[] = {QUERY_RECORDS, QUERY_CONTEXT};
    unsigned char out[MOST_RECORD];
    DWORD returned;

    accepted = redirected();
    for (int i = 0; i < 2; i++) {
        for EACH_ENTRY(entry) {
            struct call call = query_call(accepted, codes[i], out, sizeof out, &returned);
            DWORD length;
            EQUAL(error_of(entry, call), 0);
            length = returned;
            CHECK(length > 0);
            call.in = (void *)1;
            EQUAL(error_of(entry, call), 0, "a pointer without a size");
            call.in = out;
            call.in_size = 16;
            EQUAL(error_of(entry, call), 0, "some bytes");
            EQUAL(returned, length);
        }
    }
}

ROW(any_room, "S11 W12 Q3 Q4 Q5 Q10")
{
    static const DWORD codes[] = {QUERY_RECORDS, QUERY_CONTEXT};
    static unsigned char whole[8192], out[8192];
    DWORD returned;

    for (int i = 0; i < 2; i++) {
        DWORD length;
        EQUAL(error_of(BY_WSA, query_call(accepted, codes[i], whole, sizeof whole, &length)), 0);
        MUST(length > 4 && length < MOST_RECORD);
        for EACH_ENTRY(entry) {
            const DWORD rooms[] = {0, 1, 3, 4, length - 1, length, length + 1, 1024, 8192};
            /* The usual question for the size. */
            EQUAL(error_of(entry, query_call(accepted, codes[i], NULL, 0, &returned)),
                  ERROR_INSUFFICIENT_BUFFER);
            EQUAL(returned, length);
            for (size_t j = 0; j < sizeof rooms / sizeof *rooms; j++) {
                int fits = rooms[j] >= length;
                memset(out, 0xEE, sizeof out);
                EQUAL(error_of(entry, query_call(accepted, codes[i], out, rooms[j], &returned)),
                      fits ? 0 : ERROR_INSUFFICIENT_BUFFER, "room for %u", rooms[j]);
                EQUAL(returned, length, "room for %u", rooms[j]);
                CHECK(memcmp(out, whole, fits ? length : 0) == 0);
                for (size_t at = fits ? length : 0; at < sizeof out; at++) {
                    if (out[at] != 0xEE) {
                        CHECK(0, "room for %u, byte %zu was written", rooms[j], at);
                        break;
                    }
                }
            }
        }
    }
}

ROW(the_context, "S51 Q3")
{
    unsigned char out[64];
    DWORD returned;

    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, query_call(accepted, QUERY_CONTEXT, out, sizeof out, &returned)), 0);
        EQUAL(returned, 5);
        CHECK(memcmp(out, "hello", 5) == 0);
    }
}

ROW(whom_to_ask, "S49 S50 Q6 Q7 Q9 W34 W36")
{
    static const DWORD codes[] = {QUERY_RECORDS, QUERY_CONTEXT};
    struct sockaddr_in to = destination();
    unsigned char record[MOST_RECORD], out[MOST_RECORD];
    SOCKET unconnected = overlapped_socket(), onwards = overlapped_socket(), direct;
    DWORD returned, length = record_of(accepted, record);

    EQUAL(error_of(BY_WSA, set_call(onwards, record, length, &returned)), 0);
    MUST(connect(onwards, (struct sockaddr *)&to, sizeof to) == 0);
    lab("direct %u", port_of(listener_v4()));
    direct = accept(listener_v4(), NULL, NULL);
    MUST(direct != INVALID_SOCKET);
    for (int i = 0; i < 2; i++) {
        for EACH_ENTRY(entry) {
            const struct {
                SOCKET s;
                int error;
            } rows[] = {{unconnected, WSAENOTCONN},
                        {listener_v4(), WSAENOTCONN},
                        {direct, (int)FWP_E_NOT_FOUND},
                        {onwards, (int)FWP_E_NOT_FOUND}};
            for (int j = 0; j < 4; j++) {
                EQUAL(error_of(entry, query_call(rows[j].s, codes[i], out, sizeof out, &returned)),
                      rows[j].error, "code %x, socket %d", codes[i], j);
                EQUAL(returned, 0, "code %x, socket %d", codes[i], j);
            }
            /* The state comes before the pointers. */
            EQUAL(error_of(entry, query_call(unconnected, codes[i], NULL, 0, &returned)),
                  WSAENOTCONN);
        }
    }
    CHECK(echoes(onwards));
    closesocket(onwards);
    closesocket(unconnected);
    closesocket(direct);
}

ROW(not_redirected_overlapped, "Q8 W43")
{
    unsigned char out[MOST_RECORD];
    WSAEVENT event = WSACreateEvent();
    SOCKET unconnected = overlapped_socket(), direct;
    DWORD returned, bytes = UNTOUCHED, flags;

    lab("direct %u", port_of(listener_v4()));
    direct = accept(listener_v4(), NULL, NULL);
    const struct {
        SOCKET s;
        int error;
    } rows[] = {{unconnected, WSAENOTCONN}, {direct, WSAEINVAL}};
    for (int i = 0; i < 2; i++) {
        WSAOVERLAPPED overlapped = fresh(event);
        struct call call = query_call(rows[i].s, QUERY_RECORDS, out, sizeof out, &returned);
        call.overlapped = &overlapped;
        EQUAL(error_of(BY_WSA, call), WSA_IO_PENDING);
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(WSAGetOverlappedResult(rows[i].s, &overlapped, &bytes, FALSE, &flags), FALSE);
        EQUAL(WSAGetLastError(), rows[i].error, "socket %d", i);
    }
    closesocket(unconnected);
    closesocket(direct);
    WSACloseEvent(event);
}

ROW(the_endpoint, "Q11")
{
    UINT64 handle = 0;
    DWORD returned;

    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, query_call(accepted, SIO_QUERY_WFP_ALE_ENDPOINT_HANDLE, &handle,
                                         sizeof handle, &returned)),
              0);
        EQUAL(returned, sizeof handle);
        EQUAL(handle, cookie_of((int)accepted));
    }
}

ROW(the_original_destination, "Q12")
{
    struct sockaddr_in to = destination(), v4;
    struct sockaddr_in6 v6;
    struct sockaddr_storage any;
    SOCKET accepted_v6 = redirected_v6();
    char text[64], expected[64] = "";
    unsigned port = 0;
    int length = sizeof v4;

    EQUAL(getsockopt(accepted, SOL_SOCKET, SO_ORIGINAL_DST, (char *)&v4, &length), 0);
    EQUAL(length, sizeof v4);
    EQUAL(v4.sin_family, AF_INET);
    EQUAL(v4.sin_port, to.sin_port);
    EQUAL(v4.sin_addr.s_addr, to.sin_addr.s_addr);
    length = sizeof any;
    EQUAL(getsockopt(accepted, SOL_SOCKET, SO_ORIGINAL_DST, (char *)&any, &length), 0);
    EQUAL(length, sizeof v4);
    EQUAL(any.ss_family, AF_INET);

    length = sizeof v6;
    EQUAL(getsockopt(accepted_v6, SOL_SOCKET, SO_ORIGINAL_DST, (char *)&v6, &length), 0);
    EQUAL(length, sizeof v6);
    EQUAL(v6.sin6_family, AF_INET6);
    MUST(sscanf(lab("destination 6"), "%63s %u", expected, &port) == 2);
    EQUAL(ntohs(v6.sin6_port), port);
    CHECK(inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text) && strcmp(text, expected) == 0,
          "%s, not %s", text, expected);
    closesocket(accepted_v6);
}

ROW(a_duplicate_of_the_socket, "W38")
{
    unsigned char first[MOST_RECORD], second[MOST_RECORD];
    DWORD length = record_of(accepted, first);
    SOCKET copy = (SOCKET)duplicate((int)accepted);

    EQUAL(record_of(copy, second), length);
    CHECK(memcmp(first, second, length) == 0);
    EQUAL(send(copy, "text", 4, 0), 4);
    raw_close((int)copy);
}

ROW(asking_again, "Q10")
{
    unsigned char first[MOST_RECORD], second[MOST_RECORD];
    DWORD length = record_of(accepted, first), returned;

    EQUAL(error_of(BY_WSA, query_call(accepted, QUERY_RECORDS, second, sizeof second, &returned)),
          0);
    EQUAL(returned, length);
    CHECK(memcmp(first, second, length) == 0);
    closesocket(accepted);
    lab("close");
}
