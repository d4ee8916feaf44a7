/* UDP flows that end by silence. The lab's end after a second of it. */
#include "suite.h"

ROW(a_flow_that_was_silent_begins_anew, "U5 U7")
{
    SOCKET s = registered_datagrams(AF_INET, 0), onwards = datagrams(AF_INET);
    struct place place = server(0);
    struct datagram before, got;
    unsigned long long number = 0;
    char text[80];
    int socket = atoi(lab("udp open 4"));

    memset(&before, 0, sizeof before);
    snprintf(text, sizeof text, "%s", lab("udp server 0"));
    for (int round = 0; round < 2; round++) {
        lab("udp send %d %s first", socket, text);
        got = receive(s);
        EQUAL(got.objects, 1, "a record, and no context");
        CHECK(got.record_length > 0);
        CHECK(!same_place(&before.from, &got.from));
        CHECK(flow_from(&got.from) != number);
        number = flow_from(&got.from);
        before = got;
        EQUAL(send_word(onwards, &place, "onwards", &got), 0);
        CHECK(is_answered(onwards, "onwards"));
        lab("udp send %d %s second", socket, text);
        got = receive(s);
        EQUAL(got.objects, 0);
        CHECK(same_place(&before.from, &got.from));
        pause_ms(1500);
    }
    /* So did the one onwards: without a record of its own it is no more the client's. */
    EQUAL(send_word(onwards, &place, "astray", NULL), 0);
    got = receive(s);
    CHECK(strcmp(got.text, "astray") == 0);
    EQUAL(got.objects, 1);
    lab("udp close %d", socket);
    closesocket(onwards);
    closesocket(s);
}
