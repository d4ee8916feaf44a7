/* A redirect service for UDP on the C library: a table of flows by the source of their datagrams, a socket and a
 * thread for each. It knows its flows by the records that come with the datagrams which begin them. It registers
 * its socket itself, and says "ready". */
#include <winsock2.h>
#include <ws2tcpip.h>
#include <mstcpip.h>
#include <mswsock.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CARNET = 0x57465000, REGISTER_LISTENER = 227, MOST_FLOWS = 4096 };

struct flow {
    struct sockaddr_in6 client;
    struct sockaddr_storage destination;
    int destination_length;
    SOCKET onward;
};

static SOCKET registered;
static struct flow flows[MOST_FLOWS];
static int begun;

static void must(int holds, const char *what)
{
    if (!holds) {
        printf("%s: error %d\n", what, WSAGetLastError());
        exit(1);
    }
}

/* Takes the answers to the client. */
static void *answer(void *argument)
{
    struct flow *flow = argument;
    char bytes[2048];

    for (;;) {
        int length = recv(flow->onward, bytes, sizeof bytes, 0);
        must(length >= 0, "receive an answer");
        must(sendto(registered, bytes, length, 0, (struct sockaddr *)&flow->client,
                    sizeof flow->client) == length,
             "answer");
    }
    return NULL;
}

static struct flow *begin(const struct sockaddr_in6 *client)
{
    struct flow *flow = &flows[begun++];
    /* Where it was to go says a socket that is connected to the client. */
    SOCKET asking = socket(AF_INET6, SOCK_DGRAM, 0);
    pthread_t thread;

    must(begun <= MOST_FLOWS, "one flow more");
    flow->client = *client;
    must(connect(asking, (const struct sockaddr *)client, sizeof *client) == 0, "ask");
    flow->destination_length = sizeof flow->destination;
    must(getsockopt(asking, SOL_SOCKET, SO_ORIGINAL_DST, (char *)&flow->destination,
                    &flow->destination_length) == 0,
         "ask for the destination");
    closesocket(asking);
    flow->onward = socket(AF_INET6, SOCK_DGRAM, 0);
    must(flow->onward != INVALID_SOCKET, "make a socket");
    /* A port of its own, so that it can receive. */
    struct sockaddr_in6 any = {.sin6_family = AF_INET6};
    must(bind(flow->onward, (struct sockaddr *)&any, sizeof any) == 0, "bind it");
    must(pthread_create(&thread, NULL, answer, flow) == 0, "start a thread");
    return flow;
}

static struct flow *find(const struct sockaddr_in6 *client)
{
    /* The newest first: an address may have been another flow's. */
    for (int i = begun - 1; i >= 0; i--)
        if (flows[i].client.sin6_port == client->sin6_port &&
            memcmp(&flows[i].client.sin6_addr, &client->sin6_addr, sizeof client->sin6_addr) == 0)
            return &flows[i];
    return NULL;
}

int main(void)
{
    union {
        WSACMSGHDR header;
        char bytes[2048];
    } control, record;
    struct sockaddr_in6 own = {.sin6_family = AF_INET6};
    DWORD on = 1, off = 0;
    WSADATA data;

    setvbuf(stdout, NULL, _IOLBF, 0);
    must(WSAStartup(MAKEWORD(2, 2), &data) == 0, "start");
    registered = socket(AF_INET6, SOCK_DGRAM, 0);
    must(setsockopt(registered, IPPROTO_IPV6, IPV6_V6ONLY, (char *)&off, sizeof off) == 0 &&
             setsockopt(registered, IPPROTO_IP, IP_WFP_REDIRECT_RECORDS, (char *)&on,
                        sizeof on) == 0 &&
             setsockopt(registered, IPPROTO_IPV6, IPV6_WFP_REDIRECT_RECORDS, (char *)&on,
                        sizeof on) == 0,
         "set the options");
    must(bind(registered, (struct sockaddr *)&own, sizeof own) == 0, "bind");
    must(setsockopt(registered, CARNET, REGISTER_LISTENER, NULL, 0) == 0, "register");
    puts("ready");
    for (;;) {
        char bytes[2048];
        struct sockaddr_in6 client;
        WSABUF buffer = {sizeof bytes, bytes};
        WSAMSG message = {0};
        struct flow *flow;
        DWORD length = 0;

        message.name = (struct sockaddr *)&client;
        message.namelen = sizeof client;
        message.lpBuffers = &buffer;
        message.dwBufferCount = 1;
        message.Control.buf = control.bytes;
        message.Control.len = sizeof control;
        must(WSARecvMsg(registered, &message, &length, NULL, NULL) == 0, "receive");
        record.header.cmsg_len = 0;
        for (WSACMSGHDR *object = WSA_CMSG_FIRSTHDR(&message); object;
             object = WSA_CMSG_NXTHDR(&message, object))
            if (object->cmsg_type == IP_WFP_REDIRECT_RECORDS)
                memcpy(&record, object, object->cmsg_len);
        flow = record.header.cmsg_len ? begin(&client) : find(&client);
        if (!flow) {
            puts("a datagram of no flow");
            continue;
        }
        if (record.header.cmsg_len)
            printf("flow: a record of %zu bytes\n", record.header.cmsg_len - WSA_CMSG_LEN(0));
        buffer.len = length;
        message.name = (struct sockaddr *)&flow->destination;
        message.namelen = flow->destination_length;
        message.Control.buf = record.bytes;
        message.Control.len = record.header.cmsg_len ? (ULONG)WSA_CMSG_SPACE(
                                  record.header.cmsg_len - WSA_CMSG_LEN(0)) : 0;
        must(WSASendMsg(flow->onward, &message, 0, &length, NULL, NULL) == 0, "send onwards");
    }
}
