/* The calls as such: signatures, numbers, synchronous SET, and every code that is an error. */
#include "suite.h"

/* The compiler checks the signatures and the layouts. */
static int (*const wsa)(SOCKET, DWORD, LPVOID, DWORD, LPVOID, DWORD, LPDWORD, LPWSAOVERLAPPED,
                        LPWSAOVERLAPPED_COMPLETION_ROUTINE) = WSAIoctl;
static int (*const wsp)(SOCKET, DWORD, LPVOID, DWORD, LPVOID, DWORD, LPDWORD, LPWSAOVERLAPPED,
                        LPWSAOVERLAPPED_COMPLETION_ROUTINE, LPWSATHREADID, LPINT) = WSPIoctl;

ROW(the_two_signatures, "S2 S15 S57")
{
    BOOL (*result)(SOCKET, LPWSAOVERLAPPED, LPDWORD, BOOL, LPDWORD) = WSAGetOverlappedResult;
    SOCKET (*make_socket)(int, int, int, LPWSAPROTOCOL_INFOW, GROUP, DWORD) = WSASocketW;
    int (*last_error)(void) = WSAGetLastError;

    CHECK(wsa && wsp && result && make_socket && last_error);
}

ROW(the_layout_of_an_overlapped, "W6 W44 W8")
{
    static void (*const routine)(DWORD, DWORD, LPWSAOVERLAPPED, DWORD) = note;
    LPWSAOVERLAPPED_COMPLETION_ROUTINE same = routine;

    EQUAL(sizeof(WSAOVERLAPPED), sizeof(void *) == 8 ? 32 : 20);
    EQUAL(offsetof(WSAOVERLAPPED, Internal), 0);
    EQUAL(offsetof(WSAOVERLAPPED, InternalHigh), sizeof(void *));
    EQUAL(offsetof(WSAOVERLAPPED, Offset), 2 * sizeof(void *));
    EQUAL(offsetof(WSAOVERLAPPED, OffsetHigh), 2 * sizeof(void *) + 4);
    EQUAL(offsetof(WSAOVERLAPPED, hEvent), 2 * sizeof(void *) + 8);
    EQUAL(sizeof(WSATHREADID), 2 * sizeof(void *));
    CHECK(same);
}

ROW(the_numbers, "S3 Q1 Q11")
{
    EQUAL(SET_RECORDS, 0x980000DEu);
    EQUAL(QUERY_RECORDS, 0x980000DCu);
    EQUAL(QUERY_CONTEXT, 0x980000DDu);
    EQUAL(_WSAIOW(IOC_VENDOR, 222), SET_RECORDS);
    EQUAL(SIO_QUERY_WFP_ALE_ENDPOINT_HANDLE, _WSAIOR(IOC_VENDOR, 205));
    EQUAL(SIO_FLUSH, 0x28000004u);
    /* All three say "in", though two of them give data. */
    EQUAL(QUERY_RECORDS & (IOC_IN | IOC_OUT | IOC_VOID), IOC_IN);
    EQUAL(QUERY_CONTEXT & (IOC_IN | IOC_OUT | IOC_VOID), IOC_IN);
    EQUAL(SET_RECORDS & (IOC_IN | IOC_OUT | IOC_VOID), IOC_IN);
    EQUAL(SET_RECORDS & 0x18000000u, IOC_VENDOR);
}

ROW(a_record_is_set_and_the_connection_is_onward, "S1 S4 S5 S6 S10 S26 S42 S54 W19 W35")
{
    struct sockaddr_in to = destination(), peer;
    unsigned char record[MOST_RECORD];
    SOCKET accepted = redirected();
    DWORD length = record_of(accepted, record);

    for EACH_ENTRY(entry) {
        SOCKET onwards = overlapped_socket();
        int before = atoi(lab("count RecordsSet")), peer_length = sizeof peer;
        int onward = atoi(lab("count Onward"));
        DWORD returned;

        EQUAL(error_of(entry, set_call(onwards, record, length, &returned)), 0);
        EQUAL(returned, 0);
        EQUAL(atoi(lab("count RecordsSet")), before + 1);
        MUST(connect(onwards, (struct sockaddr *)&to, sizeof to) == 0);
        CHECK(echoes(onwards));
        EQUAL(atoi(lab("count Onward")), onward + 1);
        MUST(getpeername(onwards, (struct sockaddr *)&peer, &peer_length) == 0);
        EQUAL(peer.sin_port, to.sin_port);
        EQUAL(peer.sin_addr.s_addr, to.sin_addr.s_addr);
        closesocket(onwards);
    }
    closesocket(accepted);
    lab("close");
}

