/* A small redirect service, as one is written for Windows. This file compiles unchanged for Windows
 * with mingw-w64's own headers and for Linux with those of carnet-winsock:
 *
 *     x86_64-w64-mingw32-gcc -o service.exe service.c -lws2_32
 *     cc -o service service.c $(pkg-config --cflags --libs carnet-winsock)
 *
 * For each connection that it accepts it queries the redirect record and the context, sets the
 * record on a new socket, connects that to the original destination, and relays. One thread; select
 * says what can go on.
 */
#define FD_SETSIZE 512
#include <winsock2.h>
#include <ws2tcpip.h>
#include <mstcpip.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Not every version of the headers has these. */
#ifndef SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS
#define SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS _WSAIOW(IOC_VENDOR, 220)
#define SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT _WSAIOW(IOC_VENDOR, 221)
#define SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS _WSAIOW(IOC_VENDOR, 222)
#endif
#ifndef SO_ORIGINAL_DST
#define SO_ORIGINAL_DST 0x300F
#endif
/* What a query of a context answers where there is none (FWP_E_NOT_FOUND). */
#define NO_CONTEXT ((int)0x80320008)

/* Flows at a time: two sockets each, and the listeners. */
#define MOST_FLOWS ((FD_SETSIZE - 2) / 2)

struct blob {
    char *bytes;
    DWORD length;
};

/* One direction of a flow. */
struct way {
    SOCKET from, to;
    char buffer[32768];
    int begin, end;   /* what has been received and not sent yet */
    int from_ended;   /* nothing more will be received */
    int to_told;      /* and the other side knows */
};

struct flow {
    SOCKET accepted, onwards;
    int connecting;
    struct way there, back;
};

static struct flow *flows[MOST_FLOWS];
static int flow_count;

/* Whether an answer means "more room", with what it was said that the answer needs. */
static int wants_more(int error, DWORD needed)
{
    return error == ERROR_INSUFFICIENT_BUFFER || error == WSAEFAULT || error == WSAENOBUFS ||
        error == WSAEMSGSIZE || (error == WSAEINVAL && needed == 0);
}

/* Queries bytes of any length; gives 0 or the error. */
static int query(SOCKET accepted, DWORD code, struct blob *blob)
{
    DWORD room = 64;
    int attempt;

    for (attempt = 0; attempt < 10; attempt++) {
        DWORD needed = 0;
        char *bytes = realloc(blob->bytes, room);
        if (!bytes)
            return WSA_NOT_ENOUGH_MEMORY;
        blob->bytes = bytes;
        if (WSAIoctl(accepted, code, NULL, 0, bytes, room, &needed, NULL, NULL) == 0) {
            blob->length = needed;
            return 0;
        }
        if (!wants_more(WSAGetLastError(), needed))
            return WSAGetLastError();
        room = needed > room ? needed : 2 * room;
    }
    return WSAENOBUFS;
}

/* Starts the connection to where the accepted one wanted to go; gives 0 or the error. */
static int connect_onwards(struct flow *flow)
{
    struct blob records = {NULL, 0}, context = {NULL, 0};
    struct sockaddr_storage original;
    int length = sizeof original;
    DWORD nothing = 0;
    u_long on = 1;
    int error = query(flow->accepted, SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS, &records);

    if (!error) {
        error = query(flow->accepted, SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT, &context);
        if (error == NO_CONTEXT)
            error = 0;
    }
    if (!error && getsockopt(flow->accepted, SOL_SOCKET, SO_ORIGINAL_DST, (char *)&original,
                             &length) != 0)
        error = WSAGetLastError();
    if (!error) {
        flow->onwards = WSASocketW(original.ss_family, SOCK_STREAM, IPPROTO_TCP, NULL, 0,
                                   WSA_FLAG_OVERLAPPED);
        if (flow->onwards == INVALID_SOCKET)
            error = WSAGetLastError();
    }
    /* Before the connect, which is decided by what is set. */
    if (!error && WSAIoctl(flow->onwards, SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS, records.bytes,
                           records.length, NULL, 0, &nothing, NULL, NULL) != 0)
        error = WSAGetLastError();
    if (!error && ioctlsocket(flow->onwards, FIONBIO, &on) != 0)
        error = WSAGetLastError();
    if (!error && connect(flow->onwards, (struct sockaddr *)&original, length) != 0 &&
        WSAGetLastError() != WSAEWOULDBLOCK)
        error = WSAGetLastError();
    if (!error) {
        printf("flow: a record of %lu bytes, context \"%.*s\"\n", (unsigned long)records.length,
               (int)context.length, context.bytes ? context.bytes : "");
        flow->connecting = 1;
    }
    free(records.bytes);
    free(context.bytes);
    return error;
}

static void end(struct flow *flow)
{
    closesocket(flow->accepted);
    if (flow->onwards != INVALID_SOCKET)
        closesocket(flow->onwards);
    free(flow);
}

