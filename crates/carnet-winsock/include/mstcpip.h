/*
 * Microsoft's extensions for TCP/IP: the control codes of redirect services.
 *
 * Carnet, https://github.com/carnet-project/carnet; MIT or Apache-2.0.
 */
#ifndef CARNET_WINSOCK_MSTCPIP_H
#define CARNET_WINSOCK_MSTCPIP_H

#include "winsock2.h"

/* Out: the redirect record of an accepted, redirected connection; opaque bytes. */
#define SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS _WSAIOW(IOC_VENDOR, 220)
/* Out: the redirect context of an accepted, redirected connection, if there is one. */
#define SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT _WSAIOW(IOC_VENDOR, 221)
/* In: a redirect record, as it was queried, for a socket that is to be connected. */
#define SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS _WSAIOW(IOC_VENDOR, 222)
/* Out: a UINT64 that names the socket in the kernel: its cookie. */
#define SIO_QUERY_WFP_ALE_ENDPOINT_HANDLE _WSAIOR(IOC_VENDOR, 205)
/* In: struct tcp_keepalive. */
#define SIO_KEEPALIVE_VALS _WSAIOW(IOC_VENDOR, 4)

/* For getsockopt on an accepted, redirected connection: where it was going, as a sockaddr. */
#define SO_ORIGINAL_DST 0x300F
#define IP6T_SO_ORIGINAL_DST SO_ORIGINAL_DST

struct tcp_keepalive {
    ULONG onoff;
    /* Milliseconds of silence before the first probe, and between probes. */
    ULONG keepalivetime;
    ULONG keepaliveinterval;
};

#endif