ROW(the_record_is_given_back_as_it_came, "S55 S7 S34b")
{
    unsigned char record[MOST_RECORD], longer[8192];
    SOCKET accepted = redirected();
    DWORD length = record_of(accepted, record), returned;

    memset(longer, 0, sizeof longer);
    memcpy(longer, record, length);
    for EACH_ENTRY(entry) {
        SOCKET s = overlapped_socket();
        static const DWORD others[] = {1, 3, 8, 2048, 4096, 4097, 8192};
        EQUAL(error_of(entry, set_call(s, longer, length, &returned)), 0);
        EQUAL(returned, 0);
        for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
            EQUAL(error_of(entry, set_call(s, longer, others[i], &returned)), WSAEINVAL,
                  "%u bytes", others[i]);
            EQUAL(returned, 0, "%u bytes", others[i]);
        }
        EQUAL(error_of(entry, set_call(s, longer, length - 1, &returned)), WSAEINVAL);
        EQUAL(error_of(entry, set_call(s, longer, length + 1, &returned)), WSAEINVAL);
        /* No memory is that large. */
        EQUAL(error_of(entry, set_call(s, longer, 0xFFFFFFFFu, &returned)), WSAEFAULT);
        closesocket(s);
    }
    closesocket(accepted);
    lab("close");
}

ROW(every_flipped_byte_is_refused, "S34b S55")
{
    unsigned char record[MOST_RECORD];
    SOCKET accepted = redirected(), s = overlapped_socket();
    DWORD length = record_of(accepted, record), returned;

    for (DWORD at = 0; at < length; at++) {
        record[at] ^= (unsigned char)(1u << (at % 8));
        EQUAL(error_of(at % 2 ? BY_WSA : BY_WSP, set_call(s, record, length, &returned)), WSAEINVAL,
              "byte %u", at);
        record[at] ^= (unsigned char)(1u << (at % 8));
    }
    EQUAL(error_of(BY_WSA, set_call(s, record, length, &returned)), 0);
    closesocket(s);
    closesocket(accepted);
    lab("close");
}

ROW(a_record_of_another_instance_is_refused, "S34b")
{
    unsigned char record[MOST_RECORD];
    DWORD length = (DWORD)from_hexadecimal(lab("record foreign"), record, sizeof record), returned;
    SOCKET s = overlapped_socket();

    CHECK(length > 100);
    for EACH_ENTRY(entry)
        EQUAL(error_of(entry, set_call(s, record, length, &returned)), WSAEINVAL);
    closesocket(s);
}

ROW(a_record_of_another_service_is_refused, "S30")
{
    unsigned char record[MOST_RECORD];
    DWORD length = (DWORD)from_hexadecimal(lab("record stranger"), record, sizeof record), returned;
    SOCKET s = overlapped_socket();

    CHECK(length > 100);
    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, set_call(s, record, length, &returned)), WSAEACCES);
        EQUAL(returned, 0);
    }
    closesocket(s);
}

ROW(the_output_of_a_set_is_not_touched, "S8 S9")
{
    unsigned char record[MOST_RECORD];
    SOCKET accepted = redirected(), s = overlapped_socket();
    DWORD length = record_of(accepted, record), returned, out = UNTOUCHED;
    struct call call;

    for EACH_ENTRY(entry) {
        call = set_call(s, record, length, &returned);
        call.out = (void *)1;
        EQUAL(error_of(entry, call), 0, "an output pointer without a size");
        EQUAL(returned, 0);
        call = set_call(s, record, length, &returned);
        call.out = &out;
        call.out_size = sizeof out;
        EQUAL(error_of(entry, call), WSAEINVAL, "an output size");
        EQUAL(returned, 0);
        EQUAL(out, UNTOUCHED);
    }
    closesocket(s);
    closesocket(accepted);
    lab("close");
}