static void begin(SOCKET listener)
{
    struct flow *flow;
    u_long on = 1;
    int error;
    SOCKET accepted = accept(listener, NULL, NULL);

    if (accepted == INVALID_SOCKET)
        return;
    flow = calloc(1, sizeof *flow);
    if (!flow) {
        closesocket(accepted);
        return;
    }
    flow->accepted = accepted;
    flow->onwards = INVALID_SOCKET;
    error = ioctlsocket(accepted, FIONBIO, &on) != 0 ? WSAGetLastError() : connect_onwards(flow);
    if (error) {
        printf("ended: error %d (0x%x)\n", error, (unsigned)error);
        end(flow);
        return;
    }
    flow->there.from = flow->back.to = accepted;
    flow->there.to = flow->back.from = flow->onwards;
    flows[flow_count++] = flow;
}

/* Moves what can be moved; gives 0 when the direction has broken. */
static int move(struct way *way, int readable, int writable)
{
    if (readable && way->begin == way->end) {
        int length = recv(way->from, way->buffer, sizeof way->buffer, 0);
        if (length < 0 && WSAGetLastError() != WSAEWOULDBLOCK)
            return 0;
        way->begin = 0;
        way->end = length > 0 ? length : 0;
        way->from_ended = length == 0;
        writable = 1;
    }
    if (writable && way->begin < way->end) {
        int sent = send(way->to, way->buffer + way->begin, way->end - way->begin, 0);
        if (sent < 0 && WSAGetLastError() != WSAEWOULDBLOCK)
            return 0;
        way->begin += sent > 0 ? sent : 0;
    }
    if (way->from_ended && way->begin == way->end && !way->to_told) {
        shutdown(way->to, SD_SEND);
        way->to_told = 1;
    }
    return 1;
}

/* Lets a flow go on; gives 0 when it has ended. */
static int go_on(struct flow *flow, const fd_set *readable, const fd_set *writable,
                 const fd_set *failed)
{
    if (flow->connecting) {
        int error = 0, length = sizeof error;
        int refused = FD_ISSET(flow->onwards, failed);
        if (!refused && !FD_ISSET(flow->onwards, writable))
            return 1;
        if (getsockopt(flow->onwards, SOL_SOCKET, SO_ERROR, (char *)&error, &length) != 0)
            error = WSAGetLastError();
        if (refused || error) {
            printf("ended: error %d (0x%x)\n", error, (unsigned)error);
            return 0;
        }
        flow->connecting = 0;
    }
    if (!move(&flow->there, FD_ISSET(flow->accepted, readable), FD_ISSET(flow->onwards, writable)))
        return 0;
    if (!move(&flow->back, FD_ISSET(flow->onwards, readable), FD_ISSET(flow->accepted, writable)))
        return 0;
    return !flow->there.to_told || !flow->back.to_told;
}

static void watch(const struct way *way, fd_set *readable, fd_set *writable)
{
    if (way->begin < way->end)
        FD_SET(way->to, writable);
    else if (!way->from_ended)
        FD_SET(way->from, readable);
}

static SOCKET listen_on(struct sockaddr *address, int length)
{
    SOCKET listener = socket(address->sa_family, SOCK_STREAM, IPPROTO_TCP);

    if (listener == INVALID_SOCKET || bind(listener, address, length) != 0 ||
        listen(listener, SOMAXCONN) != 0) {
        fprintf(stderr, "cannot listen: error %d\n", WSAGetLastError());
        exit(1);
    }
    return listener;
}

int main(void)
{
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    SOCKET listeners[2];
    WSADATA data;
    int i;

    if (WSAStartup(MAKEWORD(2, 2), &data) != 0)
        return 1;
    memset(&v4, 0, sizeof v4);
    v4.sin_family = AF_INET;
    v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    memset(&v6, 0, sizeof v6);
    v6.sin6_family = AF_INET6;
    v6.sin6_addr.s6_addr[15] = 1;
    listeners[0] = listen_on((struct sockaddr *)&v4, sizeof v4);
    listeners[1] = listen_on((struct sockaddr *)&v6, sizeof v6);
    setvbuf(stdout, NULL, _IONBF, 0);
    puts("ready");

    for (;;) {
        fd_set readable, writable, failed;

        FD_ZERO(&readable);
        FD_ZERO(&writable);
        FD_ZERO(&failed);
        for (i = 0; i < 2 && flow_count < MOST_FLOWS; i++)
            FD_SET(listeners[i], &readable);
        for (i = 0; i < flow_count; i++) {
            if (flows[i]->connecting) {
                FD_SET(flows[i]->onwards, &writable);
                FD_SET(flows[i]->onwards, &failed);
            } else {
                watch(&flows[i]->there, &readable, &writable);
                watch(&flows[i]->back, &readable, &writable);
            }
        }
        if (select(0, &readable, &writable, &failed, NULL) == SOCKET_ERROR) {
            fprintf(stderr, "select: error %d\n", WSAGetLastError());
            return 1;
        }
        for (i = flow_count - 1; i >= 0; i--) {
            if (!go_on(flows[i], &readable, &writable, &failed)) {
                end(flows[i]);
                flows[i] = flows[--flow_count];
            }
        }
        for (i = 0; i < 2; i++) {
            if (FD_ISSET(listeners[i], &readable) && flow_count < MOST_FLOWS)
                begin(listeners[i]);
        }
    }
}
