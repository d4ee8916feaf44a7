/* UDP: records and contexts as ancillary data, of real flows. The service of the program gets whatever is sent
 * anywhere. */
#include "suite.h"

/* The lengths of a record of one service, and of the context. */
enum { RECORD = 424, CONTEXT = 5 };

static void begins(const struct datagram *got, const char *text, int level)
{
    CHECK(strcmp(got->text, text) == 0, "%s, not %s", got->text, text);
    EQUAL(got->objects, 2, "%s begins a flow", text);
    EQUAL(got->level, level, "%s", text);
    EQUAL(got->record_length, RECORD);
    EQUAL(got->context_length, CONTEXT);
    CHECK(strcmp(got->context, "hello") == 0);
    EQUAL(got->flags, 0);
}

static void goes_on(const struct datagram *got, const char *text)
{
    CHECK(strcmp(got->text, text) == 0, "%s, not %s", got->text, text);
    EQUAL(got->objects, 0, "%s begins no flow", text);
    EQUAL(got->flags, 0);
}

static int client(const char *family)
{
    return atoi(lab("udp open %s", family));
}

static void client_sends(int socket, int to, const char *word)
{
    char place[80];

    snprintf(place, sizeof place, "%s", lab("udp server %d", to));
    lab("udp send %d %s %s", socket, place, word);
}

/* The client reads this word, from this server. */
static void client_reads(int socket, int from, const char *word)
{
    char due[80];
    const char *read;

    snprintf(due, sizeof due, "%s %s", lab("udp server %d", from), word);
    read = lab("udp read %d", socket);
    CHECK(strcmp(read, due) == 0, "%s, not %s", read, due);
}

/* A flow of a client's to a server, as its first datagram brought it. */
static struct datagram flow_to(SOCKET registered, int socket, int to, const char *word)
{
    struct datagram got;

    client_sends(socket, to, word);
    got = receive(registered);
    begins(&got, word, got.from.length == sizeof(struct sockaddr_in) ? IPPROTO_IP : IPPROTO_IPV6);
    return got;
}

/* The flow that went onwards to this server, or to this port there. */
static unsigned long long onward(const struct place *to, int count)
{
    char text[64];
    const void *address = to->length == sizeof(struct sockaddr_in)
                              ? (const void *)&((const struct sockaddr_in *)&to->address)->sin_addr
                              : (const void *)&((const struct sockaddr_in6 *)&to->address)->sin6_addr;
    char *rest;
    unsigned long long flow;

    MUST(inet_ntop(to->address.ss_family, address, text, sizeof text) != NULL);
    flow = strtoull(lab("udp onward %s %d %d", text, port_at(to), count), &rest, 10);
    EQUAL(*rest, '\0', "one flow for all");
    return flow;
}

ROW(the_datagram_that_begins_a_flow, "U1 U2 U4 U5")
{
    SOCKET sockets[] = {registered_datagrams(AF_INET, 0), registered_datagrams(AF_INET6, 0)};

    for (int family = 0; family < 2; family++) {
        SOCKET s = sockets[family];
        int level = family ? IPPROTO_IPV6 : IPPROTO_IP;
        int first = client(family ? "6" : "4"), second = client(family ? "6" : "4");
        struct datagram one, got;

        client_sends(first, family, "one");
        one = receive(s);
        begins(&one, "one", level);
        client_sends(first, family, "two");
        got = receive(s);
        goes_on(&got, "two");
        CHECK(same_place(&one.from, &got.from));
        /* Another destination, another client: other flows. */
        client_sends(first, family + 2, "three");
        got = receive(s);
        begins(&got, "three", level);
        CHECK(!same_place(&one.from, &got.from));
        client_sends(second, family, "four");
        got = receive(s);
        begins(&got, "four", level);
        CHECK(!same_place(&one.from, &got.from));
        /* The answers, by either function, begin nothing. */
        EQUAL(send_word(s, &one.from, "five", NULL), 0);
        client_reads(first, family, "five");
        EQUAL(sendto(s, "six", 3, 0, (struct sockaddr *)&got.from.address, got.from.length), 3);
        client_reads(second, family, "six");
        client_sends(first, family, "seven");
        got = receive(s);
        goes_on(&got, "seven");
        lab("udp close %d", first);
        lab("udp close %d", second);
        closesocket(s);
    }
}