ROW(the_returned_length_has_to_have_a_place, "S12 S31 W13 W14 W15")
{
    static const DWORD codes[] = {SET_RECORDS, QUERY_RECORDS, QUERY_CONTEXT, FIONBIO, 0xdeadbeefu};
    unsigned char record[MOST_RECORD], out[MOST_RECORD];
    SOCKET accepted = redirected(), s = overlapped_socket();
    DWORD length = record_of(accepted, record);
    WSAEVENT event = WSACreateEvent();

    forget();
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        for EACH_ENTRY(entry) {
            WSAOVERLAPPED overlapped = fresh(event);
            struct call call = {s, codes[i], record, length, NULL, 0, NULL, NULL, NULL};
            if (codes[i] != SET_RECORDS) {
                call.out = out;
                call.out_size = sizeof out;
            }
            EQUAL(error_of(entry, call), WSAEFAULT, "code %x", codes[i]);
            call.overlapped = &overlapped;
            EQUAL(error_of(entry, call), WSAEFAULT, "code %x, overlapped", codes[i]);
            CHECK(is_fresh(&overlapped));
            call.routine = note;
            EQUAL(error_of(entry, call), WSAEFAULT, "code %x, with a routine", codes[i]);
            CHECK(is_fresh(&overlapped));
        }
    }
    CHECK(!signalled(event, 0));
    EQUAL(SleepEx(0, TRUE), 0);
    WSACloseEvent(event);
    closesocket(s);
    closesocket(accepted);
    lab("close");
}

ROW(an_unknown_code_is_not_supported, "S37a S5 W16")
{
    static const DWORD codes[] = {0xdeadbeefu,      FIOASYNC,        0x667eu,
                                  SET_RECORDS - 3,  SET_RECORDS + 1, 0,
                                  0xffffffffu,      _WSAIOW(IOC_WS2, 222),
                                  _WSAIOW(IOC_PROTOCOL, 222), _WSAIOW(IOC_UNIX, 222)};
    SOCKET sockets[] = {overlapped_socket(), plain_socket()};
    char in[16] = "", out[16] = "";

    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        for EACH_ENTRY(entry) {
            DWORD returned = UNTOUCHED;
            struct call call = {sockets[i % 2], codes[i], in,   sizeof in, out,
                                sizeof out,     &returned, NULL, NULL};
            EQUAL(error_of(entry, call), WSAEOPNOTSUPP, "code %x", codes[i]);
            EQUAL(returned, 0, "code %x", codes[i]);
        }
    }
    closesocket(sockets[0]);
    closesocket(sockets[1]);
}

ROW(a_code_of_the_wrong_direction_is_no_command, "S34a Q1")
{
    SOCKET s = overlapped_socket();

    for (DWORD number = 220; number <= 222; number++) {
        const DWORD codes[] = {_WSAIOR(IOC_VENDOR, number), _WSAIO(IOC_VENDOR, number),
                               _WSAIORW(IOC_VENDOR, number), IOC_VENDOR | number};
        for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
            for EACH_ENTRY(entry) {
                DWORD returned = UNTOUCHED;
                char buffer[16] = "";
                struct call call = {s,  codes[i],  buffer, sizeof buffer, NULL,
                                    0, &returned, NULL,   NULL};
                EQUAL(error_of(entry, call), WSAEINVAL, "code %x", codes[i]);
                EQUAL(returned, 0, "code %x", codes[i]);
            }
        }
    }
    closesocket(s);
}

ROW(a_set_without_input, "S31 W12 W22 W23 W30")
{
    unsigned char record[MOST_RECORD];
    SOCKET accepted = redirected(), s = overlapped_socket();
    DWORD length = record_of(accepted, record), returned;
    WSAEVENT event = WSACreateEvent();

    for EACH_ENTRY(entry) {
        const struct {
            unsigned char *in;
            DWORD size;
        } inputs[] = {{NULL, length}, {NULL, 0}, {record, 0}};
        for (size_t i = 0; i < 3; i++) {
            WSAOVERLAPPED overlapped = fresh(event);
            struct call call = set_call(s, inputs[i].in, inputs[i].size, &returned);
            EQUAL(error_of(entry, call), WSAEFAULT, "input %zu", i);
            EQUAL(returned, 0, "input %zu", i);
            call = set_call(s, inputs[i].in, inputs[i].size, &returned);
            call.overlapped = &overlapped;
            EQUAL(error_of(entry, call), WSAEFAULT, "input %zu, overlapped", i);
            EQUAL(returned, UNTOUCHED, "input %zu, overlapped", i);
            CHECK(is_fresh(&overlapped));
        }
    }
    CHECK(!signalled(event, 0));
    WSACloseEvent(event);
    closesocket(s);
    closesocket(accepted);
    lab("close");
}

