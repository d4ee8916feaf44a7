/* What the programs of rows have in common, on the library's own headers. */
#ifndef CARNET_CONTRACT_SUITE_H
#define CARNET_CONTRACT_SUITE_H

#include <winsock2.h>
#include <ws2tcpip.h>
#include <mstcpip.h>
#include <mswsock.h>
#include <ws2spi.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

#define QUERY_RECORDS SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS
#define QUERY_CONTEXT SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT
#define SET_RECORDS SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS

/* A value that nothing gives by itself. */
#define UNTOUCHED 0xdeadbeefu
/* Far longer than any row waits; what ends such an operation is what the row is about. */
#define LONG_MS 600000u
/* Long enough for what is expected, and bounded. */
#define PATIENCE_MS 30000u
#define MOST_RECORD 2048

/* Operations take at least this long before they touch the kernel, unless they are cancelled.
 * A hook of the library for its tests. */
void carnet_winsock_test_delay(unsigned milliseconds);

/* The two entry points. */
enum entry { BY_WSA, BY_WSP };
#define EACH_ENTRY(entry) (enum entry entry = BY_WSA; entry <= BY_WSP; entry++)

struct call {
    SOCKET s;
    DWORD code;
    void *in;
    DWORD in_size;
    void *out;
    DWORD out_size;
    DWORD *returned;
    WSAOVERLAPPED *overlapped;
    LPWSAOVERLAPPED_COMPLETION_ROUTINE routine;
};

/* The name of the calling thread, as providers have it. */
WSATHREADID own_thread(void);
/* Makes a call by one of the entry points; gives its result, and the error code of a failure. For
 * WSPIoctl also checks that the last error is left alone (S25, W48), and overwrites the structure
 * that names the thread as soon as the call has returned (S24). */
int make(enum entry entry, struct call call, int *error);
/* The same, where only the error code matters: 0 for success. */
int error_of(enum entry entry, struct call call);

/* Sockets for TCP over IPv4. */
SOCKET overlapped_socket(void);
SOCKET plain_socket(void);
/* A redirected connection that this service has accepted; its client stays until lab("close"). */
SOCKET redirected(void);
SOCKET redirected_v6(void);
/* The listener on which they arrive. */
SOCKET listener_v4(void);
unsigned short port_of(SOCKET listener);
/* The destination of all redirected connections over IPv4. */
struct sockaddr_in destination(void);
/* Queries a record without any overlapping. */
DWORD record_of(SOCKET accepted, unsigned char record[MOST_RECORD]);
/* A call that sets this record. */
struct call set_call(SOCKET s, unsigned char *record, DWORD length, DWORD *returned);
/* A call that queries into a buffer. */
struct call query_call(SOCKET s, DWORD code, void *out, DWORD size, DWORD *returned);
/* Whether the socket reaches the echo server: sends and receives some bytes. */
int echoes(SOCKET connected);

/* UDP. An address with its length. */
struct place {
    struct sockaddr_storage address;
    int length;
};
/* Of a server at the destination, see harness.h. */
struct place server(int number);
/* Of what the lab prints: an address, a port, and perhaps more. */
struct place place_of(const char *text);
int same_place(const struct place *a, const struct place *b);
/* A UDP socket, not bound. */
SOCKET datagrams(int family);
/* One that gets this service's flows, on the loopback address of its family, or on all addresses (those of
 * IPv6 include those of IPv4); with all that the datagrams may bring. */
SOCKET registered_datagrams(int family, int everywhere);
/* Turns one of the options 60 and 70 on or off. */
void want(SOCKET s, int level, int option, DWORD on);

/* What came with a datagram. */
struct datagram {
    char text[64];
    struct place from;
    DWORD flags;
    /* The objects: how many there were, at which level; their lengths, 0 for none. */
    int objects, level;
    DWORD record_length, context_length;
    unsigned char record[MOST_RECORD];
    char context[64];
};
/* Receives one, with so much room for the objects, which is at most 4096. */
struct datagram receive_in(SOCKET s, DWORD room, DWORD flags);
struct datagram receive(SOCKET s);
/* Sends a word, with a record if there is one: 0, or the error. */
int send_word(SOCKET s, const struct place *to, const char *word, const struct datagram *record);
/* Whether an answer of a server to this word comes. */
int is_answered(SOCKET s, const char *word);
/* The number of a flow whose datagrams come from there, as a socket that is connected there tells it. */
unsigned long long flow_from(const struct place *from);
/* Another place with this port. */
struct place at_port(struct place place, int port);
int port_at(const struct place *place);

/* An OVERLAPPED whose fields show whether they were touched. */
WSAOVERLAPPED fresh(WSAEVENT event);
int is_fresh(const WSAOVERLAPPED *overlapped);
/* Waits for the event of an operation. */
int signalled(WSAEVENT event, DWORD milliseconds);

/* A completion routine that keeps a journal. */
struct completion {
    DWORD error, bytes, flags;
    WSAOVERLAPPED *overlapped;
    unsigned long thread;
};
void CALLBACK note(DWORD error, DWORD bytes, LPWSAOVERLAPPED overlapped, DWORD flags);
/* Runs what is due in this thread, until there are so many entries or PATIENCE_MS have passed;
 * gives their number. The journal begins anew with forget(). */
int completions(int count);
extern struct completion journal[64];
void forget(void);

#endif