ROW(what_was_asked_for_and_nothing_else, "U2")
{
    SOCKET s = registered_datagrams(AF_INET, 0);
    struct datagram got;
    int socket;

    want(s, IPPROTO_IP, IP_WFP_REDIRECT_CONTEXT, 0);
    socket = client("4");
    client_sends(socket, 0, "records");
    got = receive(s);
    EQUAL(got.objects, 1);
    EQUAL(got.record_length, RECORD);
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_CONTEXT, 1);
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_RECORDS, 0);
    client_sends(socket, 2, "context");
    got = receive(s);
    EQUAL(got.objects, 1);
    EQUAL(got.context_length, CONTEXT);
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_CONTEXT, 0);
    client_sends(socket, 4, "nothing");
    got = receive(s);
    goes_on(&got, "nothing");
    lab("udp close %d", socket);
    closesocket(s);
}

ROW(a_receiver_of_both_families, "U2")
{
    SOCKET s = registered_datagrams(AF_INET6, 1);
    int v4 = client("4"), v6 = client("6");
    struct datagram got;

    client_sends(v6, 1, "of-six");
    got = receive(s);
    begins(&got, "of-six", IPPROTO_IPV6);
    client_sends(v4, 0, "of-four");
    got = receive(s);
    begins(&got, "of-four", IPPROTO_IP);
    EQUAL(got.from.length, sizeof(struct sockaddr_in6), "a mapped address");
    EQUAL(send_word(s, &got.from, "answer", NULL), 0);
    client_reads(v4, 0, "answer");
    /* Without the option of IPv4 there is nothing for it. */
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_RECORDS, 0);
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_CONTEXT, 0);
    client_sends(v4, 2, "unasked");
    got = receive(s);
    goes_on(&got, "unasked");
    client_sends(v6, 3, "asked");
    got = receive(s);
    begins(&got, "asked", IPPROTO_IPV6);
    lab("udp close %d", v4);
    lab("udp close %d", v6);
    closesocket(s);
}

ROW(a_control_buffer_that_is_too_small, "U9")
{
    SOCKET s = registered_datagrams(AF_INET, 0);
    const DWORD both = WSA_CMSG_SPACE(RECORD) + WSA_CMSG_LEN(CONTEXT);
    const struct {
        DWORD room, record, context, lost;
    } rows[] = {{0, 0, 0, 1},
                {CONTEXT, 0, 0, 1},
                /* There is room for the context alone. */
                {WSA_CMSG_LEN(CONTEXT), 0, CONTEXT, 1},
                {WSA_CMSG_LEN(RECORD) - 1, 0, CONTEXT, 1},
                {WSA_CMSG_LEN(RECORD), RECORD, 0, 1},
                {both - 1, RECORD, 0, 1},
                {both, RECORD, CONTEXT, 0}};

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct datagram got;
        int socket = client("4");
        client_sends(socket, 0, "first");
        got = receive_in(s, rows[i].room, 0);
        CHECK(strcmp(got.text, "first") == 0);
        EQUAL(got.record_length, rows[i].record, "row %zu", i);
        EQUAL(got.context_length, rows[i].context, "row %zu", i);
        EQUAL(got.flags, rows[i].lost ? MSG_CTRUNC : 0, "row %zu", i);
        /* What was lost is lost. */
        client_sends(socket, 0, "second");
        got = receive(s);
        goes_on(&got, "second");
        lab("udp close %d", socket);
    }
    closesocket(s);
}

ROW(a_look_ahead_takes_nothing, "U4 U5")
{
    SOCKET s = registered_datagrams(AF_INET, 0);
    int socket = client("4");
    struct datagram got;

    client_sends(socket, 0, "first");
    for (int i = 0; i < 2; i++) {
        got = receive_in(s, 4096, MSG_PEEK);
        begins(&got, "first", IPPROTO_IP);
    }
    got = receive(s);
    begins(&got, "first", IPPROTO_IP);
    client_sends(socket, 0, "second");
    got = receive_in(s, 4096, MSG_PEEK);
    goes_on(&got, "second");
    got = receive(s);
    goes_on(&got, "second");
    lab("udp close %d", socket);
    closesocket(s);
}