ROW(other_codes_that_set_something, "W19 W22 W24 W25")
{
    SOCKET s = overlapped_socket();
    struct tcp_keepalive keepalive = {1, 60000, 1000};
    DWORD returned;

    for EACH_ENTRY(entry) {
        u_long on[2] = {0, 0};
        struct call call = {s, FIONBIO, on, sizeof on[0], NULL, 0, &returned, NULL, NULL};
        returned = UNTOUCHED;
        EQUAL(error_of(entry, call), 0);
        EQUAL(returned, 0);
        call.in_size = sizeof on[0] + 1;
        EQUAL(error_of(entry, call), 0, "a byte too many");
        call.out = unmapped();
        call.out_size = 16;
        EQUAL(error_of(entry, call), 0, "an output that cannot be written");

        struct call alive = {s, SIO_KEEPALIVE_VALS, &keepalive, sizeof keepalive, NULL, 0,
                             &returned, NULL, NULL};
        returned = UNTOUCHED;
        EQUAL(error_of(entry, alive), 0);
        EQUAL(returned, 0);
        alive.in_size--;
        returned = UNTOUCHED;
        EQUAL(error_of(entry, alive), WSAEFAULT, "a byte too few");
        EQUAL(returned, 0);
        alive.in = NULL;
        EQUAL(error_of(entry, alive), WSAEFAULT, "no input");
    }
    closesocket(s);
}

ROW(what_is_no_socket, "S36 S4 W36")
{
    int ends[2], file = open_file();
    unsigned char buffer[64] = "";
    SOCKET closed = overlapped_socket();

    make_pipe(ends);
    closesocket(closed);
    SOCKET sockets[] = {(SOCKET)ends[0], (SOCKET)ends[1],    (SOCKET)file, closed,
                        INVALID_SOCKET,  (SOCKET)0x7fffffff, (SOCKET)1 << 32, 987654};
    static const DWORD codes[] = {SET_RECORDS, QUERY_RECORDS, QUERY_CONTEXT, 0xdeadbeefu, FIONBIO};
    for (size_t i = 0; i < sizeof sockets / sizeof *sockets; i++) {
        for (size_t j = 0; j < sizeof codes / sizeof *codes; j++) {
            for EACH_ENTRY(entry) {
                WSAOVERLAPPED overlapped = fresh(NULL);
                DWORD returned;
                struct call call = set_call(sockets[i], buffer, sizeof buffer, &returned);
                call.code = codes[j];
                EQUAL(error_of(entry, call), WSAENOTSOCK, "socket %zu, code %x", i, codes[j]);
                call.overlapped = &overlapped;
                EQUAL(error_of(entry, call), WSAENOTSOCK, "socket %zu, overlapped", i);
                CHECK(is_fresh(&overlapped));
                /* The handle is looked at before anything else. */
                call.in = NULL;
                call.returned = NULL;
                EQUAL(error_of(entry, call), WSAENOTSOCK, "socket %zu and no pointers", i);
            }
        }
    }
    raw_close(ends[0]);
    raw_close(ends[1]);
    raw_close(file);
}

