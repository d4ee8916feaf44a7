/*
 * TCP/IP for Windows Sockets 2: IPv6 addresses and the names that come with them. inet_pton,
 * inet_ntop, getaddrinfo and freeaddrinfo are the C library's.
 *
 * Carnet, https://github.com/carnet-project/carnet; MIT or Apache-2.0.
 */
#ifndef CARNET_WINSOCK_WS2TCPIP_H
#define CARNET_WINSOCK_WS2TCPIP_H

#include "winsock2.h"

typedef struct in6_addr IN6_ADDR, *PIN6_ADDR, *LPIN6_ADDR;
typedef struct sockaddr_in6 SOCKADDR_IN6, *PSOCKADDR_IN6, *LPSOCKADDR_IN6;
typedef struct addrinfo ADDRINFOA, *PADDRINFOA;

#define InetPtonA inet_pton
#define InetNtopA inet_ntop

/*
 * Ancillary data of datagrams, and the options (a DWORD, 0 or 1) that ask for it; on UDP and raw
 * sockets only. Linux's own options with these numbers (IPV6_RECVPATHMTU, IPV6_AUTOFLOWLABEL) are
 * not reached through setsockopt and getsockopt of winsock2.h.
 */
#define IP_WFP_REDIRECT_RECORDS 60
#define IP_WFP_REDIRECT_CONTEXT 70
#define IPV6_WFP_REDIRECT_RECORDS 60
#define IPV6_WFP_REDIRECT_CONTEXT 70

#endif