ROW(a_receive_that_pends, "U4 U5 W3")
{
    SOCKET s = registered_datagrams(AF_INET, 0);
    int socket = client("4");

    for (int round = 0; round < 2; round++) {
        char text[64] = "", control[2048];
        WSAEVENT event = WSACreateEvent();
        WSAOVERLAPPED overlapped = fresh(event);
        WSABUF buffer = {sizeof text, text};
        WSAMSG message;
        DWORD count = UNTOUCHED, bytes = 0, flags = 0;

        memset(&message, 0, sizeof message);
        message.lpBuffers = &buffer;
        message.dwBufferCount = 1;
        message.Control.buf = control;
        message.Control.len = sizeof control;
        EQUAL(WSARecvMsg(s, &message, &count, &overlapped, NULL), SOCKET_ERROR);
        EQUAL(WSAGetLastError(), WSA_IO_PENDING);
        client_sends(socket, 0, "word");
        CHECK(signalled(event, PATIENCE_MS));
        EQUAL(WSAGetOverlappedResult(s, &overlapped, &bytes, FALSE, &flags), TRUE);
        EQUAL(bytes, 4);
        EQUAL(message.Control.len,
              round ? 0 : WSA_CMSG_SPACE(RECORD) + WSA_CMSG_SPACE(CONTEXT), "round %d", round);
        WSACloseEvent(event);
    }
    lab("udp close %d", socket);
    closesocket(s);
}

ROW(a_record_is_for_its_flow_alone, "U4 U5 U7")
{
    SOCKET s = registered_datagrams(AF_INET, 0), onwards = datagrams(AF_INET);
    int first = client("4"), second = client("4");
    struct datagram one = flow_to(s, first, 0, "one"), two = flow_to(s, second, 2, "two"), got;
    unsigned long long number_one = flow_from(&one.from), number_two = flow_from(&two.from);
    struct place place_one = server(0), place_two = server(2), place_three = server(4),
                 place_four = server(6);

    CHECK(number_one != number_two);
    /* Two records on one socket, each for the destination that it was sent to. */
    EQUAL(send_word(onwards, &place_one, "a", &one), 0);
    CHECK(is_answered(onwards, "a"));
    EQUAL(send_word(onwards, &place_two, "b", &two), 0);
    CHECK(is_answered(onwards, "b"));
    EQUAL(onward(&place_one, 1), (long long)number_one);
    EQUAL(onward(&place_two, 1), (long long)number_two);
    /* The flows go on without it, and with it. */
    EQUAL(send_word(onwards, &place_one, "c", NULL), 0);
    CHECK(is_answered(onwards, "c"));
    EQUAL(sendto(onwards, "d", 1, 0, (struct sockaddr *)&place_two.address, place_two.length), 1);
    CHECK(is_answered(onwards, "d"));
    EQUAL(send_word(onwards, &place_one, "e", &two), 0);
    CHECK(is_answered(onwards, "e"));
    EQUAL(onward(&place_one, 1), (long long)number_one, "what the flow began with");
    /* The first of them once more, for a third destination. */
    EQUAL(send_word(onwards, &place_three, "f", &one), 0);
    CHECK(is_answered(onwards, "f"));
    EQUAL(onward(&place_three, 1), (long long)number_one);
    /* A flow without a record of its own has none: it is the service's own, and comes here. */
    EQUAL(send_word(onwards, &place_four, "lost", NULL), 0);
    got = receive(s);
    begins(&got, "lost", IPPROTO_IP);
    CHECK(flow_from(&got.from) != number_one);
    CHECK(flow_from(&got.from) != number_two);
    EQUAL(send_word(s, &got.from, "found", NULL), 0);
    {
        char answer[16] = "";
        EQUAL(recv(onwards, answer, sizeof answer, 0), 5);
        CHECK(strcmp(answer, "found") == 0);
    }
    lab("udp close %d", first);
    lab("udp close %d", second);
    closesocket(onwards);
    closesocket(s);
}

