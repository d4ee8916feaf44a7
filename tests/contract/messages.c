/* The options and objects of UDP, where nothing is redirected; where it is: datagrams.c. */
#include "suite.h"

enum { STREAM = 1, DATAGRAM = 2, RAW = 3, ICMP = 1, ICMP6 = 58 };

ROW(the_numbers, "U1 U6")
{
    EQUAL(IP_WFP_REDIRECT_RECORDS, 60);
    EQUAL(IP_WFP_REDIRECT_CONTEXT, 70);
    EQUAL(IPV6_WFP_REDIRECT_RECORDS, 60);
    EQUAL(IPV6_WFP_REDIRECT_CONTEXT, 70);
    EQUAL(IPPROTO_IP, 0);
    EQUAL(IPPROTO_IPV6, 41);
#ifdef IP_CONNECTION_REDIRECT_RECORD
    CHECK(0, "the name of a slip is not to be there");
#endif
}

ROW(which_sockets_have_the_options, "U2 U3")
{
    const struct {
        int family, type, protocol, valid;
    } rows[] = {{AF_INET, DATAGRAM, 0, 1},  {AF_INET6, DATAGRAM, 0, 1}, {AF_INET, RAW, ICMP, 1},
                {AF_INET6, RAW, ICMP6, 1},  {AF_INET, STREAM, 0, 0},    {AF_INET6, STREAM, 0, 0}};
    static const int options[] = {60, 70};

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        SOCKET s = socket(rows[i].family, rows[i].type, rows[i].protocol);
        int level = rows[i].family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6;
        MUST(s != INVALID_SOCKET);
        for (int j = 0; j < 2; j++) {
            DWORD value = UNTOUCHED, on = 1, off = 0;
            int length = sizeof value;
            if (!rows[i].valid) {
                EQUAL(getsockopt(s, level, options[j], (char *)&value, &length), SOCKET_ERROR);
                EQUAL(WSAGetLastError(), WSAEINVAL, "row %zu, option %d", i, options[j]);
                continue;
            }
            EQUAL(getsockopt(s, level, options[j], (char *)&value, &length), 0, "row %zu", i);
            EQUAL(value, 0, "it is off at first");
            EQUAL(setsockopt(s, level, options[j], (char *)&on, sizeof on), 0, "row %zu", i);
            length = sizeof value;
            EQUAL(getsockopt(s, level, options[j], (char *)&value, &length), 0);
            EQUAL(value, 1, "row %zu, option %d", i, options[j]);
            EQUAL(setsockopt(s, level, options[j], (char *)&off, sizeof off), 0);
            EQUAL(getsockopt(s, level, options[j], (char *)&value, &length), 0);
            EQUAL(value, 0);
        }
        DWORD value = 0;
        int length = sizeof value;
        EQUAL(getsockopt(s, level, 9999, (char *)&value, &length), SOCKET_ERROR);
        EQUAL(WSAGetLastError(), WSAENOPROTOOPT, "an unknown option, row %zu", i);
        closesocket(s);
    }
}

ROW(datagrams_with_and_without_the_options, "U2")
{
    SOCKET sender = socket(AF_INET, DATAGRAM, 0), receiver = socket(AF_INET, DATAGRAM, 0);
    struct sockaddr_in address, from;
    int length = sizeof address;
    DWORD on = 1;

    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    MUST(bind(receiver, (struct sockaddr *)&address, sizeof address) == 0);
    MUST(getsockname(receiver, (struct sockaddr *)&address, &length) == 0);
    for (int round = 0; round < 2; round++) {
        char text[] = "datagram", got[64] = "", control[2048];
        WSABUF out = {sizeof text, text}, in = {sizeof got, got};
        WSAMSG send_message, message;
        DWORD sent = 0, received = 0;
        memset(&send_message, 0, sizeof send_message);
        send_message.name = (struct sockaddr *)&address;
        send_message.namelen = sizeof address;
        send_message.lpBuffers = &out;
        send_message.dwBufferCount = 1;
        memset(&message, 0, sizeof message);
        message.name = (struct sockaddr *)&from;
        message.namelen = sizeof from;
        message.lpBuffers = &in;
        message.dwBufferCount = 1;
        message.Control.buf = control;
        message.Control.len = sizeof control;
        EQUAL(WSASendMsg(sender, &send_message, 0, &sent, NULL, NULL), 0);
        EQUAL(sent, sizeof text);
        EQUAL(WSARecvMsg(receiver, &message, &received, NULL, NULL), 0);
        EQUAL(received, sizeof text);
        CHECK(strcmp(got, text) == 0);
        EQUAL(from.sin_family, AF_INET);
        /* Nobody has redirected it, so there is no object to come. */
        EQUAL(message.Control.len, 0, "round %d", round);
        CHECK(WSA_CMSG_FIRSTHDR(&message) == NULL);
        MUST(setsockopt(receiver, IPPROTO_IP, IP_WFP_REDIRECT_RECORDS, (char *)&on, sizeof on) ==
             0);
    }
    closesocket(sender);
    closesocket(receiver);
}