ROW(another_kind_of_socket, "S34c S37b")
{
    enum { UNIX = 1, NETLINK = 16, STREAM = 1, DATAGRAM = 2, RAW = 3, ICMP = 1, ICMP6 = 58 };
    unsigned char record[MOST_RECORD], out[MOST_RECORD];
    SOCKET accepted = redirected();
    DWORD length = record_of(accepted, record), returned;
    const struct {
        int s, error;
    } kinds[] = {
        {raw_socket(AF_INET, DATAGRAM, 0), WSAEINVAL},
        {raw_socket(AF_INET6, DATAGRAM, 0), WSAEINVAL},
        {raw_socket(AF_INET, RAW, ICMP), WSAEINVAL},
        {raw_socket(AF_INET6, RAW, ICMP6), WSAEINVAL},
        {raw_socket(UNIX, STREAM, 0), WSAEOPNOTSUPP},
        {raw_socket(UNIX, DATAGRAM, 0), WSAEOPNOTSUPP},
        {raw_socket(NETLINK, RAW, 0), WSAEOPNOTSUPP},
    };

    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        SOCKET s = (SOCKET)kinds[i].s;
        for EACH_ENTRY(entry) {
            EQUAL(error_of(entry, set_call(s, record, length, &returned)), kinds[i].error,
                  "SET, kind %zu", i);
            EQUAL(returned, 0);
            EQUAL(error_of(entry, query_call(s, QUERY_RECORDS, out, sizeof out, &returned)),
                  kinds[i].error, "QUERY_RECORDS, kind %zu", i);
            EQUAL(error_of(entry, query_call(s, QUERY_CONTEXT, out, sizeof out, &returned)),
                  kinds[i].error, "QUERY_CONTEXT, kind %zu", i);
        }
        raw_close(kinds[i].s);
    }
    closesocket(accepted);
    lab("close");
}

ROW(a_record_comes_before_the_connect, "S58 S34b S34c S38")
{
    struct sockaddr_in to = destination(), any;
    unsigned char record[MOST_RECORD];
    SOCKET accepted = redirected();
    DWORD length = record_of(accepted, record), returned;

    memset(&any, 0, sizeof any);
    any.sin_family = AF_INET;
    for EACH_ENTRY(entry) {
        SOCKET first = overlapped_socket(), second = overlapped_socket();
        EQUAL(error_of(entry, set_call(first, record, length, &returned)), 0);
        MUST(bind(first, (struct sockaddr *)&any, sizeof any) == 0);
        MUST(connect(first, (struct sockaddr *)&to, sizeof to) == 0);
        CHECK(echoes(first), "set, bind, connect");
        MUST(bind(second, (struct sockaddr *)&any, sizeof any) == 0);
        EQUAL(error_of(entry, set_call(second, record, length, &returned)), 0);
        MUST(connect(second, (struct sockaddr *)&to, sizeof to) == 0);
        CHECK(echoes(second), "bind, set, connect");
        EQUAL(error_of(entry, set_call(second, record, length, &returned)), WSAEINVAL,
              "a connected socket");
        EQUAL(returned, 0);
        EQUAL(error_of(entry, set_call(accepted, record, length, &returned)), WSAEINVAL,
              "an accepted socket");
        EQUAL(error_of(entry, set_call(listener_v4(), record, length, &returned)), WSAEINVAL,
              "a listener");
        closesocket(first);
        closesocket(second);
    }
    closesocket(accepted);
    lab("close");
}

ROW(what_a_set_never_says, "S38 S27")
{
    enum { UNIX = 1, STREAM = 1, DATAGRAM = 2 };
    unsigned char record[MOST_RECORD] = "CRNT";
    SOCKET accepted = redirected(), fresh_one = overlapped_socket();
    DWORD length = record_of(accepted, record);
    const SOCKET sockets[] = {accepted, fresh_one, listener_v4(),
                              (SOCKET)raw_socket(AF_INET, DATAGRAM, 0),
                              (SOCKET)raw_socket(UNIX, STREAM, 0), INVALID_SOCKET};
    void *const inputs[] = {record, NULL, unmapped()};
    const DWORD sizes[] = {0, 1, length, length + 1, MOST_RECORD};

    for (size_t i = 0; i < 6; i++) {
        for (size_t j = 0; j < 3; j++) {
            for (size_t k = 0; k < 5; k++) {
                for EACH_ENTRY(entry) {
                    DWORD returned;
                    int error;
                    struct call call = set_call(sockets[i], inputs[j], sizes[k], &returned);
                    int result = make(entry, call, &error);
                    CHECK(error != WSAENOTCONN && error != WSAENOPROTOOPT, "error %d", error);
                    CHECK((result == 0) == (error == 0), "result %d, error %d", result, error);
                }
            }
        }
    }
    closesocket(fresh_one);
    closesocket(accepted);
    lab("close");
}