ROW(records_of_ipv6, "U1 U4")
{
    SOCKET s = registered_datagrams(AF_INET6, 0), onwards = datagrams(AF_INET6);
    int socket = client("6");
    struct datagram got = flow_to(s, socket, 1, "six");
    struct place place = server(1);

    EQUAL(send_word(onwards, &place, "onwards", &got), 0);
    CHECK(is_answered(onwards, "onwards"));
    EQUAL(onward(&place, 1), (long long)flow_from(&got.from));
    lab("udp close %d", socket);
    closesocket(onwards);
    closesocket(s);
}

ROW(one_socket_for_everything, "U4 U5 U7")
{
    SOCKET s = registered_datagrams(AF_INET, 1);
    int socket = client("4");
    struct datagram flow = flow_to(s, socket, 0, "question"), got;
    struct place place = server(0);
    int forgotten = atoi(lab("count Forgotten")), redirected = atoi(lab("count Redirected"));

    EQUAL(send_word(s, &place, "question", &flow), 0);
    got = receive(s);
    CHECK(strncmp(got.text, "question reached ", 17) == 0);
    CHECK(same_place(&got.from, &place));
    EQUAL(got.objects, 0, "the server is no client");
    EQUAL(send_word(s, &flow.from, "answer", NULL), 0);
    client_reads(socket, 0, "answer");
    /* Nor was it taken for one, which would look like a flow of the service's own. */
    EQUAL(atoi(lab("count Forgotten")), forgotten);
    EQUAL(atoi(lab("count Redirected")), redirected);
    lab("udp close %d", socket);
    closesocket(s);
}

ROW(records_that_are_refused, "U4")
{
    SOCKET s = registered_datagrams(AF_INET, 0), onwards = datagrams(AF_INET), stream, connected;
    int socket = client("4");
    struct datagram flow = flow_to(s, socket, 0, "flow"), bad = flow, stranger;
    struct place place = server(0), nowhere = {.length = 0};

    EQUAL(send_word(onwards, &place, "good", &flow), 0);
    CHECK(is_answered(onwards, "good"));
    bad.record[100] ^= 1;
    EQUAL(send_word(onwards, &place, "forged", &bad), WSAEINVAL);
    bad.record_length = 40;
    EQUAL(send_word(onwards, &place, "cut", &bad), WSAEINVAL);
    bad.record_length = 0;
    EQUAL(send_word(onwards, &place, "empty", &bad), WSAEINVAL);
    stranger.record_length = (DWORD)from_hexadecimal(lab("record stranger"), stranger.record,
                                                     sizeof stranger.record);
    EQUAL(send_word(onwards, &place, "stranger", &stranger), WSAEACCES);
    /* None of them was sent, and none is left on the socket. */
    EQUAL(send_word(onwards, &place, "next", NULL), 0);
    CHECK(is_answered(onwards, "next"));

    /* Too late. */
    connected = datagrams(AF_INET);
    EQUAL(connect(connected, (struct sockaddr *)&place.address, place.length), 0);
    EQUAL(send_word(connected, &nowhere, "late", &flow), WSAEINVAL);
    EQUAL(send_word(connected, &place, "late", &flow), WSAEINVAL);
    /* A stream has none. */
    stream = plain_socket();
    EQUAL(send_word(stream, &place, "stream", &flow), WSAEINVAL);
    lab("udp close %d", socket);
    closesocket(stream);
    closesocket(connected);
    closesocket(onwards);
    closesocket(s);
}

ROW(connected_clients, "U5 U7 U8")
{
    SOCKET s = registered_datagrams(AF_INET, 0);
    unsigned long long before = 0;
    int port = 0;

    for (int round = 0; round < 3; round++) {
        /* Another client on the same port, as soon as the one before is gone: another flow. */
        int socket = client("4");
        struct datagram one, got;
        char place[80];

        port = atoi(lab("udp bind %d %d", socket, port));
        snprintf(place, sizeof place, "%s", lab("udp server %d", 2 * round));
        lab("udp connect %d %s", socket, place);
        lab("udp write %d one", socket);
        one = receive(s);
        begins(&one, "one", IPPROTO_IP);
        EQUAL(port_at(&one.from), port);
        CHECK(flow_from(&one.from) != before);
        before = flow_from(&one.from);
        lab("udp write %d two", socket);
        got = receive(s);
        goes_on(&got, "two");
        CHECK(same_place(&one.from, &got.from));
        EQUAL(send_word(s, &one.from, "answer", NULL), 0);
        client_reads(socket, 2 * round, "answer");
        lab("udp write %d three", socket);
        got = receive(s);
        goes_on(&got, "three");
        lab("udp close %d", socket);
    }
    closesocket(s);
}

ROW(the_control_codes_are_not_for_flows, "S34c U1")
{
    SOCKET s = registered_datagrams(AF_INET, 0), asking = datagrams(AF_INET), onwards;
    int socket = client("4");
    struct datagram flow = flow_to(s, socket, 0, "flow");
    unsigned char out[MOST_RECORD];
    struct sockaddr_storage original;
    struct place place = server(0);
    int length = sizeof original;
    DWORD returned;

    EQUAL(connect(asking, (struct sockaddr *)&flow.from.address, flow.from.length), 0);
    onwards = datagrams(AF_INET);
    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, query_call(asking, QUERY_RECORDS, out, sizeof out, &returned)),
              WSAEINVAL);
        EQUAL(error_of(entry, query_call(asking, QUERY_CONTEXT, out, sizeof out, &returned)),
              WSAEINVAL);
        EQUAL(error_of(entry, set_call(onwards, flow.record, flow.record_length, &returned)),
              WSAEINVAL);
    }
    /* What there is beyond Windows: where the flow was to go. */
    EQUAL(getsockopt(asking, SOL_SOCKET, SO_ORIGINAL_DST, (char *)&original, &length), 0);
    EQUAL(length, place.length);
    CHECK(memcmp(&original, &place.address, (size_t)length) == 0);
    lab("udp close %d", socket);
    closesocket(onwards);
    closesocket(asking);
    closesocket(s);
}

enum { EACH = 40 };

struct sender {
    SOCKET s;
    struct place first;
    const struct datagram *record;
    int sent;
};

static void send_to_each(void *argument)
{
    struct sender *sender = argument;

    for (int i = 0; i < EACH; i++) {
        struct place to = at_port(sender->first, port_at(&sender->first) + i);
        sender->sent += send_word(sender->s, &to, "word", sender->record) == 0;
    }
}

ROW(records_do_not_cross_threads, "U4 U5")
{
    SOCKET s = registered_datagrams(AF_INET, 0), onwards = datagrams(AF_INET);
    int first = client("4"), second = client("4");
    struct datagram one = flow_to(s, first, 0, "one"), two = flow_to(s, second, 2, "two");
    unsigned long long number_one = flow_from(&one.from), number_two = flow_from(&two.from);
    struct place place = server(0);
    struct sender senders[] = {{onwards, at_port(place, 20000), &one, 0},
                               {onwards, at_port(place, 21000), &two, 0},
                               {onwards, at_port(place, 22000), NULL, 0}};
    struct thread *threads[3];

    for (int i = 0; i < 3; i++)
        threads[i] = start_thread(send_to_each, &senders[i]);
    for (int i = 0; i < 3; i++) {
        wait_for_thread(threads[i]);
        EQUAL(senders[i].sent, EACH, "sender %d", i);
    }
    EQUAL(onward(&senders[0].first, EACH), (long long)number_one);
    EQUAL(onward(&senders[1].first, EACH), (long long)number_two);
    for (int i = 0; i < EACH; i++) {
        struct datagram got = receive(s);
        begins(&got, "word", IPPROTO_IP);
        unsigned long long number = flow_from(&got.from);
        CHECK(number != number_one && number != number_two);
    }
    lab("udp close %d", first);
    lab("udp close %d", second);
    closesocket(onwards);
    closesocket(s);
}
